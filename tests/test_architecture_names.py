"""No code but the rows of the architectures knows one by its name: a new family is new rows, not new branches."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfsp.models.checkpoint import per_layer_class
from cfsp.models.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
ROWS = "cfsp/models/families/"
NAMES = {*FAMILIES, *(layout.architecture for row in FAMILIES.values() for layout in row.layouts)}
CLASSES = re.compile(rf"(Pruned)?({'|'.join(FAMILIES)})(ForCausalLM|Config|Model)", re.IGNORECASE)
OTHERS = {
    ("cfsp/models/gguf_tokenizer.py", "llama"): "a kind of tokenizer in GGUF files",
    ("cfsp/models/gguf_tokenizer.py", "hunyuan-dense"): "a pre-tokenizer in GGUF files",
    ("cfsp/models/gguf_tokenizer.py", "qwen35"): "a pre-tokenizer in GGUF files",
    ("exporters/onnx/companions.py", "llama"): "what GenAI calls every decoder of these graphs",
    ("exporters/onnx/companions.py", "lfm2"): "what GenAI calls decoders with a cache of short convolutions",
    ("runtime_bench/native/build.py", "llama"): "llama.cpp, the program",
}
"""Names of other things that are spelled alike."""


def constants(path: Path) -> Iterator[str]:
    """String constants of a module, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            yield node.value


def test_architectures_are_named_in_their_rows_alone() -> None:
    found = set()
    for package in ("cfsp", "exporters", "runtime_bench", "phoneready"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(ROWS):
                found |= {(name, text) for text in constants(path) if text in NAMES or CLASSES.search(text)}
    assert found == OTHERS.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_row_has_what_the_others_need(model_type: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(model_type)
    native = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    assert issubclass(per_layer_class(config), native)
    assert FAMILIES[model_type].layouts, "no layout of llama.cpp"

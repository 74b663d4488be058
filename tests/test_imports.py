"""The import direction between the packages, and what may not be imported at a module's top level."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("cfsp", "exporters", "runtime_bench", "phoneready")
OPTIONAL = {
    "llama_cpp",
    "datasets",
    "pyarrow",
    "peft",
    "accelerate",
    "lm_eval",
    "mlflow",
    "optuna",
    "playwright",
    "tomli_w",
}
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, those under `if TYPE_CHECKING` left out."""
    for node in tree.body:
        if isinstance(node, ast.If | ast.Try):
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                yield from node.body
            yield from node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    layer = path.relative_to(ROOT).parts[0]
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    names = list(imported(tree))
    if "remote_code" not in path.parts:  # copied into checkpoints, where no package surrounds it
        assert not [name for name in names if name.startswith(".")], "relative import"
    assert not above & {name.split(".")[0] for name in names}, "imports upward"
    at_import = {name.split(".")[0] for node in top_level(tree) for name in imported(node)}
    assert not OPTIONAL & at_import, "optional dependency imported at the top level"


def test_the_rules_catch_what_they_are_for() -> None:
    tree = ast.parse(
        "try:\n    import pyarrow\nexcept ImportError:\n    pass\ndef f():\n    import llama_cpp\n"
    )
    found = {name for node in top_level(tree) for name in imported(node)}
    assert found == {"pyarrow"}


def test_command_line_starts_without_torch() -> None:
    code = "import sys, phoneready.main; "
    code += "print(sorted({'torch', 'transformers', 'llama_cpp'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

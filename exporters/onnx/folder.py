"""An ONNX folder as its consumers want it: what lies beside the graphs.

config.json, generation_config.json     optimum, transformers.js
tokenizer.json, tokenizer_config.json, chat_template.jinja
genai_config.json                       ONNX Runtime GenAI
onnx/model<suffix>.onnx                 logits of every position: optimum, transformers.js, evaluation
onnx/model<suffix>_last.onnx            logits of the last position alone: GenAI, the benchmark
onnx/model<suffix>.onnx_data            the weights of both
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.files import read_json, write_json
from exporters.onnx.variants import Variant

__all__ = ["GRAPHS", "find_graph", "is_onnx", "write_companions"]

GRAPHS = "onnx"
"""Folder of the graphs."""

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE*",
)
# Of the checkpoint's config.json: code that does not come along, and keys that name torch's weights.
_DROPPED = ("auto_map", "torch_dtype", "dtype", "quantization_config")


def is_onnx(reference: str) -> bool:
    """Whether a reference is an .onnx file, or a folder that `export_onnx` made for a variant."""
    path = Path(reference)
    return path.suffix == ".onnx" or (path / GRAPHS).is_dir()


def find_graph(reference: str, *, last_logits: bool = False) -> Path:
    """The graph of a reference: the file itself, or of a variant's folder the one with the logits that are wanted.

    Raises:
        InputError: A folder without a graph, or with several.
    """
    path = Path(reference)
    if path.suffix == ".onnx":
        return path
    graphs = [p for p in (path / GRAPHS).glob("*.onnx") if p.stem.endswith("_last") == last_logits]
    if len(graphs) != 1:
        raise InputError(
            f"{path} has {len(graphs)} such graphs under {GRAPHS}",
            field="model",
            allowed="name the .onnx file",
        )
    return graphs[0]


def write_companions(
    checkpoint: Path, folder: Path, variant: Variant, config: Any, *, context_length: int
) -> None:
    """Write all of a variant's folder but the graphs.

    Args:
        checkpoint: Hugging Face folder.
        folder: The variant's folder, which exists.
        variant: What the graphs are stored as.
        config: The model's transformers config.
        context_length: Most tokens of a text.
    """
    for pattern in _COPIED:
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    template = folder / "chat_template.jinja"
    if template.is_file():
        # transformers.js knows the template from here alone.
        file = folder / "tokenizer_config.json"
        write_json(file, read_json(file) | {"chat_template": template.read_text(encoding="utf-8")})
    write_json(folder / "config.json", _config(read_json(checkpoint / "config.json"), variant))
    write_json(folder / "genai_config.json", _genai_config(variant, config, context_length))


def _config(stored: dict[str, Any], variant: Variant) -> dict[str, Any]:
    kept = {key: value for key, value in stored.items() if key not in _DROPPED}
    web: dict[str, Any] = {"use_external_data_format": {f"{variant.stem}.onnx": 1}}
    if variant.dtype == "float16":
        web["kv_cache_dtype"] = {"fp16": "float16"}
    return kept | {"transformers.js_config": web}


def _genai_config(variant: Variant, config: Any, context_length: int) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ends = config.eos_token_id
    pad = config.pad_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{GRAPHS}/{variant.stem}_last.onnx",
        "head_size": head_dim,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    return {
        "model": {
            # GenAI has one decoder for all of these graphs; the name only chooses its chat heuristics.
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": context_length,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": first_end if pad is None else pad,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": context_length,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }

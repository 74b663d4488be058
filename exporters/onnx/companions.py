"""An ONNX folder as its consumers want it: what lies beside the graphs.

config.json, generation_config.json     optimum, transformers.js
tokenizer.json, tokenizer_config.json, chat_template.jinja
genai_config.json                       ONNX Runtime GenAI; not for a portable graph
onnx/model<suffix>.onnx                 logits of every position: optimum, transformers.js, evaluation
onnx/model<suffix>_last.onnx            logits of the last position only: GenAI, the benchmark; the same
onnx/model<suffix>.onnx_data            the weights of both
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfsp.child_process import child_environment, python_module
from cfsp.errors import InputError
from cfsp.files import write_json
from cfsp.models.checkpoint import copy_notices, save_tokenizer
from cfsp.models.config_file import PER_BLOCK_LISTS
from cfsp.reading import one_line, read_json
from cfsp.text.conversations import CONVERSATIONS, Conversation
from exporters.job import Job
from exporters.onnx.folder import GENAI_CONFIG, GRAPHS
from exporters.onnx.variants import Variant
from exporters.proof import ReadChats, read_chats

_SECONDS = 300.0  # for GenAI to answer
# Of the checkpoint's config.json: code that does not come along, and keys that name torch's weights.
_DROPPED = ("auto_map", "torch_dtype", "dtype", "quantization_config")


def write_companions(job: Job, variant: Variant, folder: Path) -> ReadChats:
    """Write all of a variant's folder, which exists, but the graphs; returns what GenAI makes of chats with it."""
    checkpoint, tokenizer, config = job.checkpoint, job.tokenizer, job.config
    save_tokenizer(tokenizer, folder)
    if tokenizer.chat_template:
        # transformers.js reads the template only from here.
        file = folder / "tokenizer_config.json"
        write_json(file, read_json(file) | {"chat_template": tokenizer.chat_template})
    if (checkpoint / "generation_config.json").is_file():
        shutil.copy(checkpoint / "generation_config.json", folder)
    copy_notices(checkpoint, folder)
    stored: dict[str, Any] = read_json(checkpoint / "config.json")
    # Consumers take the numbers of hidden layers and heads for those of caches. Heads are the most of a block; the
    # graph has each cache's own. num_attention_heads stays, as some consumers divide hidden_size by it.
    silent, kv_heads = config.shape.without_attention, max(config.kv_heads)
    fewer = kv_heads * config.heads_per_group != stored["num_attention_heads"]
    if silent or fewer:
        stored.pop("per_layer_config", None)
        if fewer:
            stored["num_key_value_heads"] = kv_heads
        for key in PER_BLOCK_LISTS:
            if each := stored.get(key):
                stored[key] = [entry for index, entry in enumerate(each) if index not in silent]
        stored["num_hidden_layers"] = config.num_hidden_layers - len(silent)
    if config.kept_of_texts:
        # Which a folder may say in another way, that only transformers knows.
        stored["layer_types"] = list(job.model_config.layer_types)
    web: dict[str, Any] = {"use_external_data_format": {f"{variant.stem}.onnx": 1}}
    if variant.dtype == "float16":
        web["kv_cache_dtype"] = {"fp16": "float16"}
    kept = {key: value for key, value in stored.items() if key not in _DROPPED}
    write_json(folder / "config.json", kept | {"transformers.js_config": web})
    if variant.portable:
        return ReadChats()
    write_json(folder / GENAI_CONFIG, _genai_config(job, variant, stored))
    return _genai_chats(job, folder)


def _genai_config(job: Job, variant: Variant, stored: Mapping[str, Any]) -> dict[str, Any]:
    config, ends, kv_heads = job.model_config, sorted(job.stops), max(job.config.kv_heads)
    special = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends or None,
        "pad_token_id": next(iter(ends), None) if config.pad_token_id is None else config.pad_token_id,
    }
    inputs = {name: name for name in ("input_ids", "attention_mask")}
    outputs = {"logits": "logits"}
    for part in ("key", "value"):
        inputs[f"past_{part}_names"] = f"past_key_values.%d.{part}"
        outputs[f"present_{part}_names"] = f"present.%d.{part}"
    for kind in job.config.kept_of_texts:
        inputs[f"past_{kind}_names"] = f"past_{kind}.%d"
        outputs[f"present_{kind}_names"] = f"present_{kind}.%d"
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{GRAPHS}/{variant.stem}_last.onnx",
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": kv_heads * job.config.heads_per_group,
        "num_hidden_layers": stored["num_hidden_layers"],
        "num_key_value_heads": kv_heads,
    }
    # GenAI has one decoder for all graphs but LFM 2's, the only one with caches of convolutions; the name only chooses
    # its chat heuristics.
    kind = "llama"
    if job.config.convolution_length:
        kind = "lfm2"
        decoder |= {"layer_types": stored["layer_types"], "conv_cache_size": job.config.convolution_length}
    return {
        "model": {
            "type": kind,
            "vocab_size": config.vocab_size,
            "context_length": job.context_length,
            "decoder": decoder,
            # GenAI refuses null; what a model does not have is left out.
            **{key: value for key, value in special.items() if value is not None},
        },
        "search": {
            "do_sample": False,
            "max_length": job.context_length,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _genai_chats(job: Job, folder: Path) -> ReadChats:
    """What ONNX Runtime GenAI makes of chats with a folder's tokenizer, template and stop tokens; nothing if it is not
    installed. No weights are read."""
    if not (folder / GENAI_CONFIG).is_file() or importlib.util.find_spec("onnxruntime_genai") is None:
        return ReadChats()
    request = json.dumps([[list(c.messages), list(c.tools) or None, c.to_be_answered] for c in CONVERSATIONS])
    found: Any = {}
    try:
        result = subprocess.run(
            [*python_module("exporters.onnx.genai_worker"), str(folder)],
            input=request,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=child_environment(),
            timeout=_SECONDS,
        )
        lines = result.stdout.splitlines()
        if result.returncode or not lines:
            found = {"error": f"it ended with status {result.returncode}"}
        else:
            found = json.loads(lines[-1])
            if not isinstance(found, dict):
                raise ValueError
    except subprocess.TimeoutExpired:
        found = {"error": f"it has not answered within {_SECONDS:g} s"}
    except ValueError:
        found = {"error": f"its answer cannot be read: {lines[-1]}"}
    if "error" in found:
        return ReadChats(
            warnings=(f"GenAI cannot read the folder's tokenizer: {one_line(found['error'], 160)}",)
        )
    answers = dict(zip((one.name for one in CONVERSATIONS), found["read"], strict=True))

    def read(conversation: Conversation, _: str) -> list[int]:
        answer = answers[conversation.name]
        if "error" in answer:
            raise InputError(answer["error"])
        ids: list[int] = answer["ids"]
        return ids

    return read_chats("GenAI", job.tokenizer, job.stops, read, set(found["stops"]).__contains__)

"""What a model can become: which parts of it can go, which files hold it, and what stands in the way.

Weights are not read. What a file can hold is asked of what would write it, for the shape that the model would have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import InputError, PhonereadyError
from cfsp.models.config_file import read_model_config
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import config_from_gguf
from cfsp.models.reference import config_from_settings, find_model, folded_config, is_folded, load_tokenizer
from cfsp.models.shape import BlockShape, ModelShape
from cfsp.models.token_trees import token_trees
from cfsp.models.weights import is_quantized, model_class
from cfsp.text.conversations import CONVERSATIONS, rendered, turn_end
from exporters.checkpoint_reader import ModelConfig, open_tensors, read_config
from exporters.gguf.architecture import ChosenLayout, choose_layout, rope_metadata
from exporters.onnx.layers import check_blocks, check_rope
from exporters.onnx.portable import check_portable
from phoneready.console import Check


def examine_model(reference: str) -> list[Check]:
    config, stored = _config(Path(find_model(reference).path or ""))
    tokenizer, spec, blocks = load_tokenizer(reference), config.spec, config.shape.blocks
    has_graph = spec.not_in_graphs is None
    checks = [Check("model", "ok", _described(config))]

    def in_gguf(changed: ModelConfig) -> ChosenLayout:
        """What of llama.cpp holds the model in another configuration; raises InputError if none does."""
        chosen = choose_layout(changed, stored)
        rope_metadata(chosen.config)
        return chosen

    def held(left: Sequence[BlockShape], option: str) -> str:
        """What holds the model with these blocks; ONNX graphs hold all, but of few model types none."""
        try:
            changed = config.with_shape(ModelShape(config.vocab_size, tuple(left)))
            held = f"GGUF as {in_gguf(changed).layout.architecture}"
            return f"{held}, ONNX ({option})" if has_graph else f"{held} ({option})"
        except InputError as error:
            alone = f"ONNX alone ({option}): " if has_graph else ""
            raise InputError(f"{alone}{error}") from error

    def without_last(**own: Any) -> tuple[BlockShape, ...]:
        """The blocks, of which the last, which may lose anything, is another."""
        return (*blocks[:-1], replace(blocks[-1], **own))

    def channels() -> str:
        width = max(1, config.shape.ffn_widths[-1] // 2)
        shape = ModelShape(config.vocab_size, without_last(ffn_width=width))
        try:
            chosen = choose_layout(replace(config, shape=shape), stored)
        except InputError as error:
            choose_layout(config, stored)  # if only the widths stand in the way
            others = ", ONNX with any" if has_graph else ""
            raise InputError(
                f"GGUF with one width for all blocks (--set uniform_width=true, chosen where it is needed){others}"
            ) from error
        graph = ", ONNX" if has_graph else ""
        return f"GGUF as {chosen.layout.architecture}{graph} (--prune-ratio)"

    def vocabulary() -> str:
        return f"{len(token_trees(tokenizer).parts)} of {len(tokenizer)} tokens can go (--vocabulary)"

    def groups() -> str:
        if reason := spec.groups_stay:
            raise InputError(reason)
        if max(config.kv_heads) < 2:
            raise InputError("each block has one key-value head, and it stays")
        return held(without_last(kv_groups=1), "--kv-groups")

    def attentions() -> str:
        if reason := spec.attentions_stay:
            raise InputError(reason)
        if len(blocks) < 2:
            raise InputError("the first block's attention stays")
        return held(without_last(kv_groups=0, has_attention=False), "--attentions")

    def whole_blocks() -> str:
        if reason := spec.blocks_stay:
            raise InputError(reason)
        if len(blocks) < 2:
            raise InputError("one block stays")
        middle = len(blocks) // 2
        return held((*blocks[:middle], *blocks[middle + 1 :]), "--blocks")

    def gguf() -> str:
        chosen = in_gguf(config)
        cut = chosen.context_length < config.max_position_embeddings
        context = f", with a context of {chosen.context_length}: it has no windows" if cut else ""
        return chosen.layout.architecture + context

    def onnx() -> str:
        check_blocks(spec)
        check_rope((config.rope_scaling or {}).get("rope_type", "default"))
        cut = config.steady_context < config.max_position_embeddings
        context = f", with a context of {config.steady_context}: its rope changes beyond it" if cut else ""
        return f"fused graphs; all variants but portable{context}"

    def portable() -> str:
        check_blocks(spec)
        check_portable(config.shape)
        return "by optimum"

    def chats() -> str:
        if not tokenizer.chat_template:
            raise InputError("no chat template: chats cannot be read, answers are continuations")
        texts, end = rendered(tokenizer), turn_end(tokenizer)
        refused = [one.name for one in CONVERSATIONS if one.name not in texts]
        asking = [one for one in CONVERSATIONS if one.tools]
        shown = any(one.tools[0]["function"]["name"] in texts.get(one.name, "") for one in asking)
        tools = "and shows tools" if shown else "and knows no tools"
        without = f"; refuses a chat with {', '.join(refused)}" if refused else ""
        ends = "no token of its own" if end is None else tokenizer.convert_ids_to_tokens(end)
        return f"a chat template that ends an answer with {ends} {tools}{without}"

    for name, find in (
        ("remove: FFN channels", channels),
        ("remove: vocabulary", vocabulary),
        ("remove: key-value groups", groups),
        ("remove: attentions", attentions),
        ("remove: blocks", whole_blocks),
        ("GGUF", gguf),
        ("ONNX", onnx),
        ("ONNX, portable", portable),
        ("chats", chats),
    ):
        try:
            checks.append(Check(name, "ok", find()))
        except PhonereadyError as error:
            checks.append(Check(name, "warning", str(error)))
    return checks


def _config(path: Path) -> tuple[ModelConfig, frozenset[str]]:
    """What a folder, or a GGUF file as a folder, says of exports; names of its tensors."""
    if path.is_dir():
        settings = read_model_config(path)
    if path.is_dir() and not is_folded(path):
        with open_tensors(path) as tensors:
            for name, handle in tensors.handles.items():
                if "8" in (kind := handle.get_slice(name).get_dtype()):  # I8, U8, F8_E4M3
                    raise is_quantized(str(path), name, kind)
            return read_config(path), frozenset(tensors.handles)
    config = (
        folded_config(config_from_settings(settings, str(path)))
        if path.is_dir()
        else config_from_gguf(read_gguf(path))
    )
    with torch.device("meta"):
        names = frozenset(model_class(config)(config).state_dict())
    with tempfile.TemporaryDirectory(prefix="phoneready-config-") as folder:
        config.save_pretrained(folder)
        return read_config(Path(folder)), names


def _described(config: ModelConfig) -> str:
    def spanned(numbers: Sequence[int]) -> str:
        low, high = min(numbers), max(numbers)
        return str(low) if low == high else f"{low} to {high}"

    attending = [n for n in config.kv_heads if n]
    keyless, mixer = sum(block.is_keyless for block in config.shape.blocks), config.spec.mixer
    heads = attending if keyless else config.kv_heads
    instead = mixer.name if mixer else "those of another block"
    where = f" in {len(attending)} blocks, {instead} in {keyless}" if keyless else ""
    parts = [
        f"{config.model_type}: {config.num_hidden_layers} blocks of {config.hidden_size}",
        f"FFNs of {spanned(config.shape.ffn_widths)}",
        f"{spanned(heads)} key-value heads, each read by {config.heads_per_group}{where}",
        f"{config.vocab_size} tokens",
        f"context {config.max_position_embeddings}",
    ]
    if config.narrowest is not None:
        windowed = sum(window is not None for window in config.windows)
        parts.append(f"a window of {config.narrowest} in {windowed} blocks")
    return ", ".join(parts)

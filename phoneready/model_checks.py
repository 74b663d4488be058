"""What a model can become: which parts of it can go, which files hold it, and what stands in the way.

Weights are not read. What a file can hold is asked of what would write it, for the shape that the model would have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import InputError, PhonereadyError
from cfsp.models.config_file import read_model_config
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import config_from_gguf
from cfsp.models.hf_folder import config_from_settings, folded_config, is_folded
from cfsp.models.reference import find_model, load_tokenizer
from cfsp.models.shape import BlockShape, ModelShape
from cfsp.models.token_trees import token_trees
from cfsp.models.weights import model_class
from cfsp.text.conversations import CONVERSATIONS, rendered, shows_tools, turn_end
from exporters.checkpoint_reader import ModelConfig, open_tensors, read_config
from exporters.gguf.architecture import ChosenLayout, choose_layout
from exporters.gguf.rope import rope_metadata
from exporters.onnx.portable import check_portable
from exporters.onnx.weights import check_blocks, check_rope
from phoneready.console import Check


@dataclass(frozen=True)
class _Model:
    """What is known of a model without its weights.

    Attributes:
        config: Of its exports.
        stored: Names of its tensors.
        tokenizer: A fast tokenizer.
    """

    config: ModelConfig
    stored: frozenset[str]
    tokenizer: Any

    @property
    def has_graph(self) -> bool:
        """Whether ONNX graphs hold models of its type."""
        return self.config.spec.not_in_graphs is None

    def in_gguf(self, config: ModelConfig | None = None) -> ChosenLayout:
        """What of llama.cpp holds it, or a model of its type with another configuration.

        Raises:
            InputError: None does.
        """
        chosen = choose_layout(config or self.config, self.stored)
        rope_metadata(chosen.config)
        if chosen.padded_width is not None:
            raise InputError(f"llama.cpp's {chosen.layout.architecture} takes one width for all blocks")
        return chosen


def examine_model(reference: str) -> list[Check]:
    """All checks of a model, in the order shown.

    Raises:
        InputError: The reference leads nowhere, or to no model of a known type.
    """
    model = _read(reference)
    return [_describe(model), *(_check(name, find, model) for name, find in _CHECKS.items())]


def _read(reference: str) -> _Model:
    path = Path(find_model(reference).path or "")
    config, stored = _config(path)
    return _Model(config, stored, load_tokenizer(reference))


def _config(path: Path) -> tuple[ModelConfig, frozenset[str]]:
    """What a folder, or a GGUF file as a folder, says of exports; names of its tensors."""
    if path.is_dir():
        settings = read_model_config(path)
    if path.is_dir() and not is_folded(path):
        with open_tensors(path) as tensors:
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


def _describe(model: _Model) -> Check:
    config = model.config
    parts = [
        f"{config.model_type}: {config.num_hidden_layers} blocks of {config.hidden_size}",
        f"FFNs of {_range(config.shape.ffn_widths)}",
        _heads(config),
        f"{config.vocab_size} tokens",
        f"context {config.max_position_embeddings}",
    ]
    if config.narrowest is not None:
        windowed = sum(window is not None for window in config.windows)
        parts.append(f"a window of {config.narrowest} in {windowed} blocks")
    return Check("model", "ok", ", ".join(parts))


def _heads(config: ModelConfig) -> str:
    attending = [n for n in config.kv_heads if n]
    keyless, mixer = sum(block.is_keyless for block in config.shape.blocks), config.spec.mixer
    heads = attending if keyless else config.kv_heads
    instead = mixer.name if mixer else "those of another block"
    where = f" in {len(attending)} blocks, {instead} in {keyless}" if keyless else ""
    return f"{_range(heads)} key-value heads, each read by {config.heads_per_group}{where}"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _check(name: str, find: Callable[[_Model], str], model: _Model) -> Check:
    try:
        return Check(name, "ok", find(model))
    except PhonereadyError as error:
        return Check(name, "warning", str(error))


def _vocabulary(model: _Model) -> str:
    trees = token_trees(model.tokenizer)
    return f"{len(trees.parts)} of {len(model.tokenizer)} tokens can go (--vocabulary)"


def _of_blocks(model: _Model, blocks: Sequence[BlockShape], option: str) -> str:
    """What holds the model with these blocks; ONNX graphs hold all, but of few model types none."""
    config = model.config
    left = config.with_shape(ModelShape(config.vocab_size, tuple(blocks)))
    try:
        held = f"GGUF as {model.in_gguf(left).layout.architecture}"
        return f"{held}, ONNX ({option})" if model.has_graph else f"{held} ({option})"
    except InputError as error:
        alone = f"ONNX alone ({option}): " if model.has_graph else ""
        raise InputError(f"{alone}{error}") from error


def _with_last(model: _Model, **own: Any) -> tuple[BlockShape, ...]:
    """The blocks, of which the last, which may lose anything, is another."""
    *others, last = model.config.shape.blocks
    return (*others, replace(last, **own))


def _changed(model: _Model, option: str, **own: Any) -> str:
    return _of_blocks(model, _with_last(model, **own), option)


def _channels(model: _Model) -> str:
    width = max(1, model.config.shape.ffn_widths[-1] // 2)
    shape = ModelShape(model.config.vocab_size, _with_last(model, ffn_width=width))
    chosen = choose_layout(replace(model.config, shape=shape), model.stored)
    if chosen.padded_width is not None:
        others = ", ONNX with any" if model.has_graph else ""
        raise InputError(f"GGUF with one width for all blocks (--uniform, chosen where it is needed){others}")
    graph = ", ONNX" if model.has_graph else ""
    return f"GGUF as {chosen.layout.architecture}{graph} (--prune-ratio)"


def _groups(model: _Model) -> str:
    if reason := model.config.spec.groups_stay:
        raise InputError(reason)
    if max(model.config.kv_heads) < 2:
        raise InputError("each block has one key-value head, and it stays")
    return _changed(model, "--kv-groups", kv_groups=1)


def _attentions(model: _Model) -> str:
    if reason := model.config.spec.attentions_stay:
        raise InputError(reason)
    if model.config.num_hidden_layers < 2:
        raise InputError("the first block's attention stays")
    return _changed(model, "--attentions", kv_groups=0, has_attention=False)


def _blocks(model: _Model) -> str:
    blocks = model.config.shape.blocks
    if reason := model.config.spec.blocks_stay:
        raise InputError(reason)
    if len(blocks) < 2:
        raise InputError("one block stays")
    middle = len(blocks) // 2
    return _of_blocks(model, (*blocks[:middle], *blocks[middle + 1 :]), "--blocks")


def _gguf(model: _Model) -> str:
    chosen = model.in_gguf()
    cut = chosen.context_length < model.config.max_position_embeddings
    context = f", with a context of {chosen.context_length}: it has no windows" if cut else ""
    return chosen.layout.architecture + context


def _onnx(model: _Model) -> str:
    check_blocks(model.config.spec)
    check_rope((model.config.rope_scaling or {}).get("rope_type", "default"))
    config = model.config
    cut = config.steady_context < config.max_position_embeddings
    context = f", with a context of {config.steady_context}: its rope changes beyond it" if cut else ""
    return f"fused graphs; all variants but portable{context}"


def _portable(model: _Model) -> str:
    check_blocks(model.config.spec)
    check_portable(model.config.shape)
    return "by optimum"


def _chats(model: _Model) -> str:
    if not model.tokenizer.chat_template:
        raise InputError("no chat template: chats cannot be read, answers are continuations")
    texts, end = rendered(model.tokenizer), turn_end(model.tokenizer)
    refused = [one.name for one in CONVERSATIONS if one.name not in texts]
    tools = "and shows tools" if shows_tools(texts) else "and knows no tools"
    without = f"; refuses a chat with {', '.join(refused)}" if refused else ""
    ends = "no token of its own" if end is None else model.tokenizer.convert_ids_to_tokens(end)
    return f"a chat template that ends an answer with {ends} {tools}{without}"


_CHECKS: dict[str, Callable[[_Model], str]] = {
    "remove: FFN channels": _channels,
    "remove: vocabulary": _vocabulary,
    "remove: key-value groups": _groups,
    "remove: attentions": _attentions,
    "remove: blocks": _blocks,
    "GGUF": _gguf,
    "ONNX": _onnx,
    "ONNX, portable": _portable,
    "chats": _chats,
}

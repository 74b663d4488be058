"""The shape of a decoder: how large its vocabulary is, and what each of its blocks is made of.

A plan decides one, a checkpoint states it, exporters build files of it, records keep it. Today only the FFN widths of
a pruned model differ from its dense model's; `require_only_widths_vary` refuses every other difference where files are
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from cfsp.errors import InputError
from cfsp.validation import check_kinds, kinds


@dataclass(frozen=True)
class BlockShape:
    """What one decoder block is made of.

    Attributes:
        origin: Which block of the dense model it was.
        ffn_width: Channels of its FFN (intermediate_size).
        kv_groups: Its key-value heads (num_key_value_heads); None where a record does not say.
        has_attention: Whether it attends.
        has_ffn: Whether it has an FFN.
    """

    origin: int
    ffn_width: int
    kv_groups: int | None = None
    has_attention: bool = True
    has_ffn: bool = True


@dataclass(frozen=True)
class ModelShape:
    """What can differ between a pruned model and its dense model.

    Attributes:
        vocab_size: Tokens; None where a record does not say.
        blocks: First to last.
    """

    vocab_size: int | None
    blocks: tuple[BlockShape, ...]

    @classmethod
    def of_ffn_widths(cls, widths: Sequence[int]) -> ModelShape:
        """What is known of a model of which only the FFN widths are stated."""
        return cls(None, tuple(BlockShape(origin, width) for origin, width in enumerate(widths)))

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """FFN channels of every block, first to last."""
        return tuple(block.ffn_width for block in self.blocks)

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks are alike, so that one value for all describes them."""
        return len({replace(block, origin=0) for block in self.blocks}) <= 1

    def with_ffn_widths(self, widths: Sequence[int]) -> ModelShape:
        """The same model with other FFN widths, one a block."""
        blocks = zip(self.blocks, widths, strict=True)
        return replace(self, blocks=tuple(replace(block, ffn_width=width) for block, width in blocks))

    def agrees_with(self, whole: ModelShape) -> bool:
        """Whether it says nothing that `whole` contradicts; what it does not say is no contradiction."""
        if len(self.blocks) != len(whole.blocks):
            return False
        known = self if self.vocab_size is not None else replace(self, vocab_size=whole.vocab_size)
        blocks = (
            mine if mine.kv_groups is not None else replace(mine, kv_groups=theirs.kv_groups)
            for mine, theirs in zip(self.blocks, whole.blocks, strict=True)
        )
        return replace(known, blocks=tuple(blocks)) == whole


_PER_BLOCK = MappingProxyType({"intermediate_size": "ffn_width", "num_key_value_heads": "kv_groups"})
"""Hugging Face's name of what a block may have of its own -> ours."""
_KINDS = kinds(**dict.fromkeys(_PER_BLOCK, Annotated[int, Field(ge=1)]))


def shape_from_config(config: Mapping[str, Any], per_layer: Any, where: str) -> ModelShape:
    """The shape that a config.json states.

    Args:
        config: Its keys, with Hugging Face's defaults filled in.
        per_layer: Its `per_layer_config`: index of a block to the keys in which that block differs.
        where: File named in errors.

    Raises:
        InputError: A malformed `per_layer_config`, or one with a key that no block can have of its own.
    """
    count = config["num_hidden_layers"]
    try:
        given = {int(index): dict(own) for index, own in (per_layer or {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: malformed per_layer_config: {error}") from error
    if any(not 0 <= index < count for index in given):
        raise InputError(
            f"{where}: per_layer_config names blocks that do not exist: num_hidden_layers is {count}"
        )
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    plain = {"intermediate_size": config["intermediate_size"], "num_key_value_heads": heads}
    blocks = []
    for index in range(count):
        own = {key: value for key, value in given.get(index, {}).items() if value != config.get(key)}
        unknown = sorted(own.keys() - _PER_BLOCK.keys())
        if unknown:
            raise InputError(
                f"{where}: per_layer_config of block {index}",
                field=unknown[0],
                value=own[unknown[0]],
                allowed=f"the same in all blocks; only {', '.join(_PER_BLOCK)} may differ",
            )
        check_kinds(own, _KINDS, f"{where}: malformed per_layer_config: block {index}")
        blocks.append(BlockShape(index, **{ours: (plain | own)[key] for key, ours in _PER_BLOCK.items()}))
    return ModelShape(config["vocab_size"], tuple(blocks))


def require_only_widths_vary(shape: ModelShape, where: str) -> None:
    """Raise InputError for a shape that differs from its dense model's in more than FFN widths.

    No file format is written for such models yet, and a file of the wrong shape would be worse than none.
    """
    heads = shape.blocks[0].kv_groups if shape.blocks else None
    for index, block in enumerate(shape.blocks):
        if replace(block, ffn_width=0) != BlockShape(index, 0, heads):
            raise InputError(
                f"{where}: block {index} differs from the dense model's in more than its FFN width, "
                "which cannot be loaded or exported yet"
            )

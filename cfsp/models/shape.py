"""The shape of a decoder: its vocabulary's size, and what each of its blocks is made of.

A plan decides one, a checkpoint states it, exporters build files of it, records keep it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cfsp.errors import InputError


@dataclass(frozen=True)
class BlockShape:
    """What one decoder block is made of."""

    origin: int  # which block of the dense model it was
    ffn_width: int  # intermediate_size
    # num_key_value_heads, each with as many query heads as in every other block; 0 without attention or without keys of
    # its own; None if a record does not say.
    kv_groups: int | None = None
    has_attention: bool = True  # or another mixer in its place
    has_ffn: bool = True

    @property
    def is_keyless(self) -> bool:
        """Whether it mixes tokens without keys of its own: by another mixer, or another block's keys."""
        return self.has_attention and self.kv_groups == 0


@dataclass(frozen=True)
class ModelShape:
    """What can differ between a pruned model and its dense model."""

    vocab_size: int | None  # None if a record does not say
    blocks: tuple[BlockShape, ...]  # first to last

    @classmethod
    def of_ffn_widths(cls, widths: Sequence[int]) -> ModelShape:
        """A model of which only the FFN widths are stated."""
        return cls(None, tuple(BlockShape(origin, width) for origin, width in enumerate(widths)))

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """FFN channels of every block."""
        return tuple(block.ffn_width for block in self.blocks)

    @property
    def without_attention(self) -> tuple[int, ...]:
        """Indices of blocks without attention."""
        return tuple(index for index, block in enumerate(self.blocks) if not block.has_attention)

    @property
    def has_equal_heads(self) -> bool:
        """Whether all blocks that attend have as many key-value groups."""
        attending = (block for block in self.blocks if block.has_attention and not block.is_keyless)
        return len({block.kv_groups for block in attending}) <= 1

    @property
    def most_kv_groups(self) -> int:
        """Of any block."""
        return max(block.kv_groups or 0 for block in self.blocks)

    @property
    def is_uniform(self) -> bool:
        """Whether one value describes all blocks; which have no keys is known elsewhere."""
        kinds = {(block.ffn_width, block.has_attention, block.has_ffn) for block in self.blocks}
        return len(kinds) <= 1 and self.has_equal_heads

    def with_ffn_widths(self, widths: Sequence[int]) -> ModelShape:
        """The same model with other FFN widths, one a block."""
        blocks = zip(self.blocks, widths, strict=True)
        return replace(self, blocks=tuple(replace(block, ffn_width=width) for block, width in blocks))

    def with_kv_groups(self, counts: Sequence[int]) -> ModelShape:
        """The same model with other numbers of key-value groups, one a block; 0 is no attention."""
        blocks = zip(self.blocks, counts, strict=True)
        own = (replace(block, kv_groups=n, has_attention=n > 0 or block.is_keyless) for block, n in blocks)
        return replace(self, blocks=tuple(own))

    def without(self, blocks: Collection[int] = (), attentions: Collection[int] = ()) -> ModelShape:
        """The same model without whole blocks, and without the attention of others; both by their origins."""
        stay = (block for block in self.blocks if block.origin not in blocks)
        own = (
            replace(block, kv_groups=0, has_attention=False) if block.origin in attentions else block
            for block in stay
        )
        return replace(self, blocks=tuple(own))

    def with_origins(self, other: ModelShape) -> ModelShape:
        """The same model with the origins that another record of it states; weights do not say them."""
        blocks = zip(self.blocks, other.blocks, strict=True)
        return replace(self, blocks=tuple(replace(mine, origin=theirs.origin) for mine, theirs in blocks))

    def agrees_with(self, whole: ModelShape) -> bool:
        """Whether it says nothing that `whole` contradicts; origins count only by their order."""
        origins = [block.origin for block in self.blocks]
        if len(origins) != len(whole.blocks) or origins != sorted(set(origins)):
            return False
        known = self if self.vocab_size is not None else replace(self, vocab_size=whole.vocab_size)
        blocks = (
            mine if mine.kv_groups is not None else replace(mine, kv_groups=theirs.kv_groups)
            for mine, theirs in zip(self.blocks, whole.blocks, strict=True)
        )
        return replace(known, blocks=tuple(blocks)).with_origins(whole) == whole


def require_supported(shape: ModelShape, where: str, keyless: Collection[int] = ()) -> None:
    """Raise InputError for blocks that differ in more than FFN width, key-value groups and attention."""
    if not shape.blocks or not shape.blocks[0].has_attention:
        raise InputError(f"{where}: block 0 has no attention, from which runtimes learn how long the text is")
    for index, block in enumerate(shape.blocks):
        attends = block.kv_groups != 0
        if not block.has_ffn or block.has_attention != (attends or index in keyless):
            raise InputError(
                f"{where}: block {index} differs from the dense model's in more than its FFN width, its key-value "
                "groups and its attention, which cannot be loaded or exported yet"
            )

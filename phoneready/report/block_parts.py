"""What a plan leaves of each block of the dense model, as the reports' table and plot of it say it."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.pruning.plan import PruningPlan


@dataclass(frozen=True)
class BlockParts:
    """One block.

    Attributes:
        dense_width: FFN channels of the dense model.
        width: Those that are kept; 0 of a block that goes.
        is_gone: Whether the whole block goes.
        attends: Whether it has attention afterwards.
        groups: Key-value groups that are kept, and of how many; None where the plan takes none.
    """

    dense_width: int
    width: int
    is_gone: bool
    attends: bool
    groups: tuple[int, int] | None

    @property
    def share(self) -> float:
        """FFN channels kept."""
        return self.width / self.dense_width

    @property
    def attention_share(self) -> float:
        """Attention kept, by its key-value groups."""
        if not self.attends:
            return 0.0
        return self.groups[0] / self.groups[1] if self.groups else 1.0

    @property
    def attention(self) -> str:
        """The attention, in words."""
        if self.is_gone:
            return "block removed"
        if not self.attends:
            return "no attention"
        return "{} of {} KV groups".format(*self.groups) if self.groups else "whole"


def block_parts(plan: PruningPlan) -> tuple[BlockParts, ...]:
    """Every block of the dense model, in order."""
    without, removal = plan.gone | plan.silent, plan.kv_groups
    parts = []
    for index, (dense, block) in enumerate(zip(plan.dense_shape.blocks, plan.blocks, strict=True)):
        groups = (len(removal.kept[index]), len(removal.losses[index])) if removal else None
        attends = dense.has_attention and index not in without
        parts.append(BlockParts(dense.ffn_width, block.width, index in plan.gone, attends, groups))
    return tuple(parts)


def loses_attention(plan: PruningPlan) -> bool:
    """Whether any attention that could stay goes, or a part of one."""
    return bool(plan.silent or plan.narrowed)

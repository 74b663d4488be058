"""Key-value groups as an axis of pruning: a key-value head goes with the query heads that read it.

In every block that attends one group stays. o_proj of the block is solved anew for what is left
(cfsp/pruning/block_by_block.py), as down_proj is where channels go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import ArchitectureSpec, model_shape, spec_for
from cfsp.progress import Progress, no_progress
from cfsp.pruning.axes.attention import attentions_stay
from cfsp.pruning.axes.removal import Probe, Removal

_NORMED_TOGETHER = "one norm sees all heads of a block, and without some it would change the others"


@dataclass(frozen=True)
class GroupRemoval:
    """Which key-value groups stay, and what each is worth.

    Attributes:
        kept: Per block of the dense model the groups that stay, ascending; none where it goes or does not attend.
        losses: Per block and group the divergence where it alone is left out, beside the blocks and attentions that
            go, nats a token; 0 where it was not tried.
        loss: The same where all that go are left out and nothing makes up for them.
        tokens: Tokens of the windows that this was measured on.
    """

    kept: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    loss: float
    tokens: int

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.losses):
            raise InputError("not one for each block", field="kept", value=len(self.kept))
        for kept, losses in zip(self.kept, self.losses, strict=True):
            if list(kept) != sorted(set(kept)) or not set(kept) <= set(range(len(losses))):
                raise InputError("no groups of the block, ascending", field="kept", value=kept)

    def __str__(self) -> str:
        """How many groups each block of the dense model keeps."""
        return ", ".join(str(len(kept)) for kept in self.kept)

    @property
    def narrowed(self) -> dict[int, tuple[int, ...]]:
        """Blocks that lose some of their groups -> those that stay."""
        blocks = enumerate(zip(self.kept, self.losses, strict=True))
        return {index: kept for index, (kept, losses) in blocks if 0 < len(kept) < len(losses)}

    @property
    def removed(self) -> tuple[int, int]:
        """How many groups go, and of how many that the blocks have which keep their attention."""
        total = sum(len(losses) for kept, losses in zip(self.kept, self.losses, strict=True) if kept)
        return total - sum(map(len, self.kept)), total

    @property
    def share(self) -> float:
        """Of those groups, that of the ones that go."""
        removed, total = self.removed
        return 1 - (total - removed) / total


def plan_kv_groups(
    model: Any,
    input_ids: torch.Tensor,
    ratio: float,
    *,
    gone: frozenset[int] = frozenset(),
    silent: frozenset[int] = frozenset(),
    progress: Progress = no_progress,
) -> GroupRemoval:
    """Choose the groups to remove, over all blocks.

    Args:
        model: The dense model, in eval mode; unchanged.
        input_ids: Windows (n_windows, seqlen) int64.
        ratio: Share of the groups to remove, of blocks that stay and keep their attention.
        gone: Blocks that go whole.
        silent: Blocks that lose their attention.
        progress: Told after each choice.

    Raises:
        InputError: A ratio that removes no group, or more than can go.
    """
    parts = model_shape(model).most_kv_groups
    count = removable_count(model, ratio, gone | silent)
    candidates = [part for part in removable_groups(model) if part // parts not in gone | silent]
    probe = Probe(model, input_ids, group_left_out, gone, silent, parts)
    removal = probe.choose(candidates, count, progress=progress, what="key-value groups")
    return kept_groups(model, removal, gone | silent)


def removable_count(model: Any, ratio: float, without: frozenset[int] = frozenset()) -> int:
    """How many groups a share is of the attentions of all blocks but some.

    Raises:
        InputError: As `groups_of_share`; or no group of such a model can go.
    """
    if reason := groups_stay(spec_for(model.config)):
        raise InputError(f"{model.config.model_type}: {reason}", field="kv_groups", value=ratio)
    held = [n for index, n in enumerate(_counts(model)) if n and index not in without]
    return groups_of_share(held, ratio)


def groups_stay(spec: ArchitectureSpec) -> str | None:
    """Why no group of a model type can go; None where some can."""
    return attentions_stay(spec) or (None if spec.cuts_heads else _NORMED_TOGETHER)


def groups_of_share(counts: Sequence[int], ratio: float) -> int:
    """How many groups a share is.

    Args:
        counts: Groups of every block that keeps its attention.
        ratio: Share of them to remove.

    Raises:
        InputError: It is none, or more than can go.
    """
    total = sum(counts)
    most, count = total - len(counts), round(ratio * total)
    if not 0 < count <= most:
        raise InputError(
            f"each of the {len(counts)} blocks that attend keeps one of its groups, {total} in all",
            field="kv_groups",
            value=ratio,
            allowed=f"{1 / total:.4g} to {most / total:.4g}" if most else "0",
        )
    return count


def kept_groups(model: Any, removal: Removal, gone: Collection[int] = frozenset()) -> GroupRemoval:
    """What a removal of groups, numbered as a `Probe` does, leaves of the blocks that attend and do not go."""
    counts, parts = _counts(model), model_shape(model).most_kv_groups
    return GroupRemoval(
        kept=tuple(
            tuple(g for g in range(n) if index not in gone and parts * index + g not in removal.removed)
            for index, n in enumerate(counts)
        ),
        losses=tuple(removal.losses[parts * index : parts * index + n] for index, n in enumerate(counts)),
        loss=removal.loss,
        tokens=removal.tokens,
    )


def removable_groups(model: Any) -> list[int]:
    """Groups of blocks that have several, numbered as a `Probe` does; none where one norm sees all heads."""
    if not spec_for(model.config).cuts_heads:
        return []
    parts = model_shape(model).most_kv_groups
    return [parts * index + g for index, n in enumerate(_counts(model)) if n > 1 for g in range(n)]


def _counts(model: Any) -> list[int]:
    return [block.kv_groups or 0 for block in model_shape(model).blocks]


def group_channels(attention: Any, size: int, groups: Sequence[int]) -> torch.Tensor:
    """Which of `size` numbers, all groups' after another, are those of some groups: (n,) int64."""
    count = attention.k_proj.out_features // attention.head_dim
    every = torch.arange(size, device=attention.k_proj.weight.device)
    return every.view(count, -1)[list(groups)].flatten()


@contextmanager
def group_left_out(layer: Any, group: int) -> Iterator[None]:
    """A group of a block's attention adds nothing while the context is open."""
    attention = layer.self_attn
    channels = group_channels(attention, attention.o_proj.in_features, [group])
    with attention.o_proj.register_forward_pre_hook(lambda _, args: args[0].index_fill(-1, channels, 0)):
        yield

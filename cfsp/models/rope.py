"""RoPE: what a configuration says of it, and one RoPE as another by the order of rows.

Llama's turns rows i and i + d / 2 of a head of d rows by position / (f_i theta^(2i/d)); divisors f_i are 1 unless it is
scaled. Others are this one for rows in another order, and with other divisors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Rope = Mapping[str, Any]  # `rope_type`, `rope_theta`, and what the type asks for
_STILL = 1e20  # divisor of a frequency at which nothing turns


def stated_rope(settings: Mapping[str, Any], kind_of_block: str = "") -> dict[str, Any]:
    """Base and scaling of a configuration of transformers 5 or 4; kind_of_block: whose, if kinds of blocks differ."""
    outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    merged = {key: settings[key] for key in outside if settings.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        stated = settings.get(key) or {}
        merged |= {k: v for k, v in stated.get(kind_of_block, stated).items() if v is not None}
    kind = merged.get("rope_type") or merged.get("type") or "default"
    return {"rope_theta": 10000.0} | merged | {"rope_type": kind}


def alpha_rope(rope: Rope, head_dim: int) -> Rope:
    """A `dynamic` RoPE with an alpha as the plain one of base theta alpha^(d / (d - 2)); others as they are."""
    alpha = rope.get("alpha")
    if rope["rope_type"] != "dynamic" or not alpha:
        return rope
    theta = float(rope["rope_theta"]) * float(alpha) ** (head_dim / (head_dim - 2))
    return {"rope_type": "default", "rope_theta": theta}


def split_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k, (heads * d, ...), in Llama's order: rows 2i and 2i + 1 of a head become i and i + d / 2."""
    if len(rows) % (2 * heads):
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def partial_rope(rope: Rope, head_dim: int, context: int) -> dict[str, Any]:
    """Settings of a Llama's RoPE that turns the first r of a head's d rows as Phi-3's does, and no others.

    With rows in the order of `partial_rows` the divisors are f_i theta^(2i/r - 2i/d) for i < r / 2, and infinite for
    the others; `longrope` takes a list of them for short texts, and one for long ones.
    """
    turned, theta = _turned(rope, head_dim), float(rope["rope_theta"])
    if rope["rope_type"] == "default" and turned == head_dim:
        return {"rope_theta": theta, "rope_scaling": None}
    lists = {}
    for name in ("short_factor", "long_factor"):
        divisors = rope.get(name) or [1.0] * (turned // 2)
        steps = [2 * i / turned - 2 * i / head_dim for i in range(turned // 2)]
        still = [_STILL] * ((head_dim - turned) // 2)
        lists[name] = [f * theta**step for f, step in zip(divisors, steps, strict=True)] + still
    original = _original(rope, context)
    scaling = {
        "rope_type": "longrope",
        **lists,
        "factor": max(context / original, 1.0),
        "attention_factor": long_magnitude(rope, context),
        "original_max_position_embeddings": original,
    }
    # transformers 4 looks for it outside.
    return {"rope_theta": theta, "rope_scaling": scaling, "original_max_position_embeddings": original}


def partial_rows(rows: torch.Tensor, heads: int, rope: Rope, context: int) -> torch.Tensor:
    """Rows of q or k, (heads * d, ...), in the order for `partial_rope`: of each half of a head, first those that turn.

    The others are divided by the magnitude that cos and sin are multiplied by.
    """
    head_dim = len(rows) // heads
    turned, half = _turned(rope, head_dim), head_dim // 2
    if turned == head_dim or len(rows) % heads:
        return rows
    import torch

    still = half - turned // 2
    by_head = rows.reshape(heads, head_dim, *rows.shape[1:])
    first, second, rest = torch.split(by_head, [turned // 2, turned // 2, 2 * still], dim=1)
    rest = rest / long_magnitude(rope, context)
    return torch.cat([first, rest[:, :still], second, rest[:, still:]], dim=1).reshape(rows.shape)


def long_magnitude(rope: Rope, context: int) -> float:
    """Factor of cos and sin of a `longrope`: sqrt(1 + ln(s) / ln(L)), s = context / L, L the first training's context
    (arXiv 2402.13753), unless stated."""
    if rope["rope_type"] == "default":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = _original(rope, context)
    factor = float(rope.get("factor") or context / original)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def steady_context(rope: Rope, context: int) -> int:
    """Longest context with one set of frequencies; a `longrope` has others for longer texts."""
    return min(_original(rope, context), context) if rope.get("rope_type") == "longrope" else context


def yarn_magnitude(rope: Rope) -> float:
    """Factor of cos and sin of a `yarn`: m(1) or m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    logarithm = math.log(max(float(rope["factor"]), 1.0))
    one, other = (rope.get(name) for name in ("mscale", "mscale_all_dim"))
    if one and other:
        return (0.1 * float(one) * logarithm + 1.0) / (0.1 * float(other) * logarithm + 1.0)
    return 0.1 * logarithm + 1.0


def _original(rope: Rope, context: int) -> int:
    return int(rope.get("original_max_position_embeddings") or context)


def _turned(rope: Rope, head_dim: int) -> int:
    """Rows of a head that turn."""
    return int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))

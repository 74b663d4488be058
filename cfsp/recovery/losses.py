"""Losses over labelled positions, and their evaluation without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["ChunkLoss", "distillation_loss", "head_loss", "next_token_loss"]

CHUNK_TOKENS = 256
"""Positions whose logits are held at once: 256 x 49152 float32 are 48 MiB."""

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(logits (chunk, vocab_size) float32, which positions) -> scalar sum over the chunk."""


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy  -sum_t log softmax(z_t)[y_t], in nats.

    Args:
        logits: z (n, vocab_size) float32.
        targets: y (n,) int64.
    """
    return F.cross_entropy(logits, targets, reduction="sum")


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 * sum_t KL( softmax(teacher_t / T) || softmax(z_t / T) ), in nats (Hinton et al., arXiv 1503.02531).

    T^2 keeps the gradient's size independent of T.

    Args:
        logits: z (n, vocab_size) float32.
        teacher_logits: (n, vocab_size) float32.
        temperature: T.
    """
    # Dividing by one would cost as much as a softmax.
    softened = [z if temperature == 1 else z / temperature for z in (logits, teacher_logits)]
    student, teacher = (F.log_softmax(z, dim=-1) for z in softened)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, loss: ChunkLoss, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Sum of a loss over the logits  hidden @ weight^T, chunk by chunk.

    Gradients are taken chunk by chunk in the forward pass already, so that no logits outlive their chunk and
    none is computed twice.

    Args:
        hidden: (n, hidden_size), the positions that count.
        weight: (vocab_size, hidden_size), the output embedding.
        loss: Told the logits of each chunk.
        dtype: Of the product.

    Returns:
        A float32 scalar; zero for no positions.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        result: torch.Tensor = _HeadLoss.apply(hidden, weight, loss, dtype)  # type: ignore[no-untyped-call]
        return result
    cast = weight.to(dtype)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in _chunks(len(hidden)):
        total = total + loss(F.linear(hidden[chunk].to(dtype), cast).float(), chunk)
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, loss: ChunkLoss, dtype: torch.dtype
    ) -> torch.Tensor:
        with_hidden, with_weight = ctx.needs_input_grad[:2]
        cast = weight.detach().to(dtype).requires_grad_(with_weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden) if with_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
        for chunk in _chunks(len(hidden)):
            piece = hidden[chunk].detach().to(dtype).requires_grad_(with_hidden)
            wanted = [t for t, needed in ((piece, with_hidden), (cast, with_weight)) if needed]
            with torch.enable_grad():
                value = loss(F.linear(piece, cast).float(), chunk)
            grads = list(torch.autograd.grad(value, wanted))
            total += value.detach()
            if hidden_grad is not None:
                hidden_grad[chunk] = grads.pop(0).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad += grads.pop(0)
        ctx.grads = (hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        hidden_grad, weight_grad = ctx.grads
        scale = outputs[0]
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * scale,
            None,
            None,
        )


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_TOKENS, count)) for start in range(0, count, CHUNK_TOKENS)]

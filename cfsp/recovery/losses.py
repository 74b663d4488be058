"""Losses over labelled positions, and their evaluation without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 256
"""Positions whose logits are held at once: 256 x 49152 float32 are 48 MiB."""

LossAndGradient = tuple[torch.Tensor, torch.Tensor]
"""A loss summed over positions, scalar, and its gradient with respect to the logits (n, vocab_size)."""

ChunkLoss = Callable[[torch.Tensor, slice], LossAndGradient]
"""From the logits of a chunk (n, vocab_size) float32, and which positions they are."""


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> LossAndGradient:
    """Cross entropy  -sum_t log softmax(z_t)[y_t], in nats; its gradient is  softmax(z_t) - onehot(y_t).

    z are (n, vocab_size) float32, y (n,) int64.
    """
    probabilities = F.softmax(logits, dim=-1)
    chosen = targets[:, None]
    loss = (_log_partition(logits, probabilities) - logits.gather(1, chosen).squeeze(1)).sum()
    return loss, probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> LossAndGradient:
    """sum_t KL(softmax(teacher_t) || softmax(z_t)), in nats; its gradient is softmax(z_t) - softmax(teacher_t).

    Logits are (n, vocab_size) float32.
    """
    p, q = F.softmax(logits, dim=-1), F.softmax(teacher_logits, dim=-1)
    partitions = _log_partition(logits, p) - _log_partition(teacher_logits, q)
    loss = torch.dot(q.flatten(), (teacher_logits - logits).flatten()) + partitions.sum()
    return loss, p.sub_(q)


def _log_partition(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """log sum_v exp z_v  =  z_v - log p_v, at the v with the largest p: saves a second pass of exponentials."""
    return logits.amax(-1) - probabilities.amax(-1).log()


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, loss: ChunkLoss, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Sum of a loss over the logits  hidden @ weight^T, chunk by chunk: a float32 scalar.

    Gradients are formed in the forward pass, so that no logits outlive their chunk and none is computed twice.

    Args:
        hidden: (n, hidden_size), the positions that count.
        weight: (vocab_size, hidden_size), the output embedding.
        loss: Gets the logits of each chunk.
        dtype: Of the products.
    """
    if not torch.is_grad_enabled():
        # Of a trained weight `needs_input_grad` is true even then.
        hidden, weight = hidden.detach(), weight.detach()
    result: torch.Tensor = _HeadLoss.apply(hidden, weight, loss, dtype)  # type: ignore[no-untyped-call]
    return result


def of_capped(loss: ChunkLoss, cap: float | None) -> ChunkLoss:
    """A loss of the logits c tanh(z / c) as one of the products z; the same without a cap c."""
    if cap is None:
        return loss

    def of_products(products: torch.Tensor, chunk: slice) -> LossAndGradient:
        share = torch.tanh(products / cap)
        value, gradient = loss(cap * share, chunk)
        return value, gradient * (1 - share.square())

    return of_products


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, loss: ChunkLoss, dtype: torch.dtype
    ) -> torch.Tensor:
        with_hidden, with_weight = ctx.needs_input_grad[:2]
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if with_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            value, gradient = loss(F.linear(hidden_cast[chunk], weight_cast).float(), chunk)
            total += value
            gradient = gradient.to(dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = (gradient @ weight_cast).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden_cast[chunk]
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

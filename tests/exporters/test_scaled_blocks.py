"""Weights of which only the scales of their blocks are trained."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize

from exporters.quantize.training import ScaledBlocks


def test_weight_decay_draws_to_the_stored_scales_and_not_to_zero() -> None:
    linear = torch.nn.Linear(6, 3, bias=False)
    stored, blocks = linear.weight.detach().clone(), ScaledBlocks(3, 6, 4)
    parametrize.register_parametrization(linear, "weight", blocks)
    assert torch.equal(linear.weight, stored)
    with torch.no_grad():
        blocks.changes[0, 1] = 0.5
    optimizer = torch.optim.AdamW([blocks.changes], lr=0.1, weight_decay=0.5)
    blocks.changes.grad = torch.zeros_like(blocks.changes)
    optimizer.step()
    drawn = float(blocks.changes.detach()[0, 1])
    assert 0 < drawn < 0.5
    assert int(blocks.changes.count_nonzero()) == 1
    torch.testing.assert_close(linear.weight[0, 4:], stored[0, 4:] * (1 + drawn))
    assert torch.equal(linear.weight[:, :4], stored[:, :4])

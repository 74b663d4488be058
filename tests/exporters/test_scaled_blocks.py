"""Weights of which only the scales of their blocks are trained."""

from __future__ import annotations

import torch
from torch import nn

from exporters.quantize.scaled import factors_of, make_plain, train_blocks


def test_weight_decay_draws_to_the_stored_scales_and_not_to_zero() -> None:
    linear = nn.Linear(6, 3, bias=False)
    stored = linear.weight.detach().clone()
    train_blocks(linear, 4)
    (changes,) = [p for p in linear.parameters() if p.requires_grad]
    with torch.no_grad():
        changes[0, 1] = 0.5
    factors = factors_of(linear)
    assert factors is not None
    assert factors.tolist() == [[1.0, 1.5], [1.0, 1.0], [1.0, 1.0]]
    optimizer = torch.optim.AdamW([changes], lr=0.1, weight_decay=0.5)
    changes.grad = torch.zeros_like(changes)
    optimizer.step()
    drawn = factors_of(linear)
    assert drawn is not None
    assert 1.0 < drawn[0, 1] < 1.5
    assert (drawn.flatten()[[0, 2, 3, 4, 5]] == 1).all()
    make_plain([linear])
    torch.testing.assert_close(linear.weight[0, 4:], stored[0, 4:] * drawn[0, 1])
    assert torch.equal(linear.weight[:, :4], stored[:, :4])

from __future__ import annotations

import pytest
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import FeedForward
from cfsp.pruning.scoring import SCORES, score_channels


@pytest.fixture
def ffn() -> FeedForward:
    torch.manual_seed(0)
    gate, up, down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
    return FeedForward(nn.Module(), gate, up, down)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


@pytest.fixture
def norm(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(0).sqrt()


def expected(name: str, ffn: FeedForward, x: torch.Tensor) -> list[float]:
    """Each score channel by channel, from its definition on the raw activations."""
    G, U, D = (w.weight.detach().double() for w in (ffn.gate, ffn.up, ffn.down))
    values = []
    for i in range(10):
        norm = float(x[:, i].norm()) / 50**0.5
        relative = sum(float(D[j, i].abs() / D[j].abs().sum()) for j in range(6)) / 6
        for W in (G, U):
            relative += sum(float(W[i, j].abs() / W[:, j].abs().sum()) for j in range(6)) / 6
        values.append({"activation_norm": norm, "cfsp": relative * norm}[name])
    return values


@pytest.mark.parametrize("name", SCORES)
def test_scores_match_their_definition(
    name: str, ffn: FeedForward, norm: torch.Tensor, x: torch.Tensor
) -> None:
    assert score_channels(name, ffn, norm).tolist() == pytest.approx(expected(name, ffn, x), rel=1e-5)


def test_what_cannot_be_scored_is_refused(ffn: FeedForward, norm: torch.Tensor) -> None:
    with pytest.raises(InputError, match="activation_norm"):
        score_channels("best", ffn, norm)
    with torch.no_grad():
        ffn.down.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        score_channels("cfsp", ffn, norm)

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import FeedForward
from cfsp.pruning.elimination import eliminate_channels
from cfsp.pruning.gradients import ChannelGradients
from cfsp.pruning.scoring import SCORES, ChannelEvidence, score_channels
from cfsp.pruning.statistics import BlockStatistics, ChannelStatistics, GramStore


@pytest.fixture
def ffn() -> FeedForward:
    torch.manual_seed(0)
    gate, up, down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
    return FeedForward(nn.Module(), gate, up, down)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


@pytest.fixture
def evidence(ffn: FeedForward, x: torch.Tensor) -> ChannelEvidence:
    channels = ChannelStatistics(x.mean(0), x.square().mean(0))
    return ChannelEvidence(ffn, BlockStatistics({}, (channels,), None, n_tokens=50), 0)


@pytest.fixture
def full(evidence: ChannelEvidence, x: torch.Tensor) -> ChannelEvidence:
    """With Gram matrix and gradients as one backward pass would leave them."""
    g = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    products = x * (g @ evidence.ffn.down.weight.detach().double())
    gradients = ChannelGradients(g.T @ g / 50, products.abs().mean(0), products.square().mean(0))
    grams = GramStore()
    grams.put(0, x.T @ x / 50)
    statistics = dataclasses.replace(evidence.statistics, grams=grams, gradients=(gradients,))
    return dataclasses.replace(evidence, statistics=statistics)


def expected(name: str, ffn: FeedForward, x: torch.Tensor) -> list[float]:
    """Each score channel by channel, from its definition on the raw activations."""
    G, U, D = (w.weight.detach().double() for w in (ffn.gate, ffn.up, ffn.down))
    values = []
    for i in range(10):
        norm = float(x[:, i].norm()) / 50**0.5
        relative = sum(float(D[j, i].abs() / D[j].abs().sum()) for j in range(6)) / 6
        for W in (G, U):
            relative += sum(float(W[i, j].abs() / W[:, j].abs().sum()) for j in range(6)) / 6
        values.append(
            {
                "activation_norm": norm,
                "cfsp": relative * norm,
                "wanda_sp": float(D[:, i].abs().sum()) * norm,
                "flap": float(x[:, i].var(correction=0) * D[:, i].square().sum()),
                "magnitude": float(G[i].square().sum() + U[i].square().sum() + D[:, i].square().sum()),
            }[name]
        )
    return values


@pytest.mark.parametrize(
    "name", [name for name, row in SCORES.items() if not row.needs_gram and not row.needs_gradients]
)
def test_scores_match_their_definition(name: str, evidence: ChannelEvidence, x: torch.Tensor) -> None:
    assert score_channels(name, evidence).tolist() == pytest.approx(expected(name, evidence.ffn, x), rel=1e-5)


@pytest.mark.parametrize("name", [name for name, row in SCORES.items() if row.needs_gradients])
def test_scores_from_gradients_match_their_definition(name: str, full: ChannelEvidence) -> None:
    root = torch.linalg.cholesky(full.gradients.output).T
    order = eliminate_channels(full.gram, (root @ full.ffn.down.weight.detach().double()))
    ours = score_channels(name, full)
    if name == "obs_loss":
        assert ours.argsort(descending=True).tolist() == order.ranking.tolist()
        assert float(ours.max()) == pytest.approx(float(order.cost.sum()), rel=1e-6)
    else:
        wanted = {"taylor": full.gradients.taylor, "fisher": full.gradients.fisher / 2}[name]
        assert torch.equal(ours, wanted)


def test_obs_ranks_as_channels_are_eliminated(full: ChannelEvidence) -> None:
    done = eliminate_channels(full.gram, full.ffn.down.weight.detach())
    assert score_channels("obs", full).argsort(descending=True).tolist() == done.ranking.tolist()


@pytest.mark.parametrize("name", [n for n, row in SCORES.items() if row.needs_gram or row.needs_gradients])
def test_evidence_that_is_missing_is_named(name: str, evidence: ChannelEvidence) -> None:
    with pytest.raises(InputError, match=r"needs (Gram|gradients)"):
        score_channels(name, evidence)


def test_unknown_score_names_the_known(evidence: ChannelEvidence) -> None:
    with pytest.raises(InputError, match="wanda_sp"):
        score_channels("best", evidence)


def test_nan_weights_are_refused(evidence: ChannelEvidence) -> None:
    with torch.no_grad():
        evidence.ffn.down.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        score_channels("wanda_sp", evidence)

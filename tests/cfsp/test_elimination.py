import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.errors import InputError
from cfsp.pruning.elimination import eliminate_channels


def problem(width: int, hidden_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs (T, width) and a weight (hidden_size, width)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(300, width, generator=generator, dtype=torch.float64) @ mixing
    return x, torch.randn(hidden_size, width, generator=generator)


def solved_error(x: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, metric: torch.Tensor) -> float:
    """Half the mean squared error, in `metric`, of the best output that the kept channels allow."""
    wanted = x @ weight.double().T
    missing = wanted - x[:, kept] @ torch.linalg.lstsq(x[:, kept], wanted).solution
    return float(torch.einsum("ti,ij,tj->t", missing, metric, missing).mean() / 2)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(2, 24), seed=st.integers(0, 1000), with_metric=st.booleans())
def test_the_costs_behind_a_width_add_up_to_the_error_of_solving_for_it(width, seed, with_metric):
    x, weight = problem(width, 5, seed)
    root = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    metric = root @ root.T if with_metric else torch.eye(5, dtype=torch.float64)
    done = eliminate_channels(x.T @ x / len(x), weight, metric if with_metric else None, ridge=1e-12)
    assert sorted(done.ranking.tolist()) == list(range(width))
    for kept in {1, width // 2, width - 1} - {0}:
        expected = solved_error(x, weight, done.ranking[:kept], metric)
        assert float(done.cost[kept:].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_first_to_go_is_the_one_whose_loss_the_others_repair_best():
    x, weight = problem(8, 4, 3)
    done = eliminate_channels(x.T @ x / len(x), weight, ridge=1e-12)
    errors = [
        solved_error(x, weight, torch.tensor([j for j in range(8) if j != i]), torch.eye(4).double())
        for i in range(8)
    ]
    assert int(done.ranking[-1]) == min(range(8), key=errors.__getitem__)


def test_a_channel_that_repeats_another_goes_for_nothing():
    x, weight = problem(6, 4, 1)
    x[:, 5] = 2 * x[:, 2]
    done = eliminate_channels(x.T @ x / len(x), weight, ridge=1e-9)
    assert int(done.ranking[-1]) in (2, 5)
    assert float(done.cost[-1]) < 1e-6 * float(done.cost[0])


def test_many_channels_go_in_steps_and_still_add_up():
    x, weight = problem(1030, 3, 0)
    gram = x.T @ x / len(x)
    done = eliminate_channels(gram, weight, ridge=1e-3)
    assert sorted(done.ranking.tolist()) == list(range(1030))
    assert float(done.cost.min()) >= 0
    total = float(torch.einsum("ij,jk,ik->", weight.double(), gram, weight.double())) / 2
    assert float(done.cost.sum()) == pytest.approx(total, rel=0.05)


def test_a_gram_matrix_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="ridge"):
        eliminate_channels(torch.full((3, 3), torch.nan).double(), torch.ones(2, 3))

import pytest
import torch

from exporters.quantize.gradients import WeightChange, collect_weight_moments, predict_divergence


def kl_after(model, change, ids: torch.Tensor) -> float:
    """Mean KL(model || changed model) over all tokens, where `change` is a context that changes it."""
    with torch.no_grad():
        before = model(ids).logits.double().log_softmax(-1)
        with change:
            after = model(ids).logits.double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_the_model_is_left_as_it_was(tiny_model):
    model, _ = tiny_model()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(2))
    first, again = (collect_weight_moments(model, ["model.layers.1.mlp.down_proj"], ids) for _ in range(2))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == wanted[name]
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks for m in model.modules())
    for name, moments in first.items():
        assert torch.equal(moments.rows, again[name].rows)


@pytest.mark.parametrize("rows", [8192, 24])
def test_the_divergence_of_a_changed_weight_is_predicted(tiny_model, monkeypatch, rows):
    monkeypatch.setattr("exporters.quantize.gradients._ROWS", rows)
    model, _ = tiny_model()
    model.double()
    ids = torch.randint(3, model.config.vocab_size, (24, 16), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    last = "model.layers.3.mlp"
    changes = {
        f"{last}.{part}": 0.01
        * torch.randn(model.get_submodule(f"{last}.{part}").weight.shape, generator=generator)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    predicted = predict_divergence(
        model, {n: WeightChange(n, lambda some, c=c: c[some]) for n, c in changes.items()}, ids.repeat(20, 1)
    )
    assert list(predicted) == list(changes)
    for name, change in changes.items():
        measured = kl_after(model, ChangedWeight(model.get_submodule(name), change), ids)
        assert predicted[name] == pytest.approx(measured, rel=0.25)


class ChangedWeight:
    """Adds to a Linear's weight while it is entered."""

    def __init__(self, linear: torch.nn.Linear, change: torch.Tensor) -> None:
        self.weight, self.change = linear.weight.data, change

    def __enter__(self) -> None:
        self.weight += self.change

    def __exit__(self, *error: object) -> None:
        self.weight -= self.change

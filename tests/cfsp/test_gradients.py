import pytest
import torch

from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.pruning.gradients import WeightChange, collect_gradients, predict_divergence


def kl_after(model, change, ids: torch.Tensor) -> float:
    """Mean KL(model || changed model) over all tokens, where `change` is a context that changes it."""
    with torch.no_grad():
        before = model(ids).logits.double().log_softmax(-1)
        with change:
            after = model(ids).logits.double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


class ScaledChannel:
    """Multiplies one channel of a block's down_proj by 1 - epsilon while it is entered."""

    def __init__(self, down: torch.nn.Linear, channel: int, epsilon: float) -> None:
        self.column, self.factor = down.weight.data[:, channel], 1 - epsilon

    def __enter__(self) -> None:
        self.column *= self.factor

    def __exit__(self, *error: object) -> None:
        self.column /= self.factor


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_fisher_predicts_what_a_small_change_of_a_channel_does(tiny_model, model_type):
    model, _ = tiny_model(model_type)
    model.double()
    ids = torch.randint(3, model.config.vocab_size, (24, 16), generator=torch.Generator().manual_seed(0))
    # The last block: tokens do not reach each other after it, which is what the per-token Fisher neglects.
    gradients = collect_gradients(model, ids.repeat(20, 1))[-1]
    down = feed_forward(model, decoder_layers(model)[-1]).down
    epsilon = 0.05
    channels = gradients.fisher.argsort(descending=True)[:8].tolist()
    measured = torch.tensor([kl_after(model, ScaledChannel(down, c, epsilon), ids) for c in channels])
    predicted = gradients.fisher[channels] * epsilon**2 / 2
    assert torch.allclose(measured.double(), predicted, rtol=0.25)


def test_the_output_factor_is_consistent_with_the_channels(tiny_model):
    model, _ = tiny_model()
    ids = torch.randint(3, model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    for block in collect_gradients(model, ids):
        assert torch.equal(block.output, block.output.T)
        values = torch.linalg.eigvalsh(block.output)
        assert float(values.min()) > -1e-6 * float(values.max())
        assert bool((block.taylor.square() <= block.fisher * (1 + 1e-6)).all())


def test_the_model_is_left_as_it_was(tiny_model):
    model, _ = tiny_model()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(2))
    first = collect_gradients(model, ids, seed=5)
    again = collect_gradients(model, ids, seed=5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == wanted[name]
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(first[0].fisher, again[0].fisher)


@pytest.mark.parametrize("rows", [8192, 24])
def test_the_divergence_of_a_changed_weight_is_predicted(tiny_model, monkeypatch, rows):
    monkeypatch.setattr("cfsp.pruning.gradients._ROWS", rows)
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

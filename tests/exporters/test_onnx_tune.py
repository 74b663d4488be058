"""Scales and norms, trained end to end, bring a quantized model closer; numbers, and the model, stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import parametrize

from exporters.onnx.decoder_graph import decoder_graph
from exporters.onnx.quantize import QuantizedModel, quantize_linears, tune
from exporters.onnx.variants import INT8
from exporters.onnx.weights import HEAD_PARTS, Weights, weight_of
from exporters.quantize.training import ScaledBlocks

TEXT, UNSEEN = (
    torch.randint(0, 384, (count, 64), generator=torch.Generator().manual_seed(seed))
    for seed, count in ((0, 24), (1, 8))
)


def divergence(model: Any, quantized: QuantizedModel) -> float:
    """KL from the model on unseen text, in torch."""
    changed = copy.deepcopy(model)
    with torch.inference_mode():
        for name, stored in quantized.layers.items():
            weight_of(changed, name).copy_(stored.dequantize())
        for name, norm in quantized.norms.items():
            changed.get_parameter(name).copy_(norm)
        before, after = (m(UNSEEN).logits.log_softmax(-1) for m in (model, changed))
        return float((before.exp() * (before - after)).sum(-1).mean())


def test_tuning_brings_a_model_closer_on_text_it_has_not_seen(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama", attention_bias=True, tied=False)
    given = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
                given[name] = parameter.clone()
    rounded = quantize_linears(model, lambda *_: INT8, None)
    # What layers do together: each a little too large.
    layers = {
        n: r if n in HEAD_PARTS else r.scaled(torch.full((len(r.q), 1), 1.03)) for n, r in rounded.items()
    }
    given_layers = QuantizedModel(layers)
    steps: list[tuple[int, int]] = []
    tuned = tune(model, given_layers, TEXT, progress=lambda _, done, total: steps.append((done, total)))
    assert steps == [(i, len(TEXT)) for i in range(1, len(TEXT) + 1)]
    assert divergence(model, tuned) < 0.8 * divergence(model, given_layers)
    assert list(tuned.layers) == list(layers)
    assert all(torch.equal(tuned.layers[name].q, stored.q) for name, stored in layers.items())
    assert all(tuned.layers[part] is layers[part] for part in HEAD_PARTS)
    assert tuned.norms.keys() == {name for name in given if name.endswith("norm.weight")}
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_tuned_norms_are_what_the_graph_gets(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("qwen3")
    names = [name for name, _ in model.named_parameters() if name.endswith("norm.weight")]
    norms = {name: torch.full_like(model.get_parameter(name), i + 2) for i, name in enumerate(names)}
    graph = decoder_graph(model, Weights(norms=norms), name="tuned").graph
    stored = [v.const_value.numpy() for n, v in graph.initializers.items() if "norm" in n and v.const_value]
    assert sorted({float(vector[0]) for vector in stored}) == list(range(2, len(names) + 2))


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

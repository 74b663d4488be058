from __future__ import annotations

from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.precision import exact_products
from cfsp.pruning.block_by_block import GramSum
from cfsp.pruning.statistics import collect_input_moments, collect_statistics, spread_windows

SLIDING = {
    "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "max_window_layers": 1,
    "use_sliding_window": True, "sliding_window": 4,
}  # fmt: skip


def windows(model: Any) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("model_type", "overrides"), [("qwen2", SLIDING), ("gemma4_text", {}), ("qwen3_5_text", {})]
)
def test_block_by_block_equals_the_models_own_pass(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, model_type: str, overrides: dict[str, Any]
) -> None:
    monkeypatch.setattr("cfsp.pruning.statistics.bulk_products", exact_products)
    model, _ = tiny_model(model_type, **overrides)
    ids, inputs, around, hooks = windows(model), list[Any](), list[Any](), list[Any]()
    for layer in decoder_layers(model):
        hooks += [
            feed_forward(model, layer).down.register_forward_pre_hook(lambda _, a: inputs.append(a[0])),
            layer.register_forward_pre_hook(lambda _, a: around.append(a[0])),
            layer.register_forward_hook(
                lambda _, a, out: around.append(out[0] if isinstance(out, tuple) else out)
            ),
        ]
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    statistics, twice = collect_statistics(model, ids), collect_statistics(model, torch.cat([ids, ids]))
    assert statistics.n_tokens == ids.numel()
    torch.testing.assert_close(statistics.importance, twice.importance)
    moments = collect_input_moments(model, ids)
    for index, x in enumerate(inputs):
        squares = x.reshape(-1, x.shape[-1]).double().square().mean(0)
        torch.testing.assert_close(statistics.norms[index], squares.sqrt(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(twice.norms[index], squares.sqrt(), rtol=1e-4, atol=1e-6)
        name = f"model.layers.{index}.mlp.down_proj"
        torch.testing.assert_close(moments[name].double(), squares, rtol=1e-4, atol=1e-6)
        h_in, h_out = around[2 * index].double(), around[2 * index + 1].double()
        cosine = torch.cosine_similarity(h_in, h_out, dim=-1).clamp(-1, 1)
        expected = float(cosine.arccos().mean() / torch.pi)
        assert float(statistics.importance[index]) == pytest.approx(expected, rel=1e-3)
    if model_type == "qwen2":
        assert len(moments) == 7 * len(decoder_layers(model))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_gram_of_a_width_above_one_tile() -> None:
    x = torch.randn(50, 800, generator=torch.Generator().manual_seed(0))
    gram = GramSum(800, torch.device("cpu"))
    for part in x.split(20):
        gram.add(part)
    expected = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(gram.mean(len(x)), expected, rtol=1e-4, atol=1e-5)


def test_identical_states_are_not_nan_and_infinite_activations_are_refused(tiny_model: Any) -> None:
    model, _ = tiny_model("llama")
    with torch.no_grad():
        for layer in decoder_layers(model):
            feed_forward(model, layer).down.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    importance = collect_statistics(model, windows(model)).importance
    assert bool(torch.isfinite(importance).all())
    assert float(importance.max()) < 1e-3
    with torch.no_grad():
        feed_forward(model, decoder_layers(model)[1]).up.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="block 1 are not finite"):
        collect_statistics(model, windows(model))


def test_windows_are_taken_of_each_source_alike() -> None:
    sources = torch.arange(3).repeat_interleave(20)[:, None]
    for count, each in ((32, {10, 11}), (45, {15}), (7, {2, 3}), (3, {1})):
        found = spread_windows(sources, count)
        assert len(found) == count
        assert set(found.flatten().bincount().tolist()) <= each
    assert torch.equal(spread_windows(sources, 99), sources)
    assert torch.equal(spread_windows(sources, None), sources)

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.pruning.block_by_block import GramSum
from cfsp.pruning.statistics import collect_input_moments, collect_statistics


def windows(model: Any, count: int = 5, seqlen: int = 24) -> torch.Tensor:
    return torch.randint(
        0, model.config.vocab_size, (count, seqlen), generator=torch.Generator().manual_seed(3)
    )


def observed(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of every down_proj, and hidden states around every block, from the model's own forward pass."""
    inputs: list[torch.Tensor] = []
    hooks = [
        feed_forward(model, layer).down.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in decoder_layers(model)
    ]
    around: list[torch.Tensor] = []
    for layer in decoder_layers(model):
        hooks.append(layer.register_forward_pre_hook(lambda _, args: around.append(args[0])))
        hooks.append(
            layer.register_forward_hook(
                lambda _, a, out: around.append(out[0] if isinstance(out, tuple) else out)
            )
        )
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs, around


@pytest.mark.parametrize("model_type", ["qwen2", "gemma4_text", "qwen3_5_text"])
def test_block_by_block_equals_the_models_own_pass(tiny_model: Any, model_type: str) -> None:
    model, _ = tiny_model(model_type)
    ids = windows(model)
    inputs, around = observed(model, ids)
    statistics = collect_statistics(model, ids)
    assert statistics.n_tokens == ids.numel()
    for index, x in enumerate(inputs):
        x = x.reshape(-1, x.shape[-1]).double()
        torch.testing.assert_close(statistics.norms[index], x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)
        h_in, h_out = around[2 * index].double(), around[2 * index + 1].double()
        cosine = torch.cosine_similarity(h_in, h_out, dim=-1).clamp(-1, 1)
        expected = float(cosine.arccos().mean() / torch.pi)
        assert float(statistics.importance[index]) == pytest.approx(expected, rel=1e-3)


def test_gram_of_a_width_above_one_tile() -> None:
    x = torch.randn(50, 800, generator=torch.Generator().manual_seed(0))
    gram = GramSum(800, torch.device("cpu"))
    for part in x.split(20):
        gram.add(part)
    expected = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(gram.mean(len(x)), expected, rtol=1e-4, atol=1e-5)


def test_model_is_left_as_it_was(tiny_model: Any) -> None:
    model, _ = tiny_model("llama")
    ids = windows(model, 2)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        collect_statistics(model, ids)
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model))


def test_sliding_window_layers_get_their_own_mask(tiny_model: Any) -> None:
    layers = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}
    model, _ = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, **layers)
    ids = windows(model)
    inputs, _ = observed(model, ids)
    statistics = collect_statistics(model, ids)
    for index, x in enumerate(inputs):
        flat = x.reshape(-1, x.shape[-1]).double()
        torch.testing.assert_close(
            statistics.norms[index], flat.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6
        )


def test_identical_input_and_output_is_not_nan(tiny_model: Any) -> None:
    model, _ = tiny_model("llama")
    with torch.no_grad():
        for layer in decoder_layers(model):
            feed_forward(model, layer).down.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    importance = collect_statistics(model, windows(model)).importance
    assert bool(torch.isfinite(importance).all())
    assert float(importance.max()) < 1e-3


def test_input_moments_cover_every_linear_of_the_blocks(tiny_model: Any) -> None:
    model, _ = tiny_model("qwen2")
    ids = windows(model)
    inputs, _ = observed(model, ids)
    moments = collect_input_moments(model, ids)
    assert len(moments) == 7 * len(decoder_layers(model))
    expected = inputs[1].reshape(-1, inputs[1].shape[-1]).square().mean(0)
    torch.testing.assert_close(moments["model.layers.1.mlp.down_proj"], expected, rtol=1e-4, atol=1e-6)


def test_infinite_activations_are_refused(tiny_model: Any) -> None:
    model, _ = tiny_model("llama")
    with torch.no_grad():
        feed_forward(model, decoder_layers(model)[1]).up.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="block 1 are not finite"):
        collect_statistics(model, windows(model))

"""The walk over a model's blocks: what each layer is rounded for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch

from cfsp.models.architectures import attention_of, block_linears, decoder_layers, spec_for
from cfsp.precision import exact_products
from cfsp.pruning.statistics import input_hook
from exporters.quantize.rounding import RIDGE
from exporters.quantize.walk import Readings, round_blocks

IDS = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(3))


def changed(weight: torch.Tensor) -> torch.Tensor:
    return weight.sign() * weight.abs().mean()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("gemma4_text", {}),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    ],
)
def test_each_layer_is_rounded_for_what_all_rounded_ones_before_it_give(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model_type: str, settings: dict[str, int]
) -> None:
    """Those of its own block, too: the inputs are those of a run of the model as it is in the end."""
    monkeypatch.setattr("exporters.quantize.walk.bulk_products", exact_products)
    model = tiny_model(model_type, **settings)[0]
    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    given = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    seen: dict[str, torch.Tensor] = {}
    together: list[set[str]] = []

    def visit(index: int, readings: Readings) -> dict[str, torch.Tensor]:
        seen.update({name: reading.gram for name, reading in readings.items()})
        together.append({name.rpartition(".")[2] for name in readings})
        assert all(name in block_linears(model)[index] for name in readings)
        return {name: changed(given[name]) for name in readings}

    head = round_blocks(model, IDS, visit)
    ffn = [{"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    if (inputs_of := spec_for(model.config).block_inputs) and settings.get(inputs_of.size_setting) != 0:
        ffn += [{inputs_of.gate}, {inputs_of.output}]
    own = [attention_of(model, layer) is not None for layer in decoder_layers(model)]
    kinds = [[{"q_proj", *(["k_proj", "v_proj"] if keys else [])}, *ffn] for keys in own]
    assert together == [names for block in kinds for names in block]
    assert all(torch.equal(linear.weight, given[name]) for name, linear in linears.items())

    inputs: dict[str, torch.Tensor] = {}
    with torch.no_grad(), ExitStack() as stack:
        for name, linear in linears.items():
            linear.weight.copy_(changed(given[name]))
            stack.enter_context(input_hook(linear, partial(inputs.__setitem__, name)))
        last = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    for name, x in (*inputs.items(), ("head", last)):
        if not name.endswith(("q_proj", "k_proj", "v_proj")):  # the first token counts more there
            flat = x.flatten(0, -2).double()
            found = head if name == "head" else seen[name]
            torch.testing.assert_close(found, flat.T @ flat / len(flat), rtol=1e-3, atol=1e-4)


def test_inputs_are_summed_exactly_where_the_model_runs_in_rounded_products(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums rounded to bfloat16 are not positive definite beside massive channels, and GPTQ cannot solve them."""
    monkeypatch.setattr("exporters.quantize.walk.bulk_products", _autocast)
    model = tiny_model("llama")[0]
    read: dict[str, torch.Tensor] = {}

    def visit(index: int, readings: Readings) -> dict[str, torch.Tensor]:
        for name, reading in readings.items():
            if name.endswith(("o_proj", "gate_proj", "down_proj")):
                x = read[name].double().flatten(0, -2)
                torch.testing.assert_close(reading.gram, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
                checked.add(name.rpartition(".")[2])
        return {}

    checked: set[str] = set()
    with ExitStack() as stack:
        for block in block_linears(model):
            for name, linear in block.items():
                stack.enter_context(input_hook(linear, partial(read.__setitem__, name)))
        round_blocks(model, IDS, visit)
    assert checked == {"o_proj", "gate_proj", "down_proj"}


def _autocast(device_type: str) -> torch.autocast:
    return torch.autocast(device_type, torch.bfloat16)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_a_share_of_earlier_errors_is_taken_back(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """W' is the least-squares answer, with GPTQ's ridge, to what outputs lack beside the exact stream."""
    monkeypatch.setattr("exporters.quantize.walk.bulk_products", exact_products)
    model = tiny_model(model_type)[0]
    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    given = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    wanted: dict[str, torch.Tensor] = {}
    exact, _ = _streams(model, linears)

    def visit(_: int, readings: Readings) -> dict[str, torch.Tensor]:
        wanted.update({name: reading.weight for name, reading in readings.items()})
        return {name: changed(reading.weight) for name, reading in readings.items()}

    round_blocks(model, IDS, visit, correction=0.4)
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(changed(wanted[name]))
    here, _ = _streams(model, linears)
    for name, weight in wanted.items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):  # the first token counts more there
            continue
        x = here[name].flatten(0, -2).double()
        lack = (exact[name].flatten(0, -2).double() - x) @ given[name].double().T
        if name.endswith(("o_proj", "down_proj")) and model_type != "gemma3_text":  # whose norms come between
            lack += _sum_before(name, exact) - _sum_before(name, here)
        gram = x.T @ x / len(x)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        change = torch.linalg.solve(gram + ridge, x.T @ lack / len(x)).T
        torch.testing.assert_close(weight.double(), given[name] + 0.4 * change, rtol=1e-3, atol=1e-4)


def _streams(model: Any, linears: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What each Linear reads in a run of the model, and each norm before it; and what comes out."""
    reads: dict[str, torch.Tensor] = {}
    with torch.no_grad(), ExitStack() as stack:
        for name, module in (*linears.items(), *model.named_modules()):
            if name in linears or name.endswith("layernorm"):
                stack.enter_context(input_hook(module, partial(reads.__setitem__, name)))
        last = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    return reads, last


def _sum_before(name: str, reads: dict[str, torch.Tensor]) -> torch.Tensor:
    norm = "input_layernorm" if name.endswith("o_proj") else "post_attention_layernorm"
    return reads[f"{name.rsplit('.', 2)[0]}.{norm}"].flatten(0, -2).double()

"""`mixed:SIZE`: a type for each tensor, chosen by what rounding costs, in exactly the bytes that were predicted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InputError
from cfsp.evaluation.loss import divergence_from_logits
from cfsp.models.checkpoint import load_pruned
from cfsp.models.gguf_file import read_gguf
from cfsp.text.tokens import TokenWindows
from exporters.export_record import ParityLimits
from exporters.families import family_of, find_format
from exporters.family import ExportOptions
from exporters.gguf.export import export_gguf
from exporters.gguf.files import Files, draft_files, draft_gguf
from exporters.gguf.matrix import StoredMatrix
from exporters.gguf.quants import QUANTS, find_quant, limits_of_bits
from exporters.quantize.mixture import (
    LOOKUP,
    Option,
    Sample,
    collect_weight_moments,
    drawn_rows,
    predict_divergence,
    solve,
)

MakeCheckpoint = Callable[..., Path]
IDS = torch.randint(0, 384, (4, 96), generator=torch.Generator().manual_seed(3))


def options(**settings: Any) -> ExportOptions:
    return ExportOptions(
        **({"calibration": IDS, "n_threads": 1, "name": "m", "parity_windows": IDS[:2]} | settings)
    )


@pytest.fixture(scope="module", params=[("qwen3", True), ("llama", False)], ids=str)
def checkpoint(make_checkpoint: MakeCheckpoint, request: pytest.FixtureRequest) -> Path:
    """Pruned; qwen3's q, k and v are one tensor."""
    model_type, tied = request.param
    return make_checkpoint(model_type, tied=tied, widths=(512, 256, 96, 40), intermediate_size=512)


def measured(checkpoint: Path, folder: Path, **settings: Any) -> Files:
    """Files of which types are measured."""
    found, _ = draft_files(checkpoint, folder, ["f32", "mixed:1B"], options(must_fit=False, **settings))
    return found


@pytest.fixture(scope="module")
def costs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return measured(checkpoint, tmp_path_factory.mktemp("base"))


def bounds(costs: Files) -> tuple[int, int]:
    """Of the smallest file and of the one that loses least."""
    return costs.mixture(1, IDS).file_bytes, costs.mixture(10**8, IDS).file_bytes


def test_a_file_has_the_types_and_bytes_that_were_chosen(
    checkpoint: Path, costs: Files, tmp_path: Path
) -> None:
    least, most = bounds(costs)
    losses = [costs.mixture(int(size), IDS).loss for size in np.linspace(least, most, 6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 5 * losses[-1]
    size = (2 * least + most) // 3
    name = f"mixed:{size}"
    name_of_file = find_quant(name).name
    loose = {name_of_file: ParityLimits(kl_mean=10.0)}
    (record,) = export_gguf(checkpoint, tmp_path / "out", [name], options(limits=loose))
    assert record.quant == name_of_file
    assert record.file == f"m-{name_of_file}.gguf"
    assert size - 400 * len(costs.options or ()) < record.file_bytes <= size
    assert record.budget_bytes == size
    assert record.calibration_tokens == IDS.numel()
    stored = {tensor.name: tensor.kind.name for tensor in read_gguf(tmp_path / "out" / record.file).tensors}
    assert record.chosen_types == {name: stored[name] for name in costs.options or ()}
    assert len(set(record.chosen_types.values()) - {"F16"}) > 1
    assert record.imatrix_tensors == len(costs.options or ())
    drafts = draft_gguf(checkpoint, tmp_path, [name], options())
    assert drafts[name_of_file].read_bytes() == (tmp_path / "out" / record.file).read_bytes()


def test_a_size_that_nothing_fits_says_the_smallest(checkpoint: Path, costs: Files, tmp_path: Path) -> None:
    least, _ = bounds(costs)
    small = f"mixed:{least - 1}"
    with pytest.raises(InputError, match="text to choose types by"):
        export_gguf(checkpoint, tmp_path / "out", ["mixed:1MB"], options(calibration=None))
    with pytest.raises(InputError, match=rf"no types are small enough.*{least} bytes or more"):
        export_gguf(checkpoint, tmp_path / "out", [small], options())
    assert not (tmp_path / "out").exists()
    assert costs.mixture(least, IDS).file_bytes == least
    (path,) = draft_gguf(checkpoint, tmp_path, [small], options(must_fit=False)).values()
    assert path.stat().st_size == least


def test_without_importance_matrix_no_type_wants_one(checkpoint: Path, tmp_path: Path) -> None:
    costs = measured(checkpoint, tmp_path, use_imatrix=False)
    assert costs.mixed_imatrix == {}
    least, _ = bounds(costs)
    (path,) = draft_gguf(checkpoint, tmp_path, [f"mixed:{least}"], options(use_imatrix=False)).values()
    assert not {"IQ3_S", "IQ3_XXS", "IQ2_S"} & {tensor.kind.name for tensor in read_gguf(path).tensors}


def test_rounding_is_the_quantizers(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", widths=(512, 256, 512, 512), intermediate_size=512)
    names = ["f32", "Q2_K", "IQ3_S", "IQ4_NL", "Q4_0"]
    _, (plain, *written) = draft_files(checkpoint, tmp_path, names, options(gptq=False))
    base = {tensor.name: tensor for tensor in read_gguf(plain.path).tensors}
    for file in written:
        tensors = {tensor.name: tensor for tensor in read_gguf(file.path).tensors}
        for name in ("blk.1.ffn_down.weight", "blk.2.attn_q.weight"):
            kind = tensors[name].kind.name
            found = StoredMatrix.nearest(base[name].dequantize(), kind, file.imatrix[name])
            assert np.array_equal(found.values(), tensors[name].dequantize()), (file.path.name, name)


def test_predicted_loss_is_the_measured_divergence(make_checkpoint: MakeCheckpoint) -> None:
    """Of random changes, which is what the prediction takes rounding for."""
    checkpoint = make_checkpoint("llama")
    names = ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj", "lm_head", LOOKUP]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 384, (16, 96), generator=generator)
    dense = load_pruned(checkpoint, dtype=torch.float32)
    before = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    moments = collect_weight_moments(dense, names, ids)
    assert {name: parameter.requires_grad for name, parameter in dense.named_parameters()} == before
    assert not any(module._forward_hooks for module in dense.modules())
    for name in names:
        changed = load_pruned(checkpoint, dtype=torch.float32)
        if name in ("lm_head", LOOKUP):  # apart, as the prediction has them
            changed.lm_head.weight = torch.nn.Parameter(changed.lm_head.weight.detach().clone())
        module = changed.model.embed_tokens if name == LOOKUP else changed.get_submodule(name)
        change = torch.randn(module.weight.shape, generator=generator) * 0.02 * module.weight.detach().std()
        with torch.no_grad():
            module.weight += change
            pairs = ((dense(w[None]).logits[0], changed(w[None]).logits[0], w[1:]) for w in ids)
            measured = divergence_from_logits(pairs, TokenWindows(ids, "random", "")).kl_mean
        own = moments[name]
        predicted = float(Sample(torch.arange(len(change)), own.columns, own.rows).cost(change).sum())
        assert 0.5 * measured < predicted < 2 * measured, name
        rows, factors = drawn_rows(own.rows, len(change) // 4)
        some = Sample(rows, own.columns, own.rows[rows] * factors).cost(change[rows])
        assert float(some.sum()) == pytest.approx(predicted, rel=0.3)
        if name != LOOKUP:
            of_rows = {name: (name, slice(None), change.__getitem__)}
            exact = predict_divergence(dense, of_rows, ids)[name]
            assert exact == pytest.approx(measured, rel=0.25), name


def test_drawn_rows_know_a_sum_of_which_few_rows_are_most() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        sizes = torch.rand(500, generator=generator, dtype=torch.float64) ** 20  # a tenth has nearly all
        values = sizes * (1 + torch.rand(500, generator=generator, dtype=torch.float64))
        rows, factors = drawn_rows(sizes, 50)
        assert len(rows) == len(rows.unique()) <= 50
        assert float(factors @ values[rows]) == pytest.approx(float(values.sum()), rel=0.1)
    rows, factors = drawn_rows(sizes, 500)
    assert float(factors @ values[rows]) == pytest.approx(float(values.sum()))
    assert torch.isfinite(drawn_rows(torch.zeros(9, dtype=torch.float64), 3)[1]).all()


def test_no_other_choice_within_the_bytes_loses_less() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        choices = {
            str(name): [
                Option("x", int(b), float(loss))
                for b, loss in zip(generator.integers(1, 60, 3), generator.random(3), strict=True)
            ]
            for name in range(5)
        }
        least = sum(min(o.n_bytes for o in each) for each in choices.values())
        left = least + int(generator.integers(0, 120))
        found = solve(choices, left)
        assert sum(o.n_bytes for o in found.values()) <= left
        best = min(
            sum(o.loss for o in each)
            for each in itertools.product(*choices.values())
            if sum(o.n_bytes for o in each) <= left
        )
        assert sum(o.loss for o in found.values()) == pytest.approx(best)


def test_a_size_is_part_of_the_name() -> None:
    for said, name, size in (
        ("mixed:80MB", "mixed-80MB", 80_000_000),
        ("MIXED:70 MiB", "mixed-70MiB", 70 * 2**20),
        ("mixed-0.5GB", "mixed-500MB", 500_000_000),
        ("mixed:78632864", "mixed-78632864B", 78_632_864),
    ):
        row = find_quant(said)
        assert (row.name, row.budget_bytes, row.is_sized) == (name, size, False)
        assert find_quant(row.name) == row == find_format(said)
        assert family_of(said).name == "gguf"
    for said in ("mixed:", "mixed", "mixed:big", "mixed:0MB", "mixed:-3MB"):
        with pytest.raises(InputError):
            find_format(said)


def test_a_mixture_is_held_to_what_as_many_bits_must_reach() -> None:
    assert limits_of_bits(4.6) == QUANTS["Q4_0"].limits
    assert limits_of_bits(3.5) == QUANTS["IQ3_S"].limits
    assert limits_of_bits(9.0) == QUANTS["Q6_K"].limits
    assert limits_of_bits(1.0) == QUANTS["IQ2_M"].limits

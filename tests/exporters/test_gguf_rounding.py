"""GGUF files whose types, numbers or scales are chosen for a text: what changes, what they lose, how large they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfsp.errors import InputError
from cfsp.evaluation.loss import divergence_from_logits
from cfsp.models.checkpoint import load_pruned, save_checkpoint
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.models.source import LoadedModel, ModelSource
from exporters.checkpoint_reader import open_tensors
from exporters.export_record import ExportRecord, ParityLimits
from exporters.families import family_of, find_format
from exporters.family import ExportOptions
from exporters.gguf.architecture import read_layout
from exporters.gguf.export import export_gguf
from exporters.gguf.files import Files, draft_files, draft_gguf
from exporters.gguf.matrix import PACKINGS, SCALES, WHOLE_BLOCKS, StoredMatrix, choose_numbers
from exporters.gguf.quants import QUANTS, block_of, find_quant, limits_of_bits
from exporters.gguf.tensors import tensor_specs
from exporters.quantize.mixture import (
    LOOKUP,
    Option,
    Sample,
    collect_weight_moments,
    drawn_rows,
    predict_divergence,
    solve,
)
from exporters.quantize.rounding import round_to_codes_

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

MakeCheckpoint = Callable[..., Path]
# Of few tokens, so that inputs depend on each other, as those of trained models do.
IDS, TEXT, UNSEEN = (
    torch.randint(0, most, (count, 96), generator=torch.Generator().manual_seed(seed))
    for seed, most, count in ((3, 24, 8), (3, 64, 24), (4, 64, 4))
)
LOOSE = dict.fromkeys(QUANTS, ParityLimits(kl_mean=10.0)) | {"f32": ParityLimits(max_logit_diff=1e-3)}
WIDTHS = {"intermediate_size": 256, "widths": (256, 64, 128, 64)}


def options(**settings: Any) -> ExportOptions:
    given = {"calibration": IDS, "n_threads": 1, "name": "m", "parity_windows": IDS[:4], "limits": LOOSE}
    return ExportOptions(**(given | settings))


def export(
    checkpoint: Path, output: Path, *quants: str, **settings: Any
) -> list[tuple[ExportRecord, dict[str, GGUFTensor]]]:
    """Records, and tensors of the files."""
    records = export_gguf(checkpoint, output, quants, options(**settings))
    return [(record, tensors(output / record.file)) for record in records]


def tensors(path: Path) -> dict[str, GGUFTensor]:
    return {tensor.name: tensor for tensor in read_gguf(path).tensors}


def matrix(rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)


@pytest.fixture(scope="module", params=["deci", "openelm"])
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    """Without attention in a block and with fewer heads in another; or with q, k and v as one matrix."""
    if request.param == "openelm":
        return make_checkpoint("qwen3", **WIDTHS)
    return make_checkpoint("llama", tied=False, silent=(2,), groups={1: (0,)}, **WIDTHS)


@pytest.mark.parametrize("kind", PACKINGS)
def test_codes_and_free_scales_stand_where_ggml_reads_them(kind: str) -> None:
    grid, values, planes = PACKINGS[kind].grid, matrix(6, 512), PACKINGS[kind].planes
    values[3, :256] = 0
    written, codes = StoredMatrix.nearest(values, kind, None), torch.tensor(grid.codes)
    codes = codes[torch.from_numpy(np.random.default_rng(1).integers(0, len(codes), values.shape))]
    scales, offsets = (part.repeat_interleave(grid.block_size, 1) for part in written.scales_and_offsets())
    found = written.with_codes(codes.T)
    np.testing.assert_allclose(found.values(), scales * codes + offsets, rtol=1e-5, atol=1e-6)
    if grid.free_scales:
        scales = torch.rand(6, 512 // grid.block_size).half().float()
        found_scales, found_offsets = written.with_codes(codes.T, scales).scales_and_offsets()
        np.testing.assert_allclose(found_scales, scales, rtol=1e-5)
        np.testing.assert_allclose(found_offsets, written.scales_and_offsets()[1], atol=2e-5)
    elements, size = block_of(kind)
    assert sum(plane.bits for plane in planes) * elements // 8 < size
    assert 1 << sum(plane.bits for plane in planes) == len(grid.codes)


@pytest.mark.parametrize("kind", SCALES)
def test_rows_are_multiplied_where_ggml_reads_them(kind: str) -> None:
    assert SCALES.keys() == {*PACKINGS, *WHOLE_BLOCKS, "Q8_0", "F16"}
    importance = np.ones(512, dtype=np.float32) if kind in WHOLE_BLOCKS else None
    written = StoredMatrix.nearest(matrix(5, 512), kind, importance)
    factors = torch.tensor([1, 0.5, 1.03, 0.97, 2])[:, None]
    found = written.scaled(factors)
    np.testing.assert_allclose(found.values(), written.values() * factors.numpy(), rtol=3e-3, atol=5e-3)
    np.testing.assert_array_equal(found.data[0], written.data[0])


@pytest.mark.parametrize("kind", PACKINGS)
def test_the_nearest_code_is_chosen(kind: str) -> None:
    grid, codes = PACKINGS[kind].grid, torch.tensor(PACKINGS[kind].grid.codes)
    middles, ends = (codes[1:] + codes[:-1]) / 2, torch.tensor([-torch.inf, -1e38, 1e38, torch.inf])
    values = torch.cat([torch.linspace(codes[0] - 9.3, codes[-1] + 9.7, 9973), codes, middles, ends])
    found = round_to_codes_(values.clone(), grid)
    assert torch.isin(found, codes).all()
    assert torch.equal((values - found).abs(), (values[:, None] - codes).abs().min(1).values)


@pytest.mark.parametrize("kind", [*PACKINGS, *WHOLE_BLOCKS])
def test_chosen_numbers_lose_less_of_the_output_than_the_quantizers(kind: str) -> None:
    """Whatever some blocks hold: nothing, or next to nothing."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 64, generator=generator) @ torch.randn(64, 512, generator=generator)
    gram = x.T @ x / len(x)
    for size, share in ((1.0, 0.5 if kind in PACKINGS else 0.8), (0.0, 0.8), (1e-7, 0.8)):
        weight = 0.02 * torch.from_numpy(matrix(48, 512))
        weight[:, 64:96] *= size
        weight[5] = 0
        first = StoredMatrix.nearest(weight.numpy(), kind, gram.diagonal().numpy())
        found = choose_numbers(weight, first, gram)
        lost = [
            float((x @ (torch.from_numpy(each.values()) - weight).T).square().mean())
            for each in (found, first)
        ]
        assert lost[0] < share * lost[1]
        assert found.data.shape == first.data.shape
        assert np.isfinite(found.values()).all()
        assert np.abs(found.values()[5]).max() < 1e-4
    with pytest.raises(InputError):
        choose_numbers(weight, first, torch.full((512, 512), float("nan")))


def test_splitting_a_tensor_undoes_how_it_was_made(checkpoint: Path) -> None:
    with open_tensors(checkpoint) as stored:
        for spec in tensor_specs(read_layout(checkpoint)):
            if spec.is_matrix:
                parts = spec.split(spec.build(stored.read))
                assert list(parts) == [name for name, _ in spec.sources]
                for name, shape in spec.sources:
                    np.testing.assert_array_equal(parts[name], stored.read(name, shape))


def test_a_file_for_a_text_loses_less_on_it_in_the_same_types(checkpoint: Path, tmp_path: Path) -> None:
    quants = ("Q4_0", "Q2_K", "IQ3_XXS")
    for_text = export(checkpoint, tmp_path / "for-text", *quants)
    nearest = export(checkpoint, tmp_path / "nearest", *quants, gptq=False)
    (again, _), *_ = export(checkpoint, tmp_path / "again", "Q4_0")
    assert again.sha256 == for_text[0][0].sha256
    for (ours, after), (theirs, before) in zip(for_text, nearest, strict=True):
        assert ours.parity.kl_mean < 0.9 * theirs.parity.kl_mean
        assert (ours.file_bytes, ours.tensor_types) == (theirs.file_bytes, theirs.tensor_types)
        assert ours.calibration_tokens == IDS.numel()
        assert (theirs.gptq_tensors, theirs.calibration_sha256) == (0, ours.calibration_sha256), (
            "of the importance matrix"
        )
        same = {name for name in after if after[name].data.tobytes() == before[name].data.tobytes()}
        # An embedding that does not multiply has no inputs to round for.
        stay = {"token_embd.weight"} if "output.weight" in after else set()
        chosen = {name for name, tensor in after.items() if tensor.kind.name in (*PACKINGS, *WHOLE_BLOCKS)}
        assert same == after.keys() - (chosen - stay)
        assert ours.gptq_tensors == len(chosen - stay)


def test_a_tuned_file_loses_less_on_text_it_has_not_seen(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"gptq": False, "calibration": TEXT, "parity_windows": UNSEEN}
    found = [
        export(checkpoint, tmp_path / str(number), "Q8_0", "Q2_K", **settings, tune_scales=number > 0)
        for number in range(3)
    ]
    ((_, _), (plain, before)), ((eight, _), (tuned, after)), (_, (again, _)) = found
    assert eight.tuned_tensors == plain.tuned_tensors == 0
    assert tuned.sha256 == again.sha256
    assert tuned.parity.kl_mean < 0.99 * plain.parity.kl_mean
    assert (tuned.file_bytes, tuned.tensor_types) == (plain.file_bytes, plain.tensor_types)
    assert (tuned.gptq_tensors, tuned.calibration_tokens) == (0, TEXT.numel())
    changed = {name for name in after if after[name].data.tobytes() != before[name].data.tobytes()}
    stays = {"token_embd.weight", "output.weight", *(name for name in after if name.endswith(".bias"))}
    assert changed == after.keys() - stays
    assert tuned.tuned_tensors == len(changed)


def test_some_rows_at_a_time_are_all_rows(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("llama", intermediate_size=256)
    values = []
    # 100: a part has rows of two matrices that read the same, as gate and up do.
    for rows in (8192, 100):
        monkeypatch.setattr("exporters.gguf.matrix._ROWS", rows)
        (tmp_path / str(rows)).mkdir()
        file = draft_gguf(checkpoint, tmp_path / str(rows), ["Q4_0"], options())["Q4_0"]
        values.append({name: tensor.dequantize() for name, tensor in tensors(file).items()})
    for name, whole in values[0].items():
        assert float((whole == values[1][name]).mean()) > 0.99, name


def test_scales_of_a_model_in_16_bits_are_trained_in_float32(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("llama", intermediate_size=256)
    loaded = LoadedModel(model.to(torch.bfloat16), tokenizer, ModelSource("x", "folder", "x"))
    save_checkpoint(loaded, tmp_path / "model")
    settings = {"gptq": False, "tune_scales": True, "use_imatrix": False}
    found = [
        export(tmp_path / "model", tmp_path / dtype, "Q4_0", **settings, dtype=dtype)[0][0].tuned_tensors
        for dtype in ("bfloat16", "float32")
    ]
    assert found[0] == found[1] > 0


FLAT = torch.randint(0, 384, (4, 96), generator=torch.Generator().manual_seed(3))


def given(**settings: Any) -> ExportOptions:
    return ExportOptions(
        **({"calibration": FLAT, "n_threads": 1, "name": "m", "parity_windows": FLAT[:2]} | settings)
    )


@pytest.fixture(scope="module", params=[("qwen3", True), ("llama", False)], ids=str)
def pruned(make_checkpoint: MakeCheckpoint, request: pytest.FixtureRequest) -> Path:
    """Pruned; qwen3's q, k and v are one tensor."""
    model_type, tied = request.param
    return make_checkpoint(model_type, tied=tied, widths=(512, 256, 96, 40), intermediate_size=512)


def measured(pruned: Path, folder: Path, **settings: Any) -> Files:
    """Files of which types are measured."""
    found, _ = draft_files(pruned, folder, ["f32", "mixed:1B"], given(must_fit=False, **settings))
    return found


@pytest.fixture(scope="module")
def costs(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return measured(pruned, tmp_path_factory.mktemp("base"))


def bounds(costs: Files) -> tuple[int, int]:
    """Of the smallest file and of the one that loses least."""
    return costs.mixture(find_quant("mixed:1B"), FLAT).file_bytes, costs.mixture(
        find_quant("mixed:100MB"), FLAT
    ).file_bytes


def test_a_file_has_the_types_and_bytes_that_were_chosen(pruned: Path, costs: Files, tmp_path: Path) -> None:
    least, most = bounds(costs)
    losses = [
        costs.mixture(find_quant(f"mixed:{int(size)}B"), FLAT).loss for size in np.linspace(least, most, 6)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 5 * losses[-1]
    size = (2 * least + most) // 3
    name = f"mixed:{size}B"
    name_of_file = find_quant(name).name
    loose = {name_of_file: ParityLimits(kl_mean=10.0)}
    (record,) = export_gguf(pruned, tmp_path / "out", [name], given(limits=loose))
    assert record.quant == name_of_file
    assert record.file == f"m-{name_of_file}.gguf"
    assert size - 400 * len(costs.options or ()) < record.file_bytes <= size
    assert record.budget_bytes == size
    assert record.calibration_tokens == FLAT.numel()
    stored = {tensor.name: tensor.kind.name for tensor in read_gguf(tmp_path / "out" / record.file).tensors}
    assert record.chosen_types == {name: stored[name] for name in costs.options or ()}
    assert len(set(record.chosen_types.values()) - {"F16"}) > 1
    assert record.imatrix_tensors == len(costs.options or ())
    drafts = draft_gguf(pruned, tmp_path, [name], given())
    assert drafts[name_of_file].read_bytes() == (tmp_path / "out" / record.file).read_bytes()


def test_a_size_that_nothing_fits_says_the_smallest(pruned: Path, costs: Files, tmp_path: Path) -> None:
    least, _ = bounds(costs)
    small = f"mixed:{least - 1}B"
    with pytest.raises(InputError, match="text to choose types by"):
        export_gguf(pruned, tmp_path / "out", ["mixed:1MB"], given(calibration=None))
    with pytest.raises(InputError, match=rf"no types are small enough.*{least} bytes or more"):
        export_gguf(pruned, tmp_path / "out", [small], given())
    assert not (tmp_path / "out").exists()
    assert costs.mixture(find_quant(f"mixed:{least}B"), FLAT).file_bytes == least
    (path,) = draft_gguf(pruned, tmp_path, [small], given(must_fit=False)).values()
    assert path.stat().st_size == least


def test_without_importance_matrix_no_type_wants_one(pruned: Path, tmp_path: Path) -> None:
    costs = measured(pruned, tmp_path, use_imatrix=False)
    assert costs.mixed_imatrix == {}
    least, _ = bounds(costs)
    (path,) = draft_gguf(pruned, tmp_path, [f"mixed:{least}B"], given(use_imatrix=False)).values()
    assert not {"IQ3_S", "IQ3_XXS", "IQ2_S"} & {tensor.kind.name for tensor in read_gguf(path).tensors}


def test_rounding_is_the_quantizers(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    pruned = make_checkpoint("llama", widths=(512, 256, 512, 512), intermediate_size=512)
    names = ["f32", "Q2_K", "IQ3_S", "IQ4_NL", "Q4_0"]
    _, (plain, *written) = draft_files(pruned, tmp_path, names, given(gptq=False))
    base = {tensor.name: tensor for tensor in read_gguf(plain.path).tensors}
    for file in written:
        tensors = {tensor.name: tensor for tensor in read_gguf(file.path).tensors}
        for name in ("blk.1.ffn_down.weight", "blk.2.attn_q.weight"):
            kind = tensors[name].kind.name
            found = StoredMatrix.nearest(base[name].dequantize(), kind, file.imatrix[name])
            assert np.array_equal(found.values(), tensors[name].dequantize()), (file.path.name, name)


def test_predicted_loss_is_the_measured_divergence(make_checkpoint: MakeCheckpoint) -> None:
    """Of random changes, which is what the prediction takes rounding for."""
    pruned = make_checkpoint("llama")
    names = ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj", "lm_head", LOOKUP]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 384, (16, 96), generator=generator)
    dense = load_pruned(pruned, dtype=torch.float32)
    before = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    moments = collect_weight_moments(dense, names, ids)
    assert {name: parameter.requires_grad for name, parameter in dense.named_parameters()} == before
    assert not any(module._forward_hooks for module in dense.modules())
    for name in names:
        changed = load_pruned(pruned, dtype=torch.float32)
        if name in ("lm_head", LOOKUP):  # apart, as the prediction has them
            changed.lm_head.weight = torch.nn.Parameter(changed.lm_head.weight.detach().clone())
        module = changed.model.embed_tokens if name == LOOKUP else changed.get_submodule(name)
        change = torch.randn(module.weight.shape, generator=generator) * 0.02 * module.weight.detach().std()
        with torch.no_grad():
            module.weight += change
            windows = ([(dense(w[None]).logits[0], changed(w[None]).logits[0], w[1:])] for w in ids)
            measured = divergence_from_logits(windows).kl_mean
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

"""GGUF files whose numbers are chosen, or whose scales are trained, for a text: what changes, and what they lose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InputError
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.models.source import LoadedModel, ModelSource
from exporters.checkpoint_reader import open_tensors
from exporters.export_record import ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.gguf.architecture import read_layout
from exporters.gguf.export import export_gguf
from exporters.gguf.files import draft_gguf
from exporters.gguf.matrix import PACKINGS, SCALES, WHOLE_BLOCKS, FileNumbers, StoredMatrix, choose_numbers
from exporters.gguf.quants import QUANTS, block_of
from exporters.gguf.tensors import tensor_specs
from exporters.quantize.rounding import round_to_codes_
from exporters.quantize.training import TunedScales

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
        assert (theirs.gptq_tensors, theirs.calibration_sha256) == (0, None)
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


def test_factors_are_those_of_the_modules_rows(checkpoint: Path, tmp_path: Path) -> None:
    path = draft_gguf(checkpoint, tmp_path, ["Q8_0"], options())["Q8_0"]
    numbers = FileNumbers(path, path, read_layout(checkpoint))
    specs = [spec for spec in numbers.specs if spec.is_matrix]
    shapes = {name.removesuffix(".weight"): shape for spec in specs for name, shape in spec.sources}
    rows = {name: 2.0 ** (torch.arange(shape[0]) % 5) for name, shape in shapes.items()}
    for spec in specs:
        tuned = numbers.tuned(spec, TunedScales(rows, {}))
        assert isinstance(tuned, StoredMatrix)
        before, after = (spec.split(each.values()) for each in (numbers.matrix(spec), tuned))
        for name, values in before.items():
            factors = rows[name.removesuffix(".weight")].numpy()[:, None]
            np.testing.assert_array_equal(after[name], values * factors)


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

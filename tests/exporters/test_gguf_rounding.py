"""GGUF files whose numbers are chosen for a text: how ggml's types are packed, and what a file loses then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InputError
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from exporters.checkpoint_reader import open_tensors
from exporters.export_record import ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.gguf import QUANTS, export_gguf
from exporters.gguf.architecture import read_layout
from exporters.gguf.files import draft_gguf
from exporters.gguf.matrix import PACKINGS, WHOLE_BLOCKS, StoredMatrix, block_of, choose_numbers
from exporters.gguf.tensors import tensor_specs
from exporters.quantize.rounding import round_to_codes_

MakeCheckpoint = Callable[..., Path]
# Of few tokens, so that inputs depend on each other, as those of trained models do.
IDS = torch.randint(0, 24, (8, 96), generator=torch.Generator().manual_seed(3))


def options(**settings: Any) -> ExportOptions:
    loose = dict.fromkeys(QUANTS, ParityLimits(kl_mean=10.0)) | {"f32": ParityLimits(max_logit_diff=1e-3)}
    given = {"calibration": IDS, "n_threads": 1, "name": "m", "parity_windows": IDS[:4], "limits": loose}
    return ExportOptions(**(given | settings))


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def some_codes(kind: str, values: np.ndarray[Any, Any]) -> torch.Tensor:
    codes = torch.tensor(PACKINGS[kind].grid.codes)
    return codes[torch.from_numpy(np.random.default_rng(1).integers(0, len(codes), values.shape))]


@pytest.mark.parametrize("kind", PACKINGS)
def test_codes_stand_where_ggml_reads_them(kind: str) -> None:
    grid, values = PACKINGS[kind].grid, matrix(6, 512)
    values[3, :256] = 0
    written, codes = StoredMatrix.nearest(values, kind, None), some_codes(kind, values)
    scales, offsets = (part.repeat_interleave(grid.block_size, 1) for part in written.scales_and_offsets())
    found = written.with_codes(codes.T)
    np.testing.assert_allclose(found.values(), scales * codes + offsets, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PACKINGS)
def test_the_nearest_code_is_chosen(kind: str) -> None:
    grid, codes = PACKINGS[kind].grid, torch.tensor(PACKINGS[kind].grid.codes)
    middles, ends = (codes[1:] + codes[:-1]) / 2, torch.tensor([-torch.inf, -1e38, 1e38, torch.inf])
    values = torch.cat([torch.linspace(codes[0] - 9.3, codes[-1] + 9.7, 9973), codes, middles, ends])
    found = round_to_codes_(values.clone(), grid)
    assert torch.isin(found, codes).all()
    assert torch.equal((values - found).abs(), (values[:, None] - codes).abs().min(1).values)


@pytest.mark.parametrize("kind", [kind for kind, row in PACKINGS.items() if row.grid.free_scales])
def test_free_scales_are_stored_as_they_are(kind: str) -> None:
    values = matrix(4, 64)
    written, scales = StoredMatrix.nearest(values, kind, None), torch.rand(4, 2).half().float()
    found, offsets = written.with_codes(some_codes(kind, values).T, scales).scales_and_offsets()
    np.testing.assert_allclose(found, scales, rtol=1e-5)
    np.testing.assert_allclose(offsets, written.scales_and_offsets()[1], atol=2e-5)


@pytest.mark.parametrize("kind", [*PACKINGS, *WHOLE_BLOCKS])
def test_chosen_numbers_lose_less_of_the_output_than_the_quantizers(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 64, generator=generator) @ torch.randn(64, 512, generator=generator)
    weight = torch.from_numpy(matrix(48, 512))
    weight[5] = 0
    gram = x.T @ x / len(x)

    def lost(found: StoredMatrix) -> float:
        return float((x @ (torch.from_numpy(found.values()) - weight).T).square().mean())

    first = StoredMatrix.nearest(weight.numpy(), kind, gram.diagonal().numpy())
    found = choose_numbers(weight, first, gram)
    assert lost(found) < (0.5 if kind in PACKINGS else 0.8) * lost(first)
    assert found.data.shape == first.data.shape
    assert np.abs(found.values()[5]).max() < 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "IQ4_NL", "Q4_K"])
def test_what_lies_on_its_grid_is_kept(kind: str) -> None:
    first = StoredMatrix.nearest(matrix(16, 256), kind, None)
    exact = torch.from_numpy(first.values())
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    found = choose_numbers(exact, first, x.T @ x / len(x))
    np.testing.assert_allclose(found.values(), exact, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [*PACKINGS, *WHOLE_BLOCKS])
@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_blocks_of_nothing_take_nothing_from_the_others(kind: str, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 64, generator=generator) @ torch.randn(64, 512, generator=generator)
    weight = 0.02 * torch.from_numpy(matrix(48, 512))
    weight[:, 64:96] *= size
    gram = x.T @ x / len(x)

    def lost(found: StoredMatrix) -> float:
        return float((x @ (torch.from_numpy(found.values()) - weight).T).square().mean())

    first = StoredMatrix.nearest(weight.numpy(), kind, gram.diagonal().numpy())
    found = choose_numbers(weight, first, gram)
    assert lost(found) < 0.8 * lost(first)
    assert np.isfinite(found.values()).all()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"widths": (96, 64, 128, 32), "silent": (2,), "groups": {1: (0,)}}),
        ("qwen3", {"tied": True, "widths": (96, 64, 128, 32)}),
        ("qwen3", {"tied": False, "widths": (96, 64, 128, 32)}),
    ],
    ids=["deci without heads", "openelm: q, k and v fused", "qwen3: padded"],
)
def test_splitting_a_tensor_undoes_how_it_was_made(
    make_checkpoint: MakeCheckpoint, model_type: str, settings: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(model_type, **settings)
    with open_tensors(checkpoint) as tensors:
        specs = [spec for spec in tensor_specs(read_layout(checkpoint)) if len(spec.shape) == 2]
        for spec in specs:
            parts = spec.split(spec.build(tensors))
            assert list(parts) == [name for name, _ in spec.sources]
            for name, shape in spec.sources:
                np.testing.assert_array_equal(parts[name], tensors.read(name, shape))


def _export(
    checkpoint: Path, output: Path, quants: tuple[str, ...], **settings: Any
) -> tuple[ExportRecord, ...]:
    return export_gguf(checkpoint, output, quants, options(**settings))


MODELS = [
    ("llama", {"tied": False, "intermediate_size": 256, "widths": (256, 64, 128, 64), "silent": (2,)}),
    ("mistral", {"intermediate_size": 256, "widths": (256, 64, 128, 64), "groups": {1: (0,)}}),
    ("qwen3", {"tied": True, "intermediate_size": 256, "widths": (256, 64, 128, 64)}),
]


@pytest.mark.parametrize(("model_type", "settings"), MODELS, ids=lambda value: str(value)[:60])
def test_a_file_for_a_text_loses_less_on_it_in_the_same_types(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    checkpoint, quants = make_checkpoint(model_type, **settings), ("Q4_0", "Q2_K", "IQ3_XXS")
    for_text = _export(checkpoint, tmp_path / "for-text", quants)
    nearest = _export(checkpoint, tmp_path / "nearest", quants, gptq=False)
    for ours, theirs in zip(for_text, nearest, strict=True):
        assert ours.parity.kl_mean < 0.9 * theirs.parity.kl_mean
        assert (ours.file_bytes, ours.tensor_types) == (theirs.file_bytes, theirs.tensor_types)
        assert ours.calibration_tokens == IDS.numel()
        assert (theirs.gptq_tensors, theirs.calibration_sha256) == (0, None)
        stored_as = {name: t.kind.name for name, t in _tensors(tmp_path / "for-text" / ours.file).items()}
        if "output.weight" in stored_as:
            del stored_as["token_embd.weight"]  # it does not multiply
        assert ours.gptq_tensors == sum(kind in (*PACKINGS, *WHOLE_BLOCKS) for kind in stored_as.values())


def _tensors(path: Path) -> dict[str, GGUFTensor]:
    return {tensor.name: tensor for tensor in read_gguf(path).tensors}


def test_nothing_but_numbers_changes_and_the_same_text_gives_the_same_bytes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", tied=False, intermediate_size=256)
    files = {}
    for name, settings in {
        "a": {},
        "b": {},
        "other": {"calibration": IDS[:2]},
        "off": {"gptq": False},
    }.items():
        (tmp_path / name).mkdir()
        files[name] = draft_gguf(checkpoint, tmp_path / name, ["Q4_0"], options(**settings))["Q4_0"]
    whole = {name: path.read_bytes() for name, path in files.items()}
    assert whole["a"] == whole["b"] != whole["other"]
    ours, theirs = _tensors(files["a"]), _tensors(files["off"])
    start = min(tensor.offset for tensor in ours.values())
    assert whole["a"][:start] == whole["off"][:start]
    same = {name for name in ours if ours[name].data.tobytes() == theirs[name].data.tobytes()}
    # An embedding that does not multiply has no inputs to round for.
    expected = {name for name, t in ours.items() if t.kind.name not in PACKINGS} | {"token_embd.weight"}
    assert same == expected


def test_some_rows_at_a_time_are_all_rows(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("llama", tied=True, intermediate_size=256)
    values = []
    # 100: a part has rows of two matrices that read the same, as gate and up do.
    for rows in (8192, 100):
        monkeypatch.setattr("exporters.gguf.numbers._ROWS", rows)
        (tmp_path / str(rows)).mkdir()
        file = draft_gguf(checkpoint, tmp_path / str(rows), ["Q4_0"], options())["Q4_0"]
        values.append({name: tensor.dequantize() for name, tensor in _tensors(file).items()})
    for name, whole in values[0].items():
        assert float((whole == values[1][name]).mean()) > 0.99, name


def test_a_file_of_eight_bits_is_the_quantizers(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    (ours,) = _export(checkpoint, tmp_path / "ours", ("Q8_0",))
    (theirs,) = _export(checkpoint, tmp_path / "theirs", ("Q8_0",), gptq=False)
    assert ours.sha256 == theirs.sha256
    assert ours.gptq_tensors == 0


def test_text_that_the_model_makes_nothing_finite_of_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    weight = torch.from_numpy(matrix(4, 64))
    first = StoredMatrix.nearest(weight.numpy(), "Q4_0", None)
    with pytest.raises(InputError):
        choose_numbers(weight, first, torch.full((64, 64), float("nan")))


def test_every_type_of_a_quantization_divides_into_its_planes() -> None:
    for kind, packing in PACKINGS.items():
        elements, size = block_of(kind)
        used = sum(plane.bits for plane in packing.planes) * elements // 8
        assert used < size
        assert 1 << sum(plane.bits for plane in packing.planes) == len(packing.grid.codes)
        assert elements % packing.grid.block_size == 0

"""Proof of a file: what a broken writer would do to one matrix is found, and what logits may differ by is held."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InputError, LimitError
from cfsp.models.checkpoint import load_pruned
from cfsp.models.gguf_file import read_gguf
from cfsp.text.tokens import TokenWindows
from exporters.export_record import ParityLimits
from exporters.family import ExportOptions, MadeFile
from exporters.gguf.export import check_numbers, export_gguf
from exporters.gguf.files import WrittenFile, draft_files, draft_gguf
from exporters.gguf.matrix import SCALES, StoredMatrix
from exporters.gguf.quants import QUANTS
from exporters.onnx.export import check_numbers as check_graph_numbers
from exporters.onnx.export import export_onnx
from exporters.onnx.variants import VARIANTS
from exporters.proof import Reference, check_limits, compare
from exporters.recipe import Recipe, read_recipe

MakeCheckpoint = Callable[..., Path]
IDS = torch.randint(0, 24, (8, 96), generator=torch.Generator().manual_seed(3))
LOOSE = {name: ParityLimits() for name in (*VARIANTS, *QUANTS) if name not in ("fp32", "f32")}
OPTIONS = ExportOptions(
    calibration=IDS, parity_windows=IDS[:2], n_threads=1, name="m", mixed_bytes=10**6, limits=LOOSE
)
HEAD = 64
QUANTIZED = {quant.base_type: name for name, quant in QUANTS.items() if not quant.is_plain}.values()
Rows = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(
        "llama", hidden_size=256, intermediate_size=256, head_dim=HEAD, num_hidden_layers=2, tied=True
    )


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draft_gguf(checkpoint, tmp_path_factory.mktemp("base"), ["f32"])["f32"]


def _two_rows(name: str, kind: str, rows: Rows) -> Rows | None:
    return rows[np.r_[0:3, 7, 4:7, 3, 8 : len(rows)]] if name == "blk.1.ffn_up.weight" else None


def _two_heads(name: str, kind: str, rows: Rows) -> Rows | None:
    swapped = np.r_[HEAD : 2 * HEAD, 0:HEAD, 2 * HEAD : len(rows)]
    return rows[swapped] if name == "blk.0.attn_q.weight" else None


def _scales_of_a_block(factor: float, name: str, kind: str, rows: Rows) -> Rows | None:
    if not name.startswith("blk.1.") or kind not in SCALES:
        return None
    return StoredMatrix(kind, rows).scaled(torch.full((len(rows), 1), factor)).data


def _embedding_row(name: str, kind: str, rows: Rows) -> Rows | None:
    return np.concatenate([rows[:9], 0 * rows[:1], rows[10:]]) if name == "token_embd.weight" else None


FAULTS: dict[str, Callable[[str, str, Rows], Rows | None]] = {
    "two rows of a matrix change places": _two_rows,
    "two heads change places": _two_heads,
    "scales of a block are 5 % larger": lambda *given: _scales_of_a_block(1.05, *given),
    "scales of a block are 5 % smaller": lambda *given: _scales_of_a_block(0.95, *given),
    "a row of the embedding is gone": _embedding_row,
}


def _damaged(file: WrittenFile, fault: Callable[[str, str, Rows], Rows | None]) -> WrittenFile:
    path, changed = file.path.with_suffix(".damaged"), 0
    shutil.copyfile(file.path, path)
    with path.open("r+b") as stream:
        for tensor in read_gguf(file.path).tensors:
            if len(tensor.shape) == 2:
                data = fault(tensor.name, tensor.kind.name, tensor.data.reshape(tensor.shape[0], -1))
                if data is not None:
                    stream.seek(tensor.offset)
                    stream.write(data.tobytes())
                    changed += 1
    assert changed
    return replace(file, path=path)


@pytest.mark.parametrize(
    ("quant", "gptq"), [*((quant, True) for quant in QUANTIZED), ("Q4_0", False), ("IQ3_XXS", False)]
)
def test_a_broken_matrix_of_a_gguf_file_is_found(
    checkpoint: Path, base: Path, tmp_path: Path, quant: str, gptq: bool
) -> None:
    _, (file,) = draft_files(checkpoint, tmp_path, [quant], replace(OPTIONS, gptq=gptq))
    check_numbers(base, file)
    for fault in FAULTS.values():
        with pytest.raises(LimitError):
            check_numbers(base, _damaged(file, fault))


def test_a_broken_writer_fails_the_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.gguf import files

    quantize = files.quantize

    def broken(source: Path, path: Path, *args: Any, **settings: Any) -> None:
        quantize(source, path, *args, **settings)
        _damaged(WrittenFile(path, QUANTS["Q4_0"]), _two_heads).path.replace(path)

    monkeypatch.setattr(files, "quantize", broken)
    with pytest.raises(
        LimitError, match=r"row \d+ of blk.0.attn_q.weight in m-Q4_0.gguf is not the checkpoint's"
    ):
        export_gguf(checkpoint, tmp_path / "out", ["Q4_0"], replace(OPTIONS, calibration=None))
    assert not (tmp_path / "out").exists()


def _rows(order: np.ndarray[Any, Any]) -> Callable[[Rows], Rows]:
    return lambda rows: rows[np.r_[order, len(order) : len(rows)]]


def _without_ninth(rows: Rows) -> Rows:
    return np.concatenate([rows[:9], 0 * rows[:1], rows[10:]])


GRAPH_FAULTS: dict[str, tuple[str, Callable[[Rows], Rows]]] = {
    "two rows of a matrix change places": (
        r"model.layers.1.mlp.up_proj.weight.*",
        _rows(np.r_[0:3, 7, 4:7, 3]),
    ),
    "two heads change places": (
        r"model.layers.0.self_attn.q(kv)?_proj(.0)?.weight.*",
        _rows(np.r_[HEAD : 2 * HEAD, 0:HEAD]),
    ),
    "scales of a block are 5 % larger": (
        r"model.layers.1.*(\.scale|_proj.weight)",
        lambda rows: (rows * 1.05).astype(rows.dtype),
    ),
    "a row of the embedding is gone": (r"model.embed_tokens(.0)?.weight(\.scale)?", _without_ninth),
}


def _damaged_graph(path: Path, names: str, fault: Callable[[Rows], Rows]) -> Path:
    model, changed = ir.load(path), 0
    for name, value in model.graph.initializers.items():
        if value.const_value is None or not re.fullmatch(names, name):
            continue
        old = np.array(value.const_value.numpy())
        # Of a Linear that is no MatMulNBits' the transposed matrix is stored.
        turned = old.ndim == 2 and not name.endswith(".scale") and "embed_tokens" not in name
        new = fault(old.T).T if turned else fault(old)
        value.const_value, changed = ir.tensor(np.ascontiguousarray(new), name=name), changed + 1
    assert changed
    broken = path.with_name("damaged.onnx")
    ir.save(model, broken)
    return broken


@pytest.mark.parametrize("variant", [name for name, row in VARIANTS.items() if not row.portable])
def test_a_broken_matrix_of_a_graph_is_found(checkpoint: Path, tmp_path: Path, variant: str) -> None:
    (record,) = export_onnx(checkpoint, tmp_path / "out", [variant], OPTIONS)
    path, model = tmp_path / "out" / record.file, load_pruned(checkpoint, dtype=torch.float32)
    check_graph_numbers(path, model)
    for names, fault in GRAPH_FAULTS.values():
        with pytest.raises(LimitError):
            check_graph_numbers(_damaged_graph(path, names, fault), model)


@pytest.mark.parametrize(("export", "name"), [(export_gguf, "Q3_K_S"), (export_onnx, "int4")])
def test_numbers_chosen_for_a_text_give_way_to_plain_ones_that_lose_less(
    checkpoint: Path, tmp_path: Path, export: Callable[..., Any], name: str
) -> None:
    other_text = torch.randint(200, 380, (2, 96), generator=torch.Generator().manual_seed(1))
    one_token = replace(OPTIONS, calibration=torch.full((2, 64), 7), parity_windows=other_text)
    (kept,) = export(checkpoint, tmp_path / "kept", [name], one_token)
    assert kept.plain_kl < kept.rounded_kl
    assert kept.parity.kl_mean == kept.parity.limits["kl_mean"] == kept.plain_kl
    assert kept.gptq_tensors == 0
    assert any("plain quantizer's" in warning for warning in kept.warnings)
    (chosen,) = export(checkpoint, tmp_path / "chosen", [name], OPTIONS)
    assert chosen.rounded_kl < chosen.plain_kl == chosen.parity.limits["kl_mean"]
    assert chosen.parity.kl_mean == chosen.rounded_kl
    assert not any("plain quantizer's" in warning for warning in chosen.warnings)
    assert {path.name for path in (tmp_path / "kept").rglob("*")} == {
        path.name for path in (tmp_path / "chosen").rglob("*")
    }


@pytest.mark.parametrize("name", ["Q3_K_S", "mixed:500kB"])
def test_a_made_file_is_taken_and_proven(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Its recipe is in the file and in its record; one of another recipe, or that was changed, is refused."""
    how = replace(OPTIONS, recipe=Recipe(calibration=("self",), nsamples=2, seqlen=64, seed=3))
    (record,) = export_gguf(checkpoint, tmp_path / "made", [name], how)
    path = tmp_path / "made" / record.file
    assert read_recipe(read_gguf(path).metadata, "the file") == record.recipe
    assert record.recipe.differs_from(replace(record.recipe, seed=4)) == "seed is 4, here 3"
    again = replace(how, made={record.quant: MadeFile(path, record)})
    (taken,) = export_gguf(checkpoint, tmp_path / "taken", [name], again)
    assert taken == record
    assert (tmp_path / "taken" / taken.file).read_bytes() == path.read_bytes()
    other = replace(again, calibration=torch.full((2, 64), 7))
    with pytest.raises(InputError, match="is made otherwise: rounding_sha256 is"):
        export_gguf(checkpoint, tmp_path / "other", [name], other)
    with path.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"?")
    with pytest.raises(InputError, match="is not the file of its record"):
        export_gguf(checkpoint, tmp_path / "other", [name], again)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("largest", "difference", "fits"),
    [(5, 0.9e-3, True), (5, 1.1e-3, False), (40, 3.8e-3, True), (40, 4.2e-3, False)],
)
def test_larger_logits_may_differ_by_as_large_a_share(largest: float, difference: float, fits: bool) -> None:
    ids, draws = torch.arange(16).reshape(2, 8), torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 8, 32, generator=draws), torch.randn(64, 32, generator=draws)
    head *= largest / (hidden @ head.T).abs().max()

    def run(window: Any) -> Iterator[Any]:
        logits = (hidden[int(window[0]) // 8] @ head.T).numpy()
        logits[3, 5] += difference
        yield from np.split(logits, 2)

    reference = Reference(TokenWindows(ids, "text", ""), hidden, head)
    report = compare(reference, run, {"max_logit_diff": 1e-3, "kl_mean": 0.1})
    assert report.limits == {"max_logit_diff": pytest.approx(max(1e-3, largest * 1e-4)), "kl_mean": 0.1}
    if fits:
        check_limits(report, "file")
    else:
        with pytest.raises(LimitError, match="max_logit_diff"):
            check_limits(report, "file")

"""The commands on a tiny model, in this process, with the real libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.models.reference import load_model
from phoneready.main import main

TinyPath = Callable[..., Path]
Shown = Callable[..., Any]
Refused = Callable[..., str]
Capture = pytest.CaptureFixture[str]
TEXT = ["--calibration", "builtin:python-docs", "--set", "nsamples=2", "--set", "seqlen=32"]
SMALL = [*TEXT, "--set", "align=1"]


def warned(capsys: Capture) -> list[str]:
    """What a command has warned of, in order."""
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


def test_a_plan_is_made_shown_and_applied_at_another_ratio(
    dense: str,
    tmp_path: Path,
    shown: Shown,
    refused: Refused,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    made = shown("prune", dense, "-o", plan, "--prune-ratio", "0.25", *SMALL)
    assert (made["keep_ratio"], made["settings"]["align"]) == (pytest.approx(0.75), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    apply = ["prune", dense, "-o", str(out), "--plan", str(plan), "--prune-ratio", "0.5", *TEXT[2:]]
    applied = shown(*apply)
    assert (applied["keep_ratio"], applied["calibration"]) == (pytest.approx(0.5), ["builtin:python-docs"])
    assert (out / "pruning_plan.json").is_file()
    assert "--force" in refused(*apply)
    assert main([*apply, "--force"]) == 0
    said = capsys.readouterr().out
    assert "50.00% of the FFN channels" in said
    forecast = made["forecast"]
    assert f"{forecast['losses'][0]:.2f} at 10%, {forecast['losses'][1]:.2f} at 20%" in said
    monkeypatch.setenv("PHONEREADY_STREAM", "always")
    read = shown("prune", dense, "-o", plan, "--force", "--prune-ratio", "0.5", *SMALL)["forecast"]
    assert read == forecast | {"losses": pytest.approx(forecast["losses"], abs=2e-4)}


def test_all_axes_go_together(dense: str, tmp_path: Path, capsys: Capture) -> None:
    """Each export is proven against the checkpoint before it appears."""
    folder = tmp_path / "narrow"
    options = ["--prune-ratio", "0.25", "--vocabulary", "300", "--blocks", "1"]
    options += ["--attentions", "1", "--kv-groups", "0.25"]
    assert main(["prune", dense, "-o", str(folder), *options, *SMALL]) == 0
    said = capsys.readouterr().out
    for line in (
        "3 blocks of",
        "Blocks removed: ",
        "Attentions, with these blocks gone, removed: ",
        "KV groups kept: ",
    ):
        assert line in said
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["vocab_size"]) == (3, 300)
    files = ["--to", "f32,fp32", "--threads", "1"]
    assert main(["quantize", str(folder), "-o", str(tmp_path / "files"), *files]) == 0


def test_options_that_nothing_reads_are_named_and_change_nothing(
    dense: str, pruned: Path, tmp_path: Path, capsys: Capture
) -> None:
    plain, more, saved = tmp_path / "plain.json", tmp_path / "more.json", tmp_path / "saved.json"
    asked = ["prune", dense, "--prune-ratio", "0.25", "--set", "uniform_width=true", *SMALL]
    assert main([*asked, "-o", str(plain)]) == 0
    assert not warned(capsys)
    idle = ["--set", "strength=2", "--set", "vocabulary_text=missing.txt"]
    assert main([*asked, "-o", str(more), *idle]) == 0
    said = warned(capsys)
    assert said == [
        "--set vocabulary_text has no effect without a number of tokens to keep",
        "--set strength has no effect with one width for all blocks",
    ]
    plans = [json.loads(path.read_text("utf-8")) for path in (plain, more)]
    assert plans[1].pop("warnings") == said
    assert plans[0] == plans[1]

    asked = [
        "eval",
        dense,
        "--set",
        "seqlen=32",
        "--set",
        "max_windows=1",
        "--prompts",
        "none",
        "--save",
        str(saved),
    ]
    assert main([*asked, "--set", "limit=8"]) == 0
    said = warned(capsys)
    assert said == ["--set limit has no effect without tasks"]
    assert json.loads(saved.read_text("utf-8"))["warnings"] == said

    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    asked = ["quantize", str(pruned), "--to", "Q8_0", "--threads", "1", "--set", "name=m"]
    assert main([*asked, "-o", str(tmp_path / "plain")]) == 0
    assert not warned(capsys)
    idle = ["--calibration", "missing.txt", "--set", "opset=18", "--set", "mixed_bytes=80M", "--tune-scales"]
    assert main([*asked, "-o", str(tmp_path / "out"), *idle, "--set", "nsamples=8"]) == 0
    said = warned(capsys)
    assert said == [
        "--text has no effect without files of few bits",
        "--set opset has no effect without ONNX variants",
        "--tune-scales has no effect without GGUF files of up to 6 bits",
        "--set mixed_bytes has no effect without the ONNX variant int4-mixed",
        "--set nsamples has no effect without text to round for",
    ]
    assert json.loads((tmp_path / "out" / "export.json").read_text("utf-8"))["warnings"] == said
    files = [(tmp_path / name / "m-Q8_0.gguf").read_bytes() for name in ("plain", "out")]
    assert files[0] == files[1]


def test_export_and_bench(
    pruned: Path, tmp_path: Path, shown: Shown, refused: Refused, capsys: Capture
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output, records = tmp_path / "out", tmp_path / "records.jsonl"
    kinds = ["-o", output, "--to", "f32,fp32,int8", "--threads", "1"]
    exports = shown("quantize", pruned, *kinds)["exports"]
    assert [export["quant"] for export in exports] == ["f32", "fp32", "int8"]
    assert exports[0]["parity"]["max_logit_diff"] < 1e-3
    assert {path.name for path in output.iterdir()} == {"gguf", "onnx"}
    file, *graphs = (output / export["file"] for export in exports)
    assert file.stat().st_size == exports[0]["file_bytes"]
    assert "--force" in refused("quantize", pruned, *kinds)

    def rows(*arguments: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["bench", *map(str, arguments), "--output", "jsonl"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    sizes = ["-p", "8", "-n", "0", "--set", "ttft=0", "-r", "1", "-t", "1"]
    measured = rows(file, *sizes, "--record", records)
    assert {row["test"] for row in measured} == {"load", "pp8"}
    folders = {"onnxruntime": output / "onnx" / "fp32", "onnxruntime-genai": output / "onnx" / "int8"}
    for (engine, folder), graph in zip(
        folders.items(), ("model_last.onnx", "model_quantized_last.onnx"), strict=True
    ):
        found = rows(folder, *sizes[:2], "-n", "4", "--set", "ttft=4", *sizes[6:], "--engine", engine)
        assert [row["test"] for row in found] == ["load", "pp8", "tg4", "ttft4"]
        for row in found:
            used = Path(row["model_filename"])
            assert (row["engine"], used.name) == (engine, graph)
            assert row["file_size_bytes"] > 2 * used.stat().st_size, (
                "the weights beside a graph belong to its size"
            )
    assert all(graph.is_file() for graph in graphs)

    # What would be lost, or destroyed, after all is measured is refused before.
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    onnx = output / "onnx" / "fp32" / "onnx" / "model.onnx"
    for reason, arguments in {
        "no file of records": [file, *sizes, "--record", file],
        "is a directory": [file, *sizes, "--record", tmp_path],
        "given twice": [file, file, *sizes],
        "native runs only GGUF files": [file, onnx, *sizes, "--on", "local", "--on", "native"],
    }.items():
        assert reason in refused("bench", *arguments)
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_export_refuses_text_of_another_vocabulary(
    dense: str, trimmed: Path, tmp_path: Path, refused: Refused
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    assert (
        main(
            [
                "quantize",
                str(trimmed),
                "-o",
                str(tmp_path / "file"),
                "--to",
                "f32",
                "--set",
                "name=m",
                "--text",
                "none",
            ]
        )
        == 0
    )
    asked = ["-o", tmp_path / "out", "--to", "Q4_0", "--set", f"dense={dense}", *TEXT]
    assert "another vocabulary" in refused("quantize", tmp_path / "file" / "m-f32.gguf", *asked)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_takes_a_model_that_is_no_folder_and_rounds_it_for_a_text(
    sure_folder: TinyPath, write_gguf: Callable[..., None], tmp_path: Path, shown: Shown
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    loaded = load_model(str(sure_folder(intermediate_size=256)))
    write_gguf(tmp_path / "m.gguf", loaded.model, loaded.tokenizer)
    sized = ["--calibration", "builtin:python-docs", "--set", "nsamples=16", "--set", "seqlen=64"]
    records = {}
    ways = {
        "text": sized,
        "off": [*sized, "--set", "gptq=false"],
        "tuned": [*sized, "--tune-scales"],
        "none": ["--text", "none"],
    }
    for name, more in ways.items():
        output = tmp_path / name
        (records[name],) = shown("quantize", tmp_path / "m.gguf", "--to", "Q4_0", "-o", output, *more)[
            "exports"
        ]
        assert [file.name for file in output.glob("*.gguf")] == [records[name]["file"]]
    assert records["text"]["gptq_tensors"] > 0
    assert records["off"]["gptq_tensors"] == records["none"]["gptq_tensors"] == 0
    # A model that nothing was measured of has the importance matrix of the text.
    assert records["text"]["imatrix_tensors"] == records["off"]["imatrix_tensors"] > 0
    assert [record["calibration_tokens"] for record in records.values()] == [1024, 1024, 1024, 0]
    assert records["none"]["imatrix_tensors"] == 0
    assert [name for name, record in records.items() if record["tuned_tensors"]] == ["tuned"]
    assert len({record["sha256"] for record in records.values()}) == 4

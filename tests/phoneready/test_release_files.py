"""What lies beside the models of a release: hashes that find every change, a card, a Modelfile, a bill of materials."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import typer
from huggingface_hub import ModelCard

from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.models.checkpoint import CheckpointInfo
from cfsp.models.shape import ModelShape
from phoneready.main import app, main
from phoneready.publish.manifest import (
    Content,
    ReleaseManifest,
    describe_files,
    make_manifest,
    read_sums,
    single_commands,
    verify_release,
)
from phoneready.publish.publish import make_bom, model_card_text, modelfile_text, place, seal_release
from phoneready.report.report import ReportInput
from phoneready.settings.schema import ReleaseConfig

MakeReportInput = Callable[..., ReportInput]


def make(report: ReportInput, **source: Any) -> tuple[ReportInput, ReleaseManifest]:
    """The records with another source, and their manifest."""
    figures = replace(report.figures, source=replace(report.figures.source, **source))
    shape = ModelShape.of_ffn_widths((192,) * 6)
    info = CheckpointInfo(figures.source, shape, "34" * 32, "56" * 32, "float32", {"torch": "2.9"}, 0)
    manifest = make_manifest(report.config, figures, info, [])
    return report._replace(figures=figures), manifest


@pytest.fixture
def release(make_report_input: MakeReportInput, tmp_path: Path) -> Path:
    """A small sealed release folder: GGUF files, one more file, one inside a folder."""
    folder = tmp_path / "release"
    _, manifest = make(make_report_input("Tiny"))
    (folder / "Tiny-onnx" / "onnx").mkdir(parents=True)
    (folder / "stages").mkdir()
    (folder / "stages" / "work").write_text("not part of it", encoding="utf-8")
    (folder / ".phoneready.lock").touch()
    (folder / "history.jsonl").write_text("{}", encoding="utf-8")
    for file in manifest.files:
        (folder / file.file).write_bytes(file.file.encode() * 50)
    (folder / "README.md").write_text("card", encoding="utf-8")
    (folder / "Tiny-onnx" / "onnx" / "model.onnx").write_bytes(b"graph")
    files = tuple(replace(f, sha256=sha256_file(folder / f.file)) for f in manifest.files)
    names = [*(file.file for file in files), "README.md", "Tiny-onnx"]
    contents = describe_files(folder, names, {})
    seal_release(folder, replace(manifest, files=files, contents=contents))
    return folder


def test_an_untouched_release_passes_with_and_without_what_it_goes_on_from(release: Path) -> None:
    count, problems = verify_release(release)
    assert problems == []
    assert count == 8
    shutil.rmtree(release / "stages")
    (release / ".phoneready.lock").unlink()
    assert verify_release(release) == (8, [])
    assert main(["verify", str(release)]) == 0
    if shutil.which("sha256sum") is not None:
        command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
        assert subprocess.run(command, cwd=release, capture_output=True, check=False).returncode == 0


def test_every_changed_byte_is_found_and_its_file_named(release: Path) -> None:
    files = [path for path in release.rglob("*") if path.is_file() and path.stat().st_size]
    apart = {"SHA256SUMS", "history.jsonl", "work"}
    for path in (file for file in files if file.name not in apart):
        original, name = path.read_bytes(), path.relative_to(release).as_posix()
        for position in {0, len(original) // 2, len(original) - 1}:
            changed = bytearray(original)
            changed[position] ^= 1
            path.write_bytes(bytes(changed))
            assert name in {problem.path for problem in verify_release(release)[1]}
        path.write_bytes(original)
    assert verify_release(release)[1] == []


def test_no_change_of_the_hashes_themselves_goes_unseen(release: Path) -> None:
    path = release / "SHA256SUMS"
    original = path.read_bytes()
    for position in range(0, len(original), 3):
        changed = bytearray(original)
        changed[position] ^= 1
        path.write_bytes(bytes(changed))
        try:
            assert verify_release(release)[1], position
        except InputError:
            continue


def test_a_placed_folder_of_graphs_opens_and_is_not_copied_again_unless_it_changed(tmp_path: Path) -> None:
    source, released = tmp_path / "stages" / "int8", tmp_path / "tiny-int8"
    (source / "onnx").mkdir(parents=True)
    weight = onnx.numpy_helper.from_array(np.arange(4096, dtype=np.float32), "w")
    output = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4096])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [output], [weight]))
    onnx.save(model, source / "onnx" / "m.onnx", save_as_external_data=True, location="m.onnx_data")
    (source / "config.json").write_text("{}", encoding="utf-8")
    place(source, released)
    graph = released / "onnx" / "m.onnx"
    onnx.checker.check_model(graph)
    opened = onnx_ir.load(graph).graph.initializers["w"].const_value
    assert opened is not None
    assert opened.tobytes() == onnx.load(graph).graph.initializer[0].raw_data

    def identities() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in released.rglob("*") if path.is_file()}

    before = identities()
    place(source, released)
    assert identities() == before
    # What an earlier version left: a second name.
    (released / "config.json").write_text("[]", encoding="utf-8")
    place(source, released)
    assert (released / "config.json").read_text(encoding="utf-8") == "{}"


def test_missing_further_and_linked_files_are_found(release: Path) -> None:
    (release / "README.md").unlink()
    (release / "Tiny-onnx" / "extra.bin").write_bytes(b"x")
    graph = release / "Tiny-onnx" / "onnx" / "model.onnx"
    graph.rename(release / "stages" / "model.onnx")
    graph.symlink_to(release / "stages" / "model.onnx")
    found = {problem.path: problem.reason for problem in verify_release(release)[1]}
    assert found == {
        "README.md": "is missing",
        "Tiny-onnx/extra.bin": "is not of this release",
        "Tiny-onnx/onnx/model.onnx": "is not a regular file",
    }


def test_a_manifest_and_hashes_changed_together_do_not_hide_a_change_of_one_record(release: Path) -> None:
    """Whoever changes the manifest and its line in SHA256SUMS still has to change every other place."""
    manifest = json.loads((release / "manifest.json").read_text(encoding="utf-8"))
    name = manifest["files"][0]["file"]
    (release / name).write_bytes(b"another model")
    entry = next(content for content in manifest["contents"] if content["path"] == name)
    entry |= {"bytes": 13, "sha256": sha256_file(release / name)}
    manifest["contents"].append({"path": "../secret", "bytes": 1, "sha256": "0" * 64})
    (release.parent / "secret").write_bytes(b"s")
    (release / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    sums = read_sums(release) | {"manifest.json": sha256_file(release / "manifest.json")}
    text = "".join(f"{hash_}  {path}\n" for path, hash_ in sums.items())
    (release / "SHA256SUMS").write_text(text, encoding="utf-8")
    found = verify_release(release)[1]
    assert {problem.path for problem in found} == {name, "../secret"}
    assert "is no path inside a release" in [problem.reason for problem in found]


def test_errors_are_one_line_with_exit_status_1(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (release / "README.md").write_text("other", encoding="utf-8")
    (release / "new\x1b[31m\nfile").touch()
    assert main(["verify", str(release)]) == 1
    output, errors = capsys.readouterr()
    assert len(output.splitlines()) == 2
    assert "\x1b" not in output + errors
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
    assert "1 more" in errors
    manifest = release / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("Tiny", "Tony"), encoding="utf-8")
    assert main(["verify", str(release), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {"path": "manifest.json", "reason": "has changed: its SHA-256 is another"} in problems


def test_what_is_no_release_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        assert main(["verify", str(folder)]) == 2
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  ../outside\n", encoding="utf-8")
    assert main(["verify", str(tmp_path)]) == 2
    assert "line 1" in capsys.readouterr().err
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "SHA256SUMS").mkdir()
    assert main(["verify", str(tmp_path)]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("license_", ["apache-2.0", 'Llama 3.2 "Community": License\n- x', None])
def test_the_card_has_a_header_that_the_hub_reads(
    make_report_input: MakeReportInput, license_: str | None
) -> None:
    name = "Tiny: [x](http://127.0.0.1/)\n---\n# 'q' <b>"
    report, manifest = make(make_report_input(name), license=license_, base_model=None)
    card = ModelCard(model_card_text(report.figures, manifest))
    data = card.data.to_dict()
    assert data["base_model"] == name
    assert data["pipeline_tag"] == "text-generation"
    assert {"pruned", "gguf"} <= set(data["tags"])
    expected = {"apache-2.0": ("apache-2.0", None), None: (None, None)}
    assert (data.get("license"), data.get("license_name")) == expected.get(license_, ("other", license_))
    assert "\\[x\\]" in card.text
    outside_code = "".join(card.text.split("```")[::2])
    assert "<b>" not in outside_code.replace("\\<b\\>", "")
    assert len(card.text.split("```")) == 3


def test_the_modelfile_speaks_chatml_or_leaves_the_template_to_the_file(
    make_report_input: MakeReportInput, tiny_model: Callable[..., tuple[Any, Any]]
) -> None:
    pruned, tokenizer = make_report_input("Tiny").figures.shipped, tiny_model()[1]
    text = modelfile_text(pruned, tokenizer)
    assert "FROM ./Tiny-shipped-Q8_0.gguf\n# FROM ./Tiny-shipped-Q4_0.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "<|im_start|>{{ .Role }}" in text
    assert "SYSTEM" not in text
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + plain
    assert 'SYSTEM """Be kind."""' in modelfile_text(pruned, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    assert "\nTEMPLATE" not in modelfile_text(pruned, tokenizer)
    tokenizer.chat_template = None
    assert "{{ .Prompt }}" in modelfile_text(pruned, tokenizer)


@pytest.mark.parametrize("license_", ["apache-2.0", "Llama 3.2 Community License", None])
def test_the_bill_of_materials_keeps_to_its_schema_and_repeats(
    make_report_input: MakeReportInput, license_: str | None
) -> None:
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="cyclonedx-python-lib is not installed"
    )
    schema = pytest.importorskip("cyclonedx.schema")
    report, manifest = make(make_report_input('Tiny "</script>\u202e'), license=license_, revision="abc")
    inside = Content(f"{manifest.files[0].file}/onnx/model.onnx", 5, "78" * 32)
    manifest = replace(manifest, contents=(inside,))
    bom = make_bom(report.figures, manifest)
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(bom)) is None
    assert make_bom(report.figures, manifest) == bom
    other = make_bom(report.figures, replace(manifest, seed=1))
    assert other["serialNumber"] != bom["serialNumber"]
    hashes = json.dumps(bom)
    assert all(value in hashes for value in ("ab" * 32, "56" * 32, "78" * 32))
    assert bom["metadata"]["component"]["pedigree"]["ancestors"][0]["name"] == report.figures.source.name


def test_every_single_command_is_one_that_the_command_line_takes(make_report_input: MakeReportInput) -> None:
    figures = make_report_input("Tiny").figures
    settings: dict[str, Any] = {
        "model": {"reference": "my model"},
        "prune": {"calibration": ["self", "builtin:python-docs"], "uniform_width": True},
        "recover": {"max_tokens": 1000},
        "evaluate": {"tasks": ["sciq"], "limit": 5, "metrics": ["m:f"]},
        "quantize": {"to": ["Q8_0", "int4"], "imatrix": False},
    }
    threads = {"prune": 2, "evaluate": None, "export": 1}

    def commands(**changes: Any) -> list[str]:
        config = ReleaseConfig.model_validate(settings | changes)
        return list(single_commands(config, figures, threads))

    found = commands()
    group = typer.main.get_command(app)
    assert [shlex.split(line)[1] for line in found] == ["prune", "recover", "eval", "quantize"]
    for line in found:
        program, name, *arguments = shlex.split(line)
        assert program == "phoneready"
        group.get_command(None, name).make_context(name, arguments)
    assert "my model" in shlex.split(found[0])
    ends = ["--threads 2", None, None, "--threads 1"]
    assert [line[-11:] if "--threads" in line else None for line in found] == ends
    assert shlex.split(found[2])[2] == "recovered"
    narrow = commands(model=settings["model"] | {"dtype": "float16"})
    assert [line.count("dtype=float16") for line in narrow] == [1, 0, 1, 1]
    assert "--set dtype=auto --" in narrow[0]  # products, as in the release
    assert "--set weights_dtype=float16" in narrow[0]
    assert "weights_dtype" not in found[0]
    rounded = commands(prune={"dtype": "bfloat16"})
    assert "--set dtype=bfloat16 --" in rounded[0]
    assert "--set weights_dtype=auto" in rounded[0]
    assert [line.count("--set dtype=auto") for line in found] == [1, 1, 0, 0]
    assert "recover" not in " ".join(commands(recover=None))

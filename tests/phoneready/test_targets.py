"""Targets: `phoneready prune --target-size` and [prune] in release.toml."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from cfsp.errors import InputError
from cfsp.models.gguf_file import read_gguf
from exporters.export_record import ParityLimits
from exporters.gguf.files import draft_gguf
from exporters.onnx import export_onnx
from exporters.options import ExportOptions
from phoneready.main import main
from phoneready.release.pruning_budget import budget_of
from phoneready.settings.release import parse_config
from phoneready.settings.schema import PruneConfig

TinyPath = Callable[..., Path]
SMALL = ["--calibration", "builtin:python-docs", "--nsamples", "3", "--seqlen", "32"]
MODEL = '[model]\nreference = "x"\n[prune]\n'


@pytest.fixture(scope="module")
def model(tiny_folder: TinyPath) -> str:
    return str(tiny_folder(intermediate_size=512))


def size_of(checkpoint: Path, quant: str, folder: Path) -> int:
    folder.mkdir()
    return draft_gguf(checkpoint, folder, [quant])[quant].stat().st_size


def pruned(model: str, output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    status = main(["prune", model, "-o", str(output), *SMALL, *more, "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    plan: dict[str, Any] = json.loads(captured.out)
    return plan


@pytest.mark.parametrize(
    ("model_type", "asked", "reason"),
    [
        (
            "smollm3",
            ["--attentions", "1"],
            "smollm3: no blocks without attention, channels and tokens can go (--prune-ratio, --vocabulary)",
        ),
        (
            "gemma3_text",
            ["--kv-groups", "0.3", "--prune-ratio", "0"],
            "gemma3: as many heads in every block, whole blocks can go (--blocks)",
        ),
    ],
)
def test_a_plan_that_its_file_cannot_hold_is_refused(
    model_type: str,
    asked: list[str],
    reason: str,
    tiny_folder: TinyPath,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(tiny_folder(model_type))
    assert main(["prune", folder, "-o", str(tmp_path / "out"), *SMALL, *asked, "--for", "Q4_0"]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    pruned(folder, tmp_path / "out", capsys, *asked)


@pytest.mark.parametrize(
    ("quant", "share", "more"),
    [
        ("Q4_0", 0.75, ["--target-axes", "vocabulary,ffn"]),
        ("Q8_0", 0.6, []),
        ("Q4_K_M", 0.985, ["--prune-ratio", "0", "--target-axes", "vocabulary"]),
        ("Q8_0", 0.7, ["--vocabulary", "320", "--attentions", "1", "--blocks", "1"]),
        ("Q8_0", 0.75, ["--kv-groups", "0.25", "--target-axes", "vocabulary,ffn"]),
    ],
)
def test_the_file_is_as_large_as_was_asked(
    quant: str,
    share: float,
    more: list[str],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense = pruned(model, tmp_path / "dense", capsys, "--target-size", "1G", "--for", quant)
    assert dense["keep_ratio"] == 1
    known = size_of(tmp_path / "dense", quant, tmp_path / "dense-files")
    assert abs(dense["budget"]["dense"] - known) <= 256, "but for the plan's hash, and what names may take"
    target = round(share * known)
    plan = pruned(model, tmp_path / "out", capsys, "--target-size", str(target), "--for", quant, *more)
    size = size_of(tmp_path / "out", quant, tmp_path / "files")
    assert size <= target
    align = plan["settings"]["align"]
    assert align == {"Q4_K_M": 256}.get(quant, 32)
    # A unit of channels is 3 x 64 weights each; a token a row of 64, its text and its merge.
    step = max(align * 3 * 64 * 34 / 32, 32 * 150) if not more else align * 3 * 64 * 34 / 32
    step = 32 * 150 if "0" in more else step
    assert target - size < step + 192
    assert plan["budget"]["reached"] - size in range(0, 192)
    assert sum(axis["saved"] for axis in plan["budget"]["axes"]) == pytest.approx(
        plan["budget"]["dense"] - plan["budget"]["reached"]
    )


def onnx_size(checkpoint: Path, variant: str, folder: Path) -> int:
    """Of an export that is rounded for text where the variant is."""
    windows = torch.randint(0, 200, (2, 96), generator=torch.Generator().manual_seed(0))
    options = ExportOptions(
        limits={variant: ParityLimits()}, parity_windows=windows, calibration=windows, n_threads=1
    )
    (record,) = export_onnx(checkpoint, folder, [variant], options)
    return record.file_bytes


@pytest.mark.parametrize(
    ("variant", "share", "more", "step"),
    [
        # A channel is a row of gate and of up, and a column of down, of 64 numbers each.
        ("fp32", 0.7, ["--target-axes", "ffn"], 3 * 64 * 4),
        ("fp16", 0.6, [], 32 * 64 * 2),
        # The first of 32 channels takes a block of each row of down, too.
        ("int8", 0.75, ["--target-axes", "vocabulary,ffn"], 64 * 34 + 2 * 68),
        ("int8", 0.99, ["--prune-ratio", "0", "--target-axes", "vocabulary"], 32 * 68),
        ("int8", 0.7, ["--vocabulary", "320", "--attentions", "1", "--blocks", "1"], 64 * 34 + 2 * 68),
        ("int8-dynamic", 0.7, ["--kv-groups", "0.25", "--target-axes", "ffn"], 3 * 64 + 8),
        # Three hundredths more are left for layers that text may give eight bits.
        ("int4", 0.75, ["--target-axes", "vocabulary,ffn"], 64 * 18 + 2 * 36 + 12_000),
    ],
)
def test_a_graph_and_its_weights_are_as_large_as_was_asked(
    variant: str,
    share: float,
    more: list[str],
    step: int,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--for", variant, "--target-size"]
    dense = pruned(model, tmp_path / "dense", capsys, *asked, "1G")["budget"]["dense"]
    known = onnx_size(tmp_path / "dense", variant, tmp_path / "dense-files")
    target = round(share * known)
    plan = pruned(model, tmp_path / "out", capsys, *asked, str(target), *more)
    size = onnx_size(tmp_path / "out", variant, tmp_path / "files")
    assert plan["settings"]["align"] == 1
    assert target - step - 192 < size <= target
    exact = 192 if variant != "int4" else 12_000
    assert plan["budget"]["reached"] - size in range(exact)
    assert dense - known in range(exact)


def test_of_several_files_each_fits(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--target-size", "330kB", "--for", "Q8_0,int8", "--target-axes", "vocabulary,ffn"]
    plan = pruned(model, tmp_path / "out", capsys, *asked)
    sizes = [
        size_of(tmp_path / "out", "Q8_0", tmp_path / "gguf"),
        onnx_size(tmp_path / "out", "int8", tmp_path / "onnx"),
    ]
    assert max(sizes) <= 330_000
    assert plan["budget"]["reached"] - max(sizes) in range(192)


def test_a_model_that_stays_in_files_gets_the_same_plan(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--target-size", "400kB", "--for", "int8", "--target-axes", "vocabulary,ffn"]
    whole = pruned(model, tmp_path / "whole", capsys, *asked)
    monkeypatch.setenv("PHONEREADY_STREAM", "always")
    assert pruned(model, tmp_path / "paged", capsys, *asked)["budget"] == whole["budget"]


def test_rows_that_no_token_has_go_from_the_file_first(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """66 of 450, each a row of 64 and the name that llama.cpp has for it."""
    model = str(tiny_folder(vocab_size=450))
    whole = pruned(model, tmp_path / "dense", capsys, "--target-size", "1G", "--for", "Q8_0")["budget"]
    asked = ["--target-size", str(int(whole["dense"]) - 1), "--for", "Q8_0"]
    budget = pruned(model, tmp_path / "out", capsys, *asked)["budget"]
    gone = {one["axis"]: one["removed"] for one in budget["axes"] if one["removed"]}
    assert gone == {"vocabulary": 66}
    assert whole["dense"] - budget["reached"] > 66 * 64 * 34 / 32 + 66 * len("[PAD384]")
    size = size_of(tmp_path / "out", "Q8_0", tmp_path / "files")
    assert budget["reached"] - size in range(0, 192)


def test_what_a_file_cannot_say_is_not_removed(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No architecture of llama.cpp takes a qwen3 model of which some blocks do not attend."""
    model = str(tiny_folder("qwen3"))
    asked = ["--target-size", "125kB", "--for", "Q8_0", "--target-axes", "attentions,blocks,ffn"]
    plan = pruned(model, tmp_path / "out", capsys, *asked)
    assert "attention" not in plan
    assert plan["budget"]["dense"] > 140_000
    assert size_of(tmp_path / "out", "Q8_0", tmp_path / "files") <= 125_000


@pytest.mark.parametrize(
    ("made", "goes"),
    [
        (("int8",), {"vocabulary", "ffn", "attentions", "kv_groups", "blocks"}),
        (("Q8_0",), {"vocabulary", "ffn"}),
    ],
)
def test_what_a_file_beside_the_sized_one_cannot_say_is_not_removed(
    made: tuple[str, ...], goes: set[str], tiny_loaded: Callable[..., Any], tmp_path: Path
) -> None:
    settings = PruneConfig(target_size="400kB", for_quant=("int8",))
    budget = budget_of(settings, tiny_loaded("smollm3"), tmp_path, made=made)
    assert budget is not None
    assert set(budget.axes) == goes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["--target-size", "--target-parameters"])
def test_blocks_stay_where_a_file_cannot_do_without_them(
    target: str, tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp's smollm3 rotates in all blocks but each fourth: no other may take that place."""
    model, much = (
        str(tiny_folder("smollm3")),
        {"--target-size": "125kB", "--target-parameters": "120k"}[target],
    )
    asked = [target, much, "--for", "Q8_0", "--target-axes", "blocks,attentions,ffn"]
    plan = pruned(model, tmp_path / "out", capsys, *asked)
    assert not {"depth", "attention"} & plan.keys()
    assert size_of(tmp_path / "out", "Q8_0", tmp_path / "files") > 0


@pytest.mark.parametrize(
    ("more", "alike"), [([], True), (["--for", "Q8_0,int4"], True), (["--for", "int4"], False)]
)
def test_blocks_are_as_wide_as_each_other_where_llama_cpp_would_pad_them(
    more: list[str],
    alike: bool,
    tiny_folder: TinyPath,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, asked = str(tiny_folder("gemma3_text")), ["--prune-ratio", "0.25", "--align", "8", *more]
    status = main(["prune", model, "-o", str(tmp_path / "out"), *SMALL, *asked, "--json"])
    captured = capsys.readouterr()
    assert status == 0
    assert ("all get the same (--uniform)" in caplog.text) == alike
    widths = {block["width"] for block in json.loads(captured.out)["blocks"]}
    assert (len(widths) == 1) == alike


def test_blocks_that_are_unlike_already_stay_so(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prune-ratio", "0.25", "--align", "8"]
    pruned(str(tiny_folder("gemma3_text")), tmp_path / "unlike", capsys, *asked, "--for", "int4")
    again = pruned(str(tmp_path / "unlike"), tmp_path / "again", capsys, *asked)
    assert len({block["width"] for block in again["blocks"]}) > 1


def test_no_channels_make_up_for_what_attentions_save_too_little(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first attention that goes brings another architecture, whose metadata is larger."""
    model = str(tiny_folder(num_hidden_layers=8))

    def asked(name: str, *more: str) -> dict[str, Any]:
        return pruned(model, tmp_path / name, capsys, "--for", "Q8_0", *more)

    def reached(count: int) -> float:
        plan = asked(f"{count}", "--target-size", "1G", "--attentions", str(count))
        return float(plan["budget"]["reached"])

    dense, one, two = map(reached, (0, 1, 2))
    assert (dense + two) / 2 + 16 < one, "one is thought to save half of what two save"
    between = str(int((dense + two) / 2 + 8))
    plan = asked("out", "--target-size", between, "--target-axes", "attentions", "--prune-ratio", "0")
    assert plan["keep_ratio"] == 1
    assert len(plan["attention"]["removed"]) == 2


@pytest.mark.parametrize(("tied", "goes"), [(True, True), (False, False)])
def test_groups_go_where_a_file_says_them(
    tied: bool, goes: bool, tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp has blocks of unlike heads for qwen3 with a tied embedding alone."""
    model = str(tiny_folder("qwen3", tied=tied, num_key_value_heads=4))
    dense = pruned(model, tmp_path / "dense", capsys, "--target-size", "1G", "--for", "Q8_0")["budget"][
        "dense"
    ]
    target = int(dense) - 3000
    asked = [
        "--target-size",
        str(target),
        "--for",
        "Q8_0",
        "--target-axes",
        "kv_groups",
        "--prune-ratio",
        "0",
    ]
    if not goes:
        assert main(["prune", model, "-o", str(tmp_path / "out"), *SMALL, *asked]) == 2
        assert "less than any combination" in capsys.readouterr().err
        return
    plan = pruned(model, tmp_path / "out", capsys, *asked)
    assert plan["kv_groups"]
    assert size_of(tmp_path / "out", "Q8_0", tmp_path / "files") <= target


def read_bytes(file: Path) -> int:
    """Of a token: the embedding, where it is the output matrix too, is read once."""
    tensors = {tensor.name: tensor.data.nbytes for tensor in read_gguf(file).tensors}
    untied = "output.weight" in tensors
    return sum(size for name, size in tensors.items() if not (untied and name == "token_embd.weight"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_as_little_as_was_asked(
    tied: bool, tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_folder(tied=tied, intermediate_size=512))
    read = {}
    for name, more in (("dense", []), ("fast", ["--target-speed", "1.5", "--target-axes", "vocabulary,ffn"])):
        more = more or ["--prune-ratio", "0"]
        plan = pruned(model, tmp_path / name, capsys, "--for", "Q8_0", *more)
        (tmp_path / f"{name}-files").mkdir()
        read[name] = read_bytes(draft_gguf(tmp_path / name, tmp_path / f"{name}-files", ["Q8_0"])["Q8_0"])
    assert read["fast"] <= read["dense"] / 1.5 < read["fast"] + 32 * 3 * 64 * 34 / 32 + 1
    assert plan["budget"]["reached"] == pytest.approx(read["fast"] / read["dense"])
    assert plan["budget"]["unit"] == "decode"


def test_prune_says_what_each_axis_gives(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--target-parameters", "0.38M", "--target-axes", "vocabulary,ffn", *SMALL]
    assert main(["prune", model, "--plan-only", str(tmp_path / "plan.json"), *asked]) == 0
    said = capsys.readouterr().out
    assert "Target: 0.38 M parameters; the plan takes 0.38 M parameters. The dense model takes 0.47 M" in said
    assert re.search(r"tokens of the vocabulary \| +\d+ of 384 \| +0\.0\d M parameters \| ", said)
    assert re.search(r"blocks +\| +0 of 4 \| +0\.00 M parameters \| +0\.000 \| +not possible \|", said)
    again = ["prune", model, "-o", str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]
    assert main([*again, "--nsamples", "3", "--seqlen", "32"]) == 0
    assert "Target: 0.38 M parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--target-size", "60 apples"],
            "target_size: not understood (got '60 apples'); allowed: such as 400M",
        ),
        (["--target-parameters", "many"], "target_parameters: not understood"),
        (
            ["--target-size", "1MB", "--target-parameters", "1M"],
            "target_size and target_parameters: give one of them",
        ),
        (
            ["--target-speed", "1"],
            "--target-speed: out of range (got 1.0); allowed: above 1 and at most 1000",
        ),
        (["--target-speed", "2", "--for", "mixed:1MB"], "target_speed: no file of a size that follows"),
        (["--target-size", "1MB", "--target-axes", "heads"], "--target-axes: unknown (got 'heads')"),
        (
            ["--target-size", "1MB", "--target-axes", "ffn", "--prune-ratio", "0.1"],
            "nothing is left that the target may remove",
        ),
        (
            ["--target-size", "1MB", "--for", "portable,int4-mixed"],
            "IQ2_M, fp32, fp16, int8, int4, int4-b128, int8-",
        ),
        (["--target-speed", "2", "--for", "int4"], "IQ2_M\n"),
        (
            ["--target-size", "1MB", "--for", "int3"],
            "unknown quantization or variant (got 'int3'); allowed: f32",
        ),
        (
            ["--target-size", "2kB", "--for", "int4", *SMALL],
            "target_size: 0.002 MB is less than any combination of what may be removed takes; allowed: about 0.",
        ),
        (["--target-size", "1MB", "--for", "mixed:1MB"], "target_size: no file of a size that follows"),
        (["--target-size", "1MB", "--plan", "plan.json"], "--plan applies a plan"),
        (
            ["--target-size", "0.4MB", "--kv-groups", "0.9", *SMALL],
            "kv_groups: each of the 4 blocks that attend keeps one of its groups, 8 in all (got 0.9)",
        ),
        (
            ["--target-size", "0.4MB", "--vocabulary", "9", "--target-axes", "ffn", *SMALL],
            "vocabulary: smaller than what has to stay",
        ),
        (
            ["--target-size", "0.4MB", "--vocabulary", "100000", "--target-axes", "ffn", *SMALL],
            "vocabulary: out of range (got 100000); allowed: 1 to 384",
        ),
        (
            ["--target-speed", "900", "--target-axes", "ffn", *SMALL],
            "target_speed: faster than any combination of what may be removed (got 900.0); allowed: about 3.",
        ),
        (
            ["--target-size", "2kB", "--target-axes", "ffn", "--for", "Q8_0", *SMALL],
            "target_size: 0.002 MB is less than any combination of what may be removed takes; allowed: about 0.",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(
    arguments: list[str],
    reason: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prune", model, "-o", "out", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_configuration_states_is_fixed() -> None:
    config = parse_config(MODEL + 'target_size = "60MB"\nvocabulary = 32768\n', where="x")
    assert config.prune.target_axes == ("ffn", "attentions", "kv_groups", "blocks")
    assert (config.prune.prune_ratio, config.prune.vocabulary) == (0.0, 32768)
    config = parse_config(MODEL + 'target_size = "60MB"\nprune_ratio = 0.2\n', where="x")
    assert config.prune.target_axes == ("vocabulary", "attentions", "kv_groups", "blocks")
    assert config.prune.prune_ratio == 0.2
    assert parse_config(MODEL, where="x").prune.prune_ratio == 0.2


@pytest.mark.parametrize(
    ("asked", "sized"),
    [
        ('target_size = "60MB"', ("Q4_0", "int8")),
        ('target_size = "60MB"\nfor_quant = ["int4"]', ("int4",)),
        ("target_speed = 1.5", ("Q4_0",)),
    ],
)
def test_a_release_is_sized_by_all_that_it_makes_unless_it_says_of_what(
    asked: str, sized: tuple[str, ...]
) -> None:
    config = parse_config(MODEL + f'{asked}\n[export]\nonnx = ["int8", "portable"]\n', where="x")
    assert config.prune.sized_formats(config.export.names) == sized


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ('target_size = "60 apples"', r"line 4: prune\.target_size: .*not understood"),
        ('target_size = "60MB"\ntarget_parameters = "1M"', "line 3: prune: .*give one of them"),
        ('target_size = "60MB"\n[export]\nquants = ["mixed:60MB"]', "line 3: prune: target_size: no file"),
        ('target_size = "60MB"\n[tune]', "line 5: tune: a search chooses the ratio itself"),
    ],
)
def test_a_configuration_whose_target_cannot_be_names_its_line(section: str, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        parse_config(MODEL + section, where="release.toml")

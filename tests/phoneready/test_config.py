"""release.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cfsp.errors import InputError
from cfsp.settings import Declared, declared
from phoneready.figures.figures import select
from phoneready.main import main
from phoneready.settings.release import load_config, parse_config, planned_figures
from phoneready.settings.schema import (
    BenchConfig,
    EvaluateConfig,
    PruneConfig,
    QuantizeConfig,
    RecoverConfig,
)
from phoneready.settings.template import demo_config_text, template_text

ROOT = Path(__file__).resolve().parents[2]
MODEL = '[model]\nreference = "smollm2-135m"\n'


def test_the_demo_and_the_example_are_valid_and_the_same() -> None:
    demo = load_config(None)
    assert demo.model.reference == "smollm2-135m"
    assert demo.prune_settings().align == 256  # of mixed files
    example = parse_config((ROOT / "examples" / "release.toml").read_text(encoding="utf-8"), where="x")
    assert example.model_copy(update={"budgets": ()}) == demo
    assert example.budgets
    assert (ROOT / "examples" / "release.toml").read_text(encoding="utf-8") == template_text()
    assert "reference" in demo_config_text()


def test_all_errors_are_reported_at_once() -> None:
    text = (
        "sead = 1\n[model]\n[prune]\nprune_ratio = 1.5\ncalibrations = 3\n[evaluate]\nseqlen = 0\n"
        '[quantize]\nto = ["Q4_0", "Q9"]\n[bench]\nrepetitions = 0\n'
    )
    with pytest.raises(InputError) as caught:
        parse_config(text, where="release.toml")
    message = str(caught.value)
    for part in (
        "sead: unknown key",
        "model.reference: missing",
        "prune.prune_ratio",
        "prune.calibrations: unknown",
    ):
        assert part in message
    for part in (
        "evaluate.seqlen",
        "quantize.to: to: unknown format (got 'Q9')",
        "bench.repetitions: out of range (got 0); allowed: 1 to",
    ):
        assert part in message
    for part in ("line 1: sead", "line 2: model", "line 4: prune.p", "line 5: prune.c", "line 7: evaluate"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "line",
    [
        "seed = true",
        'seed = "1"',
        "prune.prune_ratio = false",
        "bench.n_gen = [true]",
        "bench.check_text = 1",
    ],
)
def test_true_is_no_number_and_a_number_is_not_true(line: str) -> None:
    with pytest.raises(InputError, match=r"line 1: .*should be a valid"):
        parse_config(f"{line}\n{MODEL}", where="release.toml")


LINES = '''# first
seed = -1
[model]
reference = ""   # [prune]
[quantize]
to = [
    "Q4_0",
    # "Q9",
    "Q8",
]
name = ["""
[bench]
repetitions = 0"""]
[recover]
rank = 0
loss = "best"
max_tokens = 10
alpha = 1.0
"seqlen" = 1
[[budgets]]
metric = "file_bytes"
at_most = "9 apples"
[[budgets]]
metric = "speed"
at_least = 1
[[budgets]]
metric = "tg64"
at_most = 3
[[budgets]]
metric = "kl_mean"
at_most = 0.1
relative_to = "dense"
'''


def test_every_error_stands_at_its_line() -> None:
    with pytest.raises(InputError) as caught:
        parse_config(LINES, where="release.toml")
    problems = str(caught.value).removeprefix("release.toml: ").split("; line ")
    found = {int(part.removeprefix("line ").split(":")[0]): part for part in problems}
    assert sorted(found) == [2, 4, 6, 11, 15, 16, 19, 20, 24, 26, 29]
    for line, key in {
        6: "quantize.to",
        15: "recover.rank",
        24: "budgets[1].metric",
        29: "budgets[3]",
    }.items():
        assert f": {key}: " in found[line]
    assert "9 apples" in found[20]
    assert "at_least only" in found[26]


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ('metric = "tg65"\nat_least = 1', r"line 4: budgets\[0\]\.metric: tg65 is not measured here; allowed: .*tg128"),
        ('metric = "joules_tg128"\nat_most = 1', r"joules_tg128 is not measured here"),
        ('metric = "tg128"\nat_least = 1\nfiles = ["Q8_0"]', r"line 6: .*files: Q8_0 has no tg128 here; allowed: Q4_0"),
        ('metric = "tg128"\nat_least = 1\ntargets = ["moon"]', r"targets: moon has no tg128 here; allowed: local"),
        ('metric = "kl_mean"\nat_most = 1\non = ["song"]', r"on: song has no kl_mean here; allowed: text builtin"),
        ('metric = "accuracy"\nat_least = 0.5', "accuracy is not measured here"),
        ('metric = "file_bytes"\nat_most = 1\nrelative_to = "baseline"', r"there is no \[baseline\]"),
        ('metric = "file_bytes"\nat_most = "1 MB"\nrelative_to = "dense"', "a ratio is a number"),
        ('metric = "file_bytes"\nat_most = 1.0\ndifference = true', "difference: needs relative_to"),
    ],
)  # fmt: skip
def test_a_budget_on_what_is_not_produced_is_an_error(more: str, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        parse_config(f"{MODEL}[[budgets]]\n{more}", where="release.toml")


def test_settings_can_be_overridden_with_toml_values() -> None:
    given = ["prune.prune_ratio=0.3", 'quantize.to=["Q8_0"]', "seed=7", "recover.rank=4"]
    config = parse_config(MODEL, where="x", overrides=given)
    assert (config.prune.prune_ratio, config.quantize.to, config.seed) == (0.3, ("Q8_0",), 7)
    assert config.recover is not None
    assert config.recover.rank == 4
    with pytest.raises(InputError, match=r"--set prune\.prune_ratio=2: prune\.prune_ratio: .*below 1"):
        parse_config(MODEL, where="x", overrides=["prune.prune_ratio=2"])
    with pytest.raises(InputError, match="--set: not understood"):
        parse_config(MODEL, where="x", overrides=["model.reference=smollm2-135m"])
    with pytest.raises(InputError, match=r"--set prune\.strenght=1: .* unknown key; did you mean strength\?"):
        parse_config(MODEL, where="x", overrides=["prune.strenght=1"])


def _settings() -> list[Declared]:
    kinds = (PruneConfig, RecoverConfig, EvaluateConfig, QuantizeConfig, BenchConfig)
    return [row for kind in kinds for row in declared(kind)]


def test_init_writes_a_configuration_whose_comments_are_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "release.toml"
    assert main(["init", 'a "quoted" name', "-o", str(file), "--all"]) == 0
    text = file.read_text(encoding="utf-8")
    config = parse_config(text, where="x")
    assert config.model.reference == 'a "quoted" name'
    assert config.prune.removes_nothing
    assert (config.quantize.rounding_windows, config.prune.nsamples) == (32, PruneConfig().nsamples)
    assert {budget.relative_to for budget in config.budgets} == {"dense"}
    examples = {row.name for row in _settings() if row.default is None} | {"file"}
    text = text.replace("prune_ratio = 0.0", "prune_ratio = 0.1")  # what is dense learns nothing from itself
    shown = re.sub(rf"(?m)^#(?=\[?\w+( = |\]$))(?!({'|'.join(examples)}) )(?!\[baseline)", "", text)
    assert shown.count("\n#") < text.count("\n#")
    changed = parse_config(text, where="x").model_copy(update={"recover": RecoverConfig()})
    assert parse_config(shown, where="x").model_dump() == changed.model_dump()
    assert {row.name for row in _settings()} <= set(re.findall(r"(?m)^#?(\w+) = ", text))
    capsys.readouterr()
    assert main(["init", "-o", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8").replace("prune_ratio = 0.0", "prune_ratio = 0.1") == text


def test_init_writes_a_few_lines_that_gate_a_file(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    limits = ["--max-size", "90 MB", "--max-kl", "0.2"]
    assert main(["init", "some/model", "-o", str(file), *limits]) == 0
    config = load_config(file)
    assert config.prune.removes_nothing
    assert config.quantize.to == ("mixed-90MB",)
    limits_written = [(one.metric, one.at_most, one.files) for one in config.budgets]
    assert limits_written == [("file_bytes", 90_000_000, ()), ("kl_mean", 0.2, ())]
    assert len(file.read_text(encoding="utf-8").splitlines()) < 30
    assert main(["init", "-o", str(tmp_path)]) == main(["init", "-o", str(file), "--all", *limits]) == 2


def test_a_budget_limits_every_file_that_ships_and_the_checkpoint_by_its_name() -> None:
    text = (
        MODEL
        + '[quantize]\nto = ["Q8_0", "Q4_0"]\n[evaluate]\ntasks = ["a.yaml"]\n{}[[budgets]]\nmetric = "{}"\n{}'
    )

    def limited(metric: str, limit: str, files: str = "") -> set[str]:
        config = parse_config(text.format(files, metric, limit), where="x")
        return {key.item for key in select(config.budgets[0], planned_figures(config))}

    for metric, limit in (
        ("kl_mean", "at_most = 1"),
        ("degenerate", "at_most = 0"),
        ("file_bytes", "at_most = 9"),
    ):
        assert limited(metric, limit) == {"Q8_0", "Q4_0"}
    assert limited("kl_mean", 'files = ["checkpoint"]\nat_most = 1') == {"checkpoint"}
    assert limited("accuracy", "at_least = 0.5", 'files = ["Q4_0"]\n') == {"Q4_0"}
    with pytest.raises(InputError, match=r'no file has accuracy here; allowed: files = \["checkpoint"\]'):
        limited("accuracy", "at_least = 0.5")


def test_patience_is_off_unless_it_is_asked_for() -> None:
    for asked, patience in (("", 0), ("patience = 0", 0), ("patience = 3", 3)):
        config = parse_config(MODEL + f"[recover]\n{asked}", where="x")
        assert config.recover is not None
        assert config.recover.settings(0).patience == patience


ONNX = '[quantize]\nto = ["Q4_0", "fp32"]\n[bench]\n'


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ('[recover]\nfor_quant = "Q8_0"', "recover.for_quant: "),
        ('[recover]\nfor_quant = "Q4_K_M"', "line 4: recover.for_quant: not exported (got 'Q4_K_M'); allowed: Q4_0"),
        ('[prune]\nprune_ratio = 0.0\n[recover]\nloss = "distill"', "line 6: recover.loss: nothing is removed"),
        ('[bench]\nfiles = ["int8"]', "line 4: bench.files: not exported"),
        ('[evaluate]\nfiles = ["Q8_0"]', "line 4: evaluate.files: not exported"),
        ('[quantize]\nto = ["IQ2_M"]\nimatrix = false', "line 5: quantize.imatrix: IQ2_M cannot be written without"),
        ('[evaluate]\ntext = ["a/test.txt", "b/test.txt"]', "line 4: evaluate.text: two have the name 'text test.txt'"),
        (ONNX + 'cache_type = "q8_0"', "bench.cache_type: onnxruntime cannot run fp32 with q8_0; allowed: none"),
        ('[bench]\ncache_type = "q8_0"\ntargets = ["browser"]', "the engines of browser cannot be told"),
        ('[bench]\ncache_type = "q8_0"\nanchor = "ref.onnx"', "onnxruntime cannot run ref.onnx with q8_0"),
        ('[bench]\nbackend = "vulkan"\ntargets = ["ssh:pi"]', "bench.backend: the runner that is built for"),
        (ONNX + 'targets = ["native"]', "bench.targets: native runs GGUF files only, not fp32"),
        ('[bench]\ntargets = ["ssh:a-b", "ssh:a_b"]', "bench.targets: two have one name on disk"),
        ('[prun]\nalign = 32', "line 3: prun: unknown key; did you mean prune?"),
        ("[recover]\nmax_token = 9", "line 4: recover.max_token: unknown key; did you mean max_tokens?"),
        ('[[budgets]]\nmetric = "file_bytes"\natmost = 1', "budgets[0].atmost: unknown key; did you mean at_most?"),
        ('[tracking]\nmlflow = "x"\nnames = 1', "tracking.names: unknown key; allowed: mlflow, experiment, files"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_where_it_is_written(asked: str, wrong: str) -> None:
    with pytest.raises(InputError, match=re.escape(wrong)):
        parse_config(MODEL + asked, where="x")


@pytest.mark.parametrize(
    ("asked", "idle", "where"),
    [
        ('[recover]\nmethod = "full"', "rank = 4", "--method ig-lora or lora"),
        ("[prune]", 'vocabulary_text = ["missing.txt"]', "a number of tokens to keep"),
        ("[quantize]\nto = ['Q8_0']", "tune_scales = true", "GGUF files of up to 6 bits"),
        ("[quantize]", "mixed_bytes = 90000000", "the ONNX variant int4-mixed"),
        ('[prune]\nreconstruct = "none"', "ridge = 0.1", "the reconstruction block-by-block"),
        ("[evaluate]", "limit = 8", "tasks"),
    ],
)
def test_what_nothing_reads_is_warned_of_and_has_no_effect(asked: str, idle: str, where: str) -> None:
    config = parse_config(f"{MODEL}{asked}\n{idle}", where="x")
    name = f"{asked.partition(']')[0][1:]}.{idle.partition(' ')[0]}"
    (said,) = config.warnings
    assert said.startswith(f"{name} has no effect without {where}")
    assert config.model_dump() == parse_config(MODEL + asked, where="x").model_dump()


def test_what_is_read_is_taken() -> None:
    for asked in (
        ONNX + 'cache_type = "q8_0"\nfiles = ["Q4_0"]',
        ONNX + 'targets = ["native"]\nfiles = ["Q4_0"]',
        '[bench]\nbackend = "vulkan"',
        "[prune]\ncorrection = 0.1",
        '[evaluate]\ntasks = ["chats.jsonl"]\nlimit = 8',
        '[prune]\nprune_ratio = 0.0\n[recover]\nloss = "both"',
        "[prune]\nprune_ratio = 0.0\nvocabulary = 300\n[recover]",
        '[quantize]\nto = ["Q4_0"]\n[recover]\nfor_quant = "q4_0"',
        "[quantize]\nto = ['Q4_0', 'int4-mixed']\nmixed_bytes = 90000000\ntune_scales = true",
        '[prune]\nvocabulary_text = ["a.txt"]\nvocabulary = 300',
    ):
        assert parse_config(MODEL + asked, where="x").warnings == (), asked


def test_paths_start_at_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("words")
    file = tmp_path / "release.toml"
    file.write_text('[model]\nreference = "model"\n[prune]\ncalibration = ["self", "text.txt"]\n')
    config = load_config(file)
    assert config.model.reference == str(tmp_path / "model")
    assert config.prune.calibration == ("self", str(tmp_path / "text.txt"))
    (tmp_path / "ssh.conf").touch()
    (tmp_path / "runner").touch()
    place = "ssh:board,runner=runner,config=ssh.conf,folder=/data"
    budget = f'[[budgets]]\nmetric = "tg128"\nat_least = 1\ntargets = ["{place}"]\n'
    file.write_text(f'[model]\nreference = "model"\n[bench]\ntargets = ["{place}"]\n{budget}')
    there = f"ssh:board,runner={tmp_path / 'runner'}"
    config = load_config(file)
    assert config.bench.targets == (f"{there},config={tmp_path / 'ssh.conf'},folder=/data",)
    assert config.speed_budgets(config.bench.targets[0])[0].targets == (there,)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.toml"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(InputError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_a_template_for_another_model_has_no_number_of_the_demos() -> None:
    other = parse_config(template_text("org/model"), where="x")
    assert other.prune.removes_nothing
    assert not any(name.startswith("mixed") for name in other.quantize.to)
    assert template_text("smollm2-135m") == template_text()
    for model in ("a\x7fb", 'a"b', "a\nb", "a\\b"):
        assert tomllib.loads(template_text(model))["model"]["reference"] == model

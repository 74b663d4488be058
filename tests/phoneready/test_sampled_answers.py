"""`phoneready eval --sampled` on tiny models: settings from whoever states them, the record, the gate, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_package
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from cfsp.errors import InputError
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.models.source import LoadedModel
from phoneready.evaluation.run import sampling_for
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.main import main
from phoneready.release.stages import stage_folder
from phoneready.settings.release import parse_config, planned_figures

TinyPath = Callable[..., Path]
ASKED = [
    "--no-text",
    "--sampled",
    "--prompt",
    "Once",
    "--prompt",
    "List three fruits.",
    "--max-new-tokens",
    "12",
]
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def stating(tiny_folder: TinyPath) -> str:
    """Another model, which comes with settings."""
    folder = tiny_folder(seed=1)
    stated = {"do_sample": True, "temperature": 0.6, "top_k": 50, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **stated}), "utf-8")
    return str(folder)


def test_both_models_are_sampled_alike(dense: str, stating: str, shown: Callable[..., Any]) -> None:
    plain = shown("eval", dense, "--against", stating, *(one for one in ASKED if one != "--sampled"))
    assert "sampled" not in plain
    result = shown("eval", dense, "--against", stating, *ASKED)
    found = result.pop("sampled")
    assert result == plain, "greedy answers stay what they are"
    assert found["settings"] == NEUTRAL | {"temperature": 0.6, "top_k": 50, "repetition_penalty": 1.05}
    assert found["seed"] == 1
    assert found["answers"] != plain["answers"]
    itself = shown("eval", stating, "--against", stating, *ASKED)["sampled"]
    assert itself["answers"] == itself["against_answers"] == found["against_answers"]
    assert itself["degeneration"]["difference_points"] == 0
    assert len(itself["degeneration"]["reasons"]) == 2
    again = shown("eval", stating, "--against", stating, *ASKED, "--seed", "2")["sampled"]
    assert again["answers"] != itself["answers"]


def test_what_is_asked_for_goes_before_what_is_recommended(
    dense: str, stating: str, shown: Callable[..., Any]
) -> None:
    found = shown("eval", stating, *ASKED, "--temperature", "0.9")["sampled"]["settings"]
    assert found == NEUTRAL | {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.05}
    found = shown("eval", stating, "--against", dense, *ASKED)["sampled"]["settings"]
    assert found["temperature"] == 0.6, "the reference states none"
    found = shown("eval", dense, *ASKED, "--temperature", "2")["sampled"]["settings"]
    assert found == NEUTRAL | {"temperature": 2.0}


def test_a_gguf_file_states_settings(
    tiny_gguf: TinyPath, tmp_path: Path, shown: Callable[..., Any], refused: Callable[..., str]
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    plain, path = tiny_gguf(), tmp_path / "stating.gguf"
    assert "--temperature" in refused("eval", str(plain), *ASKED)
    keys, kind = gguf_package.Keys.General, gguf_package.GGUFValueType
    stated = {
        keys.SAMPLING_TEMP: MetadataDetails(kind.FLOAT32, 0.7),
        keys.SAMPLING_TOP_K: MetadataDetails(kind.INT32, 20),
        keys.SAMPLING_TOP_P: MetadataDetails(kind.FLOAT32, 0.8),
    }
    copy_with_new_metadata(gguf_package.GGUFReader(plain), gguf_package.GGUFWriter(path, "llama"), stated, ())
    found = [shown("eval", str(path), "--runtime", one, *ASKED)["sampled"] for one in ("llama.cpp", "torch")]
    assert found[0]["settings"] == NEUTRAL | {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    assert found[0] == found[1]


def test_the_card_speaks_for_what_is_made_of_a_built_in_model(
    tiny_loaded: Callable[..., LoadedModel],
) -> None:
    row, loaded = BUILTIN_MODELS["smollm2-135m"], tiny_loaded()
    settings = EvaluationSettings(prompts=("Once",), sampled=True)
    for names in ({"sha256": row.sha256}, {"made_from": row.sha256}):
        model = TorchLanguageModel(replace(loaded, source=replace(loaded.source, **names)))
        found = sampling_for([model], settings)
        assert found is not None
        assert (found.temperature, found.top_p) == (0.2, 0.9)
    assert sampling_for([model], replace(settings, prompts=())) is None
    assert sampling_for([model], replace(settings, sampled=False)) is None
    with pytest.raises(InputError, match="--temperature T"):
        sampling_for([TorchLanguageModel(loaded)], settings)


def test_people_see_both_shares(stating: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", stating, *ASKED]) == 0
    said = capsys.readouterr().out
    assert "| degenerate answers " in said
    assert "degenerate answers, sampled at temperature 0.6, top_k 50, repetition_penalty 1.05" in said
    assert said.count("\nmodel, sampled") == 2


def test_the_gate_has_a_row_of_sampled_answers(
    stating: str, tmp_path: Path, shown: Callable[..., Any], refused: Callable[..., str]
) -> None:
    saved = str(tmp_path / "saved.json")
    assert main(["eval", stating, *ASKED, "--save", saved]) == 0
    rows = {row["metric"]: row for row in shown("eval", stating, *ASKED, "--baseline", saved)["gate"]}
    row = rows["degenerate answers, sampled"]
    assert (row["change"], row["allowed"], row["ok"]) == (0, 0.05, True)
    other = refused("eval", stating, *ASKED, "--temperature", "0.7", "--baseline", saved)
    assert "temperature was 0.6 and is 0.7" in other
    assert "seed of sampled answers was 1 and is 3" in refused(
        "eval", stating, *ASKED, "--seed", "3", "--baseline", saved
    )
    greedy = [one for one in ASKED if one != "--sampled"]
    assert "degenerate answers, sampled" in refused("eval", stating, *greedy, "--baseline", saved)


def test_settings_that_nothing_can_be_sampled_at_are_refused(
    stating: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = shutil.copytree(stating, tmp_path / "wrong")
    for stated, reason in (({"temperature": 0.0}, "temperature: out of range"), ({"top_k": "x"}, "top_k")):
        (folder / "generation_config.json").write_text(json.dumps(stated), "utf-8")
        assert reason in refused("eval", str(folder), *ASKED)


def test_a_release_plans_the_figure_where_it_is_asked_for() -> None:
    head = '[model]\nreference = "smollm2-135m"\n[evaluate]\n'
    budget = '[[budgets]]\nmetric = "degenerate_sampled"\nat_most = 0.1\n'
    with pytest.raises(InputError, match="degenerate_sampled is not measured here"):
        parse_config(head + budget, where="x")
    config = parse_config(head + "sampled = true\ntemperature = 0.3\n" + budget, where="x")
    assert [key.item for key in planned_figures(config) if key.metric == "degenerate_sampled"] == [
        "checkpoint"
    ]
    without = parse_config(head + "temperature = 0.3\n", where="x")
    assert without.warnings == ("evaluate.temperature has no effect without sampled answers",)
    with pytest.raises(InputError, match=r"evaluate\.top_p: is gone; use evaluate\.temperature"):
        parse_config(head + "sampled = true\ntop_p = 1.5\n", where="x")


def test_a_release_of_a_model_that_states_nothing_stops_at_its_first_stage(
    dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "release.toml", tmp_path / "out"
    small = '[prune]\ncalibration = ["builtin:python-docs"]\nnsamples = 1\nseqlen = 32\n'
    judged = '[evaluate]\ntext = ["builtin:python-docs"]\nchats = []\nsampled = true\n'
    config.write_text(f'[model]\nreference = "{dense}"\n{small}{judged}', "utf-8")
    capsys.readouterr()
    assert main(["release", str(config), "-o", str(out), "--threads", "1"]) == 2
    assert "--temperature T, or evaluate.temperature" in capsys.readouterr().err
    assert not stage_folder(out, "prune").exists()

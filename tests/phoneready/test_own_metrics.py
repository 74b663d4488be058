"""Own metrics as figures: budgets hold them to limits, plugins bring them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.reference import load_model
from phoneready.evaluation.evaluation_record import Evaluation
from phoneready.evaluation.figures import evaluation_figures
from phoneready.evaluation.own_metrics import check_directions, metric_sha256
from phoneready.evaluation.run import evaluate
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.figures import FigureSet
from phoneready.figures.gate import judge_all
from phoneready.settings.release import parse_config
from phoneready.settings.schema import ReleaseConfig

TinyPath = Callable[..., Path]
MODULE = '''
def tokens(model, tokenizer, windows):
    """Two figures with directions of their own."""
    return {"read": sum(w.ids.numel() for w in windows), "lost": 3.0, "seen": 1.0}

tokens.higher_is_better = {"read": True, "lost": False}
tokens.unit = {"read": "tokens"}

def plain(model, tokenizer, windows):
    return 7

plain.higher_is_better = True
'''
CONFIG = """
[model]
reference = "some/model"
[evaluate]
metrics = ["{module}:tokens", "{module}:plain"]
{baseline}
[[budgets]]
metric = "{metric}"
files = ["checkpoint"]
{limit}
"""
BASELINE = '[baseline]\nfile = "figures.json"\n'


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of own metrics in the working directory."""
    name = f"metrics_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return f"{name}.py"


def config(module: str, metric: str, limit: str, baseline: str = "") -> ReleaseConfig:
    text = CONFIG.format(module=module, metric=metric, limit=limit, baseline=baseline)
    return parse_config(text, where="x")


def judged(module: str, tiny_folder: TinyPath) -> Evaluation:
    model = TorchLanguageModel(load_model(str(tiny_folder())))
    settings = EvaluationSettings(
        ("builtin:python-docs",), seqlen=32, max_windows=2, prompts=(), metrics=(f"{module}:tokens",)
    )
    return evaluate(model, None, settings)


def figures(evaluation: Evaluation) -> FigureSet:
    return FigureSet("some/model", None, 0, tuple(evaluation_figures("checkpoint", "checkpoint", evaluation)))


def test_budgets_limit_own_metrics(module: str, tiny_folder: TinyPath) -> None:
    found = figures(judged(module, tiny_folder))
    limits = {"read": "at_least = 64", "lost": "at_most = 2", "seen": "at_most = 1"}
    outcomes = {}
    for key, limit in limits.items():
        budgets = config(module, f"{module}:tokens.{key}", limit).budgets
        check_directions(budgets)
        (verdict,) = judge_all(budgets, found)
        outcomes[key] = (verdict.outcome, verdict.unit)
    assert outcomes == {"read": ("pass", "tokens"), "lost": ("missed", ""), "seen": ("pass", "")}
    # The function's name means all that it returns.
    every = config(module, f"{module}:tokens", "at_most = 2").budgets
    with pytest.raises(InputError, match=r"budgets\[0\].*tokens is better the higher it is"):
        judge_all(every, found)
    with pytest.raises(InputError, match=f"nothing has {module}:tokens.other here.*tokens.read"):
        judge_all(config(module, f"{module}:tokens.other", "at_most = 2").budgets, found)


def test_a_limit_to_the_good_side_is_found_before_anything_runs(module: str) -> None:
    with pytest.raises(InputError, match="plain is better the higher it is; allowed: at_least only"):
        check_directions(config(module, f"{module}:plain", "at_most = 7").budgets)
    with pytest.raises(InputError, match="one of at_most and at_least"):
        config(module, f"{module}:plain", "at_most = 7\nat_least = 6")
    with pytest.raises(InputError, match=r"other:metric is not measured here; allowed: .*:plain\.\*"):
        config(module, "other:metric", "at_most = 7")
    with pytest.raises(InputError, match="is not taken of the dense model; allowed: baseline"):
        config(module, f"{module}:plain", 'at_least = 1\nrelative_to = "dense"')
    with pytest.raises(InputError, match="unknown metric"):
        config(module, "plain", "at_most = 7")


def test_a_plugin_brings_a_metric(
    dense: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shown: Callable[..., Any],
    refused: Callable[..., str],
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "metrics_of_a_plugin.py").write_text(MODULE, encoding="utf-8")
    info = tmp_path / "some_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-metrics\nVersion: 1.0\n")
    points = "[phoneready.metrics]\nseven = metrics_of_a_plugin:plain\ntorn = no_such_module_of_a_plugin:f\n"
    (info / "entry_points.txt").write_text(points)
    asked = ["eval", dense, "--set", "seqlen=32", "--set", "max_windows=1", "--prompts", "none"]
    result = shown(*asked, "--set", "metrics=seven")["metrics"]
    assert result == [{"name": "seven", "value": 7.0, "higher_is_better": True, "unit": ""}]
    assert len(metric_sha256("seven")) == 64
    text = '[model]\nreference = "m"\n[evaluate]\nmetrics = ["seven"]\n[[budgets]]\nmetric = "seven"\n'
    text += 'files = ["checkpoint"]\n'
    check_directions(parse_config(text + "at_least = 6\n", where="x").budgets)
    said = refused(*asked, "--set", "metrics=torn")
    assert "plugin torn of some-metrics 1.0 cannot be imported" in said

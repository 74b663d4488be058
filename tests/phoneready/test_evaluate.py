"""`phoneready eval` on tiny models: runtimes, tasks, own metrics, degeneration, and the gate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phoneready.main import main

TinyPath = Callable[..., Path]
Shown = Callable[..., Any]
Refused = Callable[..., str]
Capture = pytest.CaptureFixture[str]
SIZES = ["--set", "seqlen=32", "--set", "max_windows=2", "--set", "max_new_tokens=4"]
TEXT = [*SIZES, "--prompts", "none"]
METRICS = """
import torch

def logit_mean(model, tokenizer, windows):
    assert len(tokenizer) <= model.vocab_size
    return torch.cat([logits for _, logits in model.next_token_logits(windows[0].ids[0])]).mean()

def two(model, tokenizer, windows):
    return {"a": 1, "b": 2.5}

two.higher_is_better = True

def text(model, tokenizer, windows):
    return "good"

def fails(model, tokenizer, windows):
    raise RuntimeError("no luck")
"""


@pytest.fixture(scope="module")
def gguf(tiny_gguf: TinyPath) -> str:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    return str(tiny_gguf())


def figures_of(result: Any, role: str = "shipped") -> dict[str, float]:
    return {one["key"]["metric"]: one["value"] for one in result["figures"] if one["role"] == role}


def test_a_file_is_judged_in_its_own_runtime(dense: str, gguf: str, dense_onnx: str, shown: Shown) -> None:
    runs = ([dense], [gguf], [gguf, "--runtime", "torch"], [dense_onnx], [f"{dense_onnx}/onnx/model.onnx"])
    results = [shown("eval", *arguments, *SIZES) for arguments in runs]
    runtimes = [r["model"]["runtime"] for r in results]
    assert runtimes == ["torch", "llama.cpp", "torch", "onnxruntime", "onnxruntime"]
    torch_text, llama_text, dequantized, *onnx_texts = (r["texts"][0] for r in results)
    for exported in (llama_text, *onnx_texts):
        assert exported["nats"] == pytest.approx(torch_text["nats"], rel=1e-4)
    assert dequantized["nats"] == pytest.approx(torch_text["nats"], rel=1e-5)
    assert llama_text["windows_sha256"] == torch_text["windows_sha256"]
    assert results[0]["answers"] == results[1]["answers"] == results[3]["answers"]
    result = shown("eval", gguf, "--against", dense, *TEXT)
    found = result["texts"][0]["distance"]
    assert 0 <= found["kl_median"] <= found["kl_p99"] <= found["kl_p99_9"] < 1e-6
    shares = figures_of(result)
    assert (shares["same_top1"], shares["perplexity_ratio"]) == (1, pytest.approx(1, abs=1e-4))


def test_a_cache_of_few_bits_is_held_against_the_file_with_floats(
    tiny_gguf: TinyPath, dense_onnx: str, shown: Shown, refused: Refused, capsys: Capture, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    file = str(tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32))
    kl, saved = {}, tmp_path / "q8_0.json"
    for cache in ("f16", "q8_0", "q4_0"):
        result = shown("eval", file, "--set", f"cache_type={cache}", *TEXT, "--save", saved)
        assert result["model"]["cache_type"] == cache
        if cache == "f16":
            assert result["against"] is None
            continue
        assert (result["against"]["reference"], result["against"]["cache_type"]) == (file, "f16")
        (text,) = result["texts"]
        assert text["nats"] != text["against_nats"]
        kl[cache] = figures_of(result)["kl_mean"]
    assert 0 < kl["q8_0"] < kl["q4_0"]
    assert "cache_type" not in shown("eval", file, *TEXT)["model"]
    assert main(["eval", file, "--set", "cache_type=q4_0", *TEXT]) == 0
    assert f"Keys and values of {file} are in q4_0, and those of {file} in f16." in capsys.readouterr().out
    against = ["--against", file, "--baseline", saved]
    assert "cache of the reference model" in refused(
        "eval", file, "--set", "cache_type=q4_0", *against, *TEXT
    )
    said = refused("eval", dense_onnx, "--set", "cache_type=q8_0")
    assert "onnxruntime has no such cache (got 'q8_0')" in said


@pytest.mark.filterwarnings("ignore")
def test_tasks_agree_between_runtimes(
    dense: str, gguf: str, dense_onnx: str, task: Path, shown: Shown, capsys: Capture
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    asked = ["--tasks", str(task), "--set", "num_fewshot=1", "--text", "none", "--prompts", "none"]
    for exported in (gguf, dense_onnx):
        result = shown("eval", exported, "--against", dense, *asked)
        assert result["tasks"] == result["against_tasks"]
    (done,) = result["tasks"]
    assert (done["task"], done["version"], done["n_items"], done["num_fewshot"]) == ("fruits", "2.0", 10, 1)
    assert main(["eval", dense, *asked]) == 0
    captured = capsys.readouterr()
    assert "acc_norm" in captured.out
    assert captured.err == ""


def test_own_metrics_and_their_gate(
    dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown, refused: Refused
) -> None:
    name = "own_metrics_of_a_test.py"
    (tmp_path / name).write_text(METRICS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    asked = ["eval", dense, *TEXT, "--set", f"metrics={name}:logit_mean", "--set", f"metrics={name}:two"]
    found = shown(*asked, "--save", "saved.json")["metrics"]
    assert [metric["name"] for metric in found] == [f"{name}:logit_mean", f"{name}:two.a", f"{name}:two.b"]
    assert [metric["value"] for metric in found][1:] == [1, 2.5]
    assert [metric["higher_is_better"] for metric in found] == [None, True, True]
    asked = ["eval", dense, *TEXT, "--set", f"metrics={name}:two"]
    shown(*asked, "--save", "saved.json")
    assert all(row["outcome"] == "pass" for row in shown(*asked, "--baseline", "saved.json")["gate"])
    record = json.loads(Path("saved.json").read_text(encoding="utf-8"))
    undirected = [record["metrics"][0], record["metrics"][1] | {"higher_is_better": None}]
    more = [*record["texts"], record["texts"][0] | {"source": "another.txt"}]
    for change, reason in (
        ({"metrics": undirected}, "higher_is_better of"),
        ({"texts": more}, "texts of own metrics"),
    ):
        Path("changed.json").write_text(json.dumps(record | change), encoding="utf-8")
        assert reason in refused(*asked, "--baseline", "changed.json")
    for reference, reason in {
        f"{name}:text": "not a finite number",
        f"{name}:fails": "no luck",
        f"{name}:missing": "missing",
        "os": "module:function",
        "own_metrics_of_a_test:two": "own_metrics_of_a_test.py:two",
    }.items():
        assert reason in refused("eval", dense, *TEXT, "--set", f"metrics={reference}")


def test_answers_are_checked(dense: str, tmp_path: Path, shown: Shown) -> None:
    lines, plain = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    lines.write_text('{"prompt": "Once"}\n{"turns": ["List three fruits.", "More."]}\n', encoding="utf-8")
    plain.write_text("Once\n\nTwice\n", encoding="utf-8")
    asked = ["eval", dense, "--against", dense, "--text", "none", "--set", "max_new_tokens=8", "--prompts"]
    result = shown(*asked, lines)
    assert result["prompts"] == ["Once", "List three fruits."]
    found = result["degeneration"]
    assert len(found["reasons"]) == 2
    assert found["share"] == sum(reason is not None for reason in found["reasons"]) / 2
    assert (found["against_share"], found["against_reasons"]) == (found["share"], found["reasons"])
    assert shown(*asked, plain)["prompts"] == ["Once", "Twice"]


TASK = {
    **{"task": "piqa", "version": "1.0", "source": "lm_eval", "sha256": None, "n_items": 10, "limit": 10},
    **{"num_fewshot": 0, "metrics": [{"name": "acc", "value": 0.5, "stderr": 0.1, "higher_is_better": True}]},
}


def test_the_gate(
    dense: str, pruned: Path, tmp_path: Path, shown: Shown, refused: Refused, capsys: Capture
) -> None:
    saved, changed = tmp_path / "saved.json", tmp_path / "changed.json"
    asked = ["eval", str(pruned), "--against", dense, *SIZES]
    shown(*asked, "--save", saved)
    rows = {row["metric"]: row for row in shown(*asked, "--baseline", saved)["gate"]}
    assert len(rows) == 6
    assert {row["outcome"] for row in rows.values()} == {"pass"}
    assert rows["perplexity, text builtin:python-docs"]["value"] == pytest.approx(1)
    assert rows["kl_mean, text builtin:python-docs"]["limit"] == "at most 0.01 nats above baseline"

    record = json.loads(saved.read_text(encoding="utf-8"))
    (text,) = record["texts"]
    text["nats"] = [nats - 31 * math.log(1.1) for nats in text["nats"]]
    text["distance"]["kl"] = [kl - 31 * 0.05 for kl in text["distance"]["kl"]]
    changed.write_text(json.dumps(record), encoding="utf-8")
    asked = [*asked, "--baseline", str(changed)]
    capsys.readouterr()
    assert main(asked) == 1
    captured = capsys.readouterr()
    assert "2 of 6 limits of the baseline missed" in captured.err
    for part in ("perplexity, text", "is 1.1 x", "kl_mean, text"):
        assert part in captured.err
    assert "same_top1" not in captured.err
    assert captured.out.count(" missed |") == 2
    assert main([*asked, "--tolerance", "perplexity=1.2", "--tolerance", "kl_mean=0.1"]) == 0

    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "tokens of text builtin:python-docs was 000": lambda r: r["texts"][0].update(windows_sha256="0" * 64),
        "hash of the dense model": lambda r: r["model"].update(source_sha256="0" * 64),
        "reference model": lambda r: r["against"].update(sha256="0" * 64),
        "wiki.test.txt": lambda r: r["texts"][0].update(source="wiki.test.txt"),
        "m:f": lambda r: r.update(metrics=[{"name": "m:f", "value": 1.0, "higher_is_better": True}]),
        "piqa": lambda r: r.update(tasks=[TASK]),
        "max_new_tokens": lambda r: r["degeneration"].update(max_new_tokens=128),
        "schema_version": lambda r: r.update(schema_version=1),
        "texts: not one number for each window": lambda r: r["texts"][0].update(nats=[1.0]),
    }
    for reason, change in changes.items():
        record = json.loads(saved.read_text(encoding="utf-8"))
        change(record)
        changed.write_text(json.dumps(record), encoding="utf-8")
        assert reason in refused(*asked)


def test_task_figures_are_gated(
    dense: str, task: Path, tmp_path: Path, shown: Shown, refused: Refused
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    saved = tmp_path / "tasks.json"
    asked = ["eval", dense, "--text", "none", "--prompts", "none", "--tasks", str(task)]
    shown(*asked, "--save", saved)
    asked += ["--baseline", str(saved)]
    assert all(row["outcome"] == "pass" for row in shown(*asked)["gate"])
    record = json.loads(saved.read_text(encoding="utf-8"))
    metric = record["tasks"][0]["metrics"][0]
    right = metric["right"]
    assert metric["value"] == right.count("1") / 10

    def rewrite(**changes: Any) -> None:
        metric.update(changes)
        saved.write_text(json.dumps(record), encoding="utf-8")

    one_more = right.replace("0", "1", 1)
    rewrite(right=one_more, value=one_more.count("1") / 10)
    said = refused(*asked, status=3)
    assert "1 of 2 limits of the baseline not decided: accuracy, fruits acc of" in said
    assert main([*asked, "--tolerance", "accuracy=0.4"]) == 0
    rewrite(right="1" * 10, value=1.0)
    assert "missed: accuracy, fruits acc of" in refused(*asked, status=1)
    rewrite(right="10x")
    assert "tasks[0].metrics[0].right" in refused(*asked)
    del metric["right"]  # as an earlier version wrote it
    rewrite(stderr=0.01)
    assert "taken as independent" in refused(*asked, status=1)
    assert "limit of fruits was None and is 4" in refused(*asked, "--set", "limit=4")


def test_models_of_two_vocabularies_are_judged_on_the_same_text(
    dense: str, trimmed: Path, tmp_path: Path, shown: Shown, refused: Refused, capsys: Capture
) -> None:
    judged = shown("eval", trimmed, "--against", dense, *TEXT)
    assert judged["vocabularies"] == {"tokens": 300, "against_tokens": 384, "is_part": True}
    found, whole = judged["texts"][0], shown("eval", dense, *TEXT)["texts"][0]
    assert found["n_bytes"] == whole["n_bytes"], "the whole text, however many tokens that takes"
    assert found["against_nats"] == pytest.approx(whole["nats"])
    assert found["against_n_tokens"] == whole["n_tokens"] == [31, 31]
    assert sum(found["n_tokens"]) > 62, "what is gone is spelled in parts"
    assert found["distance"]["n_tokens"] == [31, 31]
    ours, theirs = figures_of(judged), figures_of(judged, "dense")
    assert ours["kl_mean"] > 0
    bits = (ours["bits_per_byte"] - theirs["bits_per_byte"]) * sum(found["n_bytes"]) / 62
    assert ours["perplexity_ratio"] == pytest.approx(math.exp(bits * math.log(2)))
    judged = shown("eval", dense, "--against", trimmed, *TEXT)
    assert judged["vocabularies"] == {"tokens": 384, "against_tokens": 300, "is_part": False}
    other = judged["texts"][0]
    assert other["distance"] is None, "the reference lacks tokens of the model"
    assert sum(other["n_tokens"]) < sum(other["against_n_tokens"]) == 62
    assert "kl_mean" not in figures_of(judged)
    assert figures_of(judged)["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=0.1)
    assert main(["eval", dense, "--against", str(trimmed), *TEXT]) == 0
    assert "KL and same top-1 are not compared" in capsys.readouterr().out
    own = tmp_path / "own.py"
    own.write_text("def count(model, tokenizer, windows):\n    return 1.0\n", encoding="utf-8")
    asked = ["eval", trimmed, "--against", dense, *TEXT, "--set", f"metrics={own}:count"]
    assert "different vocabularies" in refused(*asked)

"""`phoneready eval` on tiny models: runtimes, tasks, own metrics, degeneration, and the gate."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from cfsp.errors import InputError
from cfsp.files import sha256_file
from phoneready.evaluation.metrics import metric_sha256
from phoneready.main import main

TinyPath = Callable[..., Path]
SIZES = ["--seqlen", "32", "--windows", "2", "--max-new-tokens", "4"]
TEXT = [*SIZES, "--no-prompts"]
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
def model(tiny_folder: TinyPath) -> str:
    return str(tiny_folder())


@pytest.fixture(scope="module")
def other(tiny_folder: TinyPath) -> str:
    return str(tiny_folder(seed=1))


@pytest.fixture(scope="module")
def gguf(tiny_gguf: TinyPath) -> str:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    return str(tiny_gguf())


@pytest.fixture(scope="module")
def onnx(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the float32 ONNX variant."""
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path_factory.mktemp("onnx") / "out"
    assert main(["export", model, "-o", str(output), "--onnx", "fp32", "--threads", "1"]) == 0
    return str(output / "fp32")


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line that a refused command leaves on stderr."""
    capsys.readouterr()
    assert main(["eval", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert status != 2 or captured.out == ""
    return captured.err


def test_a_file_is_judged_in_its_own_runtime(
    model: str, gguf: str, onnx: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ([model], [gguf], [gguf, "--runtime", "torch"], [onnx], [f"{onnx}/onnx/model.onnx"])
    capsys.readouterr()
    results = [evaluate(capsys, *arguments, *SIZES) for arguments in runs]
    runtimes = [r["model"]["runtime"] for r in results]
    assert runtimes == ["torch", "llama.cpp", "torch", "onnxruntime", "onnxruntime"]
    torch_figures, llama_figures, dequantized, *onnx_figures = (r["texts"][0] for r in results)
    for exported in (llama_figures, *onnx_figures):
        assert exported["perplexity"] == pytest.approx(torch_figures["perplexity"], rel=1e-4)
    assert dequantized["perplexity"] == pytest.approx(torch_figures["perplexity"], rel=1e-5)
    assert llama_figures["windows_sha256"] == torch_figures["windows_sha256"]
    assert results[0]["answers"] == results[1]["answers"] == results[3]["answers"]


def test_a_cache_of_few_bits_is_held_against_the_file_with_floats(
    tiny_gguf: TinyPath, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    file = str(tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32))
    kl, saved = {}, tmp_path / "q8_0.json"
    for cache in ("f16", "q8_0", "q4_0"):
        result = evaluate(capsys, file, "--cache-type", cache, *TEXT, "--save", str(saved))
        assert result["model"]["cache_type"] == cache
        if cache == "f16":
            assert result["against"] is None
            continue
        assert (result["against"]["reference"], result["against"]["cache_type"]) == (file, "f16")
        (text,) = result["texts"]
        assert text["bits_per_byte"] != text["against_bits_per_byte"]
        kl[cache] = text["divergence"]["kl_mean"]
    assert 0 < kl["q8_0"] < kl["q4_0"]
    plain = evaluate(capsys, file, *TEXT)
    assert "cache_type" not in plain["model"]
    assert main(["eval", file, "--cache-type", "q4_0", *TEXT]) == 0
    assert f"Keys and values of {file} are in q4_0, and those of {file} in f16." in capsys.readouterr().out
    against = ["--against", file, "--baseline", str(saved)]
    assert "cache of the reference model" in refused(capsys, file, "--cache-type", "q4_0", *against, *TEXT)


def test_a_type_of_cache_that_a_runtime_does_not_have_is_refused(
    model: str, onnx: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "torch keeps keys and values as it computes them" in refused(capsys, model, "--cache-type", "q8_0")
    assert "onnxruntime has no such cache (got 'q8_0')" in refused(capsys, onnx, "--cache-type", "q8_0")
    assert "allowed: f16, q8_0, q4_0" in refused(capsys, model, "--cache-type", "q2_K")


def test_a_file_against_the_checkpoint(model: str, gguf: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(capsys, gguf, "--against", model, *TEXT)
    found = result["texts"][0]["divergence"]
    assert 0 <= found["kl_median"] <= found["kl_p99"] <= found["kl_p99_9"] < 1e-6
    assert found["same_top1"] == 1
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_tasks_agree_between_runtimes(
    model: str, gguf: str, onnx: str, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    asked = ["--tasks", str(task), "--num-fewshot", "1", "--no-text", "--no-prompts"]
    capsys.readouterr()
    for exported in (gguf, onnx):
        result = evaluate(capsys, exported, "--against", model, *asked)
        assert result["tasks"] == result["against_tasks"]
    (done,) = result["tasks"]
    assert (done["task"], done["version"], done["n_items"], done["num_fewshot"]) == ("fruits", "2.0", 10, 1)
    assert main(["eval", model, *asked]) == 0
    captured = capsys.readouterr()
    assert "acc_norm" in captured.out
    assert captured.err == ""


def test_own_metrics(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_metrics_of_a_test.py").write_text(METRICS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    name = "own_metrics_of_a_test.py"
    result = evaluate(capsys, model, *TEXT, "--metric", f"{name}:logit_mean", "--metric", f"{name}:two")
    names = [metric["name"] for metric in result["metrics"]]
    assert names == [f"{name}:logit_mean", f"{name}:two.a", f"{name}:two.b"]
    assert [metric["value"] for metric in result["metrics"]][1:] == [1, 2.5]
    assert [metric["higher_is_better"] for metric in result["metrics"]] == [None, True, True]
    bad = {
        f"{name}:text": "not a finite number",
        f"{name}:fails": "no luck",
        f"{name}:missing": "missing",
        "no_such_module:f": "no_such_module",
        "os": "module:function",
        "own_metrics_of_a_test:two": "own_metrics_of_a_test.py:two",
        "no/such_file.py:f": "No such file",
    }
    for reference, reason in bad.items():
        message = refused(capsys, model, *TEXT, "--metric", reference)
        assert reason in message
        assert reference.partition(":")[0] in message


def test_a_metric_is_hashed_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_package_of_a_test"
    package.mkdir()
    for file in (package / "__init__.py", package / "metrics.py", tmp_path / "alone.py"):
        file.write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    expected = sha256_file(package / "metrics.py")
    assert metric_sha256(f"{tmp_path / 'alone.py'}:f") == expected
    assert metric_sha256("a_package_of_a_test.metrics:f") == ""
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metric_sha256("a_package_of_a_test.metrics:f") == expected
    with pytest.raises(InputError, match=r"gone\.py"):
        metric_sha256(f"{tmp_path / 'gone.py'}:f")


def test_answers_are_checked(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n{"turns": ["List three fruits.", "More."]}\n', encoding="utf-8")
    asked = ["--prompts", str(prompts), "--no-text", "--max-new-tokens", "8"]
    result = evaluate(capsys, model, "--against", model, *asked)
    assert result["prompts"] == ["Once", "List three fruits."]
    found = result["degeneration"]
    assert found["n_prompts"] == len(found["reasons"]) == len(found["against_reasons"]) == 2
    assert found["share"] == sum(reason is not None for reason in found["reasons"]) / 2
    assert sum(found["by_reason"].values()) == pytest.approx(found["share"])
    assert found["difference_points"] == 0
    (tmp_path / "prompts.txt").write_text("Once\n\nTwice\n", encoding="utf-8")
    assert evaluate(capsys, model, "--prompts", str(tmp_path / "prompts.txt"), *asked[2:])["prompts"] == [
        "Once",
        "Twice",
    ]


@pytest.fixture(scope="module")
def judged(model: str, other: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judged") / "baseline.json"
    assert main(["eval", other, "--against", model, *SIZES, "--save", str(path)]) == 0
    return path


@pytest.fixture
def baseline(judged: Path, tmp_path: Path) -> str:
    return str(shutil.copy(judged, tmp_path / "baseline.json"))


def test_the_gate_passes_what_is_as_good(
    model: str, other: str, baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(capsys, other, "--against", model, *SIZES, "--baseline", baseline)
    rows = {row["metric"]: row for row in result["gate"]}
    assert len(rows) == 6
    assert all(row["ok"] for row in rows.values())
    assert rows["perplexity, text builtin:python-docs"]["change"] == pytest.approx(1)
    assert rows["KL mean, text builtin:python-docs"]["allowed"] == 0.01


def _without_direction(record: dict[str, Any]) -> None:
    record["metrics"][1]["higher_is_better"] = None


def _more_texts(record: dict[str, Any]) -> None:
    record["texts"].append(record["texts"][0] | {"source": "another.txt"})


@pytest.mark.parametrize(
    ("change", "reason"), [(_without_direction, "higher_is_better of"), (_more_texts, "texts of own metrics")]
)
def test_own_metrics_are_gated_on_the_same_texts_in_the_same_direction(
    change: Callable[[dict[str, Any]], None],
    reason: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "more_metrics_of_a_test.py").write_text(METRICS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    asked = [model, *TEXT, "--metric", "more_metrics_of_a_test.py:two"]
    evaluate(capsys, *asked, "--save", "saved.json")
    assert all(row["ok"] for row in evaluate(capsys, *asked, "--baseline", "saved.json")["gate"])
    record = json.loads(Path("saved.json").read_text(encoding="utf-8"))
    change(record)
    Path("saved.json").write_text(json.dumps(record), encoding="utf-8")
    assert reason in refused(capsys, *asked, "--baseline", "saved.json")


def test_the_gate_fails_what_is_worse(
    model: str, other: str, baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(Path(baseline).read_text(encoding="utf-8"))
    text = record["texts"][0]
    text["perplexity"] /= 1.1
    text["divergence"]["kl_mean"] -= 0.05
    Path(baseline).write_text(json.dumps(record), encoding="utf-8")
    asked = [other, "--against", model, *SIZES, "--baseline", baseline]
    assert main(["eval", *asked]) == 1
    captured = capsys.readouterr()
    assert "perplexity, text" in captured.err
    assert "ratio 1.1" in captured.err
    assert "KL mean" in captured.err
    assert "same top-1" not in captured.err
    assert captured.out.count("worse") == 2
    assert main(["eval", *asked, "--tolerance", "perplexity=1.2", "--tolerance", "kl_mean=0.1"]) == 0


TASK = {
    **{"task": "piqa", "version": "1.0", "source": "lm_eval", "sha256": None, "n_items": 10, "limit": 10},
    **{"num_fewshot": 0, "metrics": [{"name": "acc", "value": 0.5, "stderr": 0.1, "higher_is_better": True}]},
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda r: r["texts"][0].update(windows_sha256="0" * 64),
            "tokens of text builtin:python-docs was 000",
        ),
        (lambda r: r["against"].update(sha256="0" * 64), "reference model"),
        (lambda r: r["texts"][0].update(source="wiki.test.txt"), "wiki.test.txt"),
        (lambda r: r.update(metrics=[{"name": "m:f", "value": 1.0, "higher_is_better": True}]), "m:f"),
        (lambda r: r.update(tasks=[TASK]), "piqa"),
        (lambda r: r["degeneration"].update(max_new_tokens=128), "max_new_tokens"),
        (lambda r: r.update(schema_version=1), "schema_version"),
        (
            lambda r: r["texts"][0].update(perplexity=0.0),
            "texts[0].perplexity: Input should be greater than 0",
        ),
    ],
)
def test_another_baseline_is_refused(
    change: Callable[[dict[str, Any]], None],
    reason: str,
    model: str,
    other: str,
    baseline: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = json.loads(Path(baseline).read_text(encoding="utf-8"))
    change(record)
    Path(baseline).write_text(json.dumps(record), encoding="utf-8")
    assert reason in refused(capsys, other, "--against", model, *SIZES, "--baseline", baseline)


def test_a_baseline_of_another_dense_model_is_refused_without_a_reference(
    model: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = str(tmp_path / "baseline.json")
    small = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32", "--align", "1"]
    for name, dense in (("ours", model), ("theirs", other)):
        assert main(["prune", dense, "-o", str(tmp_path / name), "--prune-ratio", "0.25", *small]) == 0
    exported = tmp_path / "onnx"
    assert main(["export", str(tmp_path / "ours"), "-o", str(exported), "--onnx", "fp32"]) == 0
    capsys.readouterr()
    found = evaluate(capsys, str(tmp_path / "ours"), *TEXT, "--save", saved)
    assert found["model"]["source_sha256"] is not None
    result = evaluate(capsys, str(exported / "fp32"), *TEXT, "--baseline", saved)
    assert result["model"]["source_sha256"] == found["model"]["source_sha256"]
    gated = [str(tmp_path / "theirs"), *TEXT, "--baseline", saved]
    assert "hash of the dense model" in refused(capsys, *gated)


def test_task_figures_are_gated(
    model: str, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    saved = str(tmp_path / "tasks.json")
    asked = [model, "--no-text", "--no-prompts", "--tasks", str(task)]
    evaluate(capsys, *asked, "--save", saved)
    assert all(row["ok"] for row in evaluate(capsys, *asked, "--baseline", saved)["gate"])
    record = json.loads(Path(saved).read_text(encoding="utf-8"))
    metric = record["tasks"][0]["metrics"][0]
    wrong = metric["right"].index("0")

    def rewrite(right: str) -> None:
        metric.update(value=right.count("1") / 10, right=right)
        Path(saved).write_text(json.dumps(record), encoding="utf-8")

    assert metric["value"] == metric["right"].count("1") / 10
    rewrite(metric["right"][:wrong] + "1" + metric["right"][wrong + 1 :])
    refusal = refused(capsys, *asked, "--baseline", saved, status=3)
    assert "not decided whether it is worse than the baseline: fruits acc went from" in refusal
    assert main(["eval", *asked, "--baseline", saved, "--tolerance", "accuracy=0.4"]) == 0
    capsys.readouterr()
    rewrite("1" * 10)
    assert "fruits acc went from" in refused(capsys, *asked, "--baseline", saved, status=1)
    del metric["right"]  # as an earlier version wrote it
    metric["stderr"] = 0.01
    Path(saved).write_text(json.dumps(record), encoding="utf-8")
    assert "taken as independent" in refused(capsys, *asked, "--baseline", saved, status=1)
    metric["right"] = "10x"
    Path(saved).write_text(json.dumps(record), encoding="utf-8")
    assert "tasks[0].metrics[0].right" in refused(capsys, *asked, "--baseline", saved)
    del metric["right"]
    Path(saved).write_text(json.dumps(record), encoding="utf-8")
    assert "limit of fruits was None and is 4" in refused(capsys, *asked, "--limit", "4", "--baseline", saved)


@pytest.fixture(scope="module")
def good_result(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that a baseline can be."""
    path = tmp_path_factory.mktemp("result") / "good.json"
    assert main(["eval", model, *TEXT, "--save", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--runtime", "onnx"], "torch"),
        (["--runtime", "llama.cpp"], ".gguf"),
        (["--seqlen", "4096"], "512"),
        (["--tasks", "missing.yaml", "--no-text"], "missing.yaml"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--prompts", "prompts.md"], "prompts.md"),
        (["--baseline", "missing.json"], "missing.json"),
        (["--tolerance", "kl_mean=0.1"], "--baseline"),
        (["--max-kl-increase", "0.1"], "--max-kl-increase is gone: use --tolerance kl_mean=VALUE"),
        (["--ratios", "0.1"], "--ratios is gone: use `phoneready search MODEL --ratios`"),
        (["--baseline", "good.json", "--tolerance", "speed=1"], "a key of perplexity"),
        (["--baseline", "."], "cannot read"),
        (["--baseline", "good.json", "--tolerance", "kl_mean=-1"], "0 or more"),
        (["--baseline", "good.json", "--save", "./good.json"], "overwrite"),
        (["--save", "."], "is a directory"),
        (["--save", "prompts.md/x.json"], "is not a directory"),
        (["--text", "a/t.txt", "--text", "b/t.txt"], "text t.txt"),
        (["--no-text", "--text", "builtin:python-docs"], "--no-text"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    arguments: list[str],
    reason: str,
    model: str,
    good_result: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.md").write_text("Hello", encoding="utf-8")
    shutil.copy(good_result, tmp_path / "good.json")
    assert reason in refused(
        capsys, model, "--no-prompts" if "--prompts" not in arguments else "--no-text", *arguments
    )


def test_models_of_two_vocabularies_are_judged_on_the_same_text(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trimmed = str(tmp_path / "trimmed")
    options = ["--prune-ratio", "0", "--vocabulary", "300", "--calibration", "builtin:python-docs"]
    sizes = ["--nsamples", "4", "--seqlen", "64", "--threads", "1"]
    assert main(["prune", model, "-o", trimmed, *options, *sizes]) == 0
    assert "300 of 384 rows kept" in capsys.readouterr().out
    config = json.loads((tmp_path / "trimmed" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == 300
    assert "auto_map" not in config
    plain = transformers.AutoModelForCausalLM.from_pretrained(trimmed)
    assert plain.get_output_embeddings().weight.shape[0] == len(
        transformers.AutoTokenizer.from_pretrained(trimmed)
    )
    judged = evaluate(capsys, trimmed, "--against", model, *TEXT)
    assert judged["vocabularies"] == {"tokens": 300, "against_tokens": 384, "is_part": True}
    found = judged["texts"][0]
    dense = evaluate(capsys, model, *TEXT)["texts"][0]
    assert found["n_bytes"] <= dense["n_bytes"], "a window ends where the other has enough tokens"
    assert found["against_bits_per_byte"] == pytest.approx(dense["bits_per_byte"], rel=0.1)
    assert found["against_tokens_per_byte"] == found["n_tokens"] / found["n_bytes"]
    assert found["tokens_per_byte"] > found["against_tokens_per_byte"], "what is gone is spelled in parts"
    lost = found["divergence"]
    assert lost["kl_mean"] > 0
    assert lost["perplexity_ratio"] == pytest.approx(
        math.exp(
            (found["bits_per_byte"] - found["against_bits_per_byte"])
            * math.log(2)
            * found["n_bytes"]
            / lost["n_tokens"]
        )
    )
    judged = evaluate(capsys, model, "--against", trimmed, *TEXT)
    assert judged["vocabularies"] == {"tokens": 384, "against_tokens": 300, "is_part": False}
    other = judged["texts"][0]
    assert other["divergence"] is None, "the reference lacks tokens of the model"
    assert other["bits_per_byte"] == pytest.approx(dense["bits_per_byte"], rel=0.1)
    assert other["tokens_per_byte"] == pytest.approx(found["against_tokens_per_byte"], rel=0.1)
    assert other["against_tokens_per_byte"] == pytest.approx(found["tokens_per_byte"], rel=0.1)
    notes = {
        (trimmed, model): "over the 300 of its 384 tokens that the model has",
        (model, trimmed): "KL and same top-1 are not compared",
        (model, model): "Windows of",
    }
    for (one, against), note in notes.items():
        assert main(["eval", one, "--against", against, *TEXT]) == 0
        printed = capsys.readouterr().out
        assert note in printed
        assert ("same top-1 are" in printed) == (one != against)
    own = [str(tmp_path / "own.py") + ":count"]
    (tmp_path / "own.py").write_text(
        "def count(model, tokenizer, windows):\n    return 1.0\n", encoding="utf-8"
    )
    assert "different vocabularies" in refused(capsys, trimmed, "--against", model, *TEXT, "--metric", *own)

"""`compare --plot`: the points are the records', and the page opens offline and keeps hostile names harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.evaluation.divergence import Divergence
from cfsp.records import write_record
from phoneready.evaluation.evaluation_record import Evaluation, ModelIdentity, TextResult
from phoneready.main import main
from phoneready.report.model_points import point_groups, quality_of
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.engine_settings import EngineSettings
from runtime_bench.records.jsonl import append_jsonl
from runtime_bench.workload import Workload

MakeRecord = Callable[..., BenchRecord]
HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>%{x}\x1b\u202e{{ 7*7 }}.gguf"
)


def evaluation(
    sha256: str, kl: float | None = None, windows: str = "w", perplexity: float = 20.0
) -> Evaluation:
    divergence = (
        Divergence(
            kl_mean=kl,
            kl_median=0.1,
            kl_p99=1.0,
            kl_p99_9=2.0,
            same_top1=0.9,
            max_logit_difference=9.0,
            reference_perplexity=10.0,
            perplexity=perplexity,
            perplexity_ratio=perplexity / 10,
            n_tokens=1000,
            source="/data/test.txt",
            seqlen=512,
            windows_sha256=windows,
        )
        if kl
        else None
    )
    text = TextResult("text", "/data/test.txt", 512, 1000, windows, perplexity, divergence)
    against = ModelIdentity("dense") if kl else None
    return Evaluation(ModelIdentity(f"{sha256}.gguf", "llama.cpp", sha256), against, 0, (text,))


def test_a_point_is_the_fastest_row_with_its_quality(make_record: MakeRecord) -> None:
    dense = [make_record(n_threads=n, samples_ns=(ns,) * 5) for n, ns in ((1, 2000), (2, 1000), (4, 3000))]
    pruned = make_record(model_filename="models/pruned.gguf", file_sha256="1" * 64)
    load = make_record(Workload("load"))
    found = quality_of([evaluation("0" * 64, 0.01), evaluation("1" * 64, 0.25)])
    assert found is not None
    assert found.name.startswith("mean KL divergence from dense")
    (group,) = point_groups([load, *dense, pruned], found)
    assert group.test == "tg128"
    assert [(p.record.n_threads, p.quality) for p in group.points] == [(2, 0.01), (2, 0.25)]


def test_a_quantized_cache_has_points_and_quality_of_its_own(make_record: MakeRecord) -> None:
    rows = [make_record(), make_record(engine_settings=EngineSettings("q4_0"))]
    plain = evaluation("0" * 64)
    few = replace(
        plain,
        model=replace(plain.model, cache_type="q4_0"),
        texts=evaluation("0" * 64, perplexity=25.0).texts,
    )
    groups = point_groups(rows, quality_of([plain, few]))
    assert [(group.target, group.points[0].quality) for group in groups] == [
        ("local", 20.0),
        ("local, cache of q4_0", 25.0),
    ]


def test_kinds_and_targets_are_apart_and_nothing_is_dropped_in_silence(make_record: MakeRecord) -> None:
    failed = make_record(model_filename="b.gguf", status="failed", failure="timeout", samples_ns=())
    void = make_record(model_filename="c.gguf", degenerate="loop")
    other = make_record(kind="constrained-host", target="constrained(cores=0)")
    here, there = point_groups([make_record(), failed, void, other], None)
    assert (here.kind, there.kind) == ("measured", "constrained-host")
    assert [len(group.points) for group in (here, there)] == [1, 1]
    assert here.points[0].quality is None
    assert dict(here.left_out).keys() == {"b.gguf", "c.gguf"}
    assert dict(here.left_out)["b.gguf"] == "timeout"
    assert "loop" in dict(here.left_out)["c.gguf"]


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        ([evaluation("0" * 64), evaluation("1" * 64, windows="v")], "different texts"),
        ([evaluation("0" * 64), evaluation("0" * 64)], "several evaluations"),
        ([replace(evaluation("0" * 64), texts=())], "no text"),
        ([evaluation("9" * 64)], "other files"),
    ],
)
def test_quality_that_says_nothing_is_refused(
    evaluations: list[Evaluation], message: str, make_record: MakeRecord
) -> None:
    with pytest.raises(InputError, match=message):
        point_groups([make_record()], quality_of(evaluations))


def test_perplexity_where_there_is_no_divergence() -> None:
    found = quality_of([evaluation("0" * 64, 0.1, perplexity=20), evaluation("1" * 64, perplexity=30)])
    assert found is not None
    assert found.name == "perplexity, on test.txt"
    assert list(found.values.values()) == [20, 30]


def test_the_page_opens_offline(
    browser: Any, make_record: MakeRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly", reason="the report extra is not installed")
    records, page_file = tmp_path / "records.jsonl", tmp_path / "plot.html"
    onnx = make_record(model_filename="m/int4.onnx", file_sha256="2" * 64, engine="onnxruntime")
    hostile = make_record(model_filename=f"x{HOSTILE.replace('/', '')}", file_sha256="1" * 64)
    failed = make_record(model_filename="f.gguf", status="failed", failure=HOSTILE, samples_ns=())
    append_jsonl(records, [make_record(), hostile, failed])
    append_jsonl(tmp_path / "onnx.jsonl", [onnx])
    saved = tmp_path / "eval.json"
    write_record(saved, evaluation("1" * 64, 0.2))
    arguments = ["compare", str(records), "--plot", str(page_file), "--quality", str(saved), "--json"]
    assert main(arguments) == 0
    capsys.readouterr()
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    context.set_default_timeout(300_000)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-plots=drawn]")
    assert problems == []
    assert page.evaluate("window.hacked") is None
    assert page.locator(".plot path.point").count() == 2
    assert "49" not in page.locator("tbody").inner_text()
    assert "7*7" in page.locator("tbody").inner_text()
    assert "f.gguf is not shown" in page.inner_text("main")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


def test_options_that_do_not_go_together(make_record: MakeRecord, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    append_jsonl(records, [make_record(), make_record(model_filename="b.gguf")])
    assert main(["compare", str(records), "--plot", str(tmp_path / "x.html"), "--quality", str(records)]) == 2
    assert not (tmp_path / "x.html").exists()


def test_generation_that_was_sustained_has_a_plot_of_its_own(make_record: MakeRecord, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    lasting = make_record(
        Workload("tg", n_gen=128, regime="sustained"), regime="sustained", sustained_s=9.0, sequence=(0,) * 5
    )
    for name, records in (("with", [make_record(), lasting]), ("without", [make_record()])):
        path = tmp_path / f"{name}.jsonl"
        append_jsonl(path, [*records, *(replace(r, model_filename="new.gguf") for r in records)])
        assert main(["compare", str(path), "--plot", str(tmp_path / f"{name}.html")]) == 0
    assert 'id="sustained-0"' in (tmp_path / "with.html").read_text()
    assert "sustained-0" not in (tmp_path / "without.html").read_text()

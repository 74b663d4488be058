"""report.html in headless Chromium, without a network: complete, readable, and proof against hostile text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.pruning.parts import GroupRemoval, Removal
from cfsp.pruning.vocabulary import TokenKind, VocabularyPlan
from cfsp.records import write_record
from phoneready.evaluation.evaluation_record import Vocabularies
from phoneready.report.plots import make_plots, plot_text, script_json, spelled_out
from phoneready.report.report import (
    ReportInput,
    beaten,
    bench_notes,
    read_verdicts,
    render_page,
    render_report,
    verdict_table,
)
from phoneready.report.tables import Mark, comparison_table, losses_table, width_table
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.groups import bench_groups
from runtime_bench.records.reported import Conditions, Contention

MakeReportInput = Callable[..., ReportInput]
SECTIONS = ("verdicts", "figures", "pruning", "devices", "answers", "proof", "method")
HOSTILE = {
    "markup": "</script><script>window.hacked=1</script><!--<script></style><img src=x onerror=window.hacked=1>"
    '" onmouseover=window.hacked=1 x="\' onfocus=\'window.hacked=1 <svg onload=window.hacked=1>"]}};window.hacked=1;//',
    "templates": "{{ 7*7 }}{% include 'x' %}${7*7}%{customdata} &lt;script&gt;&#60;b&#62;&amp; \\u003c/script\\u003e"
    "<a href='javascript:window.hacked=1'>x</a><b>bold</b><br> ![z](http://127.0.0.1:9/z) `x` | y",
    "unseen": "safe\u202egnp.exe\u2066\u2069 a\u2028b\u2029c\u0000d\u001b[31me\r\nf 👩\u200d🚀 שלום مرحبا 中文",
}


class Opened:
    """A page that was opened from a file, and what went wrong in it."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True
        )
        self.context.set_default_timeout(300_000)  # a busy machine is no failure
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.page.goto(file.as_uri())

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture
def page_file(make_report_input: MakeReportInput, tmp_path: Path) -> Path:
    pytest.importorskip("plotly", reason="the report extra is not installed")
    file = tmp_path / "report.html"
    file.write_text(render_page(make_report_input("Tiny")), encoding="utf-8")
    return file


def test_it_is_complete_without_a_network(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        assert opened.page.evaluate("document.documentElement.dataset.plots") == "drawn"
        shown = opened.page.eval_on_selector_all("main > section", "all => all.map(one => one.id)")
        assert tuple(shown) == SECTIONS
        for link in opened.page.eval_on_selector_all("nav a", "all => all.map(one => one.hash)"):
            assert opened.page.locator(link).count() == 1
        plots = opened.page.locator(".plot").all()
        assert len(plots) == 5
        for plot in plots:
            assert plot.locator("svg.main-svg").count() > 0
        text = opened.page.inner_text("main")
        for part in ("missed", "inconclusive", "constrained-host", "projected", "Tiny answers"):
            assert part in text or part.replace("Tiny ", "pruned ") in text
        assert opened.requests == [page_file.as_uri()]
        assert opened.problems == []
    assert page_file.stat().st_size < 6e6, "plotly.js is there more than once"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, page_file: Path, scheme: str) -> None:
    with Opened(browser, page_file, width=390, scheme=scheme) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
        opened.page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true })")
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
        too_small = opened.page.evaluate(
            "[...document.querySelectorAll('main *')].filter(one => one.childElementCount === 0 && "
            "one.textContent.trim() && !one.closest('svg') && parseFloat(getComputedStyle(one).fontSize) < 12)"
            ".map(one => one.textContent)"
        )
        assert too_small == []
        assert opened.problems == []


def test_paper_is_white_and_plots_follow_the_system(browser: Any, page_file: Path) -> None:
    from playwright.sync_api import expect

    colour = "getComputedStyle(document.querySelector('#plot-speed-0 .xtick text')).fill"
    with Opened(browser, page_file, scheme="dark") as opened:
        dark = opened.page.evaluate(colour)
        opened.page.emulate_media(color_scheme="light")
        # The page's policy forbids the eval that wait_for_function makes.
        tick = opened.page.locator("#plot-speed-0 .xtick text").first
        expect(tick).not_to_have_css("fill", dark, timeout=300_000)
        light = opened.page.evaluate(colour)
        opened.page.emulate_media(color_scheme="dark")
        expect(tick).to_have_css("fill", dark, timeout=300_000)
        opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert opened.page.evaluate(colour) == light
        opened.page.emulate_media(media="print")
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert opened.page.pdf()[:5] == b"%PDF-"


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_only_text(
    browser: Any, make_report_input: MakeReportInput, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("plotly", reason="the report extra is not installed")
    file = tmp_path / "report.html"
    file.write_text(render_page(make_report_input(name)), encoding="utf-8")
    with Opened(browser, file, width=390) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.dataset.plots") == "drawn"
        for plot in page.locator(".plot").all():
            plot.scroll_into_view_if_needed()
            if plot.locator(".points path").count():
                plot.locator(".points path").first.hover(force=True)
        page.evaluate("document.querySelectorAll('bdi, th, td, p, h1').forEach(one => one.focus())")
        assert page.evaluate("window.hacked") is None
        assert opened.problems == []
        assert opened.requests == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert tuple(page.eval_on_selector_all("main > section", "all => all.map(one => one.id)")) == SECTIONS
        assert page.locator("img, iframe, object, a[href^='javascript'], main script, svg a").count() == 0
        shown = "".join(spelled_out(name).replace("\r\n", "\n").split())
        heading = "".join(page.locator("h1 bdi").text_content().split())
        assert heading == shown


def test_the_policy_stops_a_script_that_is_not_the_pages(browser: Any, page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    page_file.write_text(text.replace("</main>", "</main><script>window.hacked=1</script>"), encoding="utf-8")
    with Opened(browser, page_file) as opened:
        assert opened.page.evaluate("window.hacked") is None
        assert any("Content Security Policy" in problem for problem in opened.problems)
        assert opened.page.evaluate("document.documentElement.dataset.plots") == "drawn"


def test_kinds_and_targets_are_never_in_one_table_or_plot(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    groups = bench_groups(report.figures.bench)
    assert [(group.kind, group.target) for group in groups] == [
        ("measured", "local"),
        ("constrained-host", "Tiny"),
    ]
    for group in groups:
        assert {(r.kind, r.target) for r in group.records} == {(group.kind, group.target)}
    plots = {plot.id: plot for plot in make_plots(report.figures, groups)}
    for number, group in enumerate(groups):
        assert f"{group.kind}, {group.target}" in plots[f"plot-speed-{number}"].title


@pytest.mark.parametrize("factor", [1.0, 1.37])
def test_a_ratio_is_the_quotient_of_the_speeds_beside_it(
    make_report_input: MakeReportInput, factor: float
) -> None:
    figures = make_report_input("Tiny").figures
    skewed = (1.0, 1.02, 1.05, 3.0, 9.0, 1.01)

    def samples(record: BenchRecord) -> tuple[int, ...]:
        scale = factor if record.model_filename == figures.pruned[0].file else 1.0
        return tuple(int(1e9 * scale * share) for share in skewed)

    figures = replace(figures, bench=tuple(replace(r, samples_ns=samples(r)) for r in figures.bench))
    (group, _), pair = bench_groups(figures.bench), figures.pairs[0]
    markdown = verdict_table(figures, *pair).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in markdown]
    marked = [row for row in comparison_table(figures, group, *pair).rows if isinstance(row[3], Mark)]
    rows += [[*map(str, row[:3]), row[3].text] for row in marked if isinstance(row[3], Mark)]
    speeds = [row for row in rows if len(row) == 4 and "times as fast" in str(row[3])]
    assert len(speeds) >= 4
    for _, dense, pruned, change in speeds:
        (before, unit), (after, _) = str(dense).split(), str(pruned).split()
        quotient = float(after) / float(before) if unit == "t/s" else float(before) / float(after)
        assert float(str(change).split()[0]) == pytest.approx(quotient, rel=0.01)


def test_a_busy_machine_gives_no_ratio_in_either_report(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    crowd = (Contention(1e4, 0.0),) * 5
    figures = replace(report.figures, bench=tuple(replace(r, contention=crowd) for r in report.figures.bench))
    text = verdict_table(figures, *figures.pairs[0])
    assert "base: other programs took" in text
    assert ": too noisy to tell" in text
    assert "times as fast" not in text
    rows = comparison_table(figures, bench_groups(figures.bench)[0], *figures.pairs[0]).rows
    marks = [row[3] for row in rows if isinstance(row[3], Mark)]
    assert marks
    assert {mark.word for mark in marks} == {"too noisy to tell"}
    assert "too noisy" in render_page(replace(report, figures=figures))


def test_the_markdown_has_a_table_for_each_place(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    figures = report.figures
    emulated = tuple(
        replace(r, kind="emulated", target="qemu", samples_ns=(7 * 10**9,) * 5)
        for r in figures.bench
        if r.target == "local"
    )
    figures = replace(figures, bench=(*figures.bench, *emulated))
    text = verdict_table(figures, figures.dense[0], figures.pruned[0])
    here, limited, far = re.split(r"\n\n?(?=Constrained-host on Tiny|Emulated on qemu)", text)
    assert "file size" in here
    assert "file size" not in limited + far
    for table in (here, limited):
        assert "generation, tg128" in table
        assert "t/s" in table
    assert "t/s" not in far
    rendered = render_report(replace(report, figures=figures))
    assert "emulated on qemu" in rendered
    assert "emulated: that it ran counts, its times say nothing" in rendered


def test_a_file_that_dominates_a_pruned_one_is_named(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    # Sizes: dense Q8_0 150 MB and Q4_0 90 MB, pruned 135 and 81 MB.
    (line,) = beaten(report.figures)
    assert line.startswith("The dense Q4_0 file dominates the pruned Q8_0 file: 85.8 MiB against 128.7 MiB")
    assert "0.9200 bits a byte against 1.0000" in line
    for made in (render_report(report), render_page(report)):
        assert "file dominates the pruned" in made
        assert "dominated by dense Q4_0" in made.replace("\\", "")
        assert "Side by side" in made
    assert not beaten(replace(report.figures, losses=()))
    plots = {plot.id: plot for plot in make_plots(report.figures, [])}
    dense, pruned = plots["plot-losses"].figure["data"]
    assert dense["marker"]["symbol"] == ["circle", "circle"]
    assert dict(zip(pruned["text"], pruned["marker"]["symbol"], strict=True)) == {
        "Q4_0": "diamond",
        "Q8_0": "diamond-open",
    }
    # Files of one family alone are held against each other.
    others = tuple(replace(one, item="int8") if one.is_dense else one for one in report.figures.losses)
    assert "dense" not in str(beaten(replace(report.figures, losses=others)))


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_hostile_text_is_markdown(name: str, make_report_input: MakeReportInput) -> None:
    report = make_report_input(HOSTILE[name])
    text = render_report(replace(report, commands=(HOSTILE[name],)))
    code_or_escaped = re.compile(r"^    .*$|\\.", re.MULTILINE)
    plain = code_or_escaped.sub("", text)
    assert not re.search(r"<\w|!\[|\]\(", plain)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)


def test_remarks_on_samples_are_told_as_they_are(make_record: Any) -> None:
    hot, pinned = (
        make_record(conditions=tuple(Conditions((0.0,), caps=(cap,)) for cap in (1.0, *(0.5,) * 4))),
        make_record(conditions=tuple(Conditions((0.0,), caps=(cap,)) for cap in (0.5,) * 5)),
    )
    thrashing = make_record(memory_verdict="thrashes", memory_limit_bytes=400 * 2**20, reread_bytes=2**30)
    notes = bench_notes([hot, thrashing, pinned])
    assert notes[0].startswith(
        "throttled from second 0.0 of process 2: clocks were capped at 50% of the highest"
    )
    assert notes[1].startswith("thrashes: under the limit of 400 MiB")
    assert notes[2].startswith("clocks were capped at 50% of the highest all the time")


def test_a_file_that_writes_nonsense_has_no_speed(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    file = report.figures.pruned[0].file
    bench = tuple(
        replace(r, degenerate="loop <b>") if r.model_filename == file else r for r in report.figures.bench
    )
    figures = replace(report.figures, bench=bench)
    text = render_page(replace(report, figures=figures))
    assert "writes degenerate text: loop &lt;b&gt;" in text
    plots = {plot.id: plot for plot in make_plots(figures, bench_groups(bench))}
    assert "Q8_0 pruned" not in {trace["name"] for trace in plots["plot-speed-0"].figure["data"]}
    assert [trace["name"] for trace in plots["plot-ratio-0"].figure["data"]] == ["Q4_0"]


def test_without_budgets_and_records_it_says_so(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    bare = replace(report, verdicts=None, projected={}, figures=replace(report.figures, bench=()))
    text = render_page(bare)
    assert "No budgets were set" in text
    assert "Nothing was measured" in text


def test_files_are_compared_by_bits_per_byte(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    pair = report.figures.pairs[0]
    row = comparison_table(report.figures, None, *pair).rows[1]
    assert row == ("bits per byte of the file", "0.9000", "1.0000", "1.111")
    assert len(comparison_table(replace(report.figures, losses=()), None, *pair).rows) == 1


def test_tokens_per_byte_stand_there_where_vocabularies_differ(make_report_input: MakeReportInput) -> None:
    figures = make_report_input("Tiny").figures
    assert "tokens/byte" not in losses_table(figures).markdown()
    losses = tuple(
        one if one.is_dense else replace(one, texts=(replace(one.texts[0], n_tokens=147),))
        for one in figures.losses
    )
    figures = replace(figures, losses=losses)
    row = comparison_table(figures, None, *figures.pairs[0]).rows[2]
    assert row == ("tokens per byte of the file", "0.3000", "0.3500", "1.167")
    assert "tokens/byte" in losses_table(figures).markdown()


def test_it_says_which_tokens_a_divergence_is_over(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    evaluation = replace(report.figures.evaluation, vocabularies=Vocabularies(300, 384, is_part=True))
    trimmed = replace(report, figures=replace(report.figures, evaluation=evaluation))
    note = "over the 300 of its 384 tokens that the pruned one has"
    for render in (render_page, render_report):
        assert note in render(trimmed)
        assert note not in render(report)


def test_what_is_kept_of_the_vocabulary_is_shown(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    kept = VocabularyPlan(
        384, tuple(range(300)), ("x.txt",), 1000, 1.1, (TokenKind("Greek", 9, 7, 0.5, 0.25),)
    )
    plan = replace(report.figures.plan, vocabulary=kept)
    text = render_page(replace(report, figures=replace(report.figures, plan=plan)))
    assert "300 of 384 tokens kept" in text
    for part in ("1000 tokens of <bdi>x.txt</bdi>", "Greek", "50.00%", "25.000%"):
        assert part in text


def test_a_block_that_did_not_attend_before_is_not_said_to(make_report_input: MakeReportInput) -> None:
    plan = make_report_input("Tiny").figures.plan
    losses = (0.1,) * len(plan.blocks)
    plan = replace(plan, attention=Removal((1,), losses, 0.1, 64), silent_before=(2,))
    assert [row[-1] for row in width_table(plan).rows[:3]] == ["whole", "no attention", "no attention"]


def test_what_is_left_of_every_block_is_shown(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    plan = report.figures.plan
    n, whole = len(plan.blocks), [replace(block, width=len(block.ranking)) for block in plan.blocks]
    losses = tuple(0.1 for _ in range(n))
    kept = ((0, 1), (), (1,), (), *((0, 1) for _ in range(n - 4)))
    plan = replace(
        plan,
        blocks=tuple(replace(block, width=0) if i == 1 else block for i, block in enumerate(whole)),
        depth=Removal((1,), losses, 0.1, 64),
        attention=Removal((3,), losses, 0.1, 64),
        kv_groups=GroupRemoval(kept, ((0.1, 0.1),) * n, 0.1, 64),
    )
    assert plan.keep_ratio == 1, "no channel of a block that stays went"
    words = ["2 of 2 KV groups", "block removed", "1 of 2 KV groups", "no attention"]
    assert [row[-1] for row in width_table(plan).rows[:4]] == words
    pruned = replace(report, figures=replace(report.figures, plan=plan))
    assert all(word in render_report(pruned) for word in words)
    untouched = replace(plan, blocks=tuple(whole), depth=None, attention=None, kv_groups=None)
    assert width_table(untouched).rows[0][-1] == f"{untouched.blocks[0].importance:.4f}"


def test_the_page_is_well_formed(make_report_input: MakeReportInput) -> None:
    """Every element that is opened is closed, whatever the names are."""
    checker = Nesting()
    checker.feed(render_page(make_report_input(" ".join(HOSTILE.values()))))
    assert checker.open == []


def test_verdicts_of_another_kind_are_refused(tmp_path: Path, make_report_input: MakeReportInput) -> None:
    assert read_verdicts(tmp_path) is None
    verdicts = make_report_input("Tiny").verdicts
    write_record(tmp_path / "verdicts.json", verdicts)
    assert read_verdicts(tmp_path) == verdicts
    (tmp_path / "verdicts.json").write_text('{"kind": "something"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"verdicts\.json"):
        read_verdicts(tmp_path)


def test_json_in_a_script_reads_back_and_cannot_end_it() -> None:
    value = {"a": list(HOSTILE.values())}
    text = script_json(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text)
    assert text.isascii()


def test_overrides_of_direction_are_spelled_out_and_joiners_stay() -> None:
    emoji = "👩\u200d🚀 שלום"
    assert spelled_out("a\u202eb\u0000") == "a⟨U+202E⟩b⟨U+0000⟩"
    assert spelled_out(emoji) == emoji
    assert plot_text("<b>%{x}") == "&lt;b&gt;%&#123;x}"


class Nesting(HTMLParser):
    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files_are_compared_by_what_they_are_not_by_their_position(
    make_report_input: MakeReportInput,
) -> None:
    report = make_report_input("Tiny")
    shuffled = replace(report.figures, dense=report.figures.dense[::-1])
    assert [dense.quant for dense, _ in shuffled.pairs] == [pruned.quant for pruned in shuffled.pruned]
    assert render_report(replace(report, figures=shuffled)).count("Tiny-pruned-Q4_0.gguf")
    assert verdict_table(shuffled, *shuffled.pairs[0]) == verdict_table(
        report.figures, report.figures.dense[0], report.figures.pruned[0]
    )

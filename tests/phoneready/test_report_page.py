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

from cfsp.pruning.parts import GroupRemoval, Removal
from cfsp.pruning.vocabulary import TokenKind, VocabularyPlan
from phoneready.evaluation.evaluation_record import Vocabularies
from phoneready.report.plots import make_plots, pattern_plot, plot_text, script_json, spelled_out
from phoneready.report.report import (
    ReportInput,
    beaten,
    comparison_table,
    headline,
    losses_table,
    render_page,
    render_report,
    verdict_table,
    width_table,
)
from runtime_bench.records.compare import bench_groups
from runtime_bench.records.reported import Conditions, Contention

MakeReportInput = Callable[..., ReportInput]
SECTIONS = ("plots", "verdicts", "figures", "pruning", "devices", "answers", "proof", "method")
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
        assert len(plots) == 4
        for plot in plots:
            assert plot.locator("svg.main-svg").count() > 0
        text = opened.page.inner_text("main")
        for part in ("missed", "inconclusive", "constrained-host", "projected", "Tiny answers"):
            assert part in text or part.replace("Tiny ", "pruned ") in text
        assert opened.requests == [page_file.as_uri()]
        assert opened.problems == []
    assert page_file.stat().st_size < 6e6, "plotly.js is there more than once"


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


def test_a_file_that_dominates_a_pruned_one_is_named(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    # Sizes: dense Q8_0 150 MB and Q4_0 90 MB, pruned 135 and 81 MB.
    (line,) = beaten(report.figures)
    assert line.startswith("The dense Q4_0 file dominates the Q8_0 file: 85.8 MiB against 128.7 MiB")
    assert "0.9200 bits per byte against 1.0000" in line
    for made in (render_report(report), render_page(report)):
        assert "file dominates the Q8" in made
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
    text = render_report(report._replace(commands=(HOSTILE[name],)))
    code_or_escaped = re.compile(r"^    .*$|\\.", re.MULTILINE)
    plain = code_or_escaped.sub("", text)
    assert not re.search(r"<\w|!\[|\]\(", plain)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)


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
    pruned = report._replace(figures=replace(report.figures, plan=plan))
    assert all(word in render_report(pruned) for word in words)
    untouched = replace(plan, blocks=tuple(whole), depth=None, attention=None, kv_groups=None)
    assert width_table(untouched).rows[0][-1] == f"{untouched.blocks[0].importance:.4f}"


def test_the_pattern_is_a_picture_of_the_channels_kept(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    plan = report.figures.plan
    wide = plan.dense_widths[0]
    ranking = tuple(range(wide))
    blocks = (replace(plan.blocks[0], width=wide // 2, ranking=ranking), replace(plan.blocks[1], width=0))
    blocks = (*blocks, replace(plan.blocks[2], width=50, ranking=ranking[:100]))
    plan = replace(
        plan, dense_widths=(wide, wide, 100), blocks=blocks, depth=Removal((1,), (0.1,) * 3, 0.1, 9)
    )
    made = pattern_plot(plan)
    assert made is not None
    pattern, scores = made.figure["data"]
    assert pattern["z"] == [[1.0] * 48 + [0.0] * 48, [0.0] * 96, [1.0] * 48 + [0.0] * 48]
    assert scores["x"] == [block.importance for block in blocks]
    assert scores["hovertext"][2].endswith("50 of 100 channels kept")
    whole = replace(plan, depth=None, blocks=tuple(replace(b, width=len(b.ranking)) for b in blocks))
    assert pattern_plot(whole) is None
    page = render_page(report._replace(figures=replace(report.figures, plan=whole)))
    assert "plot-pattern" not in page
    assert 'id="plot-pattern"' in render_page(report)


def test_the_page_is_well_formed(make_report_input: MakeReportInput) -> None:
    """Every element that is opened is closed, whatever the names are."""
    checker = Nesting()
    checker.feed(render_page(make_report_input(" ".join(HOSTILE.values()))))
    assert checker.open == []


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


def test_each_place_has_its_own_table_and_plot(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    emulated = tuple(
        replace(r, kind="emulated", target="qemu", samples_ns=(7 * 10**9,) * 5)
        for r in report.figures.bench
        if r.target == "local"
    )
    figures = replace(report.figures, bench=(*report.figures.bench, *emulated))
    groups = bench_groups(figures.bench)
    assert [group.target for group in groups] == ["local", "Tiny", "qemu"]
    titles = [plot.title for plot in make_plots(figures, groups)]
    assert titles[:3] == [
        "Size against loss",
        *(f"Speed against size: {g.kind}, {g.target}" for g in groups[:2]),
    ]
    text = verdict_table(figures, *figures.pairs[0])
    here, limited, far = re.split(r"\n\n?(?=Constrained-host on Tiny|Emulated on qemu)", text)
    assert ("file size" in here, "file size" in limited + far) == (True, False)
    assert ["t/s" in table for table in (here, limited, far)] == [True, True, False]
    assert "emulated: that it ran counts, its times say nothing" in render_report(
        report._replace(figures=figures)
    )


def test_a_crowded_or_void_speed_gives_no_ratio(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    file, records = report.figures.shipped[0].file, report.figures.bench
    crowded = tuple(replace(r, contention=(Contention(1e4, 0.0),) * 5) for r in records)
    figures = replace(report.figures, bench=crowded)
    text = verdict_table(figures, *figures.pairs[0])
    assert "base: other programs took" in text
    assert "times as fast" not in text
    assert "speed not decided" in headline(figures)
    assert "too noisy" in render_page(report._replace(figures=figures))
    void = tuple(replace(r, degenerate="loop <b>") if r.model_filename == file else r for r in records)
    figures = replace(report.figures, bench=void)
    assert "writes degenerate text: loop &lt;b&gt;" in render_page(report._replace(figures=figures))
    plots = {plot.id: plot for plot in make_plots(figures, bench_groups(void))}
    assert "Q8_0 pruned" not in {trace["name"] for trace in plots["plot-speed-0"].figure["data"]}


def test_the_first_sentence_says_what_the_pruned_file_is_worth(make_report_input: MakeReportInput) -> None:
    report = make_report_input("Tiny")
    figures = report.figures
    dense, pruned = figures.losses[:2], figures.losses[2:]
    # A dense file in fewer bits is smaller and better: 90 MB against 135 MB.
    worse = "At 135.0 MB the pruned Q8_0 file is worse than the dense Q4_0 file (90.0 MB): 8.7% more bits per byte"
    assert headline(figures).startswith(worse)
    for made in (render_page(report), render_report(report)):
        assert "8.7% more bits per byte" in made.replace("\\", "")
    small = replace(figures, losses=(replace(pruned[0], file_bytes=80_000_000), *dense))
    assert "Q8_0 file is 10% smaller than the dense one: 11.1% more bits per byte" in headline(small)
    better = (
        replace(dense[0], file=pruned[0].file, role="shipped"),
        replace(pruned[0], file="d", role="dense"),
    )
    said = headline(replace(figures, losses=better))
    assert "is better than the dense Q8_0 file (135.0 MB): 10.0% fewer bits per byte" in said
    lone = {key: value[:1] for key, value in vars(better[0].texts[0]).items() if isinstance(value, tuple)} | {
        "distance": None
    }
    noisy = tuple(
        replace(one, texts=(replace(one.texts[0], **lone | {"nats": one.texts[0].nats[:1]}),))
        for one in better
    )
    assert headline(replace(figures, losses=noisy)).startswith(
        "At 135.0 MB the pruned Q8_0 file against the dense Q8_0 file (135.0 MB): 10.0% fewer bits per byte, "
        "inconclusive"
    )
    alike = (better[0], replace(better[0], file="d", role="dense"))
    assert "is as good as the dense Q8_0 file" in headline(replace(figures, losses=alike))
    assert headline(replace(figures, losses=(), bench=())) == (
        "At 135.0 MB the pruned Q8_0 file is 10% smaller than the dense one."
    )


def test_what_is_particular_to_a_release_is_said(
    make_report_input: MakeReportInput, make_record: Any
) -> None:
    report = make_report_input("Tiny")
    figures = report.figures
    hot, pinned = (
        make_record(conditions=tuple(Conditions((0.0,), caps=(cap,)) for cap in caps))
        for caps in ((1.0, *(0.5,) * 4), (0.5,) * 5)
    )
    longer = tuple(
        one if one.is_dense else replace(one, texts=(replace(one.texts[0], n_tokens=(73, 74)),))
        for one in figures.losses
    )
    kind = TokenKind("Greek", 9, 7, 0.5, 0.25)
    plan = replace(
        figures.plan, vocabulary=VocabularyPlan(384, tuple(range(300)), ("x.txt",), 1000, 1.1, (kind,))
    )
    evaluation = replace(figures.evaluation, vocabularies=Vocabularies(300, 384, is_part=True))
    changed = replace(figures, bench=(hot, pinned), losses=longer, plan=plan, evaluation=evaluation)
    page, text = (render(report._replace(figures=changed)) for render in (render_page, render_report))
    rows = comparison_table(changed, None, *changed.pairs[0]).rows
    assert rows[1:] == [
        ("bits per byte of the file", "0.9000", "1.0000", "1.111"),
        ("tokens per byte of the file", "0.3000", "0.3500", "1.167"),
    ]
    assert "tokens/byte" in losses_table(changed).markdown()
    assert "tokens/byte" not in losses_table(figures).markdown()
    for part in (
        "over the 300 of its 384 tokens that the pruned one has",
        "throttled from second 0.0 of process 2: clocks were capped at 50% of the highest",
        "clocks were capped at 50% of the highest all the time",
        *("300 of 384 tokens kept", "Greek", "50.00%", "25.000%"),
    ):
        assert part in page
        assert part in text.replace("\\", "")
    bare = report._replace(verdicts=None, projected={}, figures=replace(figures, bench=()))
    assert "No budgets were set" in render_page(bare)
    assert "Nothing was measured" in render_page(bare)


def test_text_is_made_harmless_for_scripts_and_plots() -> None:
    value = {"a": list(HOSTILE.values())}
    text = script_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert spelled_out("a\u202eb\u0000 👩\u200d🚀 שלום") == "a⟨U+202E⟩b⟨U+0000⟩ 👩\u200d🚀 שלום"
    assert plot_text("<b>%{x}") == "&lt;b&gt;%&#123;x}"

"""search.html: what files lose, against what they take: size, decode speed, memory; opens offline."""

from __future__ import annotations

from cfsp.units import megabytes
from phoneready.evaluation.measured_file import DOMINATED
from phoneready.report.plots import BITS, DARK, Axis, loss_figure, plotly_script, render_page
from phoneready.search.record import EvaluatedPoint, SearchRecord, conditions, search_table, sentences

_SIZE: Axis = Axis("file size, MB", lambda one: one.file_bytes / 1e6)
_SPEED: Axis = Axis("decode, tokens per second", lambda one: one.speed.low if one.speed else None)
_MEMORY: Axis = Axis(
    "memory, MiB", lambda one: one.speed.peak_bytes / 2**20 if one.speed and one.speed.peak_bytes else None
)
_KL: Axis = Axis(
    "KL from the dense model, nats a token", lambda one: None if one.point.vocabulary else one.kl_mean
)
_ROWS = (
    ("plot-size", "Size against loss", _SIZE, BITS),
    ("plot-speed", "Decode speed against loss", _SPEED, BITS),
    ("plot-memory", "Memory against loss", _MEMORY, BITS),
    ("plot-kl", "Size against divergence, of files that have all tokens", _SIZE, _KL),
)


def render_search(found: SearchRecord) -> str:
    """The page as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    rows = [row for row in _ROWS if any(None not in (row[2].of(one), row[3].of(one)) for one in found.points)]
    models = dict.fromkeys(one.point.model for one in sorted(found.points, key=lambda one: not one.is_dense))
    series = {model: [one for one in found.points if one.point.model == model] for model in models}
    beaten = {one.file for one in found.standings if one.verdict == DOMINATED}

    def lines(one: EvaluatedPoint) -> list[str]:
        return [megabytes(one.file_bytes), *([f"KL {one.kl_mean:.4f}"] if one.kl_mean is not None else [])]

    table = search_table(found)
    plots = {
        id: loss_figure(series, x, y, beaten=beaten, name=lambda one: one.point.quant, lines=lines)
        for id, _, x, y in rows
    }
    context = {
        "source": found.source,
        "lines": [line.removeprefix("- ") for line in sentences(found)],
        "conditions": conditions(found),
        "titles": [column.title for column in table.columns],
        "rows": [["-" if cell is None else cell for cell in row] for row in table.cells()],
        "shown": [{"id": id, "title": title} for id, title, _, _ in rows],
    }
    return render_page("search.html.j2", context, plots, plotly_script(needed=True), DARK)

"""What reports and pages are made with: templates that escape, plotly, a policy that lets nothing in."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from cfsp.errors import MissingExtraError
from phoneready.report.escape import script_json, spelled_out
from phoneready.report.plot_style import DARK
from runtime_bench.presentation.markup import Markdown, escape_cell, finalize_markdown

KINDS = {
    "measured": "Measured on the device that is named.",
    "constrained-host": "Measured on this machine under a device's limits of memory, cores and threads.",
    "emulated": "Run in an emulator: it shows that the file works there; its speed means nothing.",
    "projected": "Computed from a device's profile; nothing was run.",
}
"""What a reader must know of numbers of each kind."""


def render_page(template: str, context: Mapping[str, Any], plots: Mapping[str, Any], plotly: str) -> str:
    """A page that is complete in itself.

    Args:
        template: Its file.
        context: What it shows; everything is escaped.
        plots: Id of an element to plotly's figure in it.
        plotly: plotly.js; without it the page has no scripts.
    """
    scripts = [Markup(text) for text in (plotly, _resource("report.js")) if plotly]
    own = {
        "specs": Markup(script_json({"plots": plots, "dark": dict(DARK)})),
        "scripts": scripts,
        "style": Markup(_resource("report.css")),
        "policy": _content_policy(scripts),
    }
    # Controls of direction are spelled out before the text is escaped.
    made = _environment("phoneready.report", _spell, autoescape=True)
    return made.get_template(template).render(**context, **own)


def render_markdown(package: str, template: str, context: Mapping[str, Any]) -> str:
    """A template of Markdown in a package, with a final newline: each text in it is shown as it is."""
    made = _environment(package, finalize_markdown, autoescape=False)
    made.filters |= {
        "cell": lambda text: Markdown(escape_cell(text)),
        "table": lambda t: Markdown(t.markdown()),
    }
    return made.get_template(template).render(context) + "\n"


def plotly_script() -> str:
    """plotly.js as the Python package carries it; empty where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    return str(get_plotlyjs())


def plots_page(template: str, plots: Mapping[str, Any], **shown: Any) -> str:
    """A page of plots, complete in itself.

    Args:
        template: Name of its template.
        plots: Id of an element -> plotly's figure in it.
        shown: What else the template shows.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    plotly = plotly_script()
    if not plotly:
        raise MissingExtraError("plotly", "report")
    return render_page(template, shown, plots, plotly)


def _spell(value: Any) -> Any:
    return spelled_out(value) if type(value) is str else value


def _environment(package: str, finalize: Callable[[Any], Any], *, autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, "templates"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
    )


def _resource(name: str) -> str:
    return importlib.resources.files("phoneready.report").joinpath("templates", name).read_text("utf-8")


def _content_policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: our own scripts by their hash and nothing else, no network at all."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )

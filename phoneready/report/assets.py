"""What every page is made with: templates that escape, plotly, a policy that lets nothing in."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from cfsp.errors import MissingExtraError
from phoneready.report.escape import script_json, spelled_out
from phoneready.report.plot_style import DARK

KINDS = {
    "measured": "Measured on the device that is named.",
    "constrained-host": "Measured on this machine under a device's limits of memory, cores and threads.",
    "emulated": "Run in an emulator: it shows that the file works there; its speed means nothing.",
    "projected": "Computed from a device's profile; nothing was run.",
}
"""What a reader must know of numbers of each kind."""


def environment() -> jinja2.Environment:
    """Everything is escaped, and controls of direction are spelled out first."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("phoneready.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: spelled_out(value) if type(value) is str else value,
    )


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
    scripts = [Markup(text) for text in (plotly, resource("report.js"))]
    return (
        environment()
        .get_template(template)
        .render(
            shown,
            specs=Markup(script_json({"plots": plots, "dark": dict(DARK)})),
            scripts=scripts,
            style=Markup(resource("report.css")),
            policy=content_policy(scripts),
        )
    )


def resource(name: str) -> str:
    """A file of the templates' folder."""
    return importlib.resources.files("phoneready.report").joinpath("templates", name).read_text("utf-8")


def content_policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: our own scripts by their hash and nothing else, no network at all."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )

"""What reports are made with: templates that escape, text made harmless, plotly, a policy that lets nothing in."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from cfsp.errors import MissingExtraError
from runtime_bench.presentation.markup import Markdown, escape_cell, finalize_markdown

# Explicit directions can make a name read as another one; plain marks (U+200E, U+200F, U+061C) cannot, and Arabic
# and Hebrew texts need them. Tabs and line breaks stay.
_CONTROLS = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]")
KINDS = {
    "measured": "Measured on the device that is named.",
    "constrained-host": "Measured on this machine under a device's limits of memory, cores and threads.",
    "emulated": "Run in an emulator: it shows that the file works there; its speed means nothing.",
    "projected": "Computed from a device's profile; nothing was run.",
}
"""What a reader must know of numbers of each kind."""


def render_page(
    template: str, context: Mapping[str, Any], plots: Mapping[str, Any], plotly: str, dark: Mapping[str, str]
) -> str:
    """A page that is complete in itself."""
    scripts = [Markup(text) for text in (plotly, _resource("report.js")) if plotly]
    # Our own scripts by their hash and nothing else, no network at all.
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    own = {
        "specs": Markup(script_json({"plots": plots, "dark": dict(dark)})),
        "scripts": scripts,
        "style": Markup(_resource("report.css")),
        "policy": (
            f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'"
        ),
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


def plotly_script(*, needed: bool = False) -> str:
    """plotly.js as the Python package carries it; if that is not installed, empty, or MissingExtraError if needed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        if needed:
            raise MissingExtraError("plotly", "report") from None
        return ""
    return str(get_plotlyjs())


def spelled_out(text: str) -> str:
    """The text with control characters and overrides of direction spelled out, as `⟨U+202E⟩`."""
    return _CONTROLS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def plot_text(text: str) -> str:
    """The text for plotly, which reads a few tags and entities in labels, and `%{...}` in templates of them."""
    return html.escape(spelled_out(text), quote=False).replace("%{", "%&#123;")


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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

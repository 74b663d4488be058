"""Text of models, files and devices made harmless: nothing in it is markup, and nothing changes how a line reads."""

from __future__ import annotations

import html
import json
import re
from typing import Any

# Explicit directions can make a name read as another one; plain marks (U+200E, U+200F, U+061C) cannot, and Arabic
# and Hebrew texts need them. Tabs and line breaks stay.
_CONTROLS = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]")


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

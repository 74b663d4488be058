"""Chat templates with their white space written out.

transformers renders templates with Jinja's `trim_blocks` and `lstrip_blocks`: the line break behind a block or a
comment goes, and so do the blanks before it on its line. GenAI's Jinja leaves some of both.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"\{%.*?%\}|\{#.*?#\}|\{\{.*?\}\}", re.DOTALL)
_RAW = re.compile(r"\{%[-+]?\s*raw\b")
_LINE_BREAK = r"{{ '\n' }}"
"""One that is shown behind a block, where it would be taken away."""


def explicit_whitespace(template: str) -> str | None:
    """A template that renders, with and without `trim_blocks` and `lstrip_blocks`, as the given one does with both.

    None where there is none to be had this way: white space would be left that is taken away with them, or a part of
    the template is shown as it is.
    """
    explicit = _write_out(template)
    return None if _RAW.search(template) or _write_out(explicit) != explicit else explicit


def _write_out(template: str) -> str:
    tags, between = _TAG.findall(template), _TAG.split(template)
    shown = list(between)
    for index, tag in enumerate(tags):
        block, (start, end) = not tag.startswith("{{"), (tag[2], tag[-3])
        line = between[index].rpartition("\n")[2]
        if start == "-":
            shown[index] = shown[index].rstrip()
        elif block and start != "+" and not line.strip(" \t") and (index == 0 or "\n" in between[index]):
            shown[index] = shown[index].removesuffix(line)
        if end == "-":
            shown[index + 1] = shown[index + 1].lstrip()
        elif block and end != "+":
            shown[index + 1] = shown[index + 1].removeprefix("\n")
        if tag.startswith("{#"):
            tags[index] = ""
    for index, tag in enumerate(tags):
        if tag.startswith("{%") and tag[-3] not in "-+" and shown[index + 1].startswith("\n"):
            shown[index + 1] = _LINE_BREAK + shown[index + 1].removeprefix("\n")
    return "".join(part for pair in zip(shown, [*tags, ""], strict=True) for part in pair)

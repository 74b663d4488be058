"""Chat templates with their white space written out.

transformers renders templates with Jinja's `trim_blocks` and `lstrip_blocks`: the line break behind a block or a
comment goes, and so do the blanks before it on its line. GenAI's Jinja leaves some of both.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"\{%.*?%\}|\{#.*?#\}|\{\{.*?\}\}", re.DOTALL)
_KEPT = "-+"
"""What stands inside a tag's ends where it says itself what goes around it."""


def explicit_whitespace(template: str) -> str:
    """A template that renders as the given one does with `trim_blocks` and `lstrip_blocks`, without comments."""
    tags = _TAG.findall(template)
    between = _TAG.split(template)
    shown = list(between)
    for index, tag in enumerate(tags):
        if tag.startswith("{{"):
            continue
        before, after = between[index], between[index + 1]
        line = before.rpartition("\n")[2]
        if tag[2] not in _KEPT and not line.strip(" \t") and (index == 0 or "\n" in before):
            shown[index] = shown[index].removesuffix(line)
        if tag[-3] not in _KEPT and after.startswith("\n"):
            shown[index + 1] = shown[index + 1].removeprefix("\n")
        if tag.startswith("{#"):
            tags[index] = ""
            shown[index] = shown[index].rstrip() if tag[2] == "-" else shown[index]
            shown[index + 1] = shown[index + 1].lstrip() if tag[-3] == "-" else shown[index + 1]
    return "".join(part for pair in zip(shown, [*tags, ""], strict=True) for part in pair)

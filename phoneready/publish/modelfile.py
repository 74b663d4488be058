"""A Modelfile, so that `ollama create NAME -f Modelfile` takes a released GGUF file.

Ollama's templates are Go's, a model's are Jinja. ChatML, which most models of this size speak, is written out; any
other template is left to Ollama, which recognizes the common ones in the GGUF file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from cfsp.text.tokens import render_chat
from exporters.export_record import ExportRecord

_OLLAMA_CONTEXT = 4096
"""Tokens of context that Ollama gives a model unless it is told otherwise."""
_CHATML = re.compile(
    r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?<\|im_start\|>user\nA<\|im_end\|>\n"
    r"<\|im_start\|>assistant\nB<\|im_end\|>\n<\|im_start\|>user\nC<\|im_end\|>\n<\|im_start\|>assistant\n",
    re.DOTALL,
)
_GO_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile_text(exports: Sequence[ExportRecord], tokenizer: Any) -> str:
    """The Modelfile of the first GGUF file; the others are named in comments."""
    files = [record for record in exports if record.format == "gguf"]
    tag = re.sub(r"[^a-z0-9._-]+", "-", files[0].file.removesuffix(".gguf").lower())
    lines = [f"# ollama create {tag} -f Modelfile", f"FROM ./{files[0].file}"]
    lines += [f"# FROM ./{record.file}" for record in files[1:]]
    if files[0].context_length < _OLLAMA_CONTEXT:
        lines.append(f"PARAMETER num_ctx {files[0].context_length}")
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}")
    return "\n".join([*lines, *_template(tokenizer)]) + "\n"


def _template(tokenizer: Any) -> list[str]:
    if not tokenizer.chat_template:
        return ["# The model has no chat template: it completes text.", 'TEMPLATE """{{ .Prompt }}"""']
    talk = [
        {"role": role, "content": text} for role, text in (("user", "A"), ("assistant", "B"), ("user", "C"))
    ]
    rendered = render_chat(tokenizer, talk, add_generation_prompt=True)
    match = _CHATML.fullmatch(rendered)
    if match is None or '"""' in (match["system"] or ""):
        return ["# No TEMPLATE: the chat template is in the GGUF file, where Ollama looks for it."]
    system = [f'SYSTEM """{match["system"]}"""'] if match["system"] else []
    return [f'TEMPLATE """{_GO_CHATML}"""', *system]

"""Which engines render the chat templates of llama.cpp's source as transformers does, conversation by conversation.

    python benchmarks/chat_templates.py [--json FILE]

llama.cpp's Jinja is compiled from its source (a compiler is needed), GenAI is the installed one, and transformers.js'
Jinja is the one of tests/javascript (`make javascript`; left out where it is not there).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "plugins"), str(ROOT)]

from llama_jinja import llama_jinja, real_templates  # noqa: E402

from cfsp.models.folder_format import save_tokenizer  # noqa: E402
from cfsp.models.reference import load_tokenizer  # noqa: E402
from cfsp.text.conversations import CONVERSATIONS, Conversation, rendered  # noqa: E402
from exporters.onnx.chat_whitespace import explicit_whitespace  # noqa: E402

_PACKAGE = ROOT / "tests" / "javascript" / "node_modules" / "@huggingface" / "jinja" / "dist" / "index.js"
_SCRIPT = """
import fs from "fs";
const { Template } = await import(process.argv[1]);
for (const row of JSON.parse(fs.readFileSync(0))) {
  let answer = {};
  try { answer.text = new Template(row.template).render(row.context); } catch (error) { answer.error = String(error); }
  console.log(JSON.stringify(answer));
}
"""


def context_of(conversation: Conversation, tokenizer: Any) -> dict[str, Any]:
    """What a template is given."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    return {
        "messages": list(conversation.messages),
        "add_generation_prompt": conversation.to_be_answered,
        **{name: getattr(tokenizer, name) for name in names},
        **tools,
    }


def genai_text(tokenizer: Any, template: str, conversation: Conversation) -> str | None:
    """GenAI's text; None where it fails."""
    try:
        text: str = tokenizer.apply_chat_template(
            json.dumps(list(conversation.messages)),
            template_str=template,
            tools=json.dumps(list(conversation.tools)) if conversation.tools else None,
            add_generation_prompt=conversation.to_be_answered,
        )
    except Exception:
        return None
    return text


def javascript_texts(rows: list[dict[str, Any]]) -> list[str | None]:
    """transformers.js' texts; None where it fails."""
    command = ["node", "--input-type=module", "-e", _SCRIPT, str(_PACKAGE)]
    lines = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, check=True).stdout
    return [json.loads(line).get("text") for line in lines.splitlines()]


def genai_texts(
    tokenizer: Any, templates: Mapping[str, str], cases: Sequence[tuple[str, Conversation]]
) -> list[str | None]:
    """GenAI's texts, with a tokenizer's folder; None where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        settings = {
            "model": {"type": "llama", "vocab_size": len(tokenizer), "context_length": 64, "decoder": {}}
        }
        Path(folder, "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
        genai = onnxruntime_genai.Tokenizer(folder)
        return [genai_text(genai, templates[name], conversation) for name, conversation in cases]


def all_texts(
    tokenizer: Any,
    templates: Mapping[str, str],
    expected: Mapping[str, Mapping[str, str]],
    cases: Sequence[tuple[str, Conversation]],
) -> dict[str, list[str | None]]:
    """Every engine's texts of the cases."""
    rows = [
        {"template": templates[name], "context": context_of(conversation, tokenizer)}
        for name, conversation in cases
    ]
    found: dict[str, list[str | None]] = {}
    with llama_jinja() as render:
        found["llama.cpp"] = [render(row["template"], row["context"]).get("text") for row in rows]
    if _PACKAGE.is_file():
        found["transformers.js"] = javascript_texts(rows)
    found["GenAI"] = genai_texts(tokenizer, templates, cases)
    written_out = dict(templates)
    for name, template in templates.items():
        explicit = explicit_whitespace(template)
        if explicit and rendered(tokenizer, template=explicit) == expected[name]:
            written_out[name] = explicit
    found["GenAI, white space written out"] = genai_texts(tokenizer, written_out, cases)
    return found


def main() -> None:
    """Print one line an engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write what differs, by template")
    arguments = parser.parse_args()
    tokenizer, templates = load_tokenizer("smollm2-135m"), real_templates()
    expected = {name: rendered(tokenizer, template=template) for name, template in templates.items()}
    cases = [
        (name, conversation)
        for name, texts in expected.items()
        for conversation in CONVERSATIONS
        if conversation.name in texts
    ]
    differing: dict[str, dict[str, int]] = {}
    for engine, texts in all_texts(tokenizer, templates, expected, cases).items():
        wrong = Counter(
            name for (name, one), text in zip(cases, texts, strict=True) if text != expected[name][one.name]
        )
        differing[engine] = dict(wrong)
        equal = len(cases) - wrong.total()
        print(f"{engine}: {equal} of {len(cases)}; {len(wrong)} of {len(templates)} templates differ")
    if arguments.json:
        arguments.json.write_text(json.dumps(differing, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m exporters.onnx.genai_worker FOLDER`: what ONNX Runtime GenAI makes of conversations.

A process of its own, as GenAI can end it for a tokenizer.json that it does not know. Standard input is a list of
[messages, tools or null, add_generation_prompt]; standard output is {"stops": token ids, "read": [{"ids": ...} or
{"error": ...}]}, or {"error": ...} if it cannot read the folder.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    import onnxruntime_genai

    try:
        tokenizer = onnxruntime_genai.Tokenizer(sys.argv[1])
    except Exception as error:  # whatever its C++ throws
        print(json.dumps({"error": str(error)}))
        return
    read = [_read(tokenizer, *conversation) for conversation in json.load(sys.stdin)]
    print(json.dumps({"stops": [int(token) for token in tokenizer.eos_token_ids], "read": read}))


def _read(tokenizer: Any, messages: Any, tools: Any, to_be_answered: bool) -> dict[str, Any]:
    try:
        text = tokenizer.apply_chat_template(
            json.dumps(messages),
            tools=json.dumps(tools) if tools else None,
            add_generation_prompt=to_be_answered,
        )
        return {"ids": tokenizer.encode(text).tolist()}
    except Exception as error:  # likewise
        return {"error": str(error)}


if __name__ == "__main__":
    main()

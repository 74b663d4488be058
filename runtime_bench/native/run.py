"""Asking a runner for what a Python worker is not asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cfsp.errors import InputError
from runtime_bench.engines import SessionSettings
from runtime_bench.process import ProcessFailed, exchange


def generation_request(
    path: str,
    settings: SessionSettings,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop_at_end: bool = True,
) -> dict[str, Any]:
    """The document that asks a runner for a greedy continuation.

    Args:
        path: The GGUF file, as the runner's machine names it.
        settings: How it is opened.
        prompt: Token ids.
        max_new_tokens: Most tokens to make.
        stop_at_end: Stop before a token that ends a text.
    """
    wanted = {"prompt": list(prompt), "max_new_tokens": max_new_tokens, "stop_at_end": stop_at_end}
    return {"path": path, "session": asdict(settings), "generate": wanted}


def generate_tokens(command: Sequence[str], request: dict[str, Any], timeout_s: float) -> list[int]:
    """Send a `generation_request` to a runner.

    Args:
        command: The runner, and what it is started with.
        request: The document.
        timeout_s: After this long the process is ended.

    Raises:
        InputError: It failed; the message has the reason.
    """
    try:
        answer = json.loads(exchange(command, request, timeout_s))
        if answer["error"]:
            raise InputError(str(answer["error"]))
        return [int(token) for token in answer["tokens"]]
    except ProcessFailed as error:
        raise InputError(f"the runner failed: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the runner gave no readable answer: {error}") from error

"""Chats as text: the model's own template, which is a program that the model's folder brings along.

transformers runs it in Jinja's sandbox, which keeps it from everything but time and memory; both are bounded here.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.reading import one_line

_MOST_SECONDS = 5.0
"""Of processor time for one chat; templates take fractions of a millisecond."""
_MOST_CHARACTERS = 2**28
_MOST_BYTES = 2**30
"""Of memory while a chat is rendered, beyond what the process has."""
_SIZES = Path("/proc/self/statm")


def render_chat(
    tokenizer: Any, messages: Iterable[Mapping[str, Any]], *, what: str = "a chat", **options: Any
) -> str:
    """A chat's text in the model's own template; `options` are the template's, such as add_generation_prompt.

    Raises:
        InputError: There is none, it refuses the chat, or does not come to an end.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{what} cannot be rendered: the model has no chat template; use plain text")
    try:
        with _bounded():
            text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options)
    except MemoryError as error:
        raise InputError(
            f"the model's chat template takes more than {_MOST_BYTES >> 30} GiB of memory for {what}"
        ) from error
    except Exception as error:  # templates raise whatever Jinja or they themselves define
        raise InputError(f"the model's chat template refuses {what}: {one_line(error)}") from error
    if len(text) > _MOST_CHARACTERS:
        raise InputError(f"the model's chat template makes {len(text)} characters of {what}")
    return str(text)


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """A user's turn, up to where the model has to answer; raises as `render_chat`."""
    return render_chat(
        tokenizer, [{"role": "user", "content": prompt}], what="a prompt", add_generation_prompt=True
    )


@contextmanager
def _bounded() -> Iterator[None]:
    """Let what runs inside fail beyond `_MOST_SECONDS` and `_MOST_BYTES`, in the main thread and where systems can.

    Raises:
        TimeoutError: It takes longer.
        MemoryError: It takes more.
    """
    bounded = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not bounded:
        yield
        return
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, _give_up))
        # Again and again: Jinja goes on after what is raised while it folds constants.
        signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS, 0.5)
        stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        if _SIZES.is_file():
            import resource

            pages = int(_SIZES.read_text(encoding="ascii").split()[0])
            most = pages * resource.getpagesize() + _MOST_BYTES
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            tighter = most if soft == resource.RLIM_INFINITY else min(most, soft)
            resource.setrlimit(resource.RLIMIT_AS, (tighter, hard))
        yield


def _give_up(*_: object) -> None:
    raise TimeoutError(f"it does not come to an end within {_MOST_SECONDS:g} s")

"""llama.cpp's log: what it last complained about, and what it tells nowhere else of how it computes."""

from __future__ import annotations

import re
import threading
from collections import deque
from typing import Any

_INFORMATION, _WARNING, _ERROR, _CONTINUED = 2, 3, 4, 5
_BUFFER = re.compile(r"(\S+) model buffer size = +(\d+\.\d+) MiB")
_FLASH = re.compile(r"Flash Attention (enabled|not supported)")


class Log:
    """The last warnings and errors that llama.cpp logged, whole lines, and those that say how a file was opened."""

    def __init__(self) -> None:
        self._complaints: deque[str] = deque(maxlen=20)
        self._facts: deque[str] = deque(maxlen=100)
        self._open = ""
        self._level = 0
        self._lock = threading.Lock()

    def __call__(self, level: int, text: bytes | None, _: Any) -> None:
        with self._lock:
            self._level = self._level if level == _CONTINUED else level
            if self._level not in (_INFORMATION, _WARNING, _ERROR):
                return
            *whole, self._open = (self._open + (text or b"").decode("utf-8", "replace")).split("\n")
            lines = [line.strip() for line in whole if line.strip()]
            self._facts.extend(line for line in lines if _BUFFER.search(line) or _FLASH.search(line))
            if self._level != _INFORMATION:
                self._complaints.extend(lines)

    def clear(self) -> None:
        """Forget everything, before a file is opened."""
        with self._lock:
            self._complaints.clear()
            self._facts.clear()
            self._open = ""

    def last(self, count: int = 3) -> str:
        """The newest complaints as one."""
        with self._lock:
            return "; ".join(list(self._complaints)[-count:]) or "llama.cpp gave no reason"

    @property
    def flash_attention(self) -> bool | None:
        """Whether llama.cpp chose its flash kernel, where the choice was its own; None where it told of none."""
        with self._lock:
            found = [match[1] for line in self._facts if (match := _FLASH.search(line))]
        return found[-1] == "enabled" if found else None

    @property
    def weight_buffers(self) -> dict[str, int]:
        """Bytes of the weights by the buffer that holds them: `CPU_Mapped` are the file's pages, others are copies."""
        with self._lock:
            found = [match for line in self._facts if (match := _BUFFER.search(line))]
        sizes: dict[str, int] = {}
        for match in found:
            sizes[match[1]] = sizes.get(match[1], 0) + round(float(match[2]) * 2**20)
        return sizes

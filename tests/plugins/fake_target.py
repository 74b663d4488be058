"""A place where nothing runs: for tests of what is done around an engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime_bench.engines import EngineFacts
from runtime_bench.targets import Local
from runtime_bench.worker import WorkerRequest, WorkerResult

FACTS = EngineFacts("fake", 4, 1, "CPU", {"fake": "1.0"})


class FakeTarget(Local):
    """Answers at once, with samples of `times_ns` and other fields of `answer`; `asked` is what it was asked for."""

    name = "fake"

    def __init__(self, times_ns: Iterator[int] | None = None, **answer: Any) -> None:
        self.times_ns, self.answer = times_ns or itertools.repeat(100), answer
        self.asked: list[WorkerRequest] = []

    def require(self, engine: str) -> None:
        pass

    def default_engine(self, path: Path) -> str:
        return "llama.cpp"

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        self.asked.append(request)
        samples = [next(self.times_ns) for _ in range(request.samples)]
        made = {"samples_ns": samples, "load_ns": 10, "facts": FACTS, "lasted_ns": sum(samples)}
        return WorkerResult(**(made | self.answer))

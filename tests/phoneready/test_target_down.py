"""A release whose target is away in one run and there in the next, behind a real sshd."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cfsp.records import read_record
from phoneready.figures.figures import Verdicts
from phoneready.main import main
from phoneready.release import steps
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.jsonl import read_jsonl
from runtime_bench.targets import Target
from runtime_bench.targets.remote import Remote
from runtime_bench.targets.remote_shell import Ssh
from runtime_bench.targets.table import open_target
from runtime_bench.worker import WorkerRequest, WorkerResult

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytestmark = [
    pytest.mark.everything,
    pytest.mark.skipif(sys.platform != "linux", reason="daemons from Debian"),
]

BUDGET = '[[budgets]]\nmetric = "peak_rss_bytes"\nat_most = "100 GB"\ntargets = ["ssh:board"]\n'
STAGE = "bench-ssh-board"


@dataclass
class Leaving(Remote):
    """A machine that goes away when it has done so much."""

    after: int | None = None
    leave: Callable[[], None] = lambda: None

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        if self.after is not None:
            self.after -= 1
            if self.after < 0:
                self.leave()
        return super().run(request, timeout_s)


def measured(rows: list[BenchRecord]) -> dict[tuple[str, str], str]:
    """(test, file) -> session."""
    return {(row.test, row.model_filename): row.session for row in rows if row.ok}


def test_what_was_measured_is_kept_and_the_next_run_measures_what_is_missing(
    board: Any,
    runner: Path,
    tiny_folder: Callable[..., Path],
    small_release: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ("[bench]", '[bench]\ntargets = ["local", "ssh:board"]')
    config, out = small_release(tiny_folder(intermediate_size=256), places, BUDGET), tmp_path / "out"

    def release(*, up: bool, after: int | None = None) -> list[BenchRecord]:
        """A run's rows there; all else is made once, and every reader reads what came of it."""
        board.kill()
        if up:
            board.start()

        def opened(name: str) -> Target:
            if name == "local":
                return open_target(name)
            far = {"runner": runner, "folder": str(tmp_path / "far")}
            return Leaving(Ssh("board", board.config), after=after, leave=board.kill, **far)

        monkeypatch.setattr(steps, "open_target", opened)
        status = main(["release", str(config), "-o", str(out), "--threads", "1"])
        assert status == (0 if budget() == "pass" else 3)
        for line in (["report", str(out)], ["verify", str(out)], ["history", str(out)]):
            assert main(line) == 0, capsys.readouterr().err
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["stages"].keys() >= {"bench-local", STAGE}
        return read_jsonl(out / "stages" / STAGE / "bench.jsonl")

    def budget() -> str:
        (verdict,) = read_record(Verdicts, out / "verdicts.json").verdicts[-1:]
        return verdict.outcome

    def again() -> list[str]:
        capsys.readouterr()
        assert main(["release", str(config), "-o", str(out), "--explain", "--json"]) == 0
        return [stage for stage, why in json.loads(capsys.readouterr().out).items() if why]

    rows = release(up=False)
    assert len(rows) == 8
    assert not any(row.ok for row in rows)
    assert all("connection refused" in str(row.failure) for row in rows)
    assert budget() == "inconclusive"
    assert again() == [STAGE]

    first = measured(release(up=True, after=5))
    assert len(first) == 5  # it left in the middle of the third of four groups
    assert again() == [STAGE]

    down = release(up=False)
    assert measured(down).items() >= first.items()
    assert len(down) == 8

    last = measured(release(up=True))
    assert len(last) == 8
    assert len(set(last.values())) == 2
    whole = {test for test, _ in first} - {"tg2"}
    assert {row: session for row, session in last.items() if row[0] in whole}.items() <= first.items()
    assert len({session for (test, _), session in last.items() if test not in whole}) == 1
    assert budget() == "pass"
    assert again() == []

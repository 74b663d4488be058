"""Machines that say too much, or nothing: neither fills this one nor keeps it waiting."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from runtime_bench.targets import remote
from runtime_bench.targets.remote import Remote
from runtime_bench.targets.remote_shell import RemoteError, RemoteShell
from runtime_bench.targets.table import check_target
from runtime_bench.worker import SessionSettings, WorkerRequest
from runtime_bench.workload import Workload


@dataclass(frozen=True)
class Program:
    """Instead of a machine a shell here, which first does what it is told."""

    before: str

    name = "far"
    folder = "/tmp/far"
    client = "sh"

    def command(self, line: str) -> list[str]:
        return ["sh", "-c", f"{self.before}\n{line}"]

    def failure(self, lines: Sequence[str], status: int) -> str:
        return "it went away"


def test_a_machine_that_says_too_much_is_ended() -> None:
    word = uuid.uuid4().hex
    for stream in ("", " >&2"):
        with pytest.raises(RemoteError, match="more than 64 MiB"):
            RemoteShell(Program(f"yes {word}{stream}")).run("true", timeout_s=600)
    # What the client has started would fill the disk.
    going = [
        process for process in psutil.process_iter(["cmdline"]) if word in (process.info["cmdline"] or ())
    ]
    _, alive = psutil.wait_procs(going, timeout=10)
    assert not alive
    reply = RemoteShell(Program("")).run("echo fine", timeout_s=60)
    assert (reply.status, reply.text) == (0, "fine\n")


def test_a_large_file_may_be_hashed_there_for_longer_than_it_may_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "bin" / "sha256sum"
    slow.parent.mkdir()
    slow.write_text('#!/bin/sh\nsleep 2\nPATH=${PATH#*:}\nsha256sum "$@"\n')
    slow.chmod(0o755)
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(2**20))
    monkeypatch.setattr(remote, "_STALL_S", 0.5)
    way = Program(f"PATH={slow.parent}:$PATH; export PATH")
    for rate, arrives in ((2**20 / 60, True), (2**30, False)):
        monkeypatch.setattr(remote, "_HASHED_PER_S", rate)
        target = Remote(way, folder=str(tmp_path / f"far {arrives}"))
        if arrives:
            assert Path(target._have([(model, "model.gguf")])).read_bytes() == model.read_bytes()
        else:
            with pytest.raises(RemoteError, match=r"timeout: no answer within 0\.5 s"):
                target._have([(model, "model.gguf")])


def test_a_machine_that_never_answers_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (remote,):
        monkeypatch.setattr(module, "ANSWER_S", 0.5)
    asked = tmp_path / "asked"
    silent = Remote(Program(f"echo >>{asked}; sleep 60"))
    workload = Workload("pp", 8, 0, 0)
    request = WorkerRequest("x.gguf", "llama.cpp", workload, SessionSettings(64, 1, 8, 8))
    for _ in range(4):
        assert silent.environment().cpu_model is None
        assert "timeout: no answer" in (silent.run(request, 1).error or "")
    assert asked.read_text() == "\n"


def test_a_place_that_may_be_is_not_connected_to() -> None:
    for name in ("ssh:me@nowhere.invalid:22", "adb:nothing", "constrained:400M,cores=4000", "local"):
        assert check_target(name) == name

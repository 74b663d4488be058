"""Other machines, behind a real sshd and real adbds on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from loopback import HOSTILE, ROOT, Device, files_in, running, script, until

from cfsp.errors import InputError
from exporters.family import ExportOptions
from exporters.onnx.export import export_onnx
from exporters.onnx.folder import find_graph
from phoneready.main import main
from runtime_bench.measuring.measure import run_bench, run_matrix
from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.fairness import energy, fairness
from runtime_bench.targets import LOCAL, remote_scripts
from runtime_bench.targets.remote import Remote
from runtime_bench.targets.remote_shell import Adb, Ssh
from runtime_bench.targets.table import open_remote, open_target
from runtime_bench.workload import BenchSettings

SETTINGS = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(4,), ttft=(), load=False, repetitions=1, n_threads=(1,)
)
LONGER = replace(SETTINGS, n_gen=(2000,))
"""Long enough for looks beside it."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons from Debian")


@pytest.fixture(scope="module")
def tiny_onnx(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(tiny_folder(), output, ["fp32"], ExportOptions(n_threads=1))
    return find_graph(str(output / "fp32"), last_logits=True)


def bench(path: Path, target: Remote, settings: BenchSettings = SETTINGS) -> BenchRecord:
    (record,) = run_bench([path], settings, target=target)
    return record


def test_a_file_is_measured_there(
    device: Device, tiny_gguf: Callable[..., Path], tmp_path: Path, far: Path
) -> None:
    path = tiny_gguf(hidden_size=256, head_dim=64)
    target = device.target()
    record = bench(path, target, settings=LONGER)
    assert record.failure is None
    assert (record.kind, record.target, record.engine) == ("measured", target.name, "llama.cpp")
    assert (record.model_filename, record.n_threads, len(record.samples_ns)) == (str(path), 1, 1)
    assert record.memory_verdict is None
    assert record.model_n_params
    assert record.environment.platform.startswith(f"Linux {os.uname().release}")
    assert record.environment.cpus_usable == len(os.sched_getaffinity(0))
    assert record.environment.memory_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert record.environment.cpu_model
    (seen,) = record.conditions
    assert seen is not None
    assert len(seen.at_s) > 2
    assert seen.stolen_cores
    ((began, ended),) = seen.samples_s
    assert 0 < began < ended < seen.at_s[-1] + 1
    assert ended - began == pytest.approx(record.samples_ns[0] / 1e9, abs=0.01)
    assert record.contention != (None,)
    assert set(files_in(far)) == {"model.gguf", "runner"}
    assert not running(tmp_path), "something is left running"


DUMPSYS = r"""case $1 in
battery) printf '  AC powered: false\n  USB powered: true\n  status: 2\n  level: 63\n  scale: 100\n' ;;
thermalservice) printf 'Thermal Status: 3\nHAL Ready: true\n' ;;
power) printf 'mWakefulness=Asleep\nDisplay Power: state=OFF\n' ;;
esac"""


GETPROP = "case $1 in ro.boot.qemu) echo 1 ;; ro.build.version.release) echo 11 ;; esac"


def test_what_androids_services_say_is_in_the_record(
    daemons: ModuleType, tiny_gguf: Callable[..., Path], tmp_path: Path, runner: Path
) -> None:
    for name, text in (("dumpsys", DUMPSYS), ("settings", "echo null"), ("getprop", GETPROP)):
        script(tmp_path / "bin" / name, text).chmod(0o755)
    try:
        with daemons.ssh_server(f"{tmp_path}/bin:/usr/bin:/bin") as phone:
            target = Remote(Ssh("board", phone.config), runner=runner, folder=str(tmp_path / "far"))
            record = bench(tiny_gguf(hidden_size=256, head_dim=64), target, settings=LONGER)
            now = target.conditions()
    except daemons.NotPossible as error:
        pytest.skip(str(error))
    # An emulator, whose figures are nobody's
    assert (record.kind, record.environment.versions["android"]) == (EMULATED, "11")
    (seen,) = record.conditions
    assert seen is not None
    told = {name: getattr(seen, name)[0] for name in ("charging", "low_power", "screen_on")}
    assert told == {"charging": True, "low_power": False, "screen_on": False}
    assert (now.charging, now.thermal_status) == ((True,), (3,))
    # The last look asks again; those between do not.
    assert [status for status in seen.thermal_status if status is not None] == [3, 3]
    assert (fairness(record).verdict, fairness(record).reason) == (
        "throttled",
        "the system's thermal status was 3",
    )


def test_energy_is_metered_there(
    device: Device, tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = remote_scripts.RUN.replace("\nbase=  #", f"\nbase={tmp_path}  #", 1)
    monkeypatch.setattr(remote_scripts, "RUN", moved)
    battery = tmp_path / "sys/class/power_supply/battery"
    battery.mkdir(parents=True)
    shown = {"type": "Battery", "status": "Charging", "voltage_now": 3_800_000, "current_now": -800_000}
    for name, value in shown.items():
        (battery / name).write_text(f"{value}\n")
    record = bench(tiny_gguf(hidden_size=256, head_dim=64), device.target(), replace(LONGER, energy=True))
    found = energy(record)
    assert found is not None
    assert found.meter == "battery current x voltage, whole device, at battery"
    assert found.reason == "there was external power, so the battery does not show what is used"


def test_files_are_pushed_once_and_again_when_they_are_spoiled(
    device: Device, tiny_gguf: Callable[..., Path], far: Path
) -> None:
    path = tiny_gguf()
    assert bench(path, device.target()).ok
    pushed = files_in(far)["model.gguf"]
    first = pushed.stat()
    assert pushed.parent.name == bench(path, device.target()).file_sha256
    assert (pushed.stat().st_ino, pushed.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    with pushed.open("r+b") as stream:
        stream.write(b"spoiled")
    part = pushed.with_name(".part-4194305")  # of a push that was killed; no process has this number
    part.write_bytes(b"half")
    assert bench(path, device.target()).ok
    assert not part.exists()
    assert pushed.read_bytes() == path.read_bytes()


def test_hostile_names_are_only_names(
    device: Device, tiny_gguf: Callable[..., Path], tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(HOSTILE + ".gguf")
    path.write_bytes(tiny_gguf().read_bytes())
    folder = tmp_path / HOSTILE.replace("\n", "")
    record = bench(path, device.target(folder=str(folder)))
    assert record.failure is None
    assert record.model_filename == str(path)
    assert set(files_in(folder)) == {"model.gguf", "runner"}
    assert device.target(folder=str(folder)).clean() == (2, ())
    assert not folder.exists()
    assert not list(tmp_path.rglob("pwned"))
    assert not (Path.home() / "pwned").exists()


def test_what_was_pushed_is_removed_and_nothing_else(
    device: Device, tiny_gguf: Callable[..., Path], far: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tiny_gguf(), device.target()).ok
    own = far / "diary.txt"
    own.write_text("not pushed by phoneready")
    (far / ".looks-1234567").write_text("of a run that was killed")
    assert main(["devices", "clean", device.on(folder=far)[1], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"target": device.name, "removed": 2, "left": ["diary.txt"]}
    assert list(far.iterdir()) == [own]
    own.unlink()
    assert device.target().clean() == (0, ())
    assert not far.exists()


def test_a_device_that_vanishes_during_a_push_keeps_no_half(
    device: Device, tiny_gguf: Callable[..., Path], tmp_path: Path, far: Path
) -> None:
    large, small = tmp_path / "large.gguf", tiny_gguf()
    with large.open("wb") as stream:
        stream.truncate(2**29)
    target = device.target()
    # What is pushed afterwards is the large file alone.
    assert bench(small, target).ok
    kept = set(files_in(far))

    def vanish() -> None:
        until(lambda: list(far.rglob(".part-*")), "the push does not begin")
        device.vanish()

    thread = threading.Thread(target=vanish)
    thread.start()
    failed, after = run_bench([large, small], SETTINGS, target=target)
    thread.join()
    assert "the device went away" in (failed.failure or "")
    # Nobody answers any more: the next file fails, too, and at once.
    assert after.status == "failed"
    until(lambda: set(files_in(far)) == kept, "half a file is left")
    device.come_back()
    assert bench(small, target).ok


def test_a_device_that_vanishes_during_a_run_is_told_and_nothing_runs_on(
    device: Device, tiny_gguf: Callable[..., Path], tmp_path: Path, sleeper: Path
) -> None:
    def vanish() -> None:
        until(lambda: running(tmp_path / "awake"), "the run does not begin")
        device.vanish()

    thread = threading.Thread(target=vanish)
    thread.start()
    # The rest of the matrix goes on.
    gone, here = run_matrix([tiny_gguf()], SETTINGS, [device.target(runner=sleeper), LOCAL])
    thread.join()
    assert (gone.status, here.status) == ("failed", "ok")
    assert "the device went away" in (gone.failure or "")
    assert gone.samples_ns == ()
    until(lambda: not running(tmp_path / "awake"), "the run goes on there")


def test_a_run_that_takes_too_long_is_ended_there(
    device: Device,
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    sleeper: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime_bench.targets.remote._GRACE_S", 1.0)
    settings = replace(SETTINGS, timeout_s=1)
    (record,) = run_bench([tiny_gguf()], settings, target=device.target(runner=sleeper))
    assert "timeout" in (record.failure or "")
    until(lambda: not running(tmp_path / "awake"), "the run goes on there")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_nothing_runs_on_when_we_are_ended(
    device: Device,
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    sleeper: Path,
    far: Path,
    ending: signal.Signals,
) -> None:
    options = ["-n", "4", "-t", "1", "--set", "check_text=false", *device.on(runner=sleeper, folder=far)]
    command = [sys.executable, "-m", "phoneready", "bench", str(tiny_gguf()), *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: running(tmp_path / "awake"), "the run does not begin")
        process.send_signal(ending)
        _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if ending == signal.SIGINT else -signal.SIGKILL)
    assert said == ("error: interrupted\n" if ending == signal.SIGINT else "")
    until(lambda: not running(tmp_path / "awake"), "the run goes on there")
    until(lambda: not running(tmp_path), "a shell or a client is left")


def test_no_space_there(
    device: Device, tiny_gguf: Callable[..., Path], small_disk: Callable[[str], Path], far: Path
) -> None:
    folder = small_disk("256k") / "files"
    path = tiny_gguf(hidden_size=256, head_dim=64)
    record = bench(path, device.target(folder=str(folder)))
    size = path.stat().st_size / 2**20
    assert record.failure == f"no space left there for {path.name} ({size:.1f} MiB) in {folder}"
    assert set(files_in(folder)) == {"runner"}
    assert bench(path, device.target()).ok


def test_a_folder_that_cannot_be(device: Device, tiny_gguf: Callable[..., Path]) -> None:
    record = bench(tiny_gguf(), device.target(folder="/proc/nowhere"))
    assert (record.failure or "").startswith("pushing runner failed there with status 1: ")
    for folder in ("~/files", "/tmp/a\nb"):
        with pytest.raises(InputError, match="not an absolute path"):
            device.target(folder=folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "cat >/dev/null; echo GGML_ASSERT failed: sorry >&2; exit 3",
            "exit status 3: GGML_ASSERT failed: sorry",
        ),
        ('cat >/dev/null; echo \'{"samples_ns": ["many"]}\'', "no readable result: samples_ns[0]"),
    ],
)
def test_a_runner_that_fails(
    device: Device, tiny_gguf: Callable[..., Path], tmp_path: Path, text: str, reason: str
) -> None:
    record = bench(tiny_gguf(), device.target(runner=script(tmp_path / "bad", text)))
    assert reason in (record.failure or "")


def test_a_runner_for_another_processor(
    device: Device, tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    other, number = ("aarch64", 183) if os.uname().machine == "x86_64" else ("x86_64", 62)
    program = tmp_path / "foreign"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, number, 1) + bytes(40))
    record = bench(tiny_gguf(), device.target(runner=program))
    assert record.failure == f"wrong ABI: foreign is for {other}, the device is {os.uname().machine}"


def test_a_client_that_is_not_installed(
    device: Device, tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = device.target()
    monkeypatch.setenv("PATH", "/nowhere")
    record = bench(tiny_gguf(), target)
    client = target.name.partition(":")[0]
    assert record.failure == f"{target.name}: {client} is not installed; {target.name} is reached through it"
    assert record.environment.cpus_usable is None


def test_host_keys_are_checked(
    daemons: ModuleType, tiny_gguf: Callable[..., Path], board: Any, runner: Path
) -> None:
    stranger = bench(tiny_gguf(), Remote(Ssh("stranger", board.config), runner=runner))
    assert "its host key could not be verified" in (stranger.failure or "")
    with daemons.ssh_server() as other:
        other.change_host_key()
        record = bench(tiny_gguf(), Remote(Ssh("board", other.config), runner=runner))
    assert record.failure == "ssh:board: its host key is not the one that is known; it may be another machine"


def test_hosts_that_do_not_answer_or_refuse(
    tiny_gguf: Callable[..., Path], board: Any, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        record = bench(tiny_gguf(), Remote(Ssh(f"127.0.0.1:{port}")))
    assert record.failure == f"ssh:127.0.0.1:{port}: nothing answers there: connection refused"
    (tmp_path / "config").write_text(board.config.read_text().replace("user_key", "host_key"))
    record = bench(tiny_gguf(), Remote(Ssh("board", tmp_path / "config")))
    assert "it refuses the login" in (record.failure or "")


@pytest.mark.usefixtures("adb_environment")
def test_devices_that_are_not_there_or_not_ready(phones: Any, tiny_gguf: Callable[..., Path]) -> None:
    path = tiny_gguf()
    record = bench(path, Remote(Adb("nobody")))
    assert record.failure == "adb:nobody: no such device; adb devices lists those that are there"
    serial = phones.start(5611)
    phones.kill(serial)  # and adb's server still knows it
    assert "adb:127.0.0.1:5611: the device is offline" in (bench(path, Remote(Adb(serial))).failure or "")
    phones.disconnect(serial)
    # A device that asks its owner: it answers every signature with another token.
    program = phones.enter([sys.executable, "-c", UNAUTHORIZED])
    try:
        phones.connect("127.0.0.1:5612")
        phones.wait("127.0.0.1:5612", "unauthorized")
        reason = bench(path, Remote(Adb("127.0.0.1:5612"))).failure or ""
    finally:
        program.kill()
        program.wait()
        phones.disconnect("127.0.0.1:5612")
    assert "the device has not authorized this computer" in reason


UNAUTHORIZED = """
import socket, struct
with socket.create_server(("127.0.0.1", 5612)) as server:
    while True:
        peer, _ = server.accept()
        with peer:
            while head := peer.recv(24, socket.MSG_WAITALL):
                _, kind, _, size, _, _ = struct.unpack("<6I", head)
                peer.recv(size, socket.MSG_WAITALL)
                if kind == 3:  # the public key: now the owner is asked, and does not answer
                    continue
                word = int.from_bytes(b"AUTH", "little")
                token = bytes(range(20))
                peer.sendall(struct.pack("<6I", word, 1, 0, 20, sum(token), word ^ 0xFFFFFFFF) + token)
"""
"""The least of adb's protocol: system/core/adb/protocol.txt, A_AUTH of type TOKEN."""


def test_onnx_is_measured_by_a_python_there(
    board: Any, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    far = tmp_path / "far"
    record = bench(tiny_onnx, Remote(Ssh("board", board.config), folder=str(far)))
    assert record.failure is None
    assert (record.engine, record.target) == ("onnxruntime", "ssh:board")
    assert {"worker.zip", tiny_onnx.name, "tokenizer.json"} <= set(files_in(far))


def test_onnx_without_a_python_there(daemons: ModuleType, tiny_onnx: Path, tmp_path: Path) -> None:
    lean = tmp_path / "bin"
    lean.mkdir()
    for name in ("sh", "uname", "cat", "nproc", "grep", "sha256sum"):
        (lean / name).symlink_to(f"/usr/bin/{name}")
    try:
        with daemons.ssh_server(str(lean)) as bare:
            target = Remote(Ssh("board", bare.config), folder=str(tmp_path / "far"))
            assert (
                bench(tiny_onnx, target).failure == "onnxruntime needs Python there, and there is no python3"
            )
            script(lean / "python3", "echo onnxruntime tokenizers").chmod(0o755)
            lacking = bench(tiny_onnx, Remote(target.transport, folder=target.folder)).failure
            assert lacking == "onnxruntime needs a python3 with onnxruntime, tokenizers there"
    except daemons.NotPossible as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name",
    ["ssh", "ssh:", "ssh:-oProxyCommand=touch pwned", "ssh:a b", "ssh:host;id", "ssh:$(id)", "ssh:me@-x",
     "ssh:host:port", "ssh:a\nb", "adb", "adb:", "adb:-s", "adb:a\nb", "local:here", "telnet:host"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match="--on"):
        open_target(name)
    with pytest.raises(InputError, match="not another machine"):
        open_remote("local")


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("board", ["--", "board", "true"]),
        ("me@board:2222", ["-l", "me", "-p", "2222", "--", "board", "true"]),
        ("[fe80::1%eth0]:22", ["-p", "22", "--", "fe80::1%eth0", "true"]),
        ("a-b.example", ["--", "a-b.example", "true"]),
    ],
)
def test_names_of_hosts(host: str, words: list[str]) -> None:
    target = open_remote(f"ssh:{host}")
    command = target.transport.command("true")
    assert target.name == f"ssh:{host}"
    assert command[-len(words) :] == words
    assert "BatchMode=yes" in command
    assert not any("StrictHostKeyChecking" in word for word in command)

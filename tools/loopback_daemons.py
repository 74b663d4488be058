"""A real sshd and real adbds on loopback, for tests and benchmarks: throw-away keys, own configuration, no traces.

sshd listens on 127.0.0.1 and accepts one key that was made for it. adbd accepts anybody and listens everywhere, so it
runs in a network of its own, with an adb server that is reached through a socket in a folder; that needs root. No
configuration, key or server of the user's is read or changed.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

__all__ = ["AdbDevices", "NotPossible", "SshServer", "adb_devices", "ssh_server"]

_WAIT_S = 20.0
_PRIVILEGE_SEPARATION = Path("/run/sshd")


class NotPossible(Exception):  # noqa: N818
    """Why a daemon cannot be had here."""


class SshServer:
    """An sshd on 127.0.0.1. `ssh -F CONFIG board` reaches it.

    Attributes:
        config: For `ssh -F`; it knows the host `board`, and `stranger`, the same whose key is not known.
    """

    host, stranger = "board", "stranger"

    def __init__(self, folder: Path, search_path: str | None) -> None:
        self._folder, self._port = folder, _free_port()
        self.config = folder / "ssh_config"
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("host_key", "user_key"):
            self._make_key(name)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        (folder / "none").write_text("")
        self._write_known_hosts()
        sshd = [
            "ListenAddress 127.0.0.1",
            f"Port {self._port}",
            f"HostKey {folder}/host_key",
            f"AuthorizedKeysFile {folder}/authorized_keys",
            f"AllowUsers {getpass.getuser()}",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "StrictModes no",
            "UsePAM no",
            "PidFile none",
            "Subsystem sftp internal-sftp",
            # A bash that sshd starts reads the user's .bashrc, but not where SHLVL says that it is not the first one.
            f"SetEnv SHLVL=1{f' PATH={search_path}' if search_path else ''}",
        ]
        client = [
            f"Host {self.host}",
            f"UserKnownHostsFile {folder}/known_hosts",
            f"Host {self.stranger}",
            f"UserKnownHostsFile {folder}/none",
            "Host *",
            "HostName 127.0.0.1",
            f"Port {self._port}",
            f"IdentityFile {folder}/user_key",
            "IdentitiesOnly yes",
            "GlobalKnownHostsFile /dev/null",
        ]
        # Since OpenSSH 9.8 a host whose logins failed has to wait; tests fail them on purpose.
        self._write_config([*sshd, "PerSourcePenalties no"])
        if subprocess.run(self._command("-t"), capture_output=True, check=False).returncode:
            self._write_config(sshd)
        self.config.write_text("".join(f"{line}\n" for line in client))

    def start(self) -> None:
        """Begin to listen."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("-D", "-e"),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        _until(lambda: self._answers(), f"sshd does not start, see {self._folder}/log")

    def kill(self) -> None:
        """Vanish: the daemon and its sessions, not what they started."""
        if self._process is None:
            return
        family = [
            psutil.Process(self._process.pid),
            *psutil.Process(self._process.pid).children(recursive=True),
        ]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()
        self._process.wait()
        self._process = None

    def change_host_key(self) -> None:
        """Become another machine."""
        self.kill()
        self._make_key("host_key")
        self.start()

    def _command(self, *options: str) -> list[str]:
        program = shutil.which("sshd")
        assert program is not None  # looked for before
        return [program, *options, "-f", str(self._folder / "sshd_config")]

    def _write_config(self, lines: list[str]) -> None:
        (self._folder / "sshd_config").write_text("".join(f"{line}\n" for line in lines))

    def _make_key(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)
        command = [
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-N",
            "",
            "-C",
            "throw-away",
            "-f",
            str(self._folder / name),
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _write_known_hosts(self) -> None:
        key = (self._folder / "host_key.pub").read_text()
        (self._folder / "known_hosts").write_text(f"[127.0.0.1]:{self._port} {key}")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
            return True
        return False


@contextmanager
def ssh_server(search_path: str | None = None) -> Iterator[SshServer]:
    """Run an sshd.

    Args:
        search_path: PATH of what it runs; its own default unless given.

    Raises:
        NotPossible: It cannot be had here.
    """
    _require("sshd", "ssh", "ssh-keygen")
    if os.geteuid() == 0:
        # It stays: every sshd of this machine needs it, and another one may have begun meanwhile.
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sshd-") as folder:
        server = SshServer(Path(folder), search_path)
        try:
            server.start()
            yield server
        finally:
            server.kill()


class AdbDevices:
    """An adb server in a network of its own, and adbds there.

    Attributes:
        environment: What adb's client needs to find it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._devices: dict[str, subprocess.Popen[bytes]] = {}
        address = f"localfilesystem:{folder}/socket"
        own = {"HOME": str(folder), "ANDROID_USER_HOME": str(folder), "ADB_MDNS": "0"}
        self.environment = {"ADB_SERVER_SOCKET": address}
        self._environment = os.environ | own | self.environment
        script = 'ip link set lo up && exec adb -L "$1" server nodaemon'
        with (folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", script, "sh", address],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        _until(
            lambda: (folder / "socket").exists() or self._server.poll() is not None,
            "adb's server does not start",
        )
        if self._server.poll() is not None:
            raise NotPossible(f"no network of its own for adbd: {(folder / 'log').read_text().strip()}")

    def start(self, port: int = 5601) -> str:
        """Start a device and connect to it; its serial number."""
        serial = f"127.0.0.1:{port}"
        self.disconnect(serial)
        self._devices[serial] = self.enter(["adbd"], {"ADBD_PORT": str(port)})
        self.connect(serial)
        self.wait(serial, "device")
        return serial

    def wait(self, serial: str, state: str) -> None:
        """Wait until adb's server sees a device in a state."""
        _until(lambda: f"{serial}\t{state}" in self._adb("devices"), f"{serial} does not become {state}")

    def connect(self, serial: str) -> None:
        """Have the server connect."""
        _until(lambda: "connected to" in self._adb("connect", serial), f"adb cannot connect to {serial}")

    def disconnect(self, serial: str) -> None:
        """Have the server forget a device."""
        self._adb("disconnect", serial)

    def kill(self, serial: str) -> None:
        """Vanish: the daemon, not what it started."""
        daemon = self._devices.pop(serial)
        daemon.kill()
        daemon.wait()

    def kill_all(self) -> None:
        """Have no devices any more."""
        for serial in list(self._devices):
            self.kill(serial)
        self._adb("disconnect")

    def enter(self, command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a program in the devices' network."""
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                ["nsenter", f"--net=/proc/{self._server.pid}/ns/net", *command],
                env=self._environment | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def close(self) -> None:
        """End all of it."""
        self.kill_all()
        self._server.kill()
        self._server.wait()

    def _adb(self, *arguments: str) -> str:
        done = subprocess.run(
            ["adb", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_WAIT_S,
        )
        return done.stdout


@contextmanager
def adb_devices() -> Iterator[AdbDevices]:
    """Run an adb server without devices.

    Raises:
        NotPossible: It cannot be had here.
    """
    _require("adb", "adbd", "unshare", "nsenter", "ip")
    if os.geteuid() != 0:
        raise NotPossible("adbd must run as root")
    with tempfile.TemporaryDirectory(prefix="adbd-") as folder:
        devices = AdbDevices(Path(folder))
        try:
            yield devices
        finally:
            devices.close()


def _require(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise NotPossible(f"not installed: {', '.join(missing)}; make debian installs it where root may")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise NotPossible(otherwise)
        time.sleep(0.05)

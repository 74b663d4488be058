"""What another machine says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.records import tool_version
from runtime_bench.environment import environment_of
from runtime_bench.native.targets import cpu_features, runner_target_for
from runtime_bench.records.bench_record import Environment
from runtime_bench.targets.far_scripts import DESCRIBE, FACTS_FOLLOW
from runtime_bench.targets.transport import FarError, FarShell

ANSWER_S = 60.0
UNKNOWN = "unknown"
_ABIS = {"arm64-v8a": "aarch64"}
"""Android's names of instruction sets that have another one."""


@dataclass(frozen=True)
class Machine:
    """A machine that answered."""

    folder: str  # Where pushed files go, absolute
    system: str  # Kernel's name
    machine: str  # Instruction set, as the kernel calls it
    abi: str  # Android's name of the instruction set; empty elsewhere
    features: frozenset[str]  # What its processor names
    environment: Environment  # For records
    # Whether it is Android's emulator, which takes the time of whatever machine it runs on
    is_emulator: bool = False

    @property
    def runner(self) -> str:
        """The build of the runner that makes most of it.

        Raises:
            InputError: There is none for it.
        """
        machine = _ABIS.get(self.abi, self.abi) or self.machine
        # An Android on a PC's processor, an emulator's mostly, runs Linux's static programs.
        system = "android" if self.abi and machine != "x86_64" else self.system.lower()
        return runner_target_for(system, machine, self.features)


def describe(shell: FarShell, folder: str) -> Machine:
    """Connect and ask.

    Raises:
        FarError: No connection, or no sensible answer.
    """
    reply = shell.run(DESCRIBE, folder, timeout_s=ANSWER_S)
    facts, files = _parse(reply.text.partition(f"{FACTS_FOLLOW}\n")[2])
    if not facts.get("folder", "").startswith("/") or not facts.get("machine"):
        raise FarError("its shell does not say what machine it is")
    cores, android = facts.get("cores", ""), facts.get("android", "")
    system = facts.get("system", UNKNOWN)
    platform = f"{system} {facts.get('release', UNKNOWN)} {facts['machine']}"
    if android:
        platform += f", Android {android}, {facts.get('device', UNKNOWN)}"
    return Machine(
        # As it was asked for: only what the shell there chose itself has to be read back.
        folder=folder or facts["folder"],
        system=system,
        machine=facts["machine"],
        abi=facts.get("abi", ""),
        features=cpu_features(files.get("/proc/cpuinfo", "")),
        environment=environment_of(
            files,
            cpu_name=facts.get("soc") or None,
            cpus_usable=int(cores) if cores.isdecimal() else None,
            platform=platform,
            versions={"phoneready": tool_version()} | ({"android": android} if android else {}),
        ),
        is_emulator="1" in facts.get("emulator", ""),
    )


def _parse(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Lines `name=value`, and `path:line` of files."""
    facts: dict[str, str] = {}
    files: dict[str, list[str]] = {}
    for line in text.splitlines():
        path, colon, content = line.partition(":")
        if line.startswith("/") and colon:
            files.setdefault(path, []).append(content)
        else:
            name, _, value = line.partition("=")
            facts[name] = value.strip()
    return facts, {path: "\n".join(lines) for path, lines in files.items()}

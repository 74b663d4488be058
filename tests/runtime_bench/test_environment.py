"""Facts of a machine, from the text of its files: of boards and phones that are not here."""

from __future__ import annotations

import pytest

from runtime_bench.environment import FACT_FILES, cpu_model, describe_environment, environment_of
from runtime_bench.records.bench_record import Environment

CPU = "/sys/devices/system/cpu"
PI = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
PHONE = "".join(
    f"processor : {core}\nCPU implementer : 0x41\nCPU part : {part}\n\n"
    for core, part in enumerate(["0xd46", "0xd46", "0xd4e"])
)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: AMD EPYC\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        (PI, "Raspberry Pi 5 Model B Rev 1.0"),
        (PHONE, "2 x 0x41/0xd46, 1 x 0x41/0xd4e"),
        (PHONE + "Hardware\t: Qualcomm Technologies, Inc SM8550\n", "Qualcomm Technologies, Inc SM8550"),
        ("", None),
    ],
)
def test_the_processor_is_named(cpuinfo: str, name: str | None) -> None:
    assert cpu_model(cpuinfo) == name


def test_what_files_say() -> None:
    found = environment_of(
        {
            "/proc/meminfo": "MemFree: 1 kB\nMemTotal:        8052964 kB\n",
            "/proc/loadavg": "0.52 0.58 0.59 1/467 12345\n",
            f"{CPU}/cpu10/cpufreq/scaling_governor": "performance\n",
            f"{CPU}/cpu0/cpufreq/scaling_governor": "schedutil\n",
        },
        cpus_usable=8,
        platform="Linux 6.1 aarch64",
        versions={"android": "14"},
    )
    assert (found.memory_bytes, found.load_average, found.governor) == (8052964 * 1024, 0.52, "schedutil")


def test_what_no_file_says_is_unknown() -> None:
    found = environment_of({}, cpus_usable=None, platform="unknown", versions={})
    assert found == Environment(None, None, None, None, None, "unknown", {})


def test_this_machine() -> None:
    found = describe_environment()
    assert found.cpus_usable
    assert found.memory_bytes
    assert all(pattern.startswith("/") for pattern in FACT_FILES)

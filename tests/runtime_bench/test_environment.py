"""What a machine tells of itself: its facts, from the text of its files, and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_bench.counters import current_rss_bytes, evict_from_page_cache, page_cache_share, peak_rss_bytes
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


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")


def test_peak_is_no_less_than_now_and_remembers() -> None:
    before = peak_rss_bytes()
    block = bytearray(os.urandom(1)) * 2**26
    assert current_rss_bytes() > 2**26
    del block
    assert before is not None
    assert peak_rss_bytes() >= max(current_rss_bytes(), 2**26)


@LINUX
def test_a_small_process_does_not_inherit_a_large_parents_peak() -> None:
    block = bytearray(os.urandom(1)) * 2**28
    code = "from runtime_bench.counters import peak_rss_bytes; print(peak_rss_bytes())"
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(block)


@LINUX
def test_a_file_just_read_is_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(10**6))
    path.read_bytes()
    assert page_cache_share(path) == 1.0
    evict_from_page_cache(path)
    assert 0.0 <= page_cache_share(path) <= 1.0
    assert path.stat().st_size == 10**6


def test_an_empty_file_has_no_share(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert page_cache_share(path) is None

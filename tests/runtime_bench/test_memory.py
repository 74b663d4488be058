"""What the system tells about memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_bench.counters import current_rss_bytes, evict_from_page_cache, page_cache_share, peak_rss_bytes

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

"""Large temporary files: they go with their process, or, where it was killed, with the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cfsp.files import LargeScratch

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from cfsp.files import LargeScratch
scratch = LargeScratch("weights")
(scratch.path / "large").write_bytes(b"0" * 1000)
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def held(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder, and the folder."""
    environment = {"TMPDIR": str(place), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_goes_with_its_user_and_leaves_nothing(place: Path) -> None:
    scratch = LargeScratch("weights")
    (scratch.path / "file").touch()
    assert scratch.path.parent == place
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    del scratch
    assert not list(place.iterdir())
    with LargeScratch("states"), LargeScratch("states"):
        assert len(list(place.glob("phoneready-states-*"))) == 2
    assert not list(place.iterdir())


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(place: Path) -> None:
    (killed, dead), (living, kept) = held(place), held(place)
    with living:
        with killed:
            killed.kill()
        assert (dead / "large").is_file()
        with LargeScratch("gram"):
            assert not dead.exists()
            assert (kept / "large").is_file()
        living.communicate("")
    assert not list(place.iterdir())

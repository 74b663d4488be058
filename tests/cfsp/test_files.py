"""What may be replaced on the disk and what never, and that a run which ended in any way leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cfsp.errors import InputError
from cfsp.files import (
    LargeScratch,
    atomic_directory,
    atomic_file,
    claim_output,
    record_head,
    refuse_existing,
    write_json,
)

RECORD = {"kind": "checkpoint", "schema_version": 1, "tool_version": "0"}


def ours(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "phoneready.json", RECORD)
    return folder


def test_only_what_phoneready_wrote_is_replaced(tmp_path: Path) -> None:
    refuse_existing(ours(tmp_path / "ours"), force=True)
    ours(tmp_path / "both" / "gguf")
    ours(tmp_path / "both" / "onnx")
    refuse_existing(tmp_path / "both", force=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("precious")
    write_json(tmp_path / "theirs" / "package.json", {"name": "x"})
    with pytest.raises(InputError, match="nothing that phoneready wrote"):
        refuse_existing(tmp_path / "theirs", force=True)
    (tmp_path / "both" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="nothing that phoneready wrote"):
        refuse_existing(tmp_path / "both", force=True)


def test_a_home_a_parent_and_a_folder_that_is_read_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = ours(tmp_path / "users" / "me")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(InputError, match="as a whole"):
        refuse_existing(home, force=True)
    write_json(tmp_path / "work.json", RECORD)
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    for path in (tmp_path, Path(".."), Path()):
        with pytest.raises(InputError, match="as a whole"):
            refuse_existing(path, force=True)
    text = ours(tmp_path / "out") / "text.txt"
    text.write_text("read")
    with pytest.raises(InputError, match="which is read"):
        refuse_existing(tmp_path / "out", force=True, inputs=[text])


def test_a_file_is_replaced_by_one_of_its_kind_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    like = record_head("evaluation")
    write_json(file, RECORD | {"kind": "evaluation"})
    refuse_existing(file, force=True, like=like)
    with pytest.raises(InputError, match="--force"):
        refuse_existing(file, like=like)
    for other in (RECORD, {"model_type": "llama"}):
        write_json(file, other)
        with pytest.raises(InputError, match="nothing that phoneready wrote"):
            refuse_existing(file, force=True, like=like)
    file.write_text("")
    refuse_existing(file, like=like)
    with pytest.raises(InputError, match="is a directory"):
        refuse_existing(tmp_path, force=True, like=like)
    with pytest.raises(InputError, match="is a file"):
        refuse_existing(file, force=True)


def test_devices_pipes_and_sockets_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null"), Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1")):
        with pytest.raises(InputError, match="a device, a pipe or a socket"), atomic_file(path):
            pass
        with pytest.raises(InputError, match="a device, a pipe or a socket"):
            refuse_existing(path, force=True, like=re.compile(b""))
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 250, "/".join(["y" * 200] * 25), "out\udcff", "loop", "loop/x"]
)
def test_a_name_that_cannot_be_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="cannot write"):
        refuse_existing(tmp_path / name)


def test_files_get_the_rights_that_the_umask_gives(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as folder:
        os.close(os.open(folder / "weights", os.O_CREAT, 0o600))
        os.close(os.open(folder / "program", os.O_CREAT, 0o700))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out" / "weights").stat().st_mode) == 0o666 & ~mask
    assert (tmp_path / "out" / "program").stat().st_mode & 0o100


def test_the_second_run_into_an_output_is_refused_and_deletes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cfsp.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('1'); print(folder, flush=True); sys.stdin.read()\n"
    )
    output = tmp_path / "deep" / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        temporary = Path(first.stdout.readline().strip())
        with pytest.raises(InputError, match="another run is writing"), atomic_directory(output, force=True):
            pass
        assert (temporary / "a").is_file()
        first.send_signal(signal.SIGKILL)
    assert temporary.is_dir()
    with claim_output(output):
        assert not temporary.exists()
        with atomic_directory(output) as folder:
            (folder / "b").write_text("2")
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("precious")

    with pytest.raises(InputError, match="exists already"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_a_failed_run_leaves_neither_folder_nor_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_directory(tmp_path / "new" / "out"):
        raise KeyError
    assert not list(tmp_path.iterdir())


WALK = """
import os, signal, sys, threading
from pathlib import Path
from cfsp import files
from cfsp.files import atomic_directory, atomic_file, claim_output, remove_stale_temporaries

TOUCHING = ("open", "os.", "shutil.", "tempfile.", "ctypes.dlsym")
root, kind, stop, old = Path(sys.argv[1]), *sys.argv[2:]
os.fsync = lambda handle: None  # what a kill leaves needs no disk
if "aside" in kind:
    files._swap = lambda one, other: False  # what it says where a file system swaps no names


def write(text):
    name = root / "out" if "own" not in kind else root / "out" / "stage"
    if "file" in kind:
        with claim_output(name), atomic_file(name) as file:
            file.write_text(text)
        return
    name.parent.mkdir(exist_ok=True)
    with atomic_directory(name, force=True, own="own" in kind) as folder:
        (folder / "phoneready.json").write_text('{"kind": "checkpoint", "schema_version": 1}')
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(text)
        (folder / "b").write_text(text)


def sweep():
    if "own" in kind:
        (root / "out").mkdir(exist_ok=True)
        remove_stale_temporaries(root / "out")
    else:
        with claim_output(root / "out"):
            pass


def stopped_at(place):
    left = place

    def hook(event, arguments):
        nonlocal left
        if event.startswith(TOUCHING):
            left -= 1
            if left == -1:
                if stop == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt

    sys.addaudithook(hook)
    try:
        write("new")
    except KeyboardInterrupt:
        return 1
    return 0


def in_process(work):
    child = os.fork()
    if child == 0:
        os._exit(work() or 0)
    return os.waitpid(child, 0)[1]


for place in range(1000):
    if old == "old":
        in_process(lambda: write("old"))
    status = in_process(lambda: stopped_at(place))
    in_process(sweep)
    there = {
        str(path.relative_to(root)): path.read_text() if path.is_file() else "" for path in root.rglob("*")
    }
    print(place, status, sorted(there.items()), sep="\\t", flush=True)
    if status == 0:
        break
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
"""


@pytest.mark.parametrize("before", ["old", pytest.param("nothing", marks=pytest.mark.everything)])
@pytest.mark.parametrize("stop", ["kill", "interrupt"])
@pytest.mark.parametrize("kind", ["file", "folder", "folder aside", "own folder", "own folder aside"])
def test_wherever_a_replacement_is_stopped_the_old_or_the_new_one_is_there(
    tmp_path: Path, kind: str, stop: str, before: str
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path), kind, stop, before],
        capture_output=True,
        text=True,
        check=True,
    )
    steps = [line.split("\t") for line in run.stdout.splitlines()]
    *stopped, (_, status, last) = steps
    assert status == "0"
    assert len(stopped) >= 10
    assert all(status != "0" for _, status, _ in stopped)
    found = list(dict.fromkeys(there for *_, there in steps))
    assert len(found) == 2  # before the one step, and after it
    assert found[-1] == last
    assert last.count("'new'") == (1 if kind == "file" else 2)
    assert found[0] == (
        last.replace("'new'", "'old'") if before == "old" else NOTHING[kind.startswith("own")]
    )


NOTHING = {False: "[]", True: "[('out', '')]"}


def test_an_output_that_a_killed_run_set_aside_is_refused_as_if_it_had_its_name(tmp_path: Path) -> None:
    ours(tmp_path / "out").rename(tmp_path / ".out.tmp-aside")
    with pytest.raises(InputError, match="pass --force"):
        refuse_existing(tmp_path / "out")
    refuse_existing(tmp_path / "out", force=True)


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

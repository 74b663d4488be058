"""What somebody else wrote, or a machine that lacks something: one line says what is wrong, and nothing is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cfsp.models.folder_format import copy_notices
from cfsp.reading import read_json
from phoneready.__main__ import _problem
from phoneready.main import main

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is bounded on Linux")
TinyPath = Callable[..., Path]
Change = Callable[[dict[str, Any]], None]
ROOT = Path(__file__).resolve().parents[2]
TEXT = "The quick brown fox jumps over the lazy dog. " * 60
CHAT = {"messages": [{"role": "user", "content": TEXT[:300]}, {"role": "assistant", "content": "yes"}]}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What takes memory without end fails soon, and not the machine."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def model(tiny_folder: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a model in the working directory, beside a text and chats."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 40, encoding="utf-8")
    return Path(shutil.copytree(tiny_folder(), tmp_path / "m"))


def edit(file: Path, change: Change) -> None:
    state = json.loads(file.read_text(encoding="utf-8"))
    change(state)
    file.write_text(json.dumps(state), encoding="utf-8")


def without_sizes(config: dict[str, Any]) -> None:
    for name in SIZES:
        config.pop(name)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error's line; nothing else is told, and nothing is left."""
    before = {path: path.lstat().st_mtime_ns for path in Path().rglob("*")}
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert {path: path.lstat().st_mtime_ns for path in Path().rglob("*")} == before
    return captured.err


SMALL = ["--calibration", "text.txt", "--nsamples", "2", "--seqlen", "32"]
COMMANDS = {
    "prune": ["prune", "m", "-o", "out", *SMALL],
    "export": ["export", "m", "-o", "out", "--gguf", "f32"],
    "eval": ["eval", "m", "--text", "text.txt", "--seqlen", "32", "--windows", "1", "--no-prompts"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        # The library's own default model would take 27 GB.
        (without_sizes, "states a model of"),
        (lambda config: config.pop("hidden_size"), "states a model of"),
        (
            lambda config: config.update(intermediate_size=96),
            "tensors of the wrong shape: model.layers.0.mlp",
        ),
    ],
)
def test_sizes_that_are_not_the_files(
    command: str, change: Change, says: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(model / "config.json", change)
    assert says in refused(capfd, *COMMANDS[command])


def test_a_pipe_in_place_of_a_file(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is not waited for; a shell's own pipes are read."""
    file = model / "config.json"
    file.unlink()
    os.mkfifo(file)
    late = threading.Timer(10, lambda: os.close(os.open(file, os.O_WRONLY)))  # whoever waits goes on
    late.start()
    assert "config.json: it is a pipe" in refused(capfd, *COMMANDS["prune"])
    late.cancel()
    reader, writer = os.pipe()
    os.write(writer, b"{}")
    os.close(writer)
    assert read_json(Path(f"/dev/fd/{reader}")) == {}
    os.close(reader)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 3000000000 }}",
        "{% set ns = namespace(x='xx') %}{% for n in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_that_writes_without_end(
    template: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    chats = [*COMMANDS["prune"], "--calibration", "chats.jsonl"]
    assert "chat template takes more than 1 GiB of memory" in refused(capfd, *chats)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_tokenizer_that_panics_with_its_first_text(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rust tells of a panic on descriptor 2 before anything can catch it."""
    parts = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": {}}
    edit(model / "tokenizer.json", lambda state: state.update(post_processor=template))
    assert "the tokenizer in m cannot be loaded" in refused(capfd, *COMMANDS["prune"])


@pytest.mark.parametrize("name", ["n" * 201, "a/" + "\U0001f999" * 60, "..", "a\nb"])
def test_a_name_that_no_file_can_have_is_told_before_the_work(
    name: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()  # with which the work would begin
    assert "name: " in refused(capfd, *COMMANDS["export"], "--name", name)


def test_files_of_a_model_with_a_long_name_have_a_short_one(model: Path) -> None:
    long = model.rename("m" * 254)
    assert main(["export", str(long), "-o", "out", "--gguf", "Q8_0"]) == 0
    assert main(["prune", str(long), "-o", "pruned", *SMALL]) == 0
    assert main(["export", "pruned", "-o", "again", "--gguf", "Q8_0"]) == 0
    names = [[file.name for file in Path(folder).glob("*.gguf")] for folder in ("out", "again")]
    assert names == [[f"{'m' * 120}-Q8_0.gguf"]] * 2


def test_a_profile_is_shown_without_its_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "devices" / "raspberry-pi-5-8gb.toml").read_text(encoding="utf-8")
    evil = "<img src=x>[a](javascript:b)\\u001b[31m"
    lines = [f'source = "{evil}"' if line.startswith("source = ") else line for line in text.split("\n")]
    assert lines != text.split("\n")
    own = tmp_path / "<b>own"
    own.mkdir()
    (own / "evil.toml").write_text(
        "\n".join(lines).replace('"raspberry-pi-5-8gb"', '"evil"'), encoding="utf-8"
    )
    monkeypatch.setenv("PHONEREADY_DEVICES", str(own))
    assert main(["devices", "show", "evil"]) == 0
    shown = capsys.readouterr().out
    assert r"\<img src=x\>\[a\](javascript:b)" in shown
    assert r"\<b\>own" in shown
    assert "\x1b" not in shown


def test_a_licence_is_written_without_control_characters(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: \x1b[31mmine\x07\n---\n", encoding="utf-8")
    assert main(COMMANDS["prune"]) == 0
    assert Path("out/LICENSE").read_text(encoding="utf-8").endswith("licence is:  [31mmine \n")


def test_a_licence_that_is_a_link_is_copied_from_the_model_and_the_hubs_cache_alone(tmp_path: Path) -> None:
    folder, output = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "out"
    for place in (folder, output, folder.parent.parent / "blobs"):
        place.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (folder.parent.parent / "blobs" / "1").write_text("theirs", encoding="utf-8")
    for name, target in {
        "LICENSE": "../../blobs/1",
        "NOTICE": "LICENSE",
        "NOTICE-2": "../../../secret",
    }.items():
        (folder / name).symlink_to(target)
    copy_notices(folder, output)
    assert {file.name: file.read_text(encoding="utf-8") for file in output.iterdir()} == {
        "LICENSE": "theirs",
        "NOTICE": "theirs",
    }


def test_a_umask_that_takes_the_users_own_rights() -> None:
    assert _problem() is None
    for mask in (0o777, 0o200):
        before = os.umask(mask)
        try:
            assert f"the umask {mask:04o}" in str(_problem())
        finally:
            os.umask(before)
    assert _problem() is None


def test_no_folder_for_temporary_files(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", "/nonexistent")
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
        patch.setattr(os, "access", lambda *_: False)
        told = refused(capfd, *COMMANDS["prune"]), refused(capfd, "devices", "clean", "ssh:nowhere.invalid")
    for line in told:
        assert "No usable temporary directory" in line
        assert "TMPDIR" in line


@pytest.mark.parametrize("command", ["prune", "export", "recover", "release", "search"])
def test_an_output_that_is_empty_is_not_the_working_directory(
    command: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "-o: empty" in refused(capfd, command, "m", "-o", "")
    assert "-o: empty" in refused(capfd, command, "m", "--output", "")

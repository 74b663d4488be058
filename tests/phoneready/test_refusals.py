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

from cfsp.models.checkpoint import copy_notices
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


TABLE = """
nonsense | nonsense
prune MODEL | --output
prune MODEL -o x.json --plan y | name a folder
prune MODEL -o x --nsamples 8 | --nsamples: use --set nsamples=VALUE
quantize MODEL -o x --no-gptq | --no-gptq: use --set gptq=false
prune MODEL -o x --prune-ratio 1 | --prune-ratio: out of range (got 1.0); allowed: 0 or more and below 1
prune MODEL -o x --set score=best | score
prune MODEL -o x --for-quant Q9 | Q9
prune MODEL -o x --calibration missing.txt --set seqlen=32 | missing.txt
prune MODEL -o x --plan missing.json | missing.json
prune MODEL -o x --plan y --set score=cfsp | --set score: decided by the plan; allowed: without --plan
prune MODEL -o x --plan y --vocabulary 9 | --vocabulary: decided by the plan
prune MODEL -o x --blocks 4 TEXT | at most 3
prune MODEL -o x --blocks 1 --attentions 3 TEXT | at most 2
prune MODEL -o x --kv-groups 1 | --kv-groups: out of range (got 1.0); allowed: 0 or more and below 1
prune MODEL -o x --kv-groups 0.9 TEXT | kv_groups: each of the 4 blocks that attend keeps one
prune MODEL -o out --set seed=9223372036854775808 | --set seed
prune MODEL -o out --threads 3000000000 | --threads
prune MODEL -o out --set ridge=inf | --set ridge
prune MODEL -o out --set ridge=1e400 | --set ridge
quantize missing -o out | no such model
quantize MODEL -o out --to int3 | int4-b128
quantize MODEL -o out --to int4 --calibration missing.txt | missing.txt
quantize MODEL -o out --to int4 --calibration none --calibration self | stands alone
quantize MODEL -o out --to Q4_0,int2 | int2
quantize MODEL -o out --to int4-mixed --calibration none | wants text
quantize MODEL -o out --to int4-mixed --set mixed_bytes=large | --set mixed_bytes
quantize MODEL -o out --set mixed_bytes=999999999999999999999G | --set mixed_bytes
quantize MODEL -o out --to Q4_0 --tune-scales --calibration none | scales are trained on text
quantize MODEL -o out --to fp32 --set opset=12 | 13 to
quantize MODEL -o out --to fp32 --set opset=99 | 13 to
recover MODEL -o out --set rank=100000000 | --set rank
recover MODEL -o out --set alpha=nan | --set alpha
bench | bench
bench --nonsense | --nonsense
bench missing.gguf --regime cold | --regime: use --set regimes=VALUE
serch MODEL | Did you mean 'search'
eval MODEL --agains x | --against
bench missing.gguf | missing.gguf
bench missing.gguf --on the-moon | the-moon
bench missing.gguf --on constrained | no limit
bench missing.gguf --on constrained:much | much
bench missing.gguf --on constrained:1K | too little
bench missing.gguf --on constrained:cores=9999 | cores
bench missing.gguf --on constrained:1G,pixel-8a | not both
bench missing.gguf --on local:1G | unknown target
bench missing.gguf --on ssh:x,cores=1 | cores=1: not for this target
bench missing.gguf --on ssh:x,retries=many | retries=many: not a number
bench FILE -r 1e30 | -r
bench FILE -r 1000000000000 | -r
bench FILE -t 3000000000 | -t
bench FILE --set cooldown_timeout_s=inf | --set cooldown_timeout_s
compare missing missing | missing
devices list nokia-3310 | nokia-3310
devices fit missing.gguf | missing.gguf
eval MODEL --prompts none --set seed=99999999999999999999 | --set seed
eval MODEL --prompts none --runtime onnx | torch
eval MODEL --prompts none --runtime llama.cpp | .gguf
eval MODEL --prompts none --set seqlen=4096 | 512
eval MODEL --prompts none --tasks missing.yaml --text none | missing.yaml
eval MODEL --text none --prompts missing.jsonl | missing.jsonl
eval MODEL --text none --prompts prompts.md | prompts.md
eval MODEL --prompts none --baseline missing.json | missing.json
eval MODEL --prompts none --tolerance kl_mean=0.1 | --baseline
eval MODEL --prompts none --baseline good.json --tolerance speed=1 | a key of perplexity
eval MODEL --prompts none --baseline . | cannot read
eval MODEL --prompts none --baseline good.json --tolerance kl_mean=-1 | 0 or more
eval MODEL --prompts none --baseline good.json --save ./good.json | overwrite
eval MODEL --prompts none --save . | is a directory
eval MODEL --prompts none --save prompts.md/x.json | is not a directory
eval MODEL --prompts none --text a/t.txt --text b/t.txt | text t.txt
eval MODEL --prompts none --text none --text builtin:python-docs | --text none
eval MODEL --set cache_type=q8_0 | torch keeps keys and values as it computes them
eval MODEL --set cache_type=q2_K | allowed: f16, q8_0, q4_0
eval FILE --on ssh:board --chats self | only a reference model in torch
eval FILE --on ssh:board --set metrics=a:b | --set metrics needs the probability of every token
eval FILE --on ssh:board --prompts none | nothing to judge
eval FILE --on browser | cannot be asked about texts
eval FILE --on constrained:400M | cannot be asked about texts
eval FILE --on telnet:x | unknown target
eval FILE --on ssh:board --runtime torch | no exported file
eval FILE --set backend=gpu | --set backend is for another place
"""


@pytest.fixture(scope="module")
def good_result(dense: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that a baseline can be."""
    path = tmp_path_factory.mktemp("result") / "good.json"
    sizes = ["--set", "seqlen=32", "--set", "max_windows=2", "--prompts", "none"]
    assert main(["eval", dense, *sizes, "--save", str(path)]) == 0
    return path


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_what_cannot_be_done_is_refused_in_one_line(
    row: str,
    dense: str,
    tiny_gguf: TinyPath,
    good_result: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.md").write_text("Hello", encoding="utf-8")
    shutil.copy(good_result, tmp_path / "good.json")
    line, _, reason = row.partition(" | ")
    words = line.replace(
        "TEXT", "--calibration builtin:python-docs --set nsamples=2 --set seqlen=32 --set align=1"
    ).split()
    places = {"MODEL": lambda: dense, "FILE": lambda: str(tiny_gguf())}
    capfd.readouterr()
    assert reason in refused(capfd, *(places[word]() if word in places else word for word in words))


def test_no_output_replaces_its_input_or_the_working_folder(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(pruned, tmp_path / "checkpoint")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    capfd.readouterr()
    for output, where, reason in (
        ("checkpoint", tmp_path, "would replace"),
        (".", tmp_path, "would replace"),
        (".", tmp_path / "empty", "as a whole"),
        ("file/x", tmp_path, "directory"),
    ):
        monkeypatch.chdir(where)
        for command in (["quantize", "--to", "Q4_0", "--text", "none"], ["prune"], ["recover"]):
            assert reason in refused(
                capfd, command[0], str(checkpoint), "-o", output, "--force", *command[1:]
            )


SMALL = ["--calibration", "text.txt", "--set", "nsamples=2", "--set", "seqlen=32"]
COMMANDS = {
    "prune": ["prune", "m", "-o", "out", *SMALL],
    "quantize": ["quantize", "m", "-o", "out", "--to", "f32", "--text", "none"],
    "eval": [
        "eval",
        "m",
        "--text",
        "text.txt",
        "--set",
        "seqlen=32",
        "--set",
        "max_windows=1",
        "--prompts",
        "none",
    ],
}


def test_sizes_that_are_not_the_files(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stated = (model / "config.json").read_text(encoding="utf-8")
    for change, says in (
        (without_sizes, "states a model of"),  # the library's own default model would take 27 GB
        (lambda config: config.pop("hidden_size"), "states a model of"),
        (
            lambda config: config.update(intermediate_size=96),
            "tensors of the wrong shape: model.layers.0.mlp",
        ),
    ):
        (model / "config.json").write_text(stated, encoding="utf-8")
        edit(model / "config.json", change)
        for command in COMMANDS.values():
            assert says in refused(capfd, *command)


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
    assert "name: " in refused(capfd, *COMMANDS["quantize"], "--set", f"name={name}")


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
    assert main(["devices", "list", "evil"]) == 0
    shown = capsys.readouterr().out
    assert r"\<img src=x\>\[a\](javascript:b)" in shown
    assert r"\<b\>own" in shown
    assert "\x1b" not in shown


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


def test_an_output_that_is_empty_is_not_the_working_directory(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("prune", "quantize", "recover", "release", "search"):
        assert "-o: empty" in refused(capfd, command, "m", "-o", "")
        assert "-o: empty" in refused(capfd, command, "m", "--output", "")

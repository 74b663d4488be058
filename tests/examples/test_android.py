"""The Android app: compiled here but for what Android alone has, and run on Java's own machine with a real model."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
SOURCES = TESTS.parent / "examples" / "android" / "app" / "src" / "main"
KOTLIN = TESTS / "javascript" / "node_modules" / "kotlin-compiler"
SYSTEM = ("system", "You are a helpful assistant.")
Messages = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class App:
    """What was compiled."""

    folder: Path

    def run(self, *words: object, text: str = "") -> list[list[str]]:
        """Fields of each line that it writes."""
        classes = f"{self.folder}/app.jar:{KOTLIN}/lib/kotlin-stdlib.jar"
        line = ["java", f"-Djava.library.path={self.folder}", "-cp", classes, "ConversationsKt"]
        done = subprocess.run(
            [*line, *map(str, words)], input=text, capture_output=True, text=True, check=False, timeout=300
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [
            [base64.b64decode(field).decode() for field in row.split("\t")]
            for row in done.stdout.splitlines()
        ]

    def answers(self, model: Path, context: int, *asked: tuple[int, Messages]) -> list[list[str]]:
        """Of a chat that holds these conversations in turn, each stopped after so many pieces."""
        lines = [
            "\t".join(base64.b64encode(field.encode()).decode() for field in fields)
            for fields in ([str(stop), *(part for turn in turns for part in turn)] for stop, turns in asked)
        ]
        return self.run("answer", model, context, text="".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    compiler, java, javac = KOTLIN / "bin" / "kotlinc", shutil.which("java"), shutil.which("javac")
    if not compiler.is_file() or java is None:
        pytest.skip("Kotlin's compiler or Java is not installed; `make javascript debian` installs them")
    if javac is None or shutil.which("g++") is None:
        pytest.skip("no Java development kit or no g++ here; `make debian` installs the first")
    folder = tmp_path_factory.mktemp("app")
    headers = Path(javac).resolve().parents[1] / "include"
    libraries = Path(llama_cpp.__file__).parent / "lib"
    native = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    native += [f"-I{place}" for place in (libraries.parents[1] / "include", headers, headers / "linux")]
    native += [str(SOURCES / "cpp" / "chat.cpp"), f"-L{libraries}", "-lllama", f"-Wl,-rpath,{libraries}"]
    kotlin = [str(path) for path in (SOURCES / "kotlin").rglob("*.kt") if path.name != "MainActivity.kt"]
    assert len(kotlin) == 2
    kotlin += [str(Path(__file__).with_name("Conversations.kt")), "-d", str(folder / "app.jar")]
    for command in ([*native, "-o", str(folder / "libchat.so")], ["bash", str(compiler), *kotlin]):
        environment = os.environ | {"JAVA_OPTS": "-Xmx1g"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return App(folder)


def written(model: Path, context: int, *conversations: Messages) -> list[str]:
    """The likeliest answers in llama.cpp for Python, which keeps what conversations share as well."""
    llm = llama_cpp.Llama(
        str(model), n_ctx=context, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False
    )
    answers = []
    for turns in conversations:
        messages = [{"role": role, "content": content} for role, content in turns]
        done = llm.create_chat_completion(messages, temperature=0.0, max_tokens=None, repeat_penalty=1.0)
        answers.append(done["choices"][0]["message"]["content"])
    return answers


def test_it_answers_as_llama_cpp_does(app: App, smollm2_gguf: Path) -> None:
    first = [SYSTEM, ("user", "What is 'thank you' in Japanese? Answer in Japanese only.")]
    [said] = written(smollm2_gguf, 512, first)
    second = [*first, ("assistant", said), ("user", "Name a fruit.")]
    known = written(smollm2_gguf, 512, first, second)
    [one, two, stopped, again, closed] = app.answers(
        smollm2_gguf, 512, (0, first), (0, second), (3, first), (0, second)
    )
    assert [one[:2], two[:2]] == [["answered", text] for text in known]
    assert all("".join(row[2:]) == row[1] and "\ufffd" not in row[1] for row in (one, two, stopped, again))
    assert len(one) - 2 < len(written_tokens(smollm2_gguf, one[1])), "no character of several tokens"
    assert stopped == ["answered", "".join(one[2:5]), *one[2:5]]
    assert again == two, "an answer that was stopped has left something"
    assert closed == ["failed", "the chat is closed"]


def written_tokens(model: Path, text: str) -> list[int]:
    llm = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    return list(llm.tokenize(text.encode(), add_bos=False))


def test_memory_that_cannot_be_cut_is_read_anew(app: App, tiny_gguf: Callable[..., Path]) -> None:
    """A convolution's state holds the whole conversation, so that of another one nothing can be kept."""
    model = tiny_gguf("lfm2")
    first, second = [("user", "Who is there?")], [("user", "Who is here?")]
    anew, _ = app.answers(model, 128, (12, second))
    *_, changed, _ = app.answers(model, 128, (4, first), (12, second))
    assert changed == anew
    assert len(anew) == 14


def test_what_cannot_be_is_said(app: App, smollm2_gguf: Path, tmp_path: Path) -> None:
    long = [SYSTEM, ("user", "word " * 400)]
    endless = [SYSTEM, ("user", "Say “good morning” in Greek.")]
    full, cut, answered, _ = app.answers(smollm2_gguf, 256, (0, long), (0, endless), (2, endless))
    assert (full[0], full[1].partition(" tokens, ")[2]) == ("failed", "and the context has 256")
    assert cut[0] == "cut"
    assert answered == ["answered", "".join(cut[2:4]), *cut[2:4]]
    damaged = tmp_path / "damaged \N{GRINNING FACE}.gguf"
    damaged.write_bytes(smollm2_gguf.read_bytes()[:4096])
    assert app.answers(tmp_path / "none.gguf", 256) == [["failed", f"cannot read {tmp_path}/none.gguf"]]
    [[kind, problem]] = app.answers(damaged, 256)
    assert (kind, problem.partition(": ")[0]) == ("failed", "cannot load the file")
    [[kind, problem]] = app.answers(smollm2_gguf, 0)
    assert (kind, problem) == ("failed", "contextTokens and threads are above 0")


def test_the_asset_is_copied_once_for_each_version(app: App, tmp_path: Path) -> None:
    folder, asset = tmp_path / "model", tmp_path / "asset"
    asset.write_bytes(b"first" * 500_000)
    placed = str(folder / "1" / "model.gguf")
    assert app.run("place", folder, "1", asset) == [["placed", placed]] * 2 + [["opened", "1"]]
    assert app.run("place", folder, "1", asset)[2] == ["opened", "0"]
    (folder / "2").mkdir()
    (folder / "2" / "model.gguf.part").write_bytes(b"fir")
    asset.write_bytes(b"second")
    assert app.run("place", folder, "2", asset)[2] == ["opened", "1"]
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")} == {
        "2/model.gguf": b"second"
    }

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
pytestmark = pytest.mark.everything

TESTS = Path(__file__).resolve().parents[1]
SOURCES = TESTS.parent / "examples" / "android" / "app" / "src" / "main"
KOTLIN = TESTS / "javascript" / "node_modules" / "kotlin-compiler"
SYSTEM = ("system", "You are a helpful assistant.")
Messages = Sequence[tuple[str, str]]
Answers = Callable[..., list[str]]


@dataclass(frozen=True)
class App:
    """What was compiled."""

    folder: Path

    def run(self, *words: object, text: str = "") -> list[list[str]]:
        """Fields of each line that it writes."""
        classes = f"{self.folder}/app.jar:{KOTLIN}/lib/kotlin-stdlib.jar"
        line = ["java", "-cp", classes, "ConversationsKt", *map(str, words)]
        environment = os.environ | {"LC_ALL": "C.UTF-8", "LD_LIBRARY_PATH": str(self.folder)}
        done = subprocess.run(
            line, input=text, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [
            [base64.b64decode(field).decode() for field in row.split("\t")]
            for row in done.stdout.splitlines()
        ]

    def answers(
        self, model: Path, context: int, *asked: tuple[int, Messages], temperature: float = 0, seed: int = 1
    ) -> list[list[str]]:
        """Of a chat that holds these conversations in turn, each stopped after so many pieces, and is closed."""
        lines = [
            "\t".join(base64.b64encode(field.encode()).decode() for field in fields)
            for fields in ([str(stop), *(part for turn in turns for part in turn)] for stop, turns in asked)
        ]
        text = "".join(f"{line}\n" for line in lines)
        *rows, while_answering, closed = self.run("answer", model, context, temperature, seed, text=text)
        assert while_answering == ["failed", "the chat is answering"]
        assert closed == ["failed", "the chat is closed"]
        return rows

    def refusal(self, model: Path, context: int, **settings: float) -> str:
        """Why there is no chat."""
        [[kind, problem]] = self.run(
            "answer", model, context, settings.get("temperature", 0), settings.get("seed", 1)
        )
        assert kind == "failed"
        return problem


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


def test_it_answers_as_llama_cpp_does(app: App, smollm2_gguf: Path, llama_cpp_answers: Answers) -> None:
    first = [SYSTEM, ("user", "What is 'thank you' in Japanese? Answer in Japanese only.")]
    [said] = llama_cpp_answers(smollm2_gguf, 1024, first)
    second = [*first, ("assistant", said), ("user", "Name a fruit.")]
    long = [
        SYSTEM,
        ("user", "What is this text about? " + " ".join(f"Apple {i} is red." for i in range(120))),
    ]
    known = llama_cpp_answers(smollm2_gguf, 1024, first, second, long)
    one, two, three, stopped, again = app.answers(
        smollm2_gguf, 1024, (0, first), (0, second), (24, long), (3, first), (0, second)
    )
    assert [row[:2] for row in (one, two)] == [["answered", text] for text in known[:2]]
    assert (len(three), known[2].startswith(three[1])) == (26, True)
    assert all("".join(row[2:]) == row[1] for row in (one, two, three, stopped, again))
    assert stopped == ["answered", "".join(one[2:5]), *one[2:5]]
    assert again[2:5] == two[2:5], "an answer that was stopped has left something"


def test_the_same_seed_draws_the_same(app: App, smollm2_gguf: Path) -> None:
    asked = (12, [SYSTEM, ("user", "Tell me a story.")])
    first, second, third = app.answers(smollm2_gguf, 256, asked, asked, asked, temperature=1)
    [other] = app.answers(smollm2_gguf, 256, asked, temperature=1, seed=7)
    assert second == third
    assert first[0] == other[0] == "answered"
    assert first != other


def test_characters_are_whole(app: App) -> None:
    text = "a\u00e9\u304a\N{GRINNING FACE}"
    for end, shown in ((b"", ""), ("\N{GRINNING FACE}".encode()[:3], "\ufffd"), (b"\xff", "\ufffd")):
        [[kind, *pieces]] = app.run("spell", base64.b64encode(text.encode() + end).decode())
        assert kind == "spelled"
        assert [piece for piece in pieces if piece] == [*text, *shown]


def test_memory_that_cannot_be_cut_is_read_anew(app: App, tiny_gguf: Callable[..., Path]) -> None:
    """A convolution's state holds the whole conversation, so that of another one nothing can be kept."""
    model = tiny_gguf("lfm2")
    first, second = [("user", "Who is there?")], [("user", "Who is here?")]
    [anew] = app.answers(model, 128, (12, second))
    *_, changed = app.answers(model, 128, (4, first), (12, second))
    assert changed == anew
    assert len(anew) == 14


def test_what_cannot_be_is_said(app: App, smollm2_gguf: Path, tmp_path: Path) -> None:
    def words(count: int) -> Messages:
        return [SYSTEM, ("user", f"Write a long story about a {'very ' * count}old tree.")]

    [full] = app.answers(smollm2_gguf, 300, (0, words(400)))
    count, rest = full[1].removeprefix("the conversation takes ").split(" tokens, ")
    assert (full[0], rest) == ("failed", "and the context has 300")
    nearly = words(400 - (int(count) - 298))
    [cut, forged] = app.answers(smollm2_gguf, 300, (0, nearly), (0, [("user", "a\0b")]))
    assert (cut[0], len(cut) > 2) == ("cut", True)
    assert forged == ["failed", "a message has no character 0"]
    damaged = tmp_path / "damaged \N{GRINNING FACE}.gguf"
    damaged.write_bytes(smollm2_gguf.read_bytes()[:4096])
    assert app.refusal(tmp_path / "none.gguf", 256) == f"cannot read {tmp_path}/none.gguf"
    problem = app.refusal(damaged, 256)
    assert problem.startswith("cannot load the file: gguf_init")
    assert problem.endswith("failed to load model")
    assert "; " in problem, "the first line alone has the reason"
    assert app.refusal(smollm2_gguf, 10**6) == "the model has learnt contexts of up to 8192 tokens"
    assert app.refusal(smollm2_gguf, 0) == "contextTokens and threads are above 0"
    assert app.refusal(smollm2_gguf, 256, temperature=-1) == "temperature is 0 or above, topP from 0 to 1"


def test_the_asset_is_copied_once_for_each_version(app: App, tmp_path: Path) -> None:
    folder, asset = tmp_path / "model", tmp_path / "asset"
    asset.write_bytes(b"first" * 500_000)
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.gguf.part").write_bytes(b"fir")
    placed, broken = app.run("place", folder, "1", asset)
    assert (placed, broken) == (["placed", "1", "1/model.gguf: 2500000"], ["failed", "no more"])
    assert [path.name for path in folder.rglob("*")] == ["broken"], "of another version, or in part"
    assert app.run("place", folder, "2", asset)[0] == ["placed", "1", "2/model.gguf: 2500000"]

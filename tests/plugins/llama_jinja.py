"""llama.cpp's own Jinja as a program, compiled once, and the chat templates that its source carries."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.files import made_once
from cfsp.models.builtin import cache_directory
from runtime_bench.native.build import LlamaSource, fetch_source

_PROGRAM = Path(__file__).with_suffix(".cpp")
_FOLDERS = ("/llama.cpp/common/", "/llama.cpp/vendor/nlohmann/", "/llama.cpp/ggml/include/")
_PARTS = ("lexer", "parser", "runtime", "string", "value", "caps")

Render = Callable[[str, dict[str, Any]], dict[str, str]]
"""(template, context) -> its text as `text`, or what went wrong as `error`."""


def real_templates() -> dict[str, str]:
    """Name -> chat template; raises InputError where llama.cpp's source cannot be had."""
    with tarfile.open(fetch_source().path) as archive:
        return {
            Path(member.name).stem: archive.extractfile(member).read().decode("utf-8")  # type: ignore[union-attr]
            for member in archive
            if "/llama.cpp/models/templates/" in member.name and member.name.endswith(".jinja")
        }


@contextmanager
def llama_jinja() -> Iterator[Render]:
    """The renderer; raises InputError where there is no compiler or no source."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise InputError("no C++ compiler is here")
    source = fetch_source()
    key = hashlib.sha256(_PROGRAM.read_bytes() + source.sha256.encode()).hexdigest()[:16]
    folder = made_once(
        cache_directory() / "test-tools" / f"jinja-{key}",
        lambda made: (made / "jinja").is_file(),
        lambda made: _compile(compiler, source, made),
    )
    with subprocess.Popen(
        [folder / "jinja"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def render(template: str, context: dict[str, Any]) -> dict[str, str]:
            requests.write(json.dumps({"template": template, "context": context}) + "\n")
            requests.flush()
            answer: dict[str, str] = json.loads(answers.readline())
            return answer

        yield render
        requests.close()


def _compile(compiler: str, source: LlamaSource, made: Path) -> None:
    with tarfile.open(source.path) as archive:
        members = [member for member in archive if any(folder in member.name for folder in _FOLDERS)]
        archive.extractall(made, members, filter="data")
    (llama,) = made.glob("*/vendor/llama.cpp")
    files = [f"jinja/{part}.cpp" for part in _PARTS] + ["json.cpp", "unicode.cpp"]
    includes = [f"-I{llama / folder}" for folder in ("common", "vendor", "ggml/include")]
    sources = [_PROGRAM, *(llama / "common" / file for file in files)]
    line = [compiler, "-std=c++17", "-O1", "-DNDEBUG", *includes, *sources, "-o", made / "jinja"]
    subprocess.run(["nice", *line], check=True)
    shutil.rmtree(llama.parents[1])

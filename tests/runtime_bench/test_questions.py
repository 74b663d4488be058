"""What engines answer about texts: the worker's and the native runner's answers against the same engine here."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.evaluation.language_model import Branches, LanguageModel
from exporters.families import FAMILIES
from exporters.family import ExportOptions
from exporters.onnx.export import export_onnx
from runtime_bench.engines import SessionSettings
from runtime_bench.native.build import build_runner
from runtime_bench.process import exchange
from runtime_bench.targets.local import EMULATED_RUNNER, EMULATORS, Native, qemu_aarch64
from runtime_bench.worker import (
    AnswerRequest,
    AnswerResult,
    Question,
    answer_all,
    write_questions,
)

pytest.importorskip("llama_cpp")

CONTEXT = 96
_NATIVE = (("native", "llama"), ("native", "lfm2"), ("qemu", "llama"))
Asked = Callable[[list[Question]], AnswerResult]


def ids(generator: random.Random, count: int) -> tuple[int, ...]:
    return tuple(generator.randrange(3, 380) for _ in range(count))


def items() -> list[Branches]:
    """Few choices, choices of one token, more than are computed at once, and more tokens than fit together."""
    draw = random.Random(0)
    sizes = [(5, (3, 1, 7)), (1, (1,)), (30, (2,) * 20), (40, (30, 30, 30)), (60, (36, 1))]
    return [Branches(ids(draw, n), tuple(ids(draw, m) for m in many)) for n, many in sizes]


def requested(
    path: Path, engine: str, folder: Path, questions: list[Question], **changes: Any
) -> AnswerRequest:
    outline = next(f for f in FAMILIES.values() if f.runtime == engine).outline(str(path), CONTEXT)
    session = SessionSettings(
        CONTEXT, 1, outline.n_batch, outline.n_batch, outline.cache_type, None, outline.n_seq
    )
    file = folder / "questions.jsonl"
    write_questions(file, questions)
    return AnswerRequest(str(outline.path), engine, replace(session, **changes), str(file))


@pytest.fixture(scope="module")
def graph(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(tiny_folder(), output, ["fp32"], ExportOptions(n_threads=1))
    return output / "fp32"


def native(request: pytest.FixtureRequest, kind: str) -> Native | None:
    """The runner, here or under an emulator, where a kind of these tests is of one."""
    runner_for = request.getfixturevalue("runner_for") if kind in ("native", "qemu") else None
    if runner_for is None:
        return None
    if kind == "native":
        return Native(runner_for("native"))
    if not any(map(shutil.which, EMULATORS)):
        pytest.skip("qemu-user is not installed (make debian)")
    runner_for(EMULATED_RUNNER)
    return qemu_aarch64()


@pytest.fixture(
    params=[
        *("worker llama", "worker lfm2", "worker onnx"),
        *(pytest.param(f"{kind} {of}", marks=pytest.mark.everything) for kind, of in _NATIVE),
    ]
)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, Asked]:
    """A file, its engine, and what answers questions about it."""
    kind, _, of = request.param.partition(" ")
    engine = "onnxruntime" if of == "onnx" else "llama.cpp"
    path = request.getfixturevalue("graph") if of == "onnx" else request.getfixturevalue("tiny_gguf")(of)
    target = native(request, kind)

    def ask(questions: list[Question]) -> AnswerResult:
        wanted = requested(path, engine, tmp_path, questions)
        return target.answer(wanted, 120) if target else answer_all(asdict(wanted))

    return path, engine, ask


@pytest.fixture
def here(asked: tuple[Path, str, Asked]) -> Any:
    path, engine, _ = asked
    family = next(f for f in FAMILIES.values() if f.runtime == engine)
    model: LanguageModel = family.open_model(str(path), CONTEXT, 1, None)
    yield model
    model.close()


def test_choices_are_scored_as_here(asked: tuple[Path, str, Asked], here: LanguageModel) -> None:
    result = asked[2]([{"context": item.context, "continuations": item.continuations} for item in items()])
    assert result.error is None
    assert result.facts is not None
    assert result.facts.backends == "CPU"
    assert result.peak_rss_bytes
    for answer, scores in zip(result.answers, here.score(items()), strict=True):
        assert answer.log_likelihoods == pytest.approx([s.log_likelihood for s in scores], abs=1e-4)
        assert answer.greedy == tuple(s.is_greedy for s in scores)
    assert any(any(answer.greedy) for answer in asked[2](_greedy(here)).answers)


def _greedy(here: LanguageModel) -> list[Question]:
    """A continuation that the model would have chosen itself."""
    context = ids(random.Random(1), 6)
    ((first, *_),) = here.generate([context], 1)
    return [{"context": context, "continuations": [[first]]}]


def test_texts_are_written_as_here(asked: tuple[Path, str, Asked], here: LanguageModel) -> None:
    draw = random.Random(2)
    prompts = tuple(ids(draw, n) for n in (4, 30, 1, *(3,) * 18))
    ends = FAMILIES["onnx"].outline(str(asked[0]), CONTEXT).ends if asked[1] == "onnxruntime" else ()
    plain = here.generate(prompts, 12)
    assert len({tuple(text) for text in plain}) > 3
    longest = max(plain, key=len)
    stop = here.tokenizer.decode(longest[3:5])
    writing = {"prompts": prompts, "max_new_tokens": 12, "ends": ends}
    result = asked[2]([writing | {"stop_strings": []}, writing | {"stop_strings": [stop]}])
    assert result.error is None
    assert [list(text) for text in result.answers[0].written] == plain
    stopped = here.generate(prompts, 12, stop_strings=[stop])
    assert [list(text) for text in result.answers[1].written] == stopped
    assert stopped != plain


def test_texts_are_cut_into_the_tokens_of_here(asked: tuple[Path, str, Asked], here: LanguageModel) -> None:
    texts = ["The quick brown fox.", "x = 12,345\n\tdone"]
    answers = asked[2]([{"text": text} for text in texts]).answers
    expected = [tuple(here.tokenizer(text)["input_ids"]) for text in texts]
    assert [answer.ids for answer in answers] == expected


@pytest.mark.everything
@pytest.mark.parametrize(
    ("question", "changes", "reason"),
    [
        ('{"context": [], "continuations": [[1]]}', {}, "no tokens"),
        ('{"context": [1], "continuations": [[999999]]}', {}, "some that the file does not have"),
        ('{"context": [1], "continuations": [[-1]]}', {}, "some that the file does not have"),
        (
            json.dumps({"context": [5] * 60, "continuations": [[5] * 60]}),
            {},
            "a question has 119 tokens, more than the context of 96",
        ),
        ('{"song": 1}', {}, "does not know what is asked"),
        ('{"context": [1', {}, "unreadable request"),
        ('{"text": "a"}', {"backend": "gpu"}, "built without the backend gpu; it has cpu"),
        ('{"text": "a"}', {"backend": "vulkan"}, "built without the backend vulkan; it has cpu"),
        ('{"text": "a"}', {"cache_type": "q2_K"}, "no type of a cache q2_K"),
    ],
)
def test_what_the_runner_cannot_answer_is_said(
    runner_for: Callable[[str], Path],
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    question: str,
    changes: dict[str, Any],
    reason: str,
) -> None:
    request = requested(tiny_gguf(), "llama.cpp", tmp_path, [], **changes)
    Path(request.questions).write_text(question + "\n")
    result = Native(runner_for("native")).answer(request, 120)
    assert reason in (result.error or "")
    assert "\n" not in (result.error or "")
    assert not result.answers


@pytest.mark.everything
def test_the_runner_takes_the_processor_by_its_name(
    runner_for: Callable[[str], Path], tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    assert build_runner("native") == runner_for("native")
    request = requested(tiny_gguf(), "llama.cpp", tmp_path, [{"text": "a"}], backend="cpu")
    result = Native(runner_for("native")).answer(request, 120)
    assert result.facts is not None
    assert (result.error, result.facts.backends) == (None, "CPU")
    settings = result.facts.settings
    assert (settings.cache_type, settings.flash_attention) == ("f32", False)
    gone = asdict(replace(request, questions=str(tmp_path / "gone")))
    answer = json.loads(exchange([str(runner_for("native"))], gone, 120))
    assert answer["error"] == f"{tmp_path}/gone: No such file or directory"

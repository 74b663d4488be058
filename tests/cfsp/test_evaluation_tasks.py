"""Tasks of lm-evaluation-harness on tiny models: our adapter against the harness's own, and task files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.evaluation.language_model import Branches
from cfsp.evaluation.task_results import TaskResult, TaskSettings
from cfsp.evaluation.tasks import harness_model, load_tasks, run_tasks, tasks_sha256
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.source import LoadedModel

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tasks"
PIQA = [
    {
        "goal": f"list {i} fruits",
        "sol1": "an apple, a pear",
        "sol2": "the lazy dog " * (1 + i % 3),
        "label": i % 2,
    }
    for i in range(12)
]


@pytest.fixture
def language_model(tiny_loaded: Callable[..., LoadedModel]) -> TorchLanguageModel:
    return TorchLanguageModel(tiny_loaded())


@pytest.fixture(params=["llama", "lfm2", "gemma3_text"])
def each_language_model(
    tiny_loaded: Callable[..., LoadedModel], request: pytest.FixtureRequest
) -> TorchLanguageModel:
    return TorchLanguageModel(tiny_loaded(request.param))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = "".join(json.dumps(row) + "\n" for row in PIQA)
    (tmp_path / "piqa_validation.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def run(model: Any, *tasks: str | Path, **settings: Any) -> tuple[TaskResult, ...]:
    with load_tasks(TaskSettings(tuple(map(str, tasks)), **settings)) as loaded:
        return run_tasks(model, loaded)


def test_scores_are_those_of_separate_sequences(
    each_language_model: TorchLanguageModel,
) -> None:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 380, (count,), generator=generator).tolist())

    items = [Branches(ids(n), (ids(3), ids(1), ids(7))) for n in (1, 5, 40)]
    for item, scores in zip(items, each_language_model.score(items), strict=True):
        for continuation, score in zip(item.continuations, scores, strict=True):
            full = torch.tensor([item.context + continuation])
            with torch.inference_mode():
                rows = (
                    each_language_model.loaded.model(full)
                    .logits[0, len(item.context) - 1 : -1]
                    .log_softmax(-1)
                )
            expected = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
            assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
            assert score.is_greedy == (rows.argmax(-1).tolist() == list(continuation))


def test_batches_generate_what_single_prompts_do(each_language_model: TorchLanguageModel) -> None:
    prompts = [
        each_language_model.tokenizer(t)["input_ids"]
        for t in ("Once", "The quick brown fox jumps", "def add")
    ]
    together = each_language_model.generate(prompts, 12)
    assert together == [each_language_model.generate([prompt], 12)[0] for prompt in prompts]
    stop = each_language_model.tokenizer.decode(together[0][3:5])
    (short,) = each_language_model.generate([prompts[0]], 12, stop_strings=[stop])
    assert short == together[0][: len(short)]
    assert len(short) <= 5
    with pytest.raises(InputError, match="a prompt has 513 tokens"):
        each_language_model.generate([[1], [1] * 513], 4)


def test_requests_score_as_in_the_harness_own_model(language_model: TorchLanguageModel) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(
        pretrained=language_model.loaded.model,
        tokenizer=language_model.tokenizer,
        batch_size=2,
        max_length=64,
    )
    ours = harness_model(language_model)
    ours.max_length = 64
    pairs = [
        ("The capital of France", " is Paris."),
        ("", "Once upon"),
        ("A ", "small model"),
        ("x " * 90, " y"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for mine, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    with pytest.raises(InputError, match="whole texts"):
        ours.loglikelihood_rolling([])
    settings = {"until": ["a"], "max_gen_toks": 8}
    generate = [Instance("generate_until", {}, ("Once upon a", settings), 0)]
    assert ours.generate_until(generate) == theirs.generate_until(generate)


def test_a_task_file_with_data_elsewhere(language_model: TorchLanguageModel, data: Path) -> None:
    (result,) = run(language_model, EXAMPLES / "piqa.yaml", task_data=data, num_fewshot=1, limit=8)
    assert (result.task, result.version, result.source) == ("piqa", "1.0", "piqa.yaml")
    assert (result.n_items, result.limit, result.num_fewshot) == (8, 8, 1)
    figures = {metric.name: metric for metric in result.metrics}
    assert set(figures) == {"acc", "acc_norm"}
    assert 0 <= figures["acc"].value <= 1
    assert figures["acc"].stderr is not None
    assert figures["acc"].higher_is_better
    for metric in result.metrics:
        assert len(metric.right) == 8
        assert metric.right.count("1") / 8 == metric.value
    (again,) = run(language_model, EXAMPLES / "piqa.yaml", task_data=data)
    assert again.sha256 == result.sha256
    with (data / "piqa_validation.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(PIQA[0]) + "\n")
    (other,) = run(language_model, EXAMPLES / "piqa.yaml", task_data=data)
    assert other.sha256 != result.sha256
    assert (again.n_items, other.n_items) == (12, 13)


def test_the_example_tasks_are_the_harness_own() -> None:
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    keys = ["task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "metadata"]
    for name in ("piqa", "arc_easy", "sciq"):
        (own,) = Path(lm_eval.__file__).parent.glob(f"tasks/*/{name}.yaml")
        ours, theirs = load_yaml(EXAMPLES / f"{name}.yaml"), load_yaml(own)
        assert [ours[key] for key in keys] == [theirs[key] for key in keys]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "missing.yaml"),
        ("", "no_such_task_anywhere"),
        ("[1, 2]", "task file"),
        ("task: [", "task file"),
        ("dataset_path: json", "task"),
        ("task: 5", "task"),
        ("task: t\ndataset_kwargs: 5", "dataset_kwargs"),
        ("task: t # " + "x" * 2**20, "1 MiB"),
        ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: missing.jsonl}", "missing.jsonl"),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: piqa_validation.jsonl}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{nothing.lower()}}'\n"
            "doc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'",
            "t ",
        ),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: piqa_validation.jsonl}}\n"
            "test_split: other\noutput_type: multiple_choice\ndoc_to_text: goal\ndoc_to_target: label",
            "t ",
        ),
    ],
)
def test_bad_task_files_are_named(content: str, reason: str, data: Path) -> None:
    file = data / "bad.yaml"
    file.write_text(content, encoding="utf-8")
    name = str(file) if content else reason
    with pytest.raises(InputError, match=reason), load_tasks(TaskSettings((name,))):
        pass


def test_all_that_a_task_file_reads_is_in_its_hash(data: Path) -> None:
    file = data / "own.yaml"
    file.write_text(
        "include: base.yml\ntask: own\nprocess_docs: !function own_module.raises\n"
        "dataset_kwargs: {data_files: {test: piqa_validation.jsonl}, data_dir: more}\n",
        encoding="utf-8",
    )
    parts = [data / name for name in ("base.yml", "own_module.py", "piqa_validation.jsonl", "more/a.txt")]
    (data / "more").mkdir()
    for part in (data / "base.yml", data / "own_module.py", data / "more/a.txt"):
        part.write_text(
            "dataset_path: json\n" if part.suffix == ".yml" else "raise OSError", encoding="utf-8"
        )
    found = [tasks_sha256(str(file), None)]
    for part in (*parts, file):
        part.write_text(part.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        found.append(tasks_sha256(str(file), None))
    assert len(set(found)) == 6
    assert tasks_sha256(str(file), None) == found[-1]
    assert tasks_sha256("arc_easy", None) == ""

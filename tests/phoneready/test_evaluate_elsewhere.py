"""`phoneready eval --on`: tasks and answers in the engine of another machine, behind a real sshd and a real adbd."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback import Device, files_in, running, until

from phoneready.main import main

pytest.importorskip("lm_eval", reason="the eval extra is not installed")
pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons from Debian")

Shown = Callable[..., Any]
Refused = Callable[..., str]
QUICK = ["--prompts", "List three fruits.", "--set", "max_new_tokens=6", "--threads", "1"]
WRITING = """
task: echoes
dataset_path: json
dataset_kwargs: {data_files: {validation: echoes.jsonl}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{goal}}"
doc_to_target: "{{sol1}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(task: Path) -> str:
    """A task of choices and one of exact matches, with the data of the first."""
    (task.parent / "echoes.jsonl").write_text(task.with_suffix(".jsonl").read_text())
    (task.parent / "echoes.yaml").write_text(WRITING)
    return f"{task},{task.parent / 'echoes.yaml'}"


@pytest.fixture(scope="module")
def gguf(tiny_gguf: Callable[..., Path]) -> str:
    return str(tiny_gguf())


def test_tasks_on_a_device_give_what_they_give_here(
    device: Device,
    gguf: str,
    tasks: str,
    runner: Path,
    far: Path,
    capsys: pytest.CaptureFixture[str],
    shown: Shown,
) -> None:
    asked = [gguf, "--tasks", tasks, *QUICK]
    where = device.on(runner=runner, folder=far)
    here = shown("eval", *asked, "--text", "none")
    there = shown("eval", *asked, *where)
    assert there["tasks"] == here["tasks"]
    assert [task["n_items"] for task in there["tasks"]] == [10, 10]
    assert there["answers"] == here["answers"]
    assert there["texts"] == []
    place = there["place"]
    assert place["target"] == device.name
    assert (place["backends"], place["cache_type"], place["same_tokens"]) == ("CPU", "f32", True)
    assert "place" not in here
    # The questions are gone, what is needed again stays.
    assert set(files_in(far)) == {"model.gguf", "runner"}
    assert main(["eval", *asked, *where, "--set", "limit=2"]) == 0
    said = capsys.readouterr().out
    assert f"Judged on {device.name} in llama.cpp: CPU, 1 thread, keys and values in f32." in said


def test_onnx_is_judged_by_a_python_there(
    board: Any, dense_onnx: str, tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown
) -> None:
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    asked = [dense_onnx, "--tasks", tasks, *QUICK]
    where = ["--on", f"ssh:board,config={board.config},folder={tmp_path / 'far'}"]
    here = shown("eval", *asked, "--text", "none")
    there = shown("eval", *asked, *where)
    assert (there["tasks"], there["answers"]) == (here["tasks"], here["answers"])
    assert there["model"]["runtime"] == "onnxruntime"
    assert there["place"]["same_tokens"] is True


def test_texts_are_as_likely_there_as_here(
    device: Device, gguf: str, runner: Path, far: Path, tmp_path: Path, shown: Shown
) -> None:
    """Alone, and beside another model, of which then bits per byte are compared and no distributions."""
    asked = [
        gguf,
        "--text",
        "builtin:python-docs",
        "--set",
        "seqlen=48",
        "--set",
        "max_windows=10",
        "--prompts",
        "none",
    ]
    where = [*device.on(runner=runner, folder=far), "--threads", "1"]
    saved = tmp_path / "here.json"
    here = shown("eval", *asked, "--save", str(saved))["texts"][0]
    result = shown("eval", *asked, *where, "--baseline", str(saved))
    (there,) = result["texts"]
    assert there["nats"] == pytest.approx(here["nats"], rel=1e-6)
    assert (sum(there["n_tokens"]), there["windows_sha256"]) == (470, here["windows_sha256"])
    assert all(row["outcome"] == "pass" for row in result["gate"])
    (beside,) = shown("eval", *asked, *where, "--against", gguf)["texts"]
    assert beside["against_nats"] == pytest.approx(here["nats"], rel=1e-6)
    assert beside["nats"] == pytest.approx(here["nats"], rel=1e-6)
    assert beside["distance"] is None


def test_a_device_that_vanishes_leaves_one_line_and_no_record(
    device: Device, gguf: str, tasks: str, sleeper: Path, far: Path, tmp_path: Path, refused: Refused
) -> None:
    def vanish() -> None:
        until(lambda: running(tmp_path / "awake"), "the run does not begin")
        device.vanish()

    where = device.on(runner=sleeper, folder=far, retries=0)
    saved = tmp_path / "saved.json"
    thread = threading.Thread(target=vanish)
    thread.start()
    said = refused("eval", gguf, "--tasks", tasks, *QUICK, *where, "--save", saved)
    thread.join()
    assert f"{device.name}: the device went away" in said
    assert not saved.exists()
    until(lambda: not running(tmp_path / "awake"), "the run goes on there")

"""`phoneready prune` in two processes: each runs half of the windows, and one writes what one process would."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.checkpoint import load_pruned
from cfsp.processes import count, joined, mine, number, number_summed, require_alike, summed
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from phoneready.main import main

TinyPath = Callable[..., Path]
InProcesses = Callable[..., subprocess.CompletedProcess[str]]
COUNTING = """
import sys
from pathlib import Path
import torch
from cfsp import load_model
from cfsp.processes import joined, number
from cfsp.pruning.statistics import collect_statistics

model, windows, seen = load_model(sys.argv[1]).model, torch.arange(5 * 32).view(5, 32), []
model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
with joined():
    statistics = collect_statistics(model, windows)
    sums = list(statistics.norms)
    sums += statistics.importance.values()
    figures = [len(seen), statistics.n_tokens, *(float(each.sum()) for each in sums)]
    Path(sys.argv[2], str(number())).write_text(" ".join(map(str, figures)))
"""


def prune_command(model: Path, output: Path, *more: str) -> list[str]:
    text = ("--calibration", "builtin:python-docs", "--nsamples", "6", "--seqlen", "64", "--threads", "1")
    return ["prune", str(model), "-o", str(output), *text, "--dtype", "float32", "--align", "8", *more]


@pytest.mark.parametrize(
    "options",
    [
        ("--prune-ratio", "0.3", "--blocks", "1"),
        ("--prune-ratio", "0.3", "--vocabulary", "300"),
    ],
    ids=["blocks", "tokens"],
)
def test_two_processes_prune_as_one(
    tiny_folder: TinyPath, tmp_path: Path, in_processes: InProcesses, options: tuple[str, ...]
) -> None:
    one, two = (prune_command(tiny_folder(), tmp_path / name, *options) for name in ("one", "two"))
    assert main(one) == 0
    result = in_processes(2, "-m", "phoneready", *two)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Written to") == 1
    plans = [read_record(PruningPlan, tmp_path / name / "pruning_plan.json") for name in ("one", "two")]
    assert plans[0].shape == plans[1].shape
    models = [load_pruned(tmp_path / name, torch.float32) for name in ("one", "two")]
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name


def test_each_process_runs_its_share_of_the_windows(
    tiny_folder: TinyPath, tmp_path: Path, in_processes: InProcesses
) -> None:
    script = tmp_path / "count.py"
    script.write_text(COUNTING)

    def figures(processes: int) -> list[list[float]]:
        result = in_processes(processes, str(script), str(tiny_folder()), str(tmp_path))
        assert result.returncode == 0, result.stderr
        return [list(map(float, (tmp_path / str(n)).read_text().split())) for n in range(processes)]

    (alone,), (first, second) = figures(1), figures(2)
    # Twice a window: what enters the blocks is found by calls that compute nothing.
    assert (alone[0], first[0], second[0]) == (2 * 5, 2 * 3, 2 * 2)
    assert first[1:] == second[1:] == pytest.approx(alone[1:], rel=1e-5)


def test_one_process_shares_with_nobody() -> None:
    windows = torch.arange(6).view(3, 2)
    with joined() as first:
        assert (first, count(), number()) == (True, 1, 0)
        assert torch.equal(mine(windows), windows)
        assert summed(windows) is windows
        assert number_summed(2.5) == 2.5
        require_alike("ab" * 32, "text")


def test_several_processes_cannot_share_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"cannot share it.*allowed: cpu"), joined("mps"):
        pass


ALONE = """
from cfsp.errors import InputError
from cfsp.processes import number, require_alike
from phoneready.commands.processes import shared_passes
from pathlib import Path
import sys

with shared_passes(Path(sys.argv[1]) / "out", "cpu"):
    if sys.argv[2] == "fail" and number() == 1:
        raise InputError("the second one has no memory")
    require_alike(f"{number():02x}" * 32, "calibration text")
"""


@pytest.mark.parametrize(
    ("how", "said"), [("fail", "the second one has no memory"), ("differ", "have the same calibration text")]
)
def test_what_one_process_alone_finds_is_said(
    tmp_path: Path, in_processes: InProcesses, how: str, said: str
) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    result = in_processes(2, str(script), str(tmp_path), how)
    assert result.returncode != 0
    assert said in result.stderr


def test_what_fails_is_said_once(tiny_folder: TinyPath, tmp_path: Path, in_processes: InProcesses) -> None:
    wrong = prune_command(tiny_folder(), tmp_path / "out", "--prune-ratio", "0.3", "--blocks", "99")
    result = in_processes(2, "-m", "phoneready", *wrong)
    assert result.returncode != 0
    assert result.stderr.count("(got 99)") == 1
    assert not (tmp_path / "out").exists()

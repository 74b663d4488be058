"""Kill a release again and again, and see that it always ends as if nothing had happened.

A release of a tiny random model with every kind of stage (recovery, GGUF, ONNX, judged files, benchmark) runs once
undisturbed. Then runs into another folder are killed (SIGKILL, at a random moment of a stage that is not finished,
or while the results are published) and started again until one is through; then into a new folder, until
there were as many kills as asked for. It fails where

    a stage that was finished runs again,
    a finished release has other files than the undisturbed one, or files with other contents (but for times), or
    a temporary file, training's own checkpoints or a process are left.

    python benchmarks/kill_release.py [--kills 50] [--seed 0] [--threads 2] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
PUBLISH = "publish"
"""What comes after the last stage."""
NEXT = 0.7
"""How often the next stage is the one in which a run is killed; else it is any that is not finished."""

CONFIG = """
[model]
reference = "tiny-model"
[prune]
prune_ratio = 0.25
calibration = ["builtin:python-docs"]
nsamples = 4
seqlen = 64
[recover]
data = ["builtin:python-docs"]
max_tokens = 2048
seqlen = 64
batch_size = 2
eval_every = 4
[evaluate]
text = ["builtin:python-docs"]
chats = []
seqlen = 64
max_windows = 2
prompts = ["List three fruits."]
max_new_tokens = 4
files = ["Q8_0"]
[quantize]
to = ["Q8_0", "int8"]
[bench]
n_prompt = [8]
n_gen = [2]
ttft = [4]
n_threads = [1]
repetitions = 1
check_text = false
[[budgets]]
metric = "file_bytes"
at_most = 0.999
relative_to = "dense"
"""

TIMES = re.compile(
    r"(^|/)(stage\.json|bench\.jsonl|recovery\.json|\.phoneready\.lock)$"
    r"|^(manifest\.json|SHA256SUMS|history\.jsonl|figures\.json|verdicts\.json|junit\.xml|summary\.md|report\.(md|html))$"
)
"""Files that hold durations, dates or timings, or the release folder's own path; they must be there, and may differ."""


@dataclass
class Run:
    """One process of a release.

    Attributes:
        process: It.
        lines: (seconds since its start, line) of what it has said on stderr.
    """

    process: subprocess.Popen[str]
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic() - self.began, line.rstrip("\n")))

    def states(self) -> dict[str, str]:
        """The last state shown of each stage."""
        shown = [line.split(maxsplit=1) for _, line in self.lines]
        named = {"running", "done before", "finished"}
        return {
            words[0]: words[1].partition(" in ")[0]
            for words in shown
            if len(words) == 2 and words[1].partition(" in ")[0] in named
        }

    def wait_for(self, stage: str, state: str) -> bool:
        """Wait until a stage is in a state; False where the process ends before."""
        while self.states().get(stage) != state:
            if self.process.poll() is not None:
                self.reader.join()
                return self.states().get(stage) == state
            time.sleep(0.005)
        return True

    def kill(self) -> list[psutil.Process]:
        """End it at once; the processes of its stages that are still there half a minute later."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, 9)
        self.process.wait()
        left: list[psutil.Process] = psutil.wait_procs(started, timeout=30)[1]
        self.reader.join()
        return left

    def failure(self) -> list[str]:
        """Wait for its end where nobody kills it; what is wrong with that."""
        status = self.process.wait()
        self.reader.join()
        return [f"exit status {status}: {self.lines[-1][1] if self.lines else ''}"] if status else []


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills: How many.
        rounds: Releases that were finished in spite of them.
        by_stage: What was running when a process was killed.
        problems: What went wrong; empty is good.
    """

    kills: int = 0
    rounds: int = 0
    by_stage: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def start(config: Path, folder: Path, threads: int) -> Run:
    """Start a release."""
    line = ["release", str(config), "-o", str(folder), "--threads", str(threads)]
    return begun(line, {"PHONEREADY_CACHE": str(config.parent / "cache")})


def begun(line: list[str], variables: Mapping[str, str]) -> Run:
    """Start a command in a process group of its own, with variables of the environment beside those that there are."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= variables
    environment.pop("GITHUB_STEP_SUMMARY", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "phoneready", *line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    return Run(process)


def durations(run: Run) -> dict[str, float]:
    """Seconds that each stage of an undisturbed run took, in order."""
    started: dict[str, float] = {}
    found: dict[str, float] = {}
    for moment, line in run.lines:
        name, _, state = line.partition(" ")
        if state.strip() == "running":
            started[name] = moment
        elif state.strip().startswith("finished") and name in started:
            found[name] = moment - started[name]
    return found


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and its contents, None for those that hold times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [(path.relative_to(folder).as_posix(), path) for path in files]
    return {name: None if TIMES.search(name) else path.read_bytes() for name, path in names}


def finished_stages(folder: Path) -> set[str]:
    """Stages whose record is there."""
    return {path.parent.name for path in (folder / "stages").glob("[!.]*/stage.json")}


def kill_once(
    restart: Callable[[], Run],
    folder: Path,
    stages: dict[str, float],
    generator: random.Random,
    outcome: Outcome,
) -> bool:
    """Start a run and kill it; True where it was through before."""
    done = finished_stages(folder)
    open_stages = [name for name in stages if name not in done]
    # Mostly the next one, so that a release meets many kills; what comes later is reached in one go then.
    later = [*open_stages, PUBLISH]
    target = later[0] if generator.random() < NEXT else generator.choice(later)
    run = restart()
    last = list(stages)[-1]
    reached = (
        run.wait_for(target, "running")
        if target != PUBLISH
        else run.wait_for(last, "finished" if last in open_stages else "done before")
    )
    if reached:
        time.sleep(generator.uniform(0, stages.get(target, 0.5)))
    through = run.process.poll() is not None
    if through:
        outcome.problems += run.failure()
    else:
        outcome.problems += [f"left running: {process.pid}" for process in run.kill()]
        running = [name for name, state in run.states().items() if state == "running"]
        outcome.kills += 1
        outcome.by_stage[running[-1] if running else PUBLISH] += 1
    repeated = {name for name, state in run.states().items() if state in ("running", "finished")} & done
    if repeated:
        outcome.problems.append(f"finished stages ran again: {', '.join(sorted(repeated))}")
    return through


def compare(whole: Path, folder: Path) -> list[str]:
    """How a release differs from the undisturbed one."""
    expected, found = tree(whole), tree(folder)
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"left over: {name}" for name in found if name not in expected]
    problems += [
        f"other contents: {name}" for name in expected if name in found and found[name] != expected[name]
    ]
    left = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if ".tmp-" in path.name or path.name.endswith(".work")
    ]
    return problems + [f"temporary: {path}" for path in left]


def kill_and_restart(config: Path, folder: Path, kills: int, seed: int = 0, threads: int = 2) -> Outcome:
    """The whole experiment.

    Args:
        config: A release.toml.
        folder: Scratch.
        kills: How often.
        seed: Of the moments.
        threads: Of a run.
    """
    outcome, generator = Outcome(), random.Random(seed)
    whole = start(config, folder / "whole", threads)
    outcome.problems += whole.failure()
    stages = durations(whole)
    while outcome.kills < kills and not outcome.problems:
        output = folder / f"round{outcome.rounds}"
        restart = functools.partial(start, config, output, threads)
        through = False
        while outcome.kills < kills and not through and not outcome.problems:
            if finished_stages(output) == set(stages):
                break
            through = kill_once(restart, output, stages, generator, outcome)
        if not through:
            done = finished_stages(output)
            last = restart()
            outcome.problems += last.failure()
            before = {name for name, state in last.states().items() if state == "done before"}
            if before != done:
                outcome.problems.append(f"finished: {sorted(done)}, not repeated: {sorted(before)}")
        outcome.rounds += 1
        outcome.problems += compare(folder / "whole", output)
    return outcome


def tiny_model(folder: Path, dtype: str = "float32", added: float = 1.0) -> None:
    """A random model of 4 small blocks, with the tokenizer of the tests.

    Args:
        folder: Where it is saved.
        dtype: In which.
        added: What its blocks add to a token is multiplied by it: of less, few bits change less.
    """
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, tokenizer = module.make_tiny_model(intermediate_size=256)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= added
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Run it and say what came out; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="scratch; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-release-") as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tiny_model(folder / "tiny-model")
        (folder / "release.toml").write_text(CONFIG, encoding="utf-8")
        config = folder / "release.toml"
        outcome = kill_and_restart(config, folder, arguments.kills, arguments.seed, arguments.threads)
    found = vars(outcome) | {"seed": arguments.seed}
    print(f"{outcome.kills} kills, {outcome.rounds} releases finished in spite of them")
    for stage, count in outcome.by_stage.most_common():
        print(f"  {count:3d} during {stage}")
    print("\n".join(outcome.problems) or "nothing was repeated, left over or different")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The task that benchmarks make by a program: what is held out of its training file, and that answers can be judged."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from cfsp.evaluation.tasks import load_chat_task

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "quality" / "function_calls.py"
TABLES = tomllib.loads(SCRIPT.with_suffix(".toml").read_text(encoding="utf-8"))


def test_held_out_commands_are_none_that_are_trained_on(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, tmp_path, "--train", "3000", "--held", "300"], check=True)
    tasks = {name: load_chat_task(str(tmp_path / f"calls_{name}.jsonl")) for name in ("train", "held", "new")}
    asked = {name: {item.messages[-1]["content"] for item in task.items} for name, task in tasks.items()}
    assert [len(tasks[name].items) for name in ("train", "held", "new")] == [3000, 300, 300]
    assert len(asked["held"]) == len(asked["new"]) == 300
    assert not asked["train"] & (asked["held"] | asked["new"])
    for task in tasks.values():
        assert {json.loads(item.answer)["name"] for item in task.items} == set(TABLES["ways"])
    cities = TABLES["words"]["cities"]
    named = {
        name: {city for city in cities for text in texts if city in text} for name, texts in asked.items()
    }
    assert named["train"] == set(cities[:48])
    assert (named["held"] | named["new"]) & set(cities[48:])


def test_no_way_to_ask_is_both_known_and_new() -> None:
    for ways in TABLES["ways"].values():
        assert not set(ways["known"]) & set(ways["new"])
        assert len(set(ways["known"])) == 12
        assert len(set(ways["new"])) == 3

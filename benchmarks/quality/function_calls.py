"""A fixed task, made by a program: what is said to a phone, and the call of a function that does it, in JSON.

    python benchmarks/quality/function_calls.py DIR

writes chats of an instruction, a command and its call: DIR/calls_train.jsonl; DIR/calls_held.jsonl, other commands, of
whose names, places and titles a fifth is in no chat of the first; DIR/calls_new.jsonl, such commands said in ways that
no chat of the others is. Words, phrases and ways are in function_calls.toml.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
WORDS: Mapping[str, list[str]] = _TABLES["words"]
PHRASES: Mapping[str, list[str]] = _TABLES["phrases"]
WAYS: Mapping[str, Mapping[str, list[str]]] = _TABLES["ways"]
PLACEHOLDER = re.compile(r"{(\w+)}")
INSTRUCTION = "Answer with one function call."
UNITS = (
    *(("kilometres", "miles"), ("miles", "kilometres"), ("kilograms", "pounds"), ("pounds", "kilograms")),
    *(("euros", "dollars"), ("dollars", "euros"), ("litres", "gallons"), ("metres", "feet")),
)
MODES = MappingProxyType({"on foot": "walk", "by car": "drive", "by bike": "bike", "by bus": "transit"})
HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
HELD_SHARE = 0.2
"""Of the words of a list, those that no command of the training file has."""


@dataclass(frozen=True)
class Values:
    """What slots are filled with, of which some is kept for the held-out files."""

    random: random.Random
    held: bool

    def word(self, name: str) -> str:
        """One of the words of a list; the first four fifths are for all files."""
        words = WORDS[name]
        return self.random.choice(words if self.held else words[: round(len(words) * (1 - HELD_SHARE))])

    def phrase(self, name: str) -> str:
        """One of the phrases of a list, with words in it."""
        phrase = self.random.choice(PHRASES[name])
        return PLACEHOLDER.sub(
            lambda found: f"{self.number(1, 150)}" if found[1] == "number" else self.word(found[1]), phrase
        )

    def number(self, low: int, high: int) -> int:
        """A number between two."""
        return self.random.randint(low, high)


Said = tuple[str, Any]
"""What is said for a slot, and the argument."""


def _same(text: str) -> Said:
    return text, text.removeprefix("on ")


def _number(value: int) -> Said:
    return f"{value}", value


def _clock(v: Values) -> Said:
    """A time as it is said, and as HH:MM."""
    hour, minute = v.number(0, 23), v.random.choice((0, 15, 30, 45, v.number(0, 59)))
    part = "in the morning" if hour < 12 else "in the evening" if hour >= 18 else "in the afternoon"
    word, following = HOURS[hour % 12], HOURS[(hour + 1) % 12]
    said = {0: f"{word} o'clock", 15: f"quarter past {word}", 30: f"half past {word}"}.get(minute)
    if minute == 45 and hour not in (11, 17, 23):  # the part of the day is the hour's that is named
        said = f"quarter to {following}"
    shown = f"{hour:02d}:{minute:02d}"
    spoken = f"{said} {part}" if said else shown
    short = f"{hour % 12 or 12}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    return v.random.choice((spoken, shown, short)), shown


def _mode(v: Values) -> Said:
    said = v.random.choice(tuple(MODES))
    return said, MODES[said]


def _device(v: Values) -> Said:
    said = v.word("devices")
    return said, said.removeprefix("the ").replace(" ", "_")


def _units(v: Values) -> dict[str, Said]:
    source, target = v.random.choice(UNITS)
    return {"amount": _number(v.number(1, 500)), "from": _same(source), "to": _same(target)}


FUNCTIONS: Mapping[str, Callable[[Values], dict[str, Said]]] = MappingProxyType(
    {
        "set_alarm": lambda v: {"time": _clock(v)},
        "set_timer": lambda v: {"minutes": _number(v.number(1, 90))},
        "send_message": lambda v: {"to": _same(v.phrase("people")), "text": _same(v.phrase("messages"))},
        "call": lambda v: {"name": _same(v.phrase("people"))},
        "play": lambda v: {"title": _same(v.phrase("titles"))},
        "get_weather": lambda v: {"city": _same(v.word("cities")), "day": _same(v.word("days"))},
        "create_event": lambda v: {
            "title": _same(v.phrase("events")),
            "day": _same(v.word("days")),
            "time": _clock(v),
        },
        "navigate": lambda v: {"place": _same(v.phrase("places")), "mode": _mode(v)},
        "set_volume": lambda v: {"percent": _number(v.number(0, 100))},
        "switch": lambda v: {"device": _device(v), "state": _same(v.random.choice(("on", "off")))},
        "take_note": lambda v: {"text": _same(v.phrase("notes"))},
        "convert": _units,
        "translate": lambda v: {"text": _same(v.phrase("messages")), "language": _same(v.word("languages"))},
        "open_app": lambda v: {"app": _same(v.word("apps"))},
    }
)
"""Name of what can be called -> what its slots are filled with; how it is asked for is in WAYS."""


def chats(
    count: int, seed: int, *, without: Container[str] | None = None, new: bool = False
) -> Iterator[dict[str, Any]]:
    """Chats of a command and its call.

    Args:
        count: How many.
        seed: Of what is drawn.
        without: For held-out ones: commands that are none of them; then each is there once.
        new: Say them in the ways that are kept for this.
    """
    values, seen = Values(random.Random(seed), held=without is not None), set[str]()
    while count:
        name = values.random.choice(tuple(FUNCTIONS))
        way = values.random.choice(WAYS[name]["new" if new else "known"])
        slots = FUNCTIONS[name](values)
        asked = way.format(**{slot: said for slot, (said, _) in slots.items()})
        asked = asked[0].upper() + asked[1:]
        if without is not None and (asked in seen or asked in without):
            continue
        seen.add(asked)
        count -= 1
        call = {"name": name, "arguments": {slot: value for slot, (_, value) in slots.items()}}
        yield {
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": asked},
                {"role": "assistant", "content": json.dumps(call)},
            ]
        }


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=8000, help="chats to train on")
    parser.add_argument("--held", type=int, default=400, help="chats to judge on, in each of the other files")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    train = list(chats(asked.train, asked.seed))
    said = {row["messages"][1]["content"] for row in train}
    files = {
        "train": train,
        "held": list(chats(asked.held, asked.seed + 1, without=said)),
        "new": list(chats(asked.held, asked.seed + 2, without=said, new=True)),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (asked.folder / f"calls_{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

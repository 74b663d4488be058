"""A fixed task, made by a program: what is said to a phone, and the call of a function that does it, in JSON.

    python benchmarks/quality/function_calls.py DIR

writes chats of two messages: DIR/calls_train.jsonl; DIR/calls_held.jsonl, other commands, with names, places and
titles of which a fifth is in no chat of the first; DIR/calls_new.jsonl, such commands said in ways that no chat of the
others is.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

PEOPLE = (
    *("Anna", "Ben", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Karim", "Laura"),
    *(
        "Mia",
        "Noah",
        "Olga",
        "Paul",
        "Quinn",
        "Rosa",
        "Samir",
        "Tess",
        "Uma",
        "Victor",
        "Wanda",
        "Yusuf",
        "Zoe",
    ),
    *("Mum", "Dad", "my boss", "the dentist", "Aunt Carol", "Mr Okafor", "Mrs Lindqvist", "Dr Patel"),
)
CITIES = (
    *(
        "London",
        "Paris",
        "Berlin",
        "Madrid",
        "Rome",
        "Vienna",
        "Oslo",
        "Lisbon",
        "Athens",
        "Dublin",
        "Warsaw",
    ),
    *("Prague", "Zurich", "Helsinki", "Tokyo", "Seoul", "Sydney", "Toronto", "Chicago", "Boston", "Denver"),
    *("Nairobi", "Cairo", "Lagos", "Mumbai", "Delhi", "Bangkok", "Lima", "Bogota", "Havana"),
)
PLACES = (
    *(
        "the airport",
        "the train station",
        "Central Park",
        "the nearest pharmacy",
        "12 Baker Street",
        "the office",
    ),
    *(
        "the university library",
        "home",
        "the city museum",
        "Harbour Road 7",
        "the swimming pool",
        "Green Lake",
    ),
    *("the football stadium", "a petrol station", "the old town", "the hospital", "Maple Avenue 41"),
)
TITLES = (
    *(
        "Blue Monday",
        "Clair de Lune",
        "Yesterday",
        "Take Five",
        "Summertime",
        "Wonderwall",
        "Hey Jude",
        "Imagine",
    ),
    *(
        "the Four Seasons",
        "some jazz",
        "my running playlist",
        "Bohemian Rhapsody",
        "a piano concerto",
        "Hallelujah",
    ),
    *("classic rock", "the news podcast", "rain sounds", "Dancing Queen", "Space Oddity"),
)
MESSAGES = (
    *("I am running late", "dinner is at eight", "the meeting was moved to Friday", "happy birthday"),
    *("please buy milk and bread", "I will call you back", "the keys are under the mat", "see you tomorrow"),
    *("the train leaves in ten minutes", "can you pick up the kids", "thank you for the flowers"),
    *("I have sent the report", "we are out of coffee", "good luck with the exam", "the parcel has arrived"),
)
EVENTS = (
    *(
        "dentist",
        "team meeting",
        "lunch with Anna",
        "yoga class",
        "parents' evening",
        "job interview",
        "haircut",
    ),
    *("football practice", "book club", "car service", "project review", "piano lesson", "flight to Rome"),
)
NOTES = (
    *("buy eggs and flour", "the code of the door is 4712", "return the library books", "water the plants"),
    *("ask about the heating bill", "idea for the garden party", "renew the passport", "call the plumber"),
    *("the wifi password is on the fridge", "read chapter five"),
)
APPS = (
    "the camera",
    "the calendar",
    "maps",
    "the calculator",
    "photos",
    "the browser",
    "settings",
    "the music app",
)
SWITCHES = MappingProxyType(
    {
        "the wifi": "wifi",
        "bluetooth": "bluetooth",
        "the flashlight": "flashlight",
        "airplane mode": "airplane_mode",
    }
)
LANGUAGES = ("Spanish", "French", "German", "Italian", "Turkish", "Polish", "Portuguese", "Dutch")
DAYS = (
    "today",
    "tomorrow",
    "on Monday",
    "on Tuesday",
    "on Wednesday",
    "on Thursday",
    "on Friday",
    "at the weekend",
)
UNITS = (("kilometres", "miles"), ("miles", "kilometres"), ("kilograms", "pounds"), ("euros", "dollars"))
MODES = MappingProxyType({"on foot": "walk", "by car": "drive", "by bike": "bike", "by bus": "transit"})
HOURS = (
    *("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
)
HELD_SHARE = 0.2
"""Of the words for a slot that no command of the training file has."""

Slots = dict[str, tuple[str, Any]]
"""Slot -> (what is said, the argument)."""


@dataclass(frozen=True)
class Values:
    """What slots are filled with, of which some is kept for the held-out file."""

    random: random.Random
    held: bool

    def one(self, values: Sequence[str]) -> str:
        """One of some words; the first four fifths are for both files."""
        first = values[: round(len(values) * (1 - HELD_SHARE))]
        return self.random.choice(values if self.held else first)

    def clock(self) -> tuple[str, str]:
        """A time as it is said, and as HH:MM."""
        hour, minute = (
            self.random.randrange(24),
            self.random.choice((0, 15, 30, 45, self.random.randrange(60))),
        )
        part = "in the morning" if hour < 12 else "in the evening" if hour >= 18 else "in the afternoon"
        word, following = HOURS[hour % 12], HOURS[(hour + 1) % 12]
        said = {0: f"{word} o'clock", 15: f"quarter past {word}", 30: f"half past {word}"}.get(minute)
        if minute == 45 and hour not in (11, 17, 23):  # the part of the day is the hour's that is named
            said = f"quarter to {following}"
        shown = f"{hour:02d}:{minute:02d}"
        spoken = f"{said} {part}" if said else shown
        short = f"{hour % 12 or 12}:{minute:02d} {'am' if hour < 12 else 'pm'}"
        return self.random.choice((spoken, shown, short)), shown

    def number(self, low: int, high: int) -> tuple[str, int]:
        """A number, said in digits."""
        value = self.random.randint(low, high)
        return f"{value}", value


def _same(text: str) -> tuple[str, str]:
    return text, text.removeprefix("on ").removeprefix("at the ")


def _of(table: Mapping[str, str], v: Values) -> tuple[str, str]:
    said = v.random.choice(tuple(table))
    return said, table[said]


def _units(v: Values) -> Slots:
    source, target = v.random.choice(UNITS)
    return {"amount": v.number(1, 500), "from": (source, source), "to": (target, target)}


@dataclass(frozen=True)
class Function:
    """What can be called, how it is asked for, and with what; the last way to say it is held out."""

    name: str
    said: tuple[str, ...]
    slots: Callable[[Values], Slots]


FUNCTIONS = (
    Function(
        "set_alarm",
        (
            "Wake me up at {time}.",
            "Set an alarm for {time}.",
            "I need an alarm at {time}.",
            "Alarm, {time}, please.",
            "Make sure I am awake by {time}.",
        ),
        lambda v: {"time": v.clock()},
    ),
    Function(
        "set_timer",
        (
            "Set a timer for {minutes} minutes.",
            "Timer, {minutes} minutes.",
            "Start a {minutes} minute timer.",
            "Tell me when {minutes} minutes are over.",
            "Count down {minutes} minutes for me.",
        ),
        lambda v: {"minutes": v.number(1, 90)},
    ),
    Function(
        "send_message",
        (
            "Tell {to} that {text}.",
            "Send {to} a message: {text}.",
            "Text {to} {text}.",
            "Write to {to}: {text}.",
            "Let {to} know that {text}.",
        ),
        lambda v: {"to": _same(v.one(PEOPLE)), "text": _same(v.one(MESSAGES))},
    ),
    Function(
        "call",
        (
            "Call {name}.",
            "Phone {name} please.",
            "I want to talk to {name}.",
            "Ring {name}.",
            "Get me {name} on the line.",
        ),
        lambda v: {"name": _same(v.one(PEOPLE))},
    ),
    Function(
        "play",
        (
            "Play {title}.",
            "I want to hear {title}.",
            "Put on {title}.",
            "Could you play {title} for me?",
            "Let me listen to {title}.",
        ),
        lambda v: {"title": _same(v.one(TITLES))},
    ),
    Function(
        "get_weather",
        (
            "What is the weather like in {city} {day}?",
            "Will it rain in {city} {day}?",
            "Weather for {city} {day}.",
            "How warm will it be {day} in {city}?",
            "Do I need an umbrella {day} in {city}?",
        ),
        lambda v: {"city": _same(v.one(CITIES)), "day": _same(v.random.choice(DAYS))},
    ),
    Function(
        "create_event",
        (
            "Put {title} in my calendar {day} at {time}.",
            "Add {title} {day}, {time}.",
            "New event: {title}, {day} at {time}.",
            "I have {title} {day} at {time}.",
            "Remember that {day} at {time} there is {title}.",
        ),
        lambda v: {"title": _same(v.one(EVENTS)), "day": _same(v.random.choice(DAYS)), "time": v.clock()},
    ),
    Function(
        "navigate",
        (
            "Take me to {place} {mode}.",
            "How do I get to {place} {mode}?",
            "Directions to {place} {mode}.",
            "Navigate {mode} to {place}.",
            "Which way is it {mode} to {place}?",
        ),
        lambda v: {"place": _same(v.one(PLACES)), "mode": _of(MODES, v)},
    ),
    Function(
        "set_volume",
        (
            "Set the volume to {percent} percent.",
            "Volume {percent}.",
            "Turn the sound to {percent} percent.",
            "Make it {percent} percent loud.",
            "I want the volume at {percent}.",
        ),
        lambda v: {"percent": v.number(0, 100)},
    ),
    Function(
        "switch",
        (
            "Turn {state} {device}.",
            "Switch {device} {state}.",
            "{device} {state}, please.",
            "I want {device} {state}.",
            "Can you put {device} {state}?",
        ),
        lambda v: {"device": _of(SWITCHES, v), "state": _of({"on": "on", "off": "off"}, v)},
    ),
    Function(
        "take_note",
        (
            "Make a note: {text}.",
            "Note that {text}.",
            "Write down: {text}.",
            "Save this: {text}.",
            "Do not let me forget: {text}.",
        ),
        lambda v: {"text": _same(v.one(NOTES))},
    ),
    Function(
        "convert",
        (
            "How many {to} are {amount} {from}?",
            "Convert {amount} {from} to {to}.",
            "What is {amount} {from} in {to}?",
            "{amount} {from} in {to}.",
            "Change {amount} {from} into {to}.",
        ),
        _units,
    ),
    Function(
        "translate",
        (
            "How do you say {text} in {language}?",
            "Translate {text} into {language}.",
            "{text} in {language}, please.",
            "What is {language} for {text}?",
            "Put {text} into {language}.",
        ),
        lambda v: {"text": _same(v.one(MESSAGES)), "language": _same(v.random.choice(LANGUAGES))},
    ),
    Function(
        "open_app",
        ("Open {app}.", "Start {app}.", "Show me {app}.", "Go to {app}.", "Launch {app} for me."),
        lambda v: {"app": _same(v.one(APPS))},
    ),
)


def chats(
    count: int, seed: int, *, without: Container[str] | None = None, new: bool = False
) -> Iterator[dict[str, Any]]:
    """Chats of a command and its call.

    Args:
        count: How many.
        seed: Of what is drawn.
        without: For held-out ones: commands that are none of them; then each is there once.
        new: Say them in the way that is kept for this.
    """
    values, seen = Values(random.Random(seed), held=without is not None), set[str]()
    while count:
        function = values.random.choice(FUNCTIONS)
        way = function.said[-1] if new else values.random.choice(function.said[:-1])
        slots = function.slots(values)
        asked = way.format(**{name: said for name, (said, _) in slots.items()})
        asked = asked[0].upper() + asked[1:]
        if without is not None and (asked in seen or asked in without):
            continue
        seen.add(asked)
        count -= 1
        call = {"name": function.name, "arguments": {name: value for name, (_, value) in slots.items()}}
        answer = {"role": "assistant", "content": json.dumps(call)}
        yield {"messages": [{"role": "user", "content": asked}, answer]}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="chats to train on")
    parser.add_argument("--held", type=int, default=300, help="chats to judge on, in each of the other files")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    train = list(chats(asked.train, asked.seed))
    said = {row["messages"][0]["content"] for row in train}
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

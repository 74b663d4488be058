"""Has a model stopped making sense? Checks on one generated text, each a pure function of strings.

The checks look for what pruning breaks, not for wrong answers: a text may be false, short, code, a list, a table of
numbers or Chinese and still pass.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

LOOP_REPEATS = 3
"""A tail that says the same this many times in a row is a loop,"""
LOOP_CHARACTERS = 60
"""if the repetition covers at least this many characters."""
LOOP_COUNTED_LETTERS = 12
"""A period that differs only in its digits counts as the same if it has this many letters (so 1, 2, 3 does not)."""
REPEATED_SHARE = 0.5
"""Share of word 4-grams that occurred before, above which a text only repeats itself."""
REPEATED_MINIMUM = 40
"""Number of 4-grams below which that share says nothing."""

N_GRAM = 4
"""Words in a row that are compared."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0002ffff"
)
"""Characters, as ranges of a regular expression, of scripts that put no spaces between words."""
LETTERS = re.compile(r"[^\W\d_]+")
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")


def is_loop(text: str, prompt: str = "", system: str = "") -> bool:
    """The text ends in a loop, or mostly repeats itself.

    It ends in a loop if its tail of at least LOOP_CHARACTERS consists of LOOP_REPEATS or more equal periods, the last
    of which may be cut off; with LOOP_COUNTED_LETTERS letters in the period, digits may differ ("Step 1: ... Step 2:
    ..."). It mostly repeats itself if more than REPEATED_SHARE of its word 4-grams occurred before in it.
    """
    text = " ".join(text.split())
    counted = re.sub(r"\d+", "0", text)
    if _tail_period(text) or len("".join(LETTERS.findall(_tail_period(counted)))) >= LOOP_COUNTED_LETTERS:
        return True
    words = [word.casefold() for word in _TOKEN.findall(text)]
    grams = Counter(zip(*(words[i:] for i in range(N_GRAM)), strict=False))
    total = sum(grams.values())
    return total >= REPEATED_MINIMUM and 1 - len(grams) / total > REPEATED_SHARE


def _tail_period(text: str) -> str:
    """The shortest period whose repetition ends the text long and often enough; empty where there is none."""
    for period in range(1, len(text) // LOOP_REPEATS + 1):
        if text[-1] != text[-1 - period]:
            continue
        span = period
        while span < len(text) and text[-1 - span] == text[-1 - span + period]:
            span += 1
        if span >= LOOP_REPEATS * period and span >= LOOP_CHARACTERS:
            return text[-period:]
    return ""


REPLACEMENT_SHARE = 0.02
"""Share of replacement, control and private-use characters."""
MOJIBAKE_SHARE = 0.03
"""Share of characters in sequences that UTF-8 read as Latin-1 or Windows-1252 leaves."""
WORD_CHARACTER_SHARE = 0.25
"""Least share of letters, marks and digits among the characters that are not white space."""
LONGEST_WORD = 45
"""Letters in a row, in a script that puts spaces between words."""
VOWELLESS_SHARE = 0.3
"""Share of Latin words of five letters and more that have no vowel."""
ECHO_WORDS = 8
"""Words in a row taken from the system prompt."""
ECHO_SHARE = 0.8
"""Share of a text's words that stand in such runs taken from the user's prompt."""

_SHORT = 20
_SPACED_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC", "DEVANAGARI")
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00d0\u00d1\u00e2\u00e3\u00ef][\u0080-\u00bf\u20ac\u2018-\u2022\u0152\u0153\u2122\u0192\u201a-\u201e]+"
)


def degenerate(text: str, prompt: str = "", system: str = "") -> str | None:
    """The first reason in CHECKS why a generated text is degenerate, or None."""
    return next((reason for reason, check in CHECKS.items() if check(text, prompt, system)), None)


def is_empty(text: str, prompt: str = "", system: str = "") -> bool:
    """No letter, digit or symbol such as an emoji: nothing, white space or punctuation alone."""
    return not any(unicodedata.category(c)[0] in "LN" or unicodedata.category(c) == "So" for c in text)


def is_non_language(text: str, prompt: str = "", system: str = "") -> bool:
    """Characters or words that no language and no code has.

    Any of: more than REPLACEMENT_SHARE replacement, control or private-use characters (a last character that was cut
    off by the token limit does not count); more than MOJIBAKE_SHARE of wrongly decoded UTF-8; among the characters that
    are not white space fewer than WORD_CHARACTER_SHARE letters and digits; a run of more than LONGEST_WORD letters
    in a script that writes spaces; more than VOWELLESS_SHARE of the longer Latin words without a vowel.
    """
    text = text.strip().rstrip("\ufffd")
    visible = [c for c in text if not c.isspace()]
    if not visible:
        return False
    bad = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Co", "Cn") for c in visible)
    if bad / len(visible) > REPLACEMENT_SHARE:
        return True
    if sum(map(len, _MOJIBAKE.findall(text))) / len(visible) > MOJIBAKE_SHARE:
        return True
    words = sum(unicodedata.category(c)[0] in "LNM" for c in visible)
    if len(visible) >= _SHORT and words / len(visible) < WORD_CHARACTER_SHARE:
        return True
    return _implausible_words(LETTERS.findall(text))


def is_echo(text: str, prompt: str = "", system: str = "") -> bool:
    """The text repeats what it was given instead of answering.

    Either it holds ECHO_WORDS words in a row (or all, where there are fewer, but at least four) of the system
    prompt; or at least ECHO_SHARE of its words stand in runs of that length taken from the user's prompt, or it is the
    prompt. Quoting a part of the prompt, as an answer may, is no echo.
    """
    words, asked, told = (_words(part) for part in (text, prompt, system))
    if len(told) >= N_GRAM and any(_taken(words, told, min(ECHO_WORDS, len(told)))):
        return True
    if not words or not asked:
        return False
    return words == asked or sum(_taken(words, asked, ECHO_WORDS)) >= ECHO_SHARE * len(words)


CHECKS: Mapping[str, Callable[[str, str, str], bool]] = MappingProxyType(
    {"empty": is_empty, "loop": is_loop, "echo": is_echo, "non_language": is_non_language}
)
"""Reason -> check(text, prompt, system); the first that holds is the reason given."""


def system_text(tokenizer: Any, prompt: str) -> str:
    """What a chat template says before the user's turn, without its special tokens; empty for a base model."""
    if not tokenizer.chat_template:
        return ""
    from cfsp.text.tokens import render_prompt

    before, separator, _ = render_prompt(tokenizer, prompt).partition(prompt)
    if not separator:
        return ""
    for token in tokenizer.all_special_tokens:
        before = before.replace(token, "\n")
    lines = [line.strip() for line in before.splitlines()]
    return "\n".join(line for line in lines if line and line not in ("system", "user"))


def _implausible_words(words: list[str]) -> bool:
    # A letter's name begins with its script's.
    spaced = [word for word in words if unicodedata.name(word[0], "").partition(" ")[0] in _SPACED_SCRIPTS]
    if any(len(word) > LONGEST_WORD for word in spaced):
        return True
    latin = [word.casefold() for word in spaced if len(word) >= 5 and word.isascii()]
    vowelless = sum(not set(word) & set("aeiouy") for word in latin)
    return len(latin) >= 5 and vowelless / len(latin) > VOWELLESS_SHARE


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _taken(words: list[str], source: list[str], length: int) -> list[bool]:
    """Which words stand in a run of `length` words that `source` has too."""
    runs = {tuple(source[i : i + length]) for i in range(len(source) - length + 1)}
    marks = [False] * len(words)
    for i in range(len(words) - length + 1):
        if tuple(words[i : i + length]) in runs:
            marks[i : i + length] = [True] * length
    return marks

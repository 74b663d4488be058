"""Has a model stopped making sense? Checks on one generated text.

They look for what pruning breaks, not for wrong answers: a text may be false, short, code, a list, a table of numbers
or Chinese and still pass.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

LOOP_REPEATS = 3  # a tail that says the same this many times in a row is a loop,
LOOP_CHARACTERS = 60  # if the repetition covers at least this many characters;
LOOP_COUNTED_LETTERS = (
    12  # with this many letters in the period its digits may differ (so 1, 2, 3 is no loop)
)
REPEATED_SHARE = 0.5  # of word 4-grams that occurred before, above which a text only repeats itself
REPEATED_MINIMUM = 40  # 4-grams below which that share says nothing
N_GRAM = 4  # words in a row that are compared
REPLACEMENT_SHARE = 0.02  # of replacement, control and private-use characters, but for one cut off at the end
MOJIBAKE_SHARE = 0.03  # of characters in sequences that UTF-8 read as Latin-1 or Windows-1252 leaves
WORD_CHARACTER_SHARE = (
    0.25  # least share of letters, marks and digits among at least _SHORT visible characters
)
LONGEST_WORD = 45  # letters in a row, in a script that puts spaces between words
VOWELLESS_SHARE = 0.3  # of Latin words of five letters and more without a vowel, of at least five
ECHO_WORDS = 8  # in a row taken from the system prompt
ECHO_SHARE = 0.8  # of a text's words that stand in such runs taken from the user's prompt

_SHORT = 20
_SPACED_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC", "DEVANAGARI")
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0002ffff"
)
"""Characters, as ranges of a regular expression, of scripts that put no spaces between words."""
_LETTERS = re.compile(r"[^\W\d_]+")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_TOKEN = re.compile(rf"{_WORD.pattern}|[^\w\s]")
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00d0\u00d1\u00e2\u00e3\u00ef][\u0080-\u00bf\u20ac\u2018-\u2022\u0152\u0153\u2122\u0192\u201a-\u201e]+"
)


def degenerate(text: str, prompt: str = "", system: str = "") -> str | None:
    """The first reason why a generated text is degenerate: `empty`, `loop`, `echo` or `non_language`; or None."""
    kinds = map(unicodedata.category, text)
    if not any(kind[0] in "LN" or kind == "So" for kind in kinds):  # symbols are emoji
        return "empty"
    if is_loop(text):
        return "loop"
    if _is_echo(text, prompt, system):
        return "echo"
    return "non_language" if _is_non_language(text) else None


def is_loop(text: str) -> bool:
    """The text ends in a loop, or mostly repeats itself.

    It ends in a loop if its tail of at least LOOP_CHARACTERS consists of LOOP_REPEATS or more equal periods, the last
    of which may be cut off; with LOOP_COUNTED_LETTERS letters in the period, digits may differ ("Step 1: ... Step 2:
    ..."). It mostly repeats itself if more than REPEATED_SHARE of its word 4-grams occurred before in it.
    """
    text = " ".join(text.split())
    counted = re.sub(r"\d+", "0", text)
    if _tail_period(text) or len("".join(_LETTERS.findall(_tail_period(counted)))) >= LOOP_COUNTED_LETTERS:
        return True
    words = [word.casefold() for word in _TOKEN.findall(text)]
    grams = Counter(zip(*(words[i:] for i in range(N_GRAM)), strict=False))
    total = sum(grams.values())
    return total >= REPEATED_MINIMUM and 1 - len(grams) / total > REPEATED_SHARE


def _tail_period(text: str) -> str:
    """The shortest period whose repetition ends the text long and often enough; empty if there is none."""
    for period in range(1, len(text) // LOOP_REPEATS + 1):
        if text[-1] != text[-1 - period]:
            continue
        span = period
        while span < len(text) and text[-1 - span] == text[-1 - span + period]:
            span += 1
        if span >= LOOP_REPEATS * period and span >= LOOP_CHARACTERS:
            return text[-period:]
    return ""


def _is_non_language(text: str) -> bool:
    """Characters or words that no language and no code has, by the limits above."""
    text = text.strip().rstrip("\ufffd")
    visible = [c for c in text if not c.isspace()]
    if not visible:
        return False
    kinds = [unicodedata.category(c) for c in visible]
    bad = sum(c == "\ufffd" or kind in ("Cc", "Co", "Cn") for c, kind in zip(visible, kinds, strict=True))
    if bad / len(visible) > REPLACEMENT_SHARE:
        return True
    if sum(map(len, _MOJIBAKE.findall(text))) / len(visible) > MOJIBAKE_SHARE:
        return True
    of_words = sum(kind[0] in "LNM" for kind in kinds)
    if len(visible) >= _SHORT and of_words / len(visible) < WORD_CHARACTER_SHARE:
        return True
    words = _LETTERS.findall(text)
    # A letter's name begins with its script's.
    spaced = [word for word in words if unicodedata.name(word[0], "").partition(" ")[0] in _SPACED_SCRIPTS]
    if any(len(word) > LONGEST_WORD for word in spaced):
        return True
    latin = [word.casefold() for word in spaced if len(word) >= 5 and word.isascii()]
    vowelless = sum(not set(word) & set("aeiouy") for word in latin)
    return len(latin) >= 5 and vowelless / len(latin) > VOWELLESS_SHARE


def _is_echo(text: str, prompt: str, system: str) -> bool:
    """The text repeats what it was given instead of answering.

    Either it holds ECHO_WORDS words in a row (or all, if there are fewer, but at least four) of the system prompt; or
    at least ECHO_SHARE of its words stand in runs of that length taken from the user's prompt, or it is the prompt.
    """
    words, asked, told = (
        [word.casefold() for word in _WORD.findall(part)] for part in (text, prompt, system)
    )
    if len(told) >= N_GRAM and any(_taken(words, told, min(ECHO_WORDS, len(told)))):
        return True
    if not words or not asked:
        return False
    return words == asked or sum(_taken(words, asked, ECHO_WORDS)) >= ECHO_SHARE * len(words)


def _taken(words: list[str], source: list[str], length: int) -> list[bool]:
    """Which words stand in a run of `length` words that `source` has too."""
    runs = {tuple(source[i : i + length]) for i in range(len(source) - length + 1)}
    marks = [False] * len(words)
    for i in range(len(words) - length + 1):
        if tuple(words[i : i + length]) in runs:
            marks[i : i + length] = [True] * length
    return marks


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

"""Which generated texts are degenerate."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cfsp.text.degeneration import degenerate, system_text

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PROSE = (
    "The lighthouse stood at the end of the pier, and every evening the keeper climbed its stairs to light the lamp. "
    "One night a storm came in from the west. A small boat, lost in the rain, saw the light and turned for the harbour."
)
CODE = """def larger(a, b):
    if a > b:
        return a
    return b


for i in range(10):
    print(f"{i:>3} | {larger(i, 10 - i):>3} | {'=' * i}")
"""
GOOD = {
    "prose": PROSE,
    "short": "4",
    "one word": "Paris.",
    "emoji": "\N{GRINNING FACE}",
    "code": CODE,
    "list": "1. Apples\n2. Oranges\n3. Bananas\n4. Pears\n5. Cherries",
    "counting": ", ".join(map(str, range(1, 60))),
    "numbers": "3.14159 2.71828 1.41421 1.61803 0.57721 1.20205 0.91596 2.68545",
    "table": "| name | age |\n|------|-----|\n| Ann | 34 |\n| Bob | 27 |\n| Eve | 51 |",
    "refrain": "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, life is but a dream.",
    "chinese": "天空之所以是蓝色的,是因为阳光进入大气层时,波长较短的蓝光比其他颜色更容易被散射。",
    "japanese": "空が青いのは、太陽の光が大気に入ると、波長の短い青い光がほかの色よりも強く散乱されるからです。",
    "russian": "Небо голубое, потому что коротковолновый свет рассеивается в атмосфере сильнее, чем длинноволновый.",  # noqa: RUF001
    "thai": "ท้องฟ้าเป็นสีฟ้าเพราะแสงสีน้ำเงินกระเจิงมากกว่าแสงสีอื่นในชั้นบรรยากาศ",
    "german": "Die Donaudampfschifffahrtsgesellschaft fährt täglich, außer an Feiertagen, von Passau nach Wien.",
    "cut off character": "Das Wetter ist sch\ufffd",
    "accents": "Où est passé l'été ? Il a été très court cette année, déjà l'hiver s'annonce à Québec.",
}
LOOPS = {
    "sentence": "The answer is four. " * 8,
    "after a good start": PROSE + " And then it was dark again." * 6,
    "cut in a period": ("I am sorry, I cannot do that. " * 5)[:-9],
    "counted": "".join(f"Step {i}: open the box and look inside. " for i in range(1, 9)),
    "character": "Well" + "o" * 80,
    "chinese": "今天天气很好。" * 12,
    "mostly repeated": " ".join(
        f"{name} went to the market to buy some bread and then {name} went home again."
        for name in ("Ann", "Ann", "Bob", "Ann", "Bob", "Bob", "Ann", "Ann", "Bob")
    ),
}
BROKEN = {
    "replacement": "The \ufffd\ufffd of the \ufffd\ufffd\ufffd is \ufffd and so on",
    "mojibake": "C'est dÃ©jÃ\u00a0 l'Ã©tÃ© Ã\u00a0 QuÃ©bec, l'annÃ©e derniÃ¨re",
    "symbols": "}{;;)(*&^%$ #@!~ <>?:{} |+_) (*&^ %$#@ a",
    "endless word": "the Antidisestablishmentarianpneumonoultramicroscopicsilicovolcano of it",
    "no vowels": "xqzrt bcdfg the hjklm nprst vwxzz is qwrtp sdfgh",
}


TEXTS: list[tuple[str | None, str]] = [
    *((None, text) for text in GOOD.values()),
    *(("loop", text) for text in LOOPS.values()),
    *(("non_language", text) for text in BROKEN.values()),
    *(("empty", text) for text in ("", " \n\t", "...", '"', "---\n---")),
]


@pytest.mark.parametrize(("reason", "text"), TEXTS)
def test_why_a_text_is_degenerate(reason: str | None, text: str) -> None:
    assert degenerate(text, "Tell me something.", SYSTEM) == reason


def test_the_system_prompt_is_not_an_answer() -> None:
    text = f"I see. {SYSTEM}."
    assert degenerate(text, "List three fruits.", SYSTEM) == "echo"
    assert degenerate(text, "List three fruits.", "") is None
    assert degenerate("I am a helpful assistant.", "Who are you?", SYSTEM) is None


def test_the_prompt_is_not_an_answer_but_may_be_quoted() -> None:
    prompt = "Edit the following paragraph: she didnt remembre where is her purse so i thinks its in the car"
    assert degenerate(prompt.upper(), prompt) == "echo"
    answer = "She didn't remember where her purse was, so I think it's in the car. You had written: she didnt remembre"
    assert degenerate(answer, prompt) is None
    assert degenerate("What is 2+2?", "What is 2+2?") == "echo"
    assert degenerate("What is 2+2? It is 4.", "What is 2+2?") is None


def test_system_prompt_of_a_template(tiny_tokenizer: Any) -> None:
    assert system_text(tiny_tokenizer, "Hello") == ""
    speaking = copy.deepcopy(tiny_tokenizer)
    speaking.chat_template = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{tiny_tokenizer.chat_template}"
    assert system_text(speaking, "Hello") == SYSTEM
    speaking.chat_template = None
    assert system_text(speaking, "Hello") == ""

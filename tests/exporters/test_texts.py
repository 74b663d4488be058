"""Tokenizers and chats in every runtime: split and rendered as the checkpoint's, and ended where it ends them."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, processors, trainers

from cfsp.errors import InputError, LimitError
from cfsp.text.conversations import CONVERSATIONS, Conversation, rendered, turn_end
from cfsp.text.tokens import encode
from exporters.export_record import ExportRecord
from exporters.gguf import runtime
from exporters.gguf.export import export_gguf
from exporters.gguf.writer import check_tokenizer
from exporters.onnx import companions
from exporters.onnx.export import export_onnx
from exporters.proof import read_chats

VocabularyFile = Callable[[Path, Any], Path]
TEXT = [
    "The quick brown fox jumps over the lazy dog, then it sleeps for 12345 hours.",
    "It's what they'll say: we've counted 1, 22 and 333 of them.",
    "def add(a, b):\n    return a + b  # the sum\n",
    "Der Fu\u00df, \u00fcber caf\u00e9 und na\u00efve \u4f60\u597d \u4e16\u754c.",
] * 4


def byte_level(given: Any, *, add_bos: bool = True, nfc: bool = False) -> Any:
    """As Llama 3 has it."""
    tokenizer = copy.deepcopy(given)
    backend = tokenizer.backend_tokenizer
    if nfc:
        backend.normalizer = normalizers.NFC()
    if add_bos:
        bos = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        backend.post_processor = processors.TemplateProcessing(f"{bos[0][0]} $A", special_tokens=bos)
    return tokenizer


def sentencepiece(*, prefix: bool) -> Any:
    """As Llama 2 has it: byte fallback, spaces as U+2581."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
        for m in json.loads(trained.to_str())["model"]["merges"]
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {name: index for index, name in enumerate(names)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix else space
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(("add_bos", "nfc"), [(True, False), (False, True)])
def test_byte_level(
    tiny_tokenizer: Any, vocabulary_file: VocabularyFile, tmp_path: Path, add_bos: bool, nfc: bool
) -> None:
    tokenizer = byte_level(tiny_tokenizer, add_bos=add_bos, nfc=nfc)
    path = vocabulary_file(tmp_path / "v.gguf", tokenizer)
    assert check_tokenizer(path, tokenizer) > 60
    with runtime.open_vocabulary(path) as opened:
        assert (opened.tokenize("x", add_special=True)[0] == opened.bos_token) is add_bos
        assert opened.bos_token == tokenizer.bos_token_id
        assert opened.is_end_of_generation(tokenizer.eos_token_id)
        text = "It's 12345 caf\u00e9s \U0001f600\n"
        assert opened.detokenize(opened.tokenize(text)) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(vocabulary_file: VocabularyFile, tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece(prefix=prefix)
    path = vocabulary_file(tmp_path / "v.gguf", tokenizer)
    assert check_tokenizer(path, tokenizer) > 60
    assert check_tokenizer(path, tokenizer, TEXT) > 4


def test_another_vocabulary_is_noticed(
    tiny_tokenizer: Any, vocabulary_file: VocabularyFile, tmp_path: Path
) -> None:
    path = vocabulary_file(tmp_path / "v.gguf", byte_level(tiny_tokenizer))
    with pytest.raises(LimitError, match="token ids"):
        check_tokenizer(path, byte_level(tiny_tokenizer, add_bos=False))


def test_other_kinds_are_refused(vocabulary_file: VocabularyFile, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(InputError, match=r"WordLevel.*BPE"):
        vocabulary_file(tmp_path / "v.gguf", tokenizer)


TinyModel = Callable[..., tuple[Any, Any]]


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        ("import time; time.sleep(60)", "it has not answered within 3 s"),
        ("print('{\"stops\": [')", 'its answer cannot be read: {"stops": ['),
        ("raise SystemExit(7)", "it ended with status 7"),
        (None, ""),
    ],
    ids=["no end", "half an answer", "an end", "several templates"],
)
def test_what_genai_does_not_answer_is_a_warning(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str | None, said: str
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the onnx extra is not installed")
    model, tokenizer = tiny_model()
    if worker:
        monkeypatch.setattr(companions, "python_module", lambda _: [sys.executable, "-c", worker])
        monkeypatch.setattr(companions, "_SECONDS", 3.0)
    else:
        tokenizer.chat_template = dict.fromkeys(("default", "tool_use"), tokenizer.chat_template)
    (record,) = export_onnx(saved(model, tokenizer, tmp_path / "tiny"), tmp_path / "onnx", ["fp32"])
    assert record.chats == ()
    assert any(f"GenAI cannot read the folder's tokenizer: {said}" in warning for warning in record.warnings)


def test_what_ends_no_answer(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([tokenizers.AddedToken("<|plain|>", special=False)])
    part = "{% for part in m.content if part is mapping %}{{ part.text }}{% endfor %}"
    for template in (
        "{% for m in messages %}<|im_start|>" + part + "<|im_end|>{% endfor %}",
        "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}<|plain|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}",
        "{{ raise_exception('no chats') }}",
    ):
        tokenizer.chat_template = template
        assert turn_end(tokenizer) is None


def test_both_families_say_which_chats_they_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    pytest.importorskip("onnxruntime_genai", reason="the onnx extra is not installed")
    folder = saved(*tiny_model(), tmp_path / "tiny")
    names = tuple(conversation.name for conversation in CONVERSATIONS)
    for record in exported(folder, tmp_path):
        assert record.chats == names
        assert not record.warnings


def exported(folder: Path, output: Path) -> Sequence[ExportRecord]:
    return (
        *export_gguf(folder, output / "gguf", ["f32"]),
        *export_onnx(folder, output / "onnx", ["fp32"]),
    )


def test_what_a_runtime_reads_otherwise_is_told(tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the onnx extra is not installed")
    model, tokenizer = tiny_model()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | replace('a', 'o') | title }}<|im_end|>{% endfor %}"
        "{{ tools | tojson(separators=(',', ':')) if tools }}"
    )
    (record,) = export_onnx(saved(model, tokenizer, tmp_path / "tiny"), tmp_path / "onnx", ["fp32"])
    told = [warning for warning in record.warnings if warning.startswith("GenAI reads a chat with")]
    assert len(told) == len(CONVERSATIONS) - len(record.chats) > 0


def test_answers_that_end_where_generation_does_not(tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    model, tokenizer = tiny_model()
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == "<|im_end|>"
    gguf, onnx = exported(saved(model, tokenizer, tmp_path / "tiny"), tmp_path)
    said = "the chat template ends an answer with <|im_end|>, at which generation does not stop"
    assert gguf.warnings == (said,)  # it is the file's end of a turn, so llama.cpp stops there
    assert onnx.warnings == (f"{said}, nor does GenAI",)


def test_differences_are_named_by_their_place(tiny_tokenizer: Any) -> None:
    ids = {name: encode(tiny_tokenizer, text) for name, text in rendered(tiny_tokenizer).items()}

    def read(conversation: Conversation, _: str) -> list[int]:
        if conversation.name == "tools":
            raise ValueError("no tools here")
        whole = ids[conversation.name]
        return whole[:-1] if conversation.name == "a question" else whole

    found = read_chats("It", tiny_tokenizer, {0, 2, 450}, read, lambda token: token == 2)
    assert len(found.equal) == len(CONVERSATIONS) - 2
    question, tools, stop = found.warnings
    assert question.startswith(
        f"It reads a chat with a question otherwise: from token {len(ids['a question']) - 1} on"
    )
    assert tools.endswith("otherwise: no tools here")
    assert stop == "It does not stop at <|endoftext|>, token 450, where the checkpoint's texts end"
    for token in (-1, 2**40):  # that no vocabulary has
        found = read_chats("It", tiny_tokenizer, (), lambda *_, token=token: [token], bool)
        assert found.equal == ()
        assert any(f"and it ['token {token}']" in warning for warning in found.warnings)
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    assert rendered(plain) == {}
    assert turn_end(plain) is None

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch

from cfsp.errors import InputError
from cfsp.evaluation.loss import respelled
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.text import self_sampling
from cfsp.text.calibration import load_calibration
from cfsp.text.self_sampling import sample_windows
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.tokens import load_documents, token_windows

CHAT = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."}]


def as_loaded(tiny_model: Any) -> LoadedModel:
    model, tokenizer = tiny_model("llama", max_position_embeddings=512)
    return LoadedModel(model, tokenizer, ModelSource(reference="tiny", kind="folder", name="tiny"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_documents_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n two ü\n", encoding="utf-8")
    assert [d.text for d in load_documents(str(path))] == ["one\n\n two ü\n"]
    rows = [{"text": "alpha"}, {"text": "one\u2028two"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "alpha"}\n{"text": "one\u2028two"}\n', encoding="utf-8")
    for found in (load_documents(str(path)), load_documents(str(tmp_path / "a.parquet"))):
        assert [document.text for document in found] == ["alpha", "one\u2028two"]
    parts = [{"type": "text", "text": "An "}, {"type": "text", "text": "apple."}]
    chats = [[CHAT[0], {"role": "assistant", "content": content}] for content in (parts, None)]
    documents = load_documents(str(write_rows(tmp_path / "c.jsonl", [{"messages": chat} for chat in chats])))
    assert [d.messages and d.messages[1]["content"] for d in documents] == ["An apple.", ""]


def test_parquet_is_read_no_further_than_text_may_be_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pyarrow.table({"text": ["a" * 2**12] * 2**12})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2**16
    monkeypatch.setattr("cfsp.text.tokens.MAX_TEXT_BYTES", 2**20)
    with pytest.raises(InputError, match=r"a.parquet is too large.*up to 1 MiB"):
        load_documents(str(tmp_path / "a.parquet"))
    # Other columns are not read, however large.
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a"], "bytes": [b"0" * 2**21]}), tmp_path / "b.parquet"
    )
    assert [document.text for document in load_documents(str(tmp_path / "b.parquet"))] == ["a"]


def test_a_data_set_is_read_no_further_than_text_may_be_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("cfsp.text.tokens.MAX_TEXT_BYTES", 2**20)
    rows = [{"text": "a" * 2**12, "other": "b" * 2**13} for _ in range(2**9)]
    folder = tmp_path / "texts"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows)
    with pytest.raises(InputError, match=r"texts is too large; allowed: up to 1 MiB.*texts:train\[:1%\]"):
        load_documents(f"hub:{folder}")
    # Other columns do not count.
    documents = load_documents(f"hub:{folder}:train[:25%]")
    assert [document.text for document in documents] == [row["text"] for row in rows[:128]]


def test_chats_are_rendered_in_the_models_template(tiny_model: Any, tmp_path: Path) -> None:
    loaded = as_loaded(tiny_model)
    path = write_rows(tmp_path / "c.jsonl", [{"messages": CHAT}] * 3)
    windows = token_windows(str(path), loaded.tokenizer, seqlen=16)
    text = loaded.tokenizer.apply_chat_template(CHAT, tokenize=False) * 3
    expected = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert windows.ids.flatten().tolist() == expected[: windows.ids.numel()]


def test_windows_are_cut_in_order_from_one_tokenization(tiny_model: Any, tmp_path: Path) -> None:
    loaded = as_loaded(tiny_model)
    path = tmp_path / "a.txt"
    path.write_text("The quick brown fox. " * 40, encoding="utf-8")
    stream = loaded.tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = token_windows(str(path), loaded.tokenizer, seqlen=10, max_windows=2, skip_windows=1)
    assert windows.ids.tolist() == [stream[10:20], stream[20:30]]
    windows = token_windows(BUILTIN_TEXT, loaded.tokenizer, seqlen=128, max_windows=3)
    assert windows.ids.shape == (3, 128)


def starting(tokenizer: Any) -> Any:
    """A tokenizer that puts its start token before a text."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_windows_begin_with_the_start_token_of_a_tokenizer_that_puts_one_there(
    tiny_model: Any, tmp_path: Path
) -> None:
    plain, started = as_loaded(tiny_model), as_loaded(tiny_model)
    starting(started.tokenizer)
    path = tmp_path / "a.txt"
    path.write_text("The quick brown fox. " * 40, encoding="utf-8")
    bos = started.tokenizer.bos_token_id
    cut = [token_windows(str(path), one.tokenizer, seqlen=10, max_windows=2).ids for one in (plain, started)]
    drawn = [load_calibration([str(path)], one, nsamples=3, seqlen=16).input_ids for one in (plain, started)]
    for without, windows in (cut, drawn):
        assert not (without == bos).any()
        assert (windows[:, 0] == bos).all()
        assert torch.equal(windows[:, 1:], without[:, 1:])


def test_a_start_token_is_the_other_vocabularys_or_what_parts_its_texts(tiny_model: Any) -> None:
    _, plain = tiny_model()
    started = starting(tiny_model()[1])
    window = torch.tensor([started.bos_token_id, *started("The fox", add_special_tokens=False)["input_ids"]])
    assert respelled(window, started, started).ids.tolist() == window.tolist()
    other = respelled(window, started, plain)
    assert other.ids.tolist() == [plain.eos_token_id, *window[1:].tolist()]
    assert other.n_context == 1
    back = respelled(window[1:], plain, started)
    assert back.ids.tolist() == window.tolist()
    assert back.n_context == 2


def test_sources_share_the_windows_equally(tiny_model: Any, tmp_path: Path) -> None:
    loaded = as_loaded(tiny_model)
    chats = write_rows(tmp_path / "c.jsonl", [{"messages": CHAT}] * 60)
    text = tmp_path / "a.txt"
    text.write_text("fox " * 400, encoding="utf-8")
    result = load_calibration([str(chats), str(text)], loaded, nsamples=5, seqlen=32, seed=1)
    assert result.input_ids.shape == (5, 32)
    marker = loaded.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert [(row == marker).any().item() for row in result.input_ids] == [True, True, True, False, False]
    again = load_calibration([str(chats), str(text)], loaded, nsamples=5, seqlen=32, seed=1)
    other = load_calibration([str(chats), str(text)], loaded, nsamples=5, seqlen=32, seed=2)
    assert torch.equal(result.input_ids, again.input_ids)
    assert result.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no usable text"),
        ("a.txt", "too short", "tokens, too few for 4 windows of 32"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.jsonl", "", "no usable text"),
        ("a.jsonl", '{"text": ""}\n', "no usable text"),
        ("a.jsonl", '{"txet": "a"}\n', "line 1: no `text`"),
        ("a.jsonl", '{"text": "a"}\n{oops\n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: `messages`"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 5}]}\n', "line 1: `messages`"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}\n',
            "line 1: `messages`",
        ),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.docx", "x", "allowed: a file ending in .txt"),
    ],
)
def test_unusable_text_is_named(
    tiny_model: Any, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        load_calibration([str(path)], as_loaded(tiny_model), nsamples=4, seqlen=32)


def test_missing_file_and_sizes(tiny_model: Any) -> None:
    loaded = as_loaded(tiny_model)
    with pytest.raises(InputError, match="does not exist"):
        load_calibration(["nowhere.txt"], loaded, nsamples=1, seqlen=32)
    with pytest.raises(InputError, match=r"seqlen.*2 to 512"):
        load_calibration(["self"], loaded, seqlen=4096)
    with pytest.raises(InputError, match="nsamples"):
        load_calibration(["self"], loaded, nsamples=0)


def test_text_that_comes_with_the_package_is_not_sampled_again(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = as_loaded(tiny_model)
    monkeypatch.setattr(self_sampling, "FOLDER", tmp_path / "package")
    monkeypatch.setattr(self_sampling, "MAX_REPLY_TOKENS", 16)
    monkeypatch.setattr(self_sampling, "MAX_USER_TOKENS", 8)
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    kept = torch.arange(64) % 300
    (tmp_path / "package").mkdir()
    self_sampling.write_written(self_sampling.text_origin(loaded, 3), kept, {"model": "tiny"})
    windows = sample_windows(loaded, nsamples=3, seqlen=16, seed=3)
    assert torch.equal(windows, kept[:48].view(3, 16))
    assert not (tmp_path / "cache").exists()
    for asked in ({"nsamples": 5, "seed": 3}, {"nsamples": 3, "seed": 4}):
        sampled = sample_windows(loaded, seqlen=16, **asked)
        assert sampled.shape == (asked["nsamples"], 16)
        assert not torch.equal(sampled.flatten()[:48], kept[:48])
    assert not torch.equal(sample_windows(loaded, nsamples=3, seqlen=16, seed=3, use_written=False), windows)
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[5] += 1
    assert not torch.equal(sample_windows(loaded, nsamples=3, seqlen=16, seed=3), windows)


@pytest.mark.everything
def test_the_built_in_model_wrote_the_text_that_comes_with_the_package(smollm2_gguf: Path) -> None:
    loaded = load_model("smollm2-135m")
    found = [self_sampling.read_written(self_sampling.text_origin(loaded, seed), 8192) for seed in (0, 1)]
    assert found[0] is not None
    assert found[1] is not None
    assert not torch.equal(*found)
    for ids in found:
        text = loaded.tokenizer.decode(ids)
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
        window = ids[None, :512]
        with torch.inference_mode():
            loss = loaded.model(window, labels=window).loss
            shuffled = window[:, torch.randperm(512, generator=torch.Generator().manual_seed(0))]
            assert loss < 4 < loaded.model(shuffled, labels=shuffled).loss - 2

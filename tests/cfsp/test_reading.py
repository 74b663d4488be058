"""What somebody else wrote is read within bounds: hostile files end in one InputError and never in anything else."""

from __future__ import annotations

import base64
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsp.errors import InputError, PhonereadyError
from cfsp.models.config_file import read_model_config
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import config_from_gguf
from cfsp.models.gguf_tokenizer import tokenizer_from_gguf
from cfsp.models.reference import load_folder, load_folder_tokenizer, load_model
from cfsp.models.weights import safetensors_files
from cfsp.reading import as_input_error, parse_json, parse_toml
from cfsp.text.tokens import encode, load_documents
from exporters.checkpoint_reader import open_tensors, read_config

DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = [
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "\0", "\ud800", "1" * 5000, "\x1b[31m"),
    *([], [None], [[]], [1] * 50, {}, {"a": None}),
]
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def folder(tiny_folder: Any) -> Path:
    """A folder with a model of two blocks; copied before it is changed."""
    made: Path = tiny_folder(num_hidden_layers=2)
    return made


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "changed"))


@pytest.fixture(scope="module")
def gguf_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder's model as GGUF."""
    from exporters.gguf.export import export_gguf

    out = tmp_path_factory.mktemp("gguf") / "out"
    (record,) = export_gguf(folder, out, ["f32"])
    return Path(out / record.file)


def test_documents_beyond_their_bounds_name_the_place() -> None:
    for text in ("a = " + DEEP, "a = " + "9" * 5000, "a = nan", "a = inf", "a ="):
        with pytest.raises(InputError, match=r"^x\.toml"):
            parse_toml(text, "x.toml")
    for text, message in (
        (DEEP, "nested too deeply"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
        ('{"a": [NaN]}', "a, 0 is no number"),
        ('{"a": -Infinity}', "a is no number"),
        ('{"a": 1e400}', "a is no number"),
        ('{"a": ' + "9" * 400 + "}", "a is no number"),
        ('{"a": "\\ud800"}', "half of a character"),
        ('{"\\udfff": 1}', "half of a character"),
        ('{"a": ', "not valid JSON"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            parse_json(text, "x.json")
        assert str(caught.value).startswith("x.json")
        assert len(str(caught.value)) < 400


def test_a_panic_of_a_library_in_rust_is_an_input_error_and_an_interruption_is_none() -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(InputError, match="file: told"), as_input_error("file"):
        raise PanicException("told")
    with pytest.raises(KeyboardInterrupt), as_input_error("file"):
        raise KeyboardInterrupt


CONFIGS: list[dict[str, Any]] = [
    {"num_attention_heads": 0},
    {"num_attention_heads": 7, "head_dim": None},
    {"num_key_value_heads": 3},
    {"head_dim": 15},
    {"num_hidden_layers": 10**7},
    {"max_position_embeddings": 0},
    {"rms_norm_eps": -1.0},
    {"rms_norm_eps": float("nan")},
    {"rope_parameters": {"rope_type": "yarn", "factor": 0, "rope_theta": 1e4}},
    {"dtype": "evil"},
    {"quantization_config": "x"},
    {"no_rope_layers": ["x", "x", "x", "x"]},
    {"embedding_multiplier": "x", "model_type": "granite"},
    {"no_rope_layers": [1]},
    {"bos_token_id": "x"},
    {"eos_token_id": 10**6},
    {"hidden_act": ["silu"]},
    {"model_type": ["llama"]},
]


def test_a_config_that_no_library_should_see_is_refused_by_key(changed: Path) -> None:
    file = changed / "config.json"
    stated = json.loads(file.read_text())
    for change in CONFIGS:
        file.write_text(json.dumps(stated | change))
        named = next(iter(change)).replace("_parameters", "")
        for read in (read_model_config, read_config, load_model):
            with pytest.raises(InputError, match=named):
                read(changed)


INDEXES: list[Any] = [
    [],
    {},
    {"weight_map": None},
    {"weight_map": {"a": ["b"]}},
    {"weight_map": {}},
    {"weight_map": {"a": "../outside.safetensors"}},
    {"weight_map": {"a": "a\0b.safetensors"}},
    {"weight_map": {"a": "pytorch_model.bin"}},
]


def test_an_index_names_only_safetensors_in_its_own_folder(changed: Path) -> None:
    shutil.move(changed / "model.safetensors", changed.parent / "outside.safetensors")
    for index in INDEXES:
        (changed / "model.safetensors.index.json").write_text(json.dumps(index))
        for read in (safetensors_files, lambda folder: open_tensors(folder).__enter__()):
            with pytest.raises(InputError, match=r"index\.json") as caught:
                read(changed)
            assert len(str(caught.value)) < 800


def test_metadata_that_llama_cpp_would_abort_at_is_refused_by_key(tmp_path: Path) -> None:
    path, kinds = tmp_path / "bad.gguf", gguf.GGUFValueType
    for key, value, kind in (
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), kinds.FLOAT32),
        ("llama.block_count", 0, kinds.UINT32),
        ("llama.block_count", 4_000_000_000, kinds.UINT32),
        ("tokenizer.ggml.bos_token_id", 1.5, kinds.FLOAT32),
        ("tokenizer.ggml.eos_token_id", [1], kinds.ARRAY),
        ("llama.context_length", "x", kinds.STRING),
        ("tokenizer.ggml.tokens", 5, kinds.UINT32),
        ("tokenizer.ggml.model", ["gpt2"], kinds.ARRAY),
        ("general.name", 5, kinds.UINT32),
    ):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_key_value(key, value, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(InputError, match=key.removeprefix("llama.")):
            read_gguf(path)


def _precompiled(charsmap: bytes) -> dict[str, Any]:
    return {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    }


_GROWING = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 2000}
_PIECES = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0}
TOKENIZERS: list[dict[str, Any]] = [
    _precompiled(b"\xff" * 64),
    _precompiled(b"\0"),
    {"normalizer": {"type": "Sequence", "normalizers": [_GROWING] * 3}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}},
    {"model": {**_PIECES, "vocab": {"a": 0}, "unk_token": "zz"}},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
    {"id beyond memory": 2**33},
]


def test_a_tokenizer_that_cannot_take_a_text_is_an_input_error(
    changed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = changed / "tokenizer.json"
    stored = file.read_text()
    for change in TOKENIZERS:
        state = json.loads(stored) | change
        if number := state.pop("id beyond memory", None):
            state["model"]["vocab"]["zz"] = number
        file.write_text(json.dumps(state))
        with pytest.raises(InputError):
            encode(load_folder_tokenizer(changed), "The quick brown fox")
        assert "panicked" not in capfd.readouterr().err


def _load_as_floats(folder: Path) -> object:
    return load_folder(folder, dtype=torch.float32)


def test_a_tokenizers_and_a_generations_settings_are_checked_before_transformers_reads_them(
    changed: Path,
) -> None:
    for name, content in (
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", DEEP),
        ("special_tokens_map.json", '{"eos_token": [1]}'),
        ("generation_config.json", DEEP),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("generation_config.json", '{"eos_token_id": 1' + "0" * 40 + "}"),
    ):
        sound = (changed / name).read_text() if (changed / name).exists() else None
        (changed / name).write_text(content)
        read = load_folder_tokenizer if not name.startswith("generation") else _load_as_floats
        with pytest.raises(InputError, match=name.removesuffix(".json")):
            read(changed)
        if sound is None:
            (changed / name).unlink()
        else:
            (changed / name).write_text(sound)


def test_a_row_that_is_no_text_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line in (
        '{"text": ["a"]}',
        '{"text": {"a": "b"}}',
        '{"text": 5}',
        '{"text": "\\ud800 lonely"}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"text": ' + DEEP + "}",
        '{"text": ' + "9" * 9000 + "}",
    ):
        path.write_text('{"text": "sound"}\n' + line + "\n")
        with pytest.raises(InputError, match=r"a\.jsonl, line 2"):
            load_documents(str(path))


# ---- fuzzing: an error of ours, or success


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value[:6]))
    return found + [node for key, inner in entries for node in _nodes(inner, (*path, key))]


def _mutated(value: Any, rnd: random.Random) -> Any:
    """A copy in which one or two places are gone, hostile, or new."""
    changed = json.loads(json.dumps(value))
    for _ in range(rnd.choice((1, 1, 2))):
        path = rnd.choice(_nodes(changed))
        place = changed
        for key in path[:-1]:
            place = place[key]
        kind = rnd.random()
        if kind < 0.15:
            del place[path[-1]]
        elif kind < 0.2 and isinstance(place, dict):
            place["evil"] = rnd.choice(HOSTILE)
        else:
            place[path[-1]] = rnd.choice(HOSTILE)
    return changed


def _mutated_bytes(content: bytes, rnd: random.Random, head: int) -> bytes:
    """A copy that is cut, or has other bytes in its first `head`."""
    data = bytearray(content)
    place = rnd.randrange(head - 8)
    kind = rnd.random()
    if kind < 0.2:
        return bytes(data[: rnd.randrange(len(data))])
    if kind < 0.5:
        data[place : place + 8] = struct.pack(
            "<Q", rnd.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
        )
    elif kind < 0.6:
        del data[place : place + rnd.randrange(1, 64)]
    else:
        for _ in range(rnd.choice((1, 2, 8))):
            data[rnd.randrange(head)] = rnd.randrange(256)
    return bytes(data)


def _tried(read: Callable[[], object]) -> None:
    """Run a reader: it succeeds, or tells in one line what is wrong."""
    told = ""
    try:
        read()
    except PhonereadyError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 5000


seeds = st.integers(0, 2**32).map(random.Random)


@FUZZ
@given(rnd=seeds)
def test_fuzz_config(rnd: random.Random, folder: Path, tmp_path: Path) -> None:
    mutated = _mutated(json.loads((folder / "config.json").read_text()), rnd)
    for file in folder.iterdir():
        if not (tmp_path / file.name).exists():
            shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(mutated))
    _tried(lambda: read_config(tmp_path))
    _tried(lambda: load_model(tmp_path))


@FUZZ
@given(rnd=seeds)
def test_fuzz_safetensors(rnd: random.Random, folder: Path, tmp_path: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0]
    (tmp_path / "model.safetensors").write_bytes(_mutated_bytes(content, rnd, head))
    shutil.copy(folder / "config.json", tmp_path)
    _tried(lambda: load_folder(tmp_path, dtype=torch.float32))

    def read_all() -> None:
        with open_tensors(tmp_path) as tensors:
            for name in sorted(tensors.handles):
                tensors.read(name, (64,))

    _tried(read_all)


@FUZZ
@given(rnd=seeds)
def test_fuzz_gguf(rnd: random.Random, gguf_file: Path, tmp_path: Path) -> None:
    content = gguf_file.read_bytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(_mutated_bytes(content, rnd, min(len(content), 12_000)))

    def read() -> None:
        file = read_gguf(path)
        config_from_gguf(file)
        encode(tokenizer_from_gguf(file), "The quick brown fox")

    _tried(read)

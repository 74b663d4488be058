"""export_gguf as a whole: every architecture and type, metadata, limits, sizes, and nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch

from cfsp.errors import InputError, LimitError
from cfsp.models.checkpoint import read_checkpoint_info, save_checkpoint
from cfsp.models.families import FAMILIES
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import SAMPLING, sampling_of_gguf
from cfsp.models.reference import load_model
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.records import read_record
from exporters import job as job_module
from exporters.checkpoint_reader import read_config
from exporters.export_record import ExportManifest, ExportRecord, ParityLimits, ParityReport
from exporters.families import required_multiple
from exporters.family import ExportOptions
from exporters.gguf import architecture, matrix
from exporters.gguf import writer as writer_module
from exporters.gguf.architecture import read_layout
from exporters.gguf.export import export_gguf
from exporters.gguf.files import Files, draft_gguf
from exporters.gguf.quants import QUANTS, Quant
from exporters.gguf.tensors import size_template
from exporters.job import MANIFEST_FILE, read_provenance

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

WIDTHS = (96, 64, 128, 40)
# Next-token distributions of random weights are nearly flat, so quantization moves them far.
LOOSE = {name: ParityLimits(kl_mean=10.0) for name in QUANTS if name not in ("f32", "f16")}
WINDOWS = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
NEEDING = [name for name, quant in QUANTS.items() if quant.needs_imatrix]
MakeCheckpoint = Callable[..., Path]


def export(checkpoint: Path, output: Path, *quants: str, **settings: Any) -> tuple[ExportRecord, ...]:
    settings = {"limits": LOOSE, "parity_windows": WINDOWS, "n_threads": 1} | settings
    return export_gguf(checkpoint, output, quants, ExportOptions(**settings))


@pytest.fixture(scope="module")
def pruned(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("llama", widths=WIDTHS)


@pytest.fixture(scope="module")
def made(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ExportRecord]]:
    """Every quantization of a pruned model."""
    folder = tmp_path_factory.mktemp("made") / "out"
    return folder, {record.quant: record for record in export(pruned, folder, *QUANTS, name="My Phone Model")}


@pytest.fixture(scope="module")
def wide(make_checkpoint: MakeCheckpoint) -> Path:
    """Rows of 256 and 512: no type falls back."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
    return make_checkpoint("llama", widths=(256, 512), num_hidden_layers=2, **sizes)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_all_quantizations_of_a_pruned_model(made: tuple[Path, dict[str, ExportRecord]]) -> None:
    folder, records = made
    assert list(records) == list(QUANTS)
    assert names_in(folder) == {f"My Phone Model-{name}.gguf" for name in QUANTS} | {MANIFEST_FILE}
    assert read_record(ExportManifest, folder / MANIFEST_FILE).exports == tuple(records.values())
    assert records["f32"].parity.max_logit_diff <= 1e-3
    for record in records.values():
        path = folder / record.file
        assert record.architecture == "deci"
        assert record.shape.ffn_widths == WIDTHS
        assert record.file_bytes == path.stat().st_size
        assert sum(record.tensor_types.values()) == len(gguf.GGUFReader(path).tensors)
        assert metadata(path)["general.file_type"] == QUANTS[record.quant].ftype
    sizes = [records[name].file_bytes for name in ("f32", "f16", "Q8_0", "Q4_0")]
    assert sizes == sorted(sizes, reverse=True)


def test_fallbacks_are_warned_of(made: tuple[Path, dict[str, ExportRecord]]) -> None:
    # 40 divides into no block, 64 only into blocks of 32.
    record = made[1]["Q4_K_M"]
    assert "stored as F16 instead of Q4_K, for rows of 40: blk.3.ffn_down.weight" in record.warnings
    said = r"stored as Q5_0 instead of Q4_K, for rows of 64: blk\.0\.\w+\.weight and \d+ more"
    assert any(re.fullmatch(said, warning) for warning in record.warnings)
    assert record.tensor_types["F16"] == 1


def test_metadata(pruned: Path, made: tuple[Path, dict[str, ExportRecord]]) -> None:
    folder, records = made
    found = metadata(folder / records["Q8_0"].file)
    expected = {
        "general.architecture": "deci",
        "general.name": "My Phone Model",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "Base-1B",
        "general.base_model.0.organization": "owner",
        "phoneready.source_model": "Dense-1B",
        "phoneready.source_sha256": "a" * 64,
        "phoneready.checkpoint_sha256": records["Q8_0"].checkpoint_sha256,
        "phoneready.intermediate_sizes": list(WIDTHS),
        "deci.feed_forward_length": list(WIDTHS),
        "deci.attention.head_count": 4,
        "deci.attention.head_count_kv": 2,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["deci.rope.freq_base"] == read_config(pruned).rope_theta
    assert found["tokenizer.ggml.tokens"][found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert "<|im_start|>" in found["tokenizer.chat_template"]
    assert "phoneready.tool_version" in found


def test_rows_of_whole_blocks_are_stored_as_asked(wide: Path, tmp_path: Path) -> None:
    assert required_multiple(["Q4_0", "Q8_0"]) == 32
    assert required_multiple(["Q4_K_M", "f16"]) == required_multiple(["IQ2_M"]) == 256
    rows = [quant for quant in QUANTS.values() if quant.width_multiple == 256]
    for record, quant in zip(export(wide, tmp_path / "out", *(row.name for row in rows)), rows, strict=True):
        assert not any("instead of" in warning for warning in record.warnings)
        assert quant.base_type in record.tensor_types
        assert record.imatrix_tensors > 0


def test_what_llama_cpp_refuses_to_write_without_importance_matrix(
    make_checkpoint: MakeCheckpoint, wide: Path, tmp_path: Path
) -> None:
    bare = make_checkpoint("llama", moments=False)
    for checkpoint, use in ((bare, True), (make_checkpoint("llama"), False)):
        for name in NEEDING:
            with pytest.raises(InputError, match=rf"importance matrix.*{name}"):
                export(checkpoint, tmp_path / "out", name, use_imatrix=use)
    assert names_in(tmp_path) == set()
    source, *_ = export(wide, tmp_path / "base", "f32")
    refused = []
    for name in ("IQ3_S", "Q2_K", *NEEDING):
        try:
            matrix.quantize(tmp_path / "base" / source.file, tmp_path / "file.gguf", QUANTS[name].ftype)
        except InputError:
            refused.append(name)
    assert refused == NEEDING == ["IQ3_XXS", "IQ2_M"]


def test_importance_matrix_is_used_and_lowers_the_weighted_error(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("qwen3", widths=(96, 64, 128, 32))
    moments = safetensors.torch.load_file(checkpoint / "input_moments.safetensors")
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    modules = {
        "ffn_up": ("mlp.up_proj",),
        "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    }
    errors = []
    for use in (True, False):
        (record,) = export(checkpoint, tmp_path / str(use), "Q4_0", use_imatrix=use)
        assert (record.imatrix_tensors > 0) is use
        assert any("without an importance matrix" in warning for warning in record.warnings) is not use
        tensors = {t.name: t for t in read_gguf(tmp_path / str(use) / record.file).tensors}
        total = 0.0
        for block in range(4):
            for name, parts in modules.items():
                keys = [f"model.layers.{block}.{part}" for part in parts]
                exact = np.concatenate([weights[f"{key}.weight"].numpy() for key in keys])
                lost = tensors[f"blk.{block}.{name}.weight"].dequantize() - exact
                total += float((lost**2 * moments[keys[0]].numpy()).sum())
        errors.append(total)
    assert errors[0] < 0.95 * errors[1]


def _forget_permutation(spec: Any) -> Any:
    return dataclasses.replace(spec, interleave_heads=0)


def _swap_gate_and_up(spec: Any) -> Any:
    swapped = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
    parts = spec.name.split(".")
    return dataclasses.replace(spec, name=".".join(swapped.get(part, part) for part in parts))


def test_what_a_broken_writer_leaves_is_caught(
    make_checkpoint: MakeCheckpoint, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs, rope = writer_module.tensor_specs, architecture.rope_metadata
    other_rope = {"rope_type": "default", "rope_theta": 1000000.0}
    far = make_checkpoint("llama", rope_parameters=other_rope)
    faults: list[tuple[Path, Any, str, Any, str]] = [
        (pruned, writer_module, "tensor_specs", lambda *a: list(map(_forget_permutation, specs(*a))), ""),
        (pruned, writer_module, "tensor_specs", lambda *a: list(map(_swap_gate_and_up, specs(*a))), ""),
        (
            far,
            architecture,
            "rope_metadata",
            lambda c: {k: v for k, v in rope(c).items() if k != "rope.freq_base"},
            "",
        ),
        (pruned, writer_module, "pre_tokenizer_name", lambda _: "llama-bpe", "token ids"),
    ]
    for checkpoint, module, name, fault, said in faults:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(LimitError, match=said or r"max_logit_diff [\d.e+]+ above its limit 0\.001"):
                export(checkpoint, tmp_path / "out", "Q4_0")
    strict = {"Q4_0": ParityLimits(kl_mean=1e-6, same_top1=1.0)}
    with pytest.raises(
        LimitError, match=r"Q4_0\.gguf .*kl_mean \S+ above its limit 1e-06.*same_top1 \S+ below"
    ):
        export(pruned, tmp_path / "out", "f32", "Q4_0", limits=strict)
    assert names_in(tmp_path) == set()


def test_the_model_is_not_in_memory_while_quantized_files_are_proven(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, there = [], []
    opened, measured = job_module.open_pruned, Files.measured

    def open_pruned(*args: Any, **settings: Any) -> Any:
        model = opened(*args, **settings)
        models.append(weakref.ref(model))
        return model

    def measure(files: Files, quant: Quant, path: Path) -> ParityReport:
        there.append((path.name[-9:], sum(model() is not None for model in models)))
        return measured(files, quant, path)

    monkeypatch.setattr(job_module, "open_pruned", open_pruned)
    monkeypatch.setattr(Files, "measured", measure)
    export(pruned, tmp_path / "out", "Q8_0", "Q4_0", calibration=WINDOWS)
    assert dict(there) == dict.fromkeys(("-f32.gguf", "4_0.plain", "Q4_0.gguf", "Q8_0.gguf"), 0)
    assert len(models) <= 3, "read for the reference, for the importance matrix, and to choose numbers"


def test_existing_output(pruned: Path, tmp_path: Path) -> None:
    for force in (False, True):
        export(pruned, tmp_path / "out", "f16", force=force)
    with pytest.raises(InputError, match="exists already"):
        export(pruned, tmp_path / "out", "Q8_0")
    assert names_in(tmp_path / "out") == {"Dense-1B-f16.gguf", MANIFEST_FILE}
    assert names_in(tmp_path) == {"out"}


def _change(name: str, **settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | settings))

    return change


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _set(file: str, name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / file)
        tensors[name] = torch.full_like(tensors[name], value) if isinstance(value, float) else value
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})

    return change


def _delete(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)] and None


def test_bad_checkpoints_and_requests_are_refused(pruned: Path, tmp_path: Path) -> None:
    widths = {str(block): {"intermediate_size": width} for block, width in enumerate((96, 72, 128, 40))}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    down = "model.layers.1.mlp.down_proj"
    for damage, said in (
        (_delete("model.safetensors"), "model.safetensors"),
        (_cut_weights, "damaged or cut short"),
        (_delete("config.json"), "no config.json"),
        (_delete("tokenizer*"), "tokenizer"),
        (_change("config.json", per_layer_config=widths), "input moments do not belong"),
        (_change("config.json", model_type="gpt2"), "gpt2"),
        (_change("config.json", rope_parameters=rope), "dynamic.*linear, yarn, longrope, llama3"),
        (_set("model.safetensors", "model.norm.weight", float("nan")), "not all finite"),
        (_set("input_moments.safetensors", down, torch.ones(7)), down),
    ):
        folder = tmp_path / "bad" / "checkpoint"
        shutil.copytree(pruned, folder)
        damage(folder)
        with pytest.raises(InputError, match=said) as caught:
            export(folder, tmp_path / "out", "Q4_0")
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "bad")
    for quants, said in ((("Q3_K_XXL",), r"Q3_K_XXL.*f32, f16, bf16, Q8_0"), ((), "no quantization")):
        with pytest.raises(InputError, match=said):
            export(pruned, tmp_path / "out", *quants)
    assert names_in(tmp_path) == set()


def test_vocabulary_holes_are_unused_tokens(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=400)
    save_checkpoint(LoadedModel(model, tokenizer, ModelSource("x", "folder", "x")), tmp_path / "hf")
    (record,) = export(tmp_path / "hf", tmp_path / "out", "f32")
    found = metadata(tmp_path / "out" / record.file)
    assert found["tokenizer.ggml.tokens"][384:] == [f"[PAD{index}]" for index in range(384, 400)]
    assert set(found["tokenizer.ggml.token_type"][384:]) == {5}
    model, tokenizer = tiny_model("llama", vocab_size=300)
    save_checkpoint(LoadedModel(model, tokenizer, ModelSource("x", "folder", "x")), tmp_path / "small")
    with pytest.raises(InputError, match="more tokens than"):
        export(tmp_path / "small", tmp_path / "none", "f32", parity_windows=WINDOWS.clamp_max(299))


def test_missing_extra_says_what_to_install(pruned: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from pathlib import Path\n"
        "from cfsp.errors import MissingExtraError\n"
        "from exporters.gguf.export import export_gguf\n"
        f"try: export_gguf(Path({str(pruned)!r}), Path({str(tmp_path / 'out')!r}), ['f32'])\n"
        "except MissingExtraError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "phoneready[gguf]" in found.stdout
    assert names_in(tmp_path) == set()


def test_a_plain_folder_of_a_composing_tokenizer_and_sharded_half_precision(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("llama", tied=False)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    folder = tmp_path / "tiny-model"
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    (record,) = export(folder, tmp_path / "out", "f32", parity_windows=None)
    assert record.parity.max_logit_diff <= 1e-3
    assert record.parity.n_tokens == 4 * 512
    assert "python-docs" in record.parity.text
    assert (record.file, record.plan_sha256) == ("tiny-model-f32.gguf", None)
    assert any("NFC" in warning for warning in record.warnings)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(InputError, match="model-00002"):
        export(folder, tmp_path / "none", "f32")


def test_a_file_names_the_weights_that_it_is_made_from(make_checkpoint: MakeCheckpoint) -> None:
    """Not those that the checkpoint had before somebody trained them."""
    folder = make_checkpoint("llama")
    stated = read_provenance(folder).checkpoint_sha256
    assert stated == read_checkpoint_info(folder).weights_sha256
    _set("model.safetensors", "model.norm.weight", 2.0)(folder)
    assert read_provenance(folder).checkpoint_sha256 != stated


def test_a_file_says_how_the_model_recommends_to_sample(pruned: Path, tmp_path: Path) -> None:
    sampled = {"do_sample": True, "temperature": 0.25, "top_p": 0.9, "top_k": 20}
    for number, (stated, written) in enumerate(
        (
            (sampled, {"temp": 0.25, "top_p": 0.9, "top_k": 20}),
            ({"repetition_penalty": 1.125, "min_p": 0.0625}, {"penalty_repeat": 1.125, "min_p": 0.0625}),
            ({"do_sample": True}, {"temp": 1.0}),
            ({"top_k": 10**12, "temperature": 1e300, "top_p": 3.0, "min_p": 0.25}, {"min_p": 0.25}),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(pruned, folder / "model")
        _change("generation_config.json", **stated)(folder / "model")
        (record,) = export(folder / "model", folder / "out", "Q4_0")
        path = folder / "out" / record.file
        found = metadata(path)
        keys = {key.rpartition(".")[2]: value for key, value in found.items() if "general.sampling" in key}
        assert keys == pytest.approx(written)
        again = sampling_of_gguf(read_gguf(path))
        assert again == {SAMPLING[key]: value for key, value in written.items()}


NAMED = ExportOptions(name="template")


@pytest.mark.parametrize(
    ("model_type", "moments"),
    [("llama", False), ("gemma4_text", True), ("qwen3_5_text", True)],
)
def test_sizes_of_other_widths_are_exact(
    model_type: str, moments: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense: dict[str, Any] = {
        "intermediate_size": 512,
        "tied": any(one.tied for one in FAMILIES[model_type].layouts),
    }
    quants = [name for name, quant in QUANTS.items() if moments or not quant.needs_imatrix]
    first, others = (512, 256, 512, 512), [(256, 512, 256, 256), (33, 64, 40, 480)]
    if not any(one.per_layer_sizes for one in FAMILIES[model_type].layouts):
        first, others = (512,) * 4, [(256,) * 4, (40,) * 4]
    template_of = make_checkpoint(model_type, widths=first, moments=moments, **dense)
    templates = {
        quant: size_template(path, quant)
        for quant, path in draft_gguf(template_of, tmp_path, quants, NAMED).items()
    }
    layout = read_layout(template_of)
    for number, widths in enumerate(others):
        other = make_checkpoint(model_type, widths=widths, moments=moments, **dense)
        (tmp_path / str(number)).mkdir()
        written = draft_gguf(other, tmp_path / str(number), quants, NAMED)
        for quant, path in written.items():
            of_widths = layout.of_shape(ModelShape.of_ffn_widths(widths))
            assert templates[quant].file_bytes(of_widths) == path.stat().st_size, (quant, widths)


UNEQUAL = (96, 64, 128, 32)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
DEEP_KINDS = ([WINDOWED] * 3 + [FULL]) * 16
DEEP = {"num_hidden_layers": 64, "sliding_window": 24, "intermediate_size": 32}
ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
DELTA_NET = "linear_attention"
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "overrides", "widths", "architecture"),
    [
        ("llama", {}, None, "llama"),
        ("llama", {"num_key_value_heads": 1, "tied": False, "rope_parameters": LINEAR}, UNEQUAL, "deci"),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}, UNEQUAL, "deci"),
        ("mistral", {}, UNEQUAL, "deci"),
        ("qwen2", {}, None, "qwen2"),
        ("qwen2", {"head_dim": 32, "rope_parameters": LLAMA3}, None, "deci"),
        ("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3}}, None, "qwen2"),
        ("qwen3", {"tied": False}, None, "qwen3"),
        ("qwen3", {"head_dim": 32}, UNEQUAL, "openelm"),
        ("smollm3", {"head_dim": 32, "num_hidden_layers": 9}, None, "smollm3"),
        ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 32, "tied": False}, None, "gemma3"),
        ("gemma3_text", {"sliding_window_pattern": 6, "num_hidden_layers": 7}, None, "gemma3"),
        ("gemma4_text", {"num_key_value_heads": 1, "use_double_wide_mlp": False}, None, "gemma4"),
        ("gemma4_text", {"num_kv_shared_layers": 0, "head_dim": 32}, UNEQUAL, "gemma4"),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}, None, "gemma4"),
        (
            "gemma4_text",
            {"final_logit_softcapping": 12.0, "sliding_window": 7, "tied": False},
            None,
            "gemma4",
        ),
        ("olmo2", {"tied": False}, None, "olmo2"),
        ("olmo3", {"tied": False, "num_key_value_heads": 4, "num_hidden_layers": 9}, None, "olmo2"),
        ("olmo3", {"tied": False, "rope_scaling": YARN | {"rope_theta": 500000.0}}, None, "olmo2"),
        ("exaone4", {"num_key_value_heads": 1, "rope_parameters": LLAMA3, "tied": False}, None, "exaone4"),
        ("exaone4", DEEP | {"layer_types": DEEP_KINDS[1:] + DEEP_KINDS[:1]}, None, "exaone4"),
        ("hunyuan_v1_dense", {"head_dim": 32, "num_key_value_heads": 1}, None, "hunyuan-dense"),
        ("hunyuan_v1_dense", {"rope_parameters": ALPHA, "tied": False}, None, "hunyuan-dense"),
        (
            "qwen3_5_text",
            {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 3, "head_dim": 32},
            None,
            "qwen35",
        ),
        ("qwen3_5_text", {"layer_types": [FULL, DELTA_NET, DELTA_NET, FULL], "tied": False}, None, "qwen35"),
        ("lfm2", {"num_key_value_heads": 1, "conv_L_cache": 4}, None, "lfm2"),
        ("lfm2", {"layer_types": [FULL, FULL, "conv", "conv"], "tied": False}, None, "lfm2"),
    ],
)
def test_logits_equal_the_models(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    model_type: str,
    overrides: dict[str, Any],
    widths: tuple[int, ...] | None,
    architecture: str,
) -> None:
    """Within 0.001, or where ggml looks the activation up in float16, predictions that cannot be told apart."""
    text = torch.randint(0, 384, (1, 200), generator=torch.Generator().manual_seed(1))
    checkpoint = make_checkpoint(model_type, widths=widths, moments=False, **overrides)
    (record,) = export(checkpoint, tmp_path / "out", "f32", parity_windows=text)
    assert record.architecture == architecture
    if not model_type.startswith("gemma"):
        assert record.parity.max_logit_diff < 1e-3
        assert record.parity.same_top1 == 1.0
        assert record.parity.ppl_ratio == pytest.approx(1.0, abs=1e-4)
    else:
        assert record.parity.max_logit_diff < 0.1
        assert record.parity.kl_mean < 2e-5
        assert record.parity.same_top1 > 0.98


def test_a_context_ends_with_a_window_that_llama_cpp_has_not(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("mistral", sliding_window=64)
    (record,) = export(checkpoint, tmp_path / "out", "f32", parity_windows=WINDOWS[:, :64])
    assert record.context_length == 64
    assert record.parity.max_logit_diff < 1e-3
    assert any("context_length is cut to the window, 64" in warning for warning in record.warnings)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gemma3_text", {"layer_types": [FULL] * 4}),
        ("gemma3_text", {"layer_types": [FULL] + [WINDOWED] * 3}),
        ("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
        ("olmo3", {"tied": False, "rope_scaling": YARN | {"rope_theta": 500000.0}}),
        ("exaone4", {"sliding_window": 24, "layer_types": [FULL, FULL, WINDOWED, FULL]}),
    ],
)
def test_a_file_comes_back_as_it_was(
    tiny_model: Callable[..., Any],
    write_gguf: Callable[..., None],
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    model_type: str,
    overrides: dict[str, Any],
) -> None:
    """It says which blocks have a window, and what scales a rope."""
    (model, tokenizer), path = tiny_model(model_type, **overrides), tmp_path / "model.gguf"
    if model_type == "exaone4":  # no file of ours says of so few blocks that they have windows
        write_gguf(path, model, tokenizer)
    else:
        checkpoint = make_checkpoint(model_type, moments=False, **overrides)
        path = draft_gguf(checkpoint, tmp_path, ["f32"])["f32"]
    again = load_model(path).model
    assert getattr(again.config, "layer_types", None) == getattr(model.config, "layer_types", None)
    ids = torch.randint(0, 384, (1, 60), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "overrides", "said"),
    [
        (
            "qwen3",
            {"tied": False, "widths": UNEQUAL},
            "qwen3: one FFN width.*--set uniform_width=true.*openelm: tied",
        ),
        ("gemma3_text", {"widths": UNEQUAL}, "gemma3: one FFN width"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "smollm3: a rope in all blocks but each 4th"),
        # It has windows in EXAONE 4 of 64 blocks, whatever the file says.
        (
            "exaone4",
            {"sliding_window": 24, "layer_types": DEEP_KINDS[:4]},
            "exaone4: windows in models of 64",
        ),
        ("exaone4", {"num_hidden_layers": 64}, "exaone4: windows in models of 64 blocks and in no others"),
        ("gemma4_text", {"layer_types": [FULL] * 4, "num_kv_shared_layers": 0}, "a window in some block"),
        ("gemma4_text", {"layer_types": [FULL, WINDOWED, WINDOWED, FULL]}, "from the last two before them"),
        ("gemma4_text", {"attention_bias": True}, "no bias on"),
        ("lfm2", {"layer_types": [FULL] * 4}, "lfm2: a short convolution in some block"),
        ("qwen3_5_text", {"layer_types": [FULL] * 4}, "a gated delta net in some block"),
        (
            "qwen3_5_text",
            {"linear_value_head_dim": 32},
            "key heads and value heads of a delta net of one size",
        ),
        ("qwen3_5_text", {"rope_parameters": HALF | {"mrope_section": [11, 11, 10]}}, "sections of the rope"),
        ("qwen3_5_text", {"rope_parameters": HALF | {"mrope_section": [4, 0, 0]}}, "sections of the rope"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    make_checkpoint: MakeCheckpoint, model_type: str, overrides: dict[str, Any], said: str
) -> None:
    """Or what ends its process."""
    with pytest.raises(InputError, match=said):
        read_layout(make_checkpoint(model_type, moments=False, **overrides))

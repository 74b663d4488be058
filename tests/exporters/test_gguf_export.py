"""export_gguf as a whole: types, importance matrix, metadata, limits, and nothing half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import subprocess
import sys
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
from cfsp.models.checkpoint import load_pruned, read_checkpoint_info, save_checkpoint
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import SAMPLING, sampling_of_gguf
from cfsp.models.reference import load_tokenizer
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.records import read_record
from cfsp.text.tokens import TokenWindows
from exporters.checkpoint_reader import read_config
from exporters.export_record import ExportManifest, ExportRecord, ParityLimits
from exporters.families import required_multiple
from exporters.family import ExportOptions
from exporters.gguf import QUANTS, export_gguf, matrix, runtime
from exporters.gguf import writer as writer_module
from exporters.gguf.writer import write_gguf
from exporters.job import MANIFEST_FILE
from exporters.proof import check_limits, compare, reference_of
from exporters.provenance import read_provenance

WIDTHS = (96, 64, 128, 40)
# Next-token distributions of random weights are nearly flat, so quantization moves them far.
LOOSE = {name: ParityLimits(kl_mean=10.0) for name in QUANTS if name not in ("f32", "f16")}
WINDOWS = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))

MakeCheckpoint = Callable[..., Path]


def export(checkpoint: Path, output: Path, *quants: str, **settings: Any) -> tuple[ExportRecord, ...]:
    settings = {"limits": LOOSE, "parity_windows": WINDOWS, "n_threads": 1} | settings
    return export_gguf(checkpoint, output, quants, ExportOptions(**settings))


@pytest.fixture(scope="module")
def pruned(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("llama", widths=WIDTHS)


@pytest.fixture(scope="module")
def wide(make_checkpoint: MakeCheckpoint) -> Path:
    """Rows of 256 and 512: no type falls back."""
    return make_checkpoint(
        "llama",
        widths=(256, 512),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        head_dim=64,
        num_attention_heads=4,
    )


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def metadata(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


def test_all_quantizations_of_a_pruned_model(pruned: Path, tmp_path: Path) -> None:
    records = export(pruned, tmp_path / "out", *QUANTS)
    assert [record.quant for record in records] == list(QUANTS)
    assert names_in(tmp_path / "out") == {f"Dense-1B-{name}.gguf" for name in QUANTS} | {MANIFEST_FILE}
    assert read_record(ExportManifest, tmp_path / "out" / MANIFEST_FILE).exports == records
    by_quant = {record.quant: record for record in records}
    assert by_quant["f32"].parity.max_logit_diff <= 1e-3
    for record in records:
        assert record.architecture == "deci"
        assert record.shape.ffn_widths == WIDTHS
        assert record.file_bytes == (tmp_path / "out" / record.file).stat().st_size
        assert sum(record.tensor_types.values()) == len(
            gguf.GGUFReader(tmp_path / "out" / record.file).tensors
        )
        assert metadata(tmp_path / "out" / record.file)["general.file_type"] == QUANTS[record.quant].ftype
    sizes = [by_quant[name].file_bytes for name in ("f32", "f16", "Q8_0", "Q4_0")]
    assert sizes == sorted(sizes, reverse=True)


def test_only_what_was_asked_for_remains(pruned: Path, tmp_path: Path) -> None:
    records = export(pruned, tmp_path / "out", "q8_0")
    assert names_in(tmp_path / "out") == {"Dense-1B-Q8_0.gguf", MANIFEST_FILE}
    assert [record.quant for record in records] == ["Q8_0"]
    assert names_in(tmp_path) == {"out"}


def test_fallbacks_are_reported_and_warned_of(
    pruned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (record,) = export(pruned, tmp_path / "out", "Q4_K_M")
    found = {(f.asked, f.actual, f.row_length): f.tensors for f in record.fallbacks}
    # 40 divides into no block, 64 into blocks of 32 alone.
    assert "blk.3.ffn_down.weight" in found["Q4_K", "F16", 40]
    assert "blk.0.ffn_up.weight" in found["Q4_K", "Q5_0", 64]
    assert record.tensor_types["F16"] == 1
    assert any("instead of Q4_K" in warning for warning in record.warnings)
    assert any("instead of Q4_K" in message for message in caplog.messages)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / record.file).tensors}
    for fallback in record.fallbacks:
        assert {types[name] for name in fallback.tensors} == {fallback.actual}


def test_aligned_widths_keep_the_type(wide: Path, tmp_path: Path) -> None:
    assert required_multiple(["Q4_0", "Q8_0"]) == 32
    assert required_multiple(["Q4_K_M", "f16"]) == 256
    assert required_multiple(["IQ2_M"]) == required_multiple(["IQ3_XXS"]) == 256
    (record,) = export(wide, tmp_path / "out", "Q4_K_M")
    assert record.fallbacks == ()
    assert set(record.tensor_types) == {"Q4_K", "Q6_K", "F32"}


def test_rows_of_whole_blocks_are_stored_as_asked(wide: Path, tmp_path: Path) -> None:
    rows = [quant for quant in QUANTS.values() if quant.width_multiple == 256]
    for record, quant in zip(export(wide, tmp_path / "out", *(row.name for row in rows)), rows, strict=True):
        assert record.fallbacks == ()
        assert quant.base_type in record.tensor_types
        assert record.imatrix_tensors > 0


def test_what_llama_cpp_refuses_to_write_without_importance_matrix(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    bare = make_checkpoint("llama", moments=False)
    needing = [name for name, quant in QUANTS.items() if quant.needs_imatrix]
    assert needing == ["IQ3_XXS", "IQ2_M"]
    for checkpoint, use in ((bare, True), (make_checkpoint("llama"), False)):
        for name in needing:
            with pytest.raises(InputError, match=rf"importance matrix.*{name}"):
                export(checkpoint, tmp_path / "out", name, use_imatrix=use)
    assert names_in(tmp_path) == set()
    (record,) = export(bare, tmp_path / "out", "Q2_K")
    assert record.imatrix_tensors == 0


def test_the_rows_that_need_an_importance_matrix_are_llama_cpps(wide: Path, tmp_path: Path) -> None:
    export(wide, tmp_path / "base", "f32")
    (source,) = (tmp_path / "base").glob("*.gguf")
    written = set()
    for name, quant in QUANTS.items():
        with contextlib.suppress(InputError):
            matrix.quantize(source, tmp_path / "file.gguf", quant.ftype)
            written.add(name)
    assert written == {name for name, quant in QUANTS.items() if not quant.needs_imatrix}


def test_importance_matrix_is_used_and_lowers_the_weighted_error(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("qwen3", widths=(96, 64, 128, 32))
    moments = safetensors.torch.load_file(checkpoint / "input_moments.safetensors")
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    errors = []
    for label, use in (("with", True), ("without", False)):
        (record,) = export(checkpoint, tmp_path / label, "Q4_0", use_imatrix=use)
        assert (record.imatrix_tensors > 0) is use
        assert any("without an importance matrix" in warning for warning in record.warnings) is not use
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / label / record.file).tensors}
        total = 0.0
        for block in range(4):
            for module, name in (("mlp.up_proj", "ffn_up"), ("mlp.gate_proj", "ffn_gate")):
                stored = tensors[f"blk.{block}.{name}.weight"]
                values = gguf.dequantize(stored.data, stored.tensor_type)
                key = f"model.layers.{block}.{module}"
                total += float(
                    ((values - weights[f"{key}.weight"].numpy()) ** 2 * moments[key].numpy()).sum()
                )
            qkv = tensors[f"blk.{block}.attn_qkv.weight"]
            ours = np.concatenate([weights[f"model.layers.{block}.self_attn.{x}_proj.weight"] for x in "qkv"])
            key = f"model.layers.{block}.self_attn.q_proj"
            difference = gguf.dequantize(qkv.data, qkv.tensor_type) - ours
            total += float((difference**2 * moments[key].numpy()).sum())
        errors.append(total)
    assert errors[0] < 0.95 * errors[1]


def test_wrong_moments_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    file = checkpoint / "input_moments.safetensors"
    moments = safetensors.torch.load_file(file)
    moments["model.layers.1.mlp.down_proj"] = torch.ones(7)
    safetensors.torch.save_file(moments, file)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj"):
        export(checkpoint, tmp_path / "out", "Q4_0")
    assert names_in(tmp_path) == set()


def test_metadata(pruned: Path, tmp_path: Path) -> None:
    (record,) = export(pruned, tmp_path / "out", "Q8_0", name="My Phone Model")
    found = metadata(tmp_path / "out" / record.file)
    assert record.file == "My Phone Model-Q8_0.gguf"
    expected = {
        "general.architecture": "deci",
        "general.name": "My Phone Model",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "Base-1B",
        "general.base_model.0.organization": "owner",
        "general.quantization_version": 2,
        "phoneready.source_model": "Dense-1B",
        "phoneready.source_sha256": "a" * 64,
        "phoneready.checkpoint_sha256": record.checkpoint_sha256,
        "phoneready.model_type": "llama",
        "phoneready.intermediate_sizes": list(WIDTHS),
        "phoneready.seed": 7,
        "deci.feed_forward_length": list(WIDTHS),
        "deci.attention.head_count": 4,
        "deci.attention.head_count_kv": 2,
        "deci.attention.key_length": 16,
        "deci.rope.dimension_count": 16,
        "deci.context_length": 512,
        "deci.vocab_size": 384,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["deci.rope.freq_base"] == read_config(pruned).rope_theta
    assert found["tokenizer.ggml.tokens"][found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert "<|im_start|>" in found["tokenizer.chat_template"]
    assert "phoneready.tool_version" in found


def test_padding_is_said_and_sliding_window_cuts_the_context(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("qwen3", tied=False, widths=(96, 64, 128, 32))
    (record,) = export(checkpoint, tmp_path / "padded", "Q4_0")
    assert record.padded_width == 128
    assert record.shape.ffn_widths == (96, 64, 128, 32)
    assert any("uniform width" in warning for warning in record.warnings)
    checkpoint = make_checkpoint("mistral", sliding_window=128)
    (record,) = export(checkpoint, tmp_path / "window", "f16")
    assert record.context_length == 128
    assert any("sliding window" in warning for warning in record.warnings)
    assert metadata(tmp_path / "window" / record.file)["llama.context_length"] == 128


Damage = Callable[[Any], Any]


def _forget_permutation(spec: Any) -> Any:
    return dataclasses.replace(spec, interleave_heads=0)


def _swap_gate_and_up(spec: Any) -> Any:
    swapped = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
    parts = spec.name.split(".")
    return dataclasses.replace(spec, name=".".join(swapped.get(part, part) for part in parts))


@pytest.mark.parametrize("damage", [_forget_permutation, _swap_gate_and_up])
def test_wrong_tensors_are_caught(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage
) -> None:
    original = writer_module.tensor_specs
    monkeypatch.setattr(writer_module, "tensor_specs", lambda *a: [damage(spec) for spec in original(*a)])
    with pytest.raises(LimitError, match=r"max_logit_diff [\d.e+]+ above its limit 0\.001"):
        export(pruned, tmp_path / "out", "Q4_0")
    assert names_in(tmp_path) == set()


def test_missing_rope_base_is_caught(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.gguf import metadata as metadata_module

    checkpoint = make_checkpoint("llama", rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})
    original = metadata_module.rope_metadata
    monkeypatch.setattr(
        metadata_module,
        "rope_metadata",
        lambda config: {k: v for k, v in original(config).items() if k != "rope.freq_base"},
    )
    with pytest.raises(LimitError, match="max_logit_diff"):
        export(checkpoint, tmp_path / "out", "Q8_0")
    assert names_in(tmp_path) == set()


def test_a_quantized_file_beyond_its_limit_leaves_nothing(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LimitError, match=r"Q4_0\.gguf .*kl_mean \S+ above its limit 1e-06.*same_top1 \S+ below"
    ):
        export(
            pruned,
            tmp_path / "out",
            "f32",
            "Q4_0",
            limits={"Q4_0": ParityLimits(kl_mean=1e-6, same_top1=1.0)},
        )
    assert names_in(tmp_path) == set()


def test_a_tokenizer_that_splits_otherwise_is_caught(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.gguf import tokenizer_metadata

    monkeypatch.setattr(tokenizer_metadata, "pre_tokenizer_name", lambda tokenizer: "llama-bpe")
    with pytest.raises(LimitError, match="token ids"):
        export(pruned, tmp_path / "out", "f32")
    assert names_in(tmp_path) == set()


def test_existing_output(pruned: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        export(pruned, output, "f16")
    assert names_in(output) == {"precious.txt"}
    stale, other = tmp_path / ".out.tmp-dead", tmp_path / ".other.tmp-alive"
    stale.mkdir()
    other.mkdir()
    with pytest.raises(InputError, match="nothing that phoneready wrote"):
        export(pruned, output, "f16", force=True)
    (output / "precious.txt").unlink()
    export(pruned, output, "f16")
    export(pruned, output, "f16", force=True)
    assert names_in(output) == {"Dense-1B-f16.gguf", MANIFEST_FILE}
    assert names_in(tmp_path) == {"out", ".other.tmp-alive"}


def test_unknown_quant_names_the_known_ones(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Q3_K_XXL.*f32, f16, bf16, Q8_0"):
        export(pruned, tmp_path / "out", "Q3_K_XXL")
    with pytest.raises(InputError, match="no quantization"):
        export(pruned, tmp_path / "out")


def _delete_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _delete_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _delete_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _wrong_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["1"]["intermediate_size"] = 72
    (folder / "config.json").write_text(json.dumps(config))


def _other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


def _not_a_number(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        _delete_weights,
        _cut_weights,
        _delete_config,
        _delete_tokenizer,
        _wrong_width,
        _other_architecture,
        _not_a_number,
    ],
)
def test_bad_checkpoints_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoint = make_checkpoint("llama", widths=WIDTHS)
    damage(checkpoint)
    with pytest.raises(InputError) as caught:
        export(checkpoint, tmp_path / "out", "f32")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == set()


def test_scalings_that_llama_cpp_lacks_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    with pytest.raises(InputError, match=r"dynamic.*linear, yarn, longrope, llama3"):
        export(checkpoint, tmp_path / "out", "f32")


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


def test_built_in_text_is_the_default(pruned: Path, tmp_path: Path) -> None:
    (record,) = export(pruned, tmp_path / "out", "f32", parity_windows=None)
    assert record.parity.n_tokens == 4 * 512
    assert "python-docs" in record.parity.text


def test_missing_extra_says_what_to_install(pruned: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from pathlib import Path\n"
        "from cfsp.errors import MissingExtraError\n"
        "from exporters.gguf import export_gguf\n"
        f"try: export_gguf(Path({str(pruned)!r}), Path({str(tmp_path / 'out')!r}), ['f32'])\n"
        "except MissingExtraError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "phoneready[gguf]" in found.stdout
    assert names_in(tmp_path) == set()


def test_plain_hugging_face_folders_are_exported_too(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder("qwen2")
    (record,) = export(folder, tmp_path / "out", "Q8_0")
    assert record.architecture == "qwen2"
    assert record.file == "tiny-model-Q8_0.gguf"
    assert record.plan_sha256 is None


def test_a_composing_tokenizer_is_exported_with_a_warning(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("qwen2")
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    save_checkpoint(LoadedModel(model, tokenizer, ModelSource("x", "folder", "x")), tmp_path / "hf")
    (record,) = export(tmp_path / "hf", tmp_path / "out", "f32")
    assert any("NFC" in warning for warning in record.warnings)


@pytest.mark.parametrize("broken", [False, True])
def test_limits_tell_a_broken_quantized_file_from_a_good_one(
    pruned: Path, tmp_path: Path, broken: bool
) -> None:
    tokenizer, limits = load_tokenizer(pruned), QUANTS["Q8_0"].limits.as_dict()
    original = writer_module.tensor_specs
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(
                writer_module, "tensor_specs", lambda *a: [_forget_permutation(spec) for spec in original(*a)]
            )
        write_gguf(pruned, tmp_path / "f32.gguf", tokenizer, read_provenance(pruned))
    matrix.quantize(tmp_path / "f32.gguf", tmp_path / "q.gguf", QUANTS["Q8_0"].ftype)
    with runtime.open_model(
        tmp_path / "q.gguf", runtime.Context(n_ctx=WINDOWS.shape[1], cache_type="f32")
    ) as opened:
        reference = reference_of(load_pruned(pruned), TokenWindows(WINDOWS, "random", ""))
        report = compare(reference, opened.iter_logits, limits)
    if broken:
        with pytest.raises(LimitError, match=r"q\.gguf .*kl_mean .* above"):
            check_limits(report, "q.gguf")
    else:
        check_limits(report, "q.gguf")


def test_sharded_half_precision_folders(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", tied=False)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    (record,) = export(tmp_path / "hf", tmp_path / "out", "f32")
    assert record.parity.max_logit_diff <= 1e-3
    next((tmp_path / "hf").glob("model-00002*")).unlink()
    with pytest.raises(InputError, match="model-00002"):
        export(tmp_path / "hf", tmp_path / "none", "f32")


def test_a_file_names_the_weights_that_it_is_made_from(make_checkpoint: MakeCheckpoint) -> None:
    """Not those that the checkpoint had before somebody trained them."""
    folder = make_checkpoint("llama")
    stated = read_provenance(folder).checkpoint_sha256
    assert stated == read_checkpoint_info(folder).weights_sha256
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_provenance(folder).checkpoint_sha256 != stated


@pytest.mark.parametrize(
    ("stated", "written"),
    [
        (
            {"do_sample": True, "temperature": 0.25, "top_p": 0.9, "top_k": 20},
            {"temp": 0.25, "top_p": 0.9, "top_k": 20},
        ),
        ({"repetition_penalty": 1.125, "min_p": 0.0625}, {"penalty_repeat": 1.125, "min_p": 0.0625}),
        ({"do_sample": True}, {"temp": 1.0}),
        ({}, {}),
        ({"top_k": 10**12, "temperature": 1e300, "top_p": 3.0, "min_p": 0.25}, {"min_p": 0.25}),
    ],
)
def test_a_file_says_how_the_model_recommends_to_sample(
    pruned: Path, tmp_path: Path, stated: dict[str, Any], written: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pruned, folder)
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").write_text(json.dumps(settings | stated), encoding="utf-8")
    export(folder, tmp_path / "out", "f32", "Q4_0")
    for name in ("f32", "Q4_0"):
        found = metadata(tmp_path / "out" / f"Dense-1B-{name}.gguf")
        keys = {key.rpartition(".")[2]: value for key, value in found.items() if "general.sampling" in key}
        assert keys == pytest.approx(written)
        again = sampling_of_gguf(read_gguf(tmp_path / "out" / f"Dense-1B-{name}.gguf"))
        assert again == {SAMPLING[key]: value for key, value in written.items()}

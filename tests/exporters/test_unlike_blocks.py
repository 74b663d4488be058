"""Models whose blocks are not alike: no attention or something in its place, fewer heads, more inputs, shared keys."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape, token_tables
from cfsp.models.checkpoint import load_pruned
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.gguf_file import CONVOLUTIONS, read_gguf
from cfsp.models.gguf_model import model_from_gguf
from cfsp.models.reference import load_model
from exporters.checkpoint_reader import open_tensors, read_config
from exporters.export_record import ParityLimits
from exporters.family import ExportOptions
from exporters.gguf.architecture import read_layout
from exporters.gguf.export import export_gguf
from exporters.gguf.files import draft_files, draft_gguf
from exporters.gguf.tensors import tensor_specs
from exporters.onnx.export import export_onnx
from exporters.onnx.language_model import OnnxLanguageModel
from exporters.onnx.runtime import open_model
from exporters.quantize.walk import round_blocks
from phoneready.main import main
from runtime_bench.devices import gguf_facts

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

TinyPath = Callable[..., Path]
TEXT = ["--calibration", "builtin:python-docs", "--set", "nsamples=2", "--set", "seqlen=32", "--threads", "1"]
WINDOWS = torch.randint(0, 330, (2, 96), generator=torch.Generator().manual_seed(0))
VARIANTS = ("fp32", "fp16", "int8", "int8-dynamic", "int4")
QUANTS_MADE = ("f32", "f16", "Q8_0", "Q4_0", "Q4_K_M")
# Next-token distributions of random weights are nearly flat, so quantization moves them far; in torch, too.
OPTIONS = ExportOptions(
    limits=dict.fromkeys(("Q8_0", "Q4_0", "Q4_K_M", "mixed-200kB"), ParityLimits(kl_mean=5.0)),
    parity_windows=WINDOWS,
    n_threads=1,
)
KEY = "attention.recurrent_layers"


@pytest.fixture(scope="module")
def made(
    tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Model type -> a pruned checkpoint that lost channels, tokens and blocks, and its GGUF files."""

    @functools.cache
    def make(model_type: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("files")
        dense = str(tiny_folder(model_type, intermediate_size=192, num_hidden_layers=6))
        removed = ["--prune-ratio", "0.25", "--vocabulary", "330", "--blocks", "1", "--for", "Q8_0"]
        assert main(["prune", dense, "-o", str(folder / "pruned"), *removed, *TEXT]) == 0
        export_gguf(folder / "pruned", folder / "gguf", QUANTS_MADE, OPTIONS)
        return folder / "pruned", folder / "gguf"

    return make


@pytest.fixture(scope="module", params=["lfm2", "qwen3_5_text"])
def graphs(
    made: Callable[[str], tuple[Path, Path]],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A pruned checkpoint, and its ONNX folders."""
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    pruned, folder = made(request.param)[0], tmp_path_factory.mktemp("onnx") / "out"
    limits = dict.fromkeys(VARIANTS[1:], ParityLimits(kl_mean=3.0))
    export_onnx(pruned, folder, VARIANTS, ExportOptions(limits=limits, n_threads=1))
    return pruned, folder


@pytest.fixture
def files(made: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Path]:
    return made("qwen3_5_text")


@pytest.mark.parametrize(("model_type", "architecture"), [("qwen3_5_text", "qwen35"), ("lfm2", "lfm2")])
def test_what_pruning_leaves_is_proven_and_judged_as_its_checkpoint(
    made: Callable[[str], tuple[Path, Path]],
    judged_alike: Callable[..., None],
    model_type: str,
    architecture: str,
) -> None:
    """Every continuation and every prompt by itself: tokens of a row see what stands before them."""
    files = made(model_type)
    records = {one["quant"]: one for one in json.loads((files[1] / "export.json").read_text())["exports"]}
    assert list(records) == list(QUANTS_MADE)
    assert records["f32"]["parity"]["max_logit_diff"] < 1e-3
    assert records["f32"]["parity"]["same_top1"] == 1
    for record in records.values():
        assert record["architecture"] == architecture
        kernels = [t for t in read_gguf(files[1] / record["file"]).tensors if t.name.endswith(CONVOLUTIONS)]
        assert {tensor.kind.name for tensor in kernels} == {"F32"}
    judged_alike(files, 1e-3, n_ids=40, context=9, last=21, n_tokens=12)
    (path,) = files[1].glob("*f32.gguf")
    ids = torch.arange(60).view(2, 30)
    ours, theirs = (load_model(one).model(ids).logits for one in (path, files[0]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_graph_is_judged_as_its_checkpoint_is(
    graphs: tuple[Path, Path], judged_alike: Callable[..., None]
) -> None:
    """Its cache cannot be rewound, so each continuation reads its context again."""
    records = {one["quant"]: one for one in json.loads((graphs[1] / "export.json").read_text())["exports"]}
    assert records["fp16"]["parity"]["kl_mean"] < 1e-3
    assert records["int8"]["parity"]["kl_mean"] < 0.1
    assert any("something else in the place of attention" in said for said in records["fp32"]["warnings"])
    judged_alike(graphs, 1e-3, n_ids=40, context=9, last=21, n_tokens=32)
    theirs = OnnxLanguageModel(str(graphs[1] / "fp32"), n_ctx=256, n_threads=1)
    with pytest.raises(InputError, match="rewound"):
        theirs._model.rewind(3)
    theirs.close()


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_genai_generates_what_the_graph_generates(
    graphs: tuple[Path, Path], variant: str, genai_agrees: Callable[..., None]
) -> None:
    genai_agrees(graphs[1] / variant, list(range(40, 60)))


def test_a_folder_may_name_the_blocks_that_attend(tiny_folder: TinyPath, tmp_path: Path) -> None:
    """As the first published ones do; GenAI and transformers.js read what every block is."""
    file = tiny_folder("lfm2") / "config.json"
    settings = json.loads(file.read_text())
    kinds = settings.pop("layer_types")
    file.write_text(json.dumps(settings | {"full_attn_idxs": [1, 3]}))
    export_onnx(file.parent, tmp_path / "out", ["fp32"], OPTIONS)
    genai = json.loads((tmp_path / "out" / "fp32" / "genai_config.json").read_text())["model"]
    assert (genai["type"], genai["decoder"]["layer_types"]) == ("lfm2", kinds)
    assert json.loads((tmp_path / "out" / "fp32" / "config.json").read_text())["layer_types"] == kinds


def test_value_heads_are_ordered_as_ggml_repeats_key_heads(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows and columns of a file go back to what they came from, and importances go with their columns."""
    (spec,) = (one for one in tensor_specs(read_layout(files[0])) if one.name == "blk.0.ssm_out.weight")
    ((source, shape),) = spec.sources
    with open_tensors(files[0]) as tensors:
        exact = tensors.read(source, shape)
        assert not np.array_equal(spec.build(tensors.read), exact)
        assert np.array_equal(spec.split(spec.build(tensors.read))[source], exact)
    moments = safetensors.torch.load_file(files[0] / "input_moments.safetensors")
    heads = moments[source.removesuffix(".weight")].view(2, 2, 16)
    _, (file,) = draft_files(files[0], tmp_path, ["Q4_K_M"], OPTIONS)
    importance = file.imatrix["blk.0.ssm_out.weight"]
    np.testing.assert_allclose(importance, heads.swapaxes(0, 1).reshape(-1), rtol=1e-5)


def test_numbers_are_chosen_for_what_columns_read(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml's own rounding of the output matrix, whose columns change places, is farther from it on a text.

    Nothing is taken back of what is lost before it, so that the checkpoint's is the weight to be near to.
    """
    monkeypatch.setattr("exporters.gguf.matrix.round_blocks", partial(round_blocks, correction=0.0))
    options = replace(OPTIONS, calibration=WINDOWS)
    export_gguf(files[0], tmp_path / "out", ("Q4_0", "mixed:200kB"), options)
    model = load_model(files[0]).model
    out_proj, read = model.model.layers[0].linear_attn.out_proj, []
    out_proj.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].flatten(0, 1)))
    with torch.inference_mode():
        model(WINDOWS)
    (spec,) = (one for one in tensor_specs(read_layout(files[0])) if one.name == "blk.0.ssm_out.weight")
    losses = []
    for path in (next((tmp_path / "out").glob("*Q4_0.gguf")), next(files[1].glob("*Q4_0.gguf"))):
        (stored,) = (tensor for tensor in read_gguf(path).tensors if tensor.name == spec.name)
        (weight,) = spec.split(stored.dequantize()).values()
        losses.append(
            float((read[0] @ (torch.from_numpy(weight) - out_proj.weight.detach()).T).square().mean())
        )
    assert losses[0] < 0.9 * losses[1]


def test_of_a_folder_that_can_see_the_text_part_is_taken(tiny_folder: TinyPath, tmp_path: Path) -> None:
    """Heads that draft further tokens are left where they are, as what encodes images is."""
    text = tiny_folder("qwen3_5_text")
    expected = load_model(text).model
    weights = safetensors.torch.load_file(text / "model.safetensors")
    drafting = {"mtp.norm.weight": torch.ones(64), "mtp.fc.weight": torch.ones(64, 128)}
    safetensors.torch.save_file(weights | drafting, text / "model.safetensors", {"format": "pt"})
    (record,) = export_gguf(text, tmp_path / "out", ("f32",), OPTIONS)
    assert record.parity.max_logit_diff < 1e-3
    assert not any("nextn" in tensor.name for tensor in read_gguf(tmp_path / "out" / record.file).tensors)
    parts = {f"model.language_{name}": tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    parts |= drafting | {"model.visual.merger.norm.weight": torch.ones(8)}
    safetensors.torch.save_file(parts, text / "model.safetensors", {"format": "pt"})
    own = json.loads((text / "config.json").read_text())
    settings = {"model_type": "qwen3_5", "text_config": own, "vision_config": {}}
    (text / "config.json").write_text(json.dumps(settings))
    loaded = load_model(text).model
    assert loaded.config.model_type == "qwen3_5_text"
    ids = torch.arange(40, 80)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_folders_of_no_such_model(tiny_folder: TinyPath) -> None:
    for model_type, settings, said in (
        ("qwen3_5_text", {"layer_types": ["linear_attention"] * 4}, "no block attends"),
        ("qwen3_5_text", {"linear_num_value_heads": 3}, "linear_num_value_heads 3 is no multiple"),
        ("qwen3_5_text", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ("lfm2", {"layer_types": ["conv"] * 4}, "no block attends"),
        ("lfm2", {"conv_L_cache": 1}, "conv_L_cache"),
        ("lfm2", {"norm_eps": 0}, "norm_eps"),
        ("gemma4_text", {"enable_moe_block": True}, "unsupported, with experts beside the FFN"),
        ("gemma4_text", {"attention_k_eq_v": True}, "unsupported, with values that are the keys"),
        ("gemma4_text", {"vocab_size_per_layer_input": 300}, "input 300 is not vocab_size 384"),
        ("gemma4_text", {"num_kv_shared_layers": 4}, "leaves none of 4 blocks to read from"),
        ("gemma4_text", {"model_type": "llama"}, "final_logit_softcapping"),
    ):
        if model_type not in transformers.CONFIG_MAPPING:
            continue
        file = tiny_folder(model_type) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        with pytest.raises(InputError, match=said) as caught:
            load_model(file.parent)
        assert "\n" not in str(caught.value)


def test_files_of_no_such_model(files: tuple[Path, Path]) -> None:
    (path,) = files[1].glob("*f32.gguf")
    file = read_gguf(path)
    kept = {name: one for name, one in file.metadata.items() if not name.endswith(KEY)}
    for key, value, said in (
        (KEY, [True] * 5, "no block attends"),
        (KEY, [True, False], "not one number for each"),
        ("full_attention_interval", 6, "no block attends"),
        ("ssm.state_size", 8, "blk.0.attn_qkv.weight"),
        ("ssm.group_count", 8, "no multiple of the key heads"),
        ("rope.dimension_count", 64, "rope.dimension_count"),
        ("rope.dimension_sections", [4], "three numbers, 4 together"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            model_from_gguf(replace(file, metadata=kept | {f"qwen35.{key}": value}), dtype=torch.float32)
        assert "\n" not in str(caught.value)


def test_of_a_file_blocks_that_draft_tokens_are_left_out(
    tiny_model: Callable[..., Any], write_gguf: Callable[..., None], tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("qwen3_5_text")
    ids = torch.arange(60).view(2, 30)
    expected = model(ids).logits
    model.config.mtp_num_hidden_layers = 1
    extra = {"blk.4.nextn.eh_proj.weight": np.ones((64, 128), np.float32)}
    extra["blk.4.attn_norm.weight"] = np.ones(64, np.float32)
    path = tmp_path / "file.gguf"
    write_gguf(path, model, tokenizer, extra)
    torch.testing.assert_close(load_model(path).model(ids).logits, expected, atol=1e-4, rtol=0)
    kept = model.config.layer_types.count("full_attention")
    facts = gguf_facts(path)
    assert facts.key_value_width == kept * 2 * 2 * 16  # keys and values of blocks that attend
    assert facts.weight_bytes - facts.read_bytes == 4 * (64 * 128 + 64)
    file = read_gguf(path)
    said = file.metadata | {"qwen35.nextn_predict_layers": 5}
    with pytest.raises(InputError, match="no block is left"):
        model_from_gguf(replace(file, metadata=said), dtype=torch.float32)


GEMMA = "gemma4_text"
LOST = ["--prune-ratio", "0.25", "--vocabulary", "330", "--for", "Q8_0"]
FEW_IDS = torch.randint(0, 330, (3, 40), generator=torch.Generator().manual_seed(4))
NEEDS_GEMMA = pytest.mark.skipif(GEMMA not in transformers.CONFIG_MAPPING, reason="transformers 4")


@pytest.fixture(scope="module")
def gemma(tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint that lost channels and tokens, and its GGUF files."""
    if GEMMA not in transformers.CONFIG_MAPPING:
        pytest.skip("transformers 4")
    folder = tmp_path_factory.mktemp("files")
    dense = str(tiny_folder(GEMMA, intermediate_size=192, num_hidden_layers=6))
    assert main(["prune", dense, "-o", str(folder / "pruned"), *LOST, *TEXT]) == 0
    made = ["--to", "f32,f16,Q8_0,Q4_0,Q4_K_M,mixed:500KiB", "--threads", "1"]
    text = [
        "--calibration",
        "builtin:python-docs",
        "--set",
        "nsamples=4",
        "--set",
        "seqlen=64",
        "--tune-scales",
    ]
    assert main(["quantize", str(folder / "pruned"), "-o", str(folder / "gguf"), *made, *text]) == 0
    return folder / "pruned", folder / "gguf"


def test_what_pruning_leaves_is_proven_in_every_type(gemma: tuple[Path, Path]) -> None:
    records = {one["quant"]: one for one in json.loads((gemma[1] / "export.json").read_text())["exports"]}
    assert records["f32"]["parity"]["kl_mean"] < 1e-5
    assert records["Q4_0"]["gptq_tensors"] > 40
    widths = model_shape(load_pruned(gemma[0])).ffn_widths
    assert len(set(widths)) > 1
    for record in records.values():
        assert record["architecture"] == "gemma4"
        file = read_gguf(gemma[1] / record["file"])
        assert tuple(file.hyperparameter("feed_forward_length")) == widths
        shapes = {tensor.name: tensor.shape for tensor in file.tensors}
        assert shapes["token_embd.weight"] == (330, 64)
        assert shapes["per_layer_token_embd.weight"] == (330, 6 * 64)
        assert {name for name in shapes if name.endswith("attn_k.weight")} == {
            f"blk.{block}.attn_k.weight" for block in range(4)
        }


def test_a_file_is_judged_as_its_checkpoint_is(
    gemma: tuple[Path, Path], judged_alike: Callable[..., None]
) -> None:
    """Logits are capped in both, and windows end where they do."""
    judged_alike(gemma, 2e-2, n_ids=60, context=40, last=50, n_tokens=32)
    (path,) = gemma[1].glob("*f32.gguf")
    # What is read for a token leaves the further table out, and keys are kept of blocks that have their own.
    facts, model = gguf_facts(path), load_pruned(gemma[0])
    table = token_tables(model)[1].weight
    assert facts.weight_bytes - facts.read_bytes == table.numel() * table.itemsize
    assert facts.key_value_width == read_config(gemma[0]).key_value_width == 2 * 2 * (2 * 16 + 2 * 32)


@NEEDS_GEMMA
def test_a_gguf_file_of_a_dense_model_is_a_source(tiny_folder: TinyPath, tmp_path: Path) -> None:
    """With windows in other blocks, heads of one size, and no cap."""
    kinds = [WINDOWED, WINDOWED, WINDOWED, FULL, WINDOWED, FULL]
    folder = tiny_folder(
        GEMMA, num_hidden_layers=6, layer_types=kinds, global_head_dim=16, final_logit_softcapping=None
    )
    path = draft_gguf(folder, tmp_path, ["f32"])["f32"]
    assert torch.equal(load_model(path).model(FEW_IDS).logits, load_model(folder).model(FEW_IDS).logits)


@NEEDS_GEMMA
def test_keys_that_are_stored_and_never_read_are_left_out(tiny_folder: TinyPath, tmp_path: Path) -> None:
    """As published folders have them, of blocks that read another block's."""
    import safetensors.torch

    folder = tiny_folder(GEMMA)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    expected = load_model(folder).model(FEW_IDS).logits
    for part in ("k_proj", "v_proj", "k_norm"):
        name = f"model.layers.1.self_attn.{part}.weight"
        weights[name.replace("layers.1", "layers.3")] = weights[name].clone()
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(folder).model(FEW_IDS).logits, expected)
    path = draft_gguf(folder, tmp_path, ["f32"])["f32"]
    assert not any("blk.3.attn_k" in tensor.name for tensor in read_gguf(path).tensors)


CALIBRATION = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
# Next-token distributions of random weights are nearly flat, so quantization moves them far.
LOOSE = {name: ParityLimits(kl_mean=3.0) for name in ("Q8_0", "Q4_K_M", "int8", "int4")}
FOR_TEXT = ExportOptions(limits=LOOSE, parity_windows=CALIBRATION, calibration=CALIBRATION, n_threads=1)
UNLIKE = {0: (1,), 2: (0, 2, 3)}
EVERY = dict.fromkeys(range(4), (1,))


@pytest.mark.parametrize(
    ("model_type", "tied", "changes", "architecture"),
    [
        ("llama", True, {"groups": UNLIKE, "silent": (3,), "widths": (96, 64, 128, 32)}, "deci"),
        ("qwen3", True, {"groups": UNLIKE}, "openelm"),
        ("qwen3", False, {"groups": EVERY}, "qwen3"),
    ],
)
def test_llama_cpp_computes_the_checkpoint(
    make_checkpoint: Any,
    tmp_path: Path,
    model_type: str,
    tied: bool,
    changes: dict[str, Any],
    architecture: str,
) -> None:
    overrides = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    checkpoint = make_checkpoint(model_type, tied, **changes, **overrides)
    quants = ("f32", "Q8_0", "Q4_K_M") if "widths" in changes else ("f32",)
    record, *_ = export_gguf(checkpoint, tmp_path / "out", quants, FOR_TEXT)
    assert record.parity.max_logit_diff <= 1e-3
    path = tmp_path / "out" / record.file
    file, groups, silent = read_gguf(path), changes.get("groups", {}), changes.get("silent", ())
    assert file.architecture == architecture
    kv_heads = [0 if block in silent else len(groups.get(block, range(4))) for block in range(4)]
    stated = [file.require(f"{architecture}.attention.{key}") for key in ("head_count_kv", "head_count")]
    heads = [2 * n for n in kv_heads]
    assert stated == ([1, 2] if groups is EVERY else [kv_heads, heads])
    gone = tuple(f"blk.{block}.attn" for block in silent)
    assert not any(tensor.name.startswith(gone) for tensor in file.tensors if gone)
    assert gguf_facts(path).key_value_width == sum(kv_heads) * 2 * 16


def test_what_a_runtime_cannot_say_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    for said, tied, changes in (
        ("qwen3: no blocks without attention, whole blocks can go", True, {"silent": (2, 3)}),
        (r"as many heads in every block, whole.*; openelm: tied embeddings", False, {"groups": {1: (0,)}}),
    ):
        with pytest.raises(InputError, match=said):
            export_gguf(make_checkpoint("qwen3", tied, **changes), tmp_path / "out", ("f32",), FOR_TEXT)
    for said, model_type, changes in (
        ("optimum gives every block a cache", "llama", {"silent": (2,)}),
        (r"optimum gives every block a cache of the same heads.*2, 2, 1, 2", "llama", {"groups": {2: (1,)}}),
        ("optimum exports no blocks with something else in the place of attention", "lfm2", {}),
    ):
        checkpoint = make_checkpoint(model_type, **changes)
        with pytest.raises(InputError, match=said):
            export_onnx(checkpoint, tmp_path / "out", ("fp32", "portable"), FOR_TEXT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("groups", [{1: (1,)}, EVERY], ids=["one", "every"])
def test_every_cache_has_its_block_s_heads(
    make_checkpoint: Callable[..., Path], tmp_path: Path, groups: dict[int, tuple[int, ...]]
) -> None:
    """Half of the heads in one block and no attention in another, or all alike."""
    silent = () if groups is EVERY else (2,)
    checkpoint = make_checkpoint("llama", groups=groups, silent=silent, widths=(64, 96, 128, 64))
    (record,) = export_onnx(checkpoint, tmp_path / "out", ("fp32",), FOR_TEXT)
    assert record.parity.max_logit_diff <= 2e-3
    folder = tmp_path / "out" / "fp32"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = open_model(folder / "onnx" / "model.onnx", n_ctx=64, n_threads=1)
    heads = [model._inputs[name].shape[1] for name in sorted(model._caches) if name.endswith("key")]
    assert heads == ([1] * 4 if groups is EVERY else [2, 1, 2])
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (len(heads), 4)
    warned = any("optimum's ORTModelForCausalLM" in warning for warning in record.warnings)
    assert warned is (groups is not EVERY)

"""export_onnx as a whole: the graphs compute the checkpoint, consumers load the folder, nothing is half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from cfsp.errors import InputError, LimitError
from cfsp.models.checkpoint import load_pruned
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.reference import load_tokenizer
from cfsp.records import read_record
from exporters.export_record import ExportManifest, ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.job import MANIFEST_FILE
from exporters.onnx.export import check_numbers, export_onnx
from exporters.onnx.folder import is_onnx
from exporters.onnx.runtime import OnnxModel, open_model
from exporters.onnx.variants import VARIANTS

MakeCheckpoint = Callable[..., Path]
WIDTHS = (96, 64, 128, 40)
WINDOWS = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
# Next-token distributions of random weights are nearly flat, so quantization moves them far.
FUSED = {name: variant for name, variant in VARIANTS.items() if not variant.portable}
LOOSE = {name: ParityLimits(kl_mean=3.0) for name in FUSED if name != "fp32"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500000.0}


def export(checkpoint: Path, output: Path, *variants: str, **settings: Any) -> tuple[ExportRecord, ...]:
    settings = {"limits": LOOSE, "parity_windows": WINDOWS, "n_threads": 1} | settings
    return export_onnx(checkpoint, output, variants, ExportOptions(**settings))


def opened(folder: Path, variant: str, *, last: bool = False, n_ctx: int = 160) -> OnnxModel:
    stem = VARIANTS[variant].stem + ("_last" if last else "")
    return open_model(folder / variant / "onnx" / f"{stem}.onnx", n_ctx=n_ctx, n_threads=1)


@pytest.fixture(scope="module")
def pruned(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("llama", widths=WIDTHS)


@pytest.fixture(scope="module")
def exported(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("onnx") / "out"
    # A graph is most of such a small file; by default a mixture would have no room for one bit more.
    export(pruned, output, *FUSED, calibration=WINDOWS, mixed_bytes=200_000)
    return output


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"tied": False, "num_key_value_heads": 1, "head_dim": 32}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
        ("llama", {"head_dim": 40, "attention_bias": True}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"tied": False}),
        ("qwen3", {"head_dim": 32}),
        ("smollm3", {"no_rope_layers": [0, 1, 0, 0]}),
        ("gemma3_text", {"query_pre_attn_scalar": 40, "sliding_window_pattern": 3}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
        ("olmo3", {"rope_scaling": YARN, "tied": False}),
        ("lfm2", {"tied": False, "conv_bias": True, "conv_L_cache": 4, "num_key_value_heads": 1}),
        ("lfm2", {"layer_types": [FULL, "conv", "conv", FULL]}),
        ("qwen3_5_text", {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}),
        ("qwen3_5_text", {"tied": False, "linear_num_key_heads": 1, "linear_value_head_dim": 32}),
        ("hunyuan_v1_dense", {"rope_parameters": ALPHA, "head_dim": 32, "attention_bias": True}),
        ("exaone4", {"sliding_window": 24, "layer_types": [FULL, WINDOWED, WINDOWED, FULL], "head_dim": 32}),
    ],
)
def test_the_graph_computes_the_checkpoint(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(model_type, widths=WIDTHS, **overrides)
    (record,) = export(checkpoint, tmp_path / "out", "fp32")
    assert record.parity.max_logit_diff < 2e-4
    assert record.parity.same_top1 == 1
    assert record.shape.ffn_widths == WIDTHS
    assert record.context_length == 512
    model = load_pruned(checkpoint)
    # Each weight once; frequencies of ropes and sizes of reshapes are no weights.
    assert record.n_params == sum(p.numel() for p in model.parameters())
    graph = opened(tmp_path / "out", "fp32")
    ids = WINDOWS[0].numpy()
    with torch.inference_mode():
        expected = model(input_ids=WINDOWS[:1]).logits[0].numpy()
    for n_batch in (96, 17, 1):
        graph.n_batch = n_batch
        found = np.concatenate([piece.copy() for piece in graph.iter_logits(ids)])
        np.testing.assert_allclose(found, expected, atol=2e-4)
    assert opened(tmp_path / "out", "fp32", last=True).decode(ids).shape == (1, model.config.vocab_size)
    if graph.can_rewind:
        graph.rewind(40)
        np.testing.assert_allclose(graph.decode(ids[40:]), expected[40:], atol=2e-4)


def run_session(session: Any, ids: Any, mask: Any, cache: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Logits, and the cache as the next call's inputs; without one, from an empty past."""
    caches = [value for value in session.get_inputs() if value.name.startswith("past_")]
    empty = {
        value.name: np.zeros(
            [len(ids), *(n if isinstance(n, int) else 0 for n in value.shape[1:])], dtype=np.float32
        )
        for value in caches
    }
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask} | (cache or empty))
    return logits, dict(zip(empty, present, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "hunyuan_v1_dense", "lfm2", "qwen3_5_text"])
def test_rows_of_unlike_lengths_go_on_where_each_ends(
    model_type: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(model_type)
    export(checkpoint, tmp_path / "out", "fp32")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "fp32" / "onnx" / "model.onnx")
    model, lengths = load_pruned(checkpoint), (12, 7)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    first, cache = run_session(session, WINDOWS[:, :12].numpy(), mask.numpy(), {})
    following = torch.stack([row[n : n + 1] for row, n in zip(WINDOWS, lengths, strict=True)])
    mask = (torch.arange(13) < torch.tensor(lengths)[:, None] + 1).long()
    logits, _ = run_session(session, following.numpy(), mask.numpy(), cache)
    for row, n, before, found in zip(WINDOWS, lengths, first, logits, strict=True):
        with torch.inference_mode():
            alone = model(input_ids=row[None, : n + 1]).logits[0]
        np.testing.assert_allclose(np.concatenate([before[:n], found]), alone, atol=2e-4)


def test_variants_store_what_they_say(pruned: Path, exported: Path) -> None:
    records = {
        record.quant: record for record in read_record(ExportManifest, exported / MANIFEST_FILE).exports
    }
    assert list(records) == list(FUSED)
    assert records["fp32"].tensor_types.keys() == {"float"}
    assert records["fp16"].tensor_types.keys() == {"float16"}
    assert {"int8", "float"} == records["int8"].tensor_types.keys()
    assert {"int4", "int8", "float"} == records["int4"].tensor_types.keys()
    # Most have four bits; the few that need them most have eight.
    assert records["int4"].tensor_types["int4"] > records["int4"].tensor_types["int8"]
    sizes = [records[name].file_bytes for name in ("fp32", "fp16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    for record in records.values():
        graph = onnx.load(exported / record.file, load_external_data=False)
        onnx.shape_inference.infer_shapes(graph, strict_mode=True, check_type=True, data_prop=True)
        assert record.source_model == "Dense-1B"


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_genai_generates_what_the_graph_generates(
    pruned: Path, exported: Path, variant: str, genai_agrees: Callable[..., None]
) -> None:
    text = "List three fruits: an apple, "
    ids = load_tokenizer(pruned)(text, add_special_tokens=False)["input_ids"]
    genai_agrees(exported / variant, ids, text)


def test_a_folder_has_what_its_consumers_read(pruned: Path, exported: Path) -> None:
    for name, variant in FUSED.items():
        folder = exported / name
        config = json.loads((folder / "config.json").read_text())
        assert "auto_map" not in config
        assert config["transformers.js_config"]["use_external_data_format"] == {f"{variant.stem}.onnx": 1}
        genai = json.loads((folder / "genai_config.json").read_text())["model"]
        assert (folder / genai["decoder"]["filename"]).is_file()
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{variant.stem}.onnx")
        caches = [value for value in session.get_inputs() if "past_key_values" in value.name]
        assert all(value.shape[1] == 2 and value.shape[3] == 16 for value in caches)
        for end in ("", "_last"):  # both graphs read the same file of weights
            values = ir.load(folder / "onnx" / f"{variant.stem}{end}.onnx").graph.initializers.values()
            tensors = [value.const_value for value in values if value.const_value is not None]
            outside = {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
            assert outside == {f"{variant.stem}.onnx_data"}
        assert (folder / "LICENSE").is_file()
        assert load_tokenizer(folder)("a fox")["input_ids"] == load_tokenizer(pruned)("a fox")["input_ids"]


def test_a_matrix_of_another_shape_stored_twice_or_missing_is_found(
    make_checkpoint: MakeCheckpoint, pruned: Path, exported: Path, tmp_path: Path
) -> None:
    path = exported / "fp32" / "onnx" / "model.onnx"
    other = load_pruned(make_checkpoint("llama", widths=(96, 64, 96, 40)))
    with pytest.raises(LimitError, match=r"layers\.2\.mlp\.gate_proj.* is \(128, 64\), not \(96, 64\)"):
        check_numbers(path, other)
    model = load_pruned(pruned)
    for change, said in (("pop", "has 0 matrices"), ("copy", "has 2 matrices")):
        graph = ir.load(path)
        name = "model.layers.1.mlp.down_proj.weight" if change == "pop" else "model.embed_tokens.weight"
        value = graph.graph.initializers[name]
        if change == "copy":
            tensor = value.const_value
            assert tensor is not None
            again = ir.Value(name="lm_head.weight", const_value=ir.tensor(tensor.numpy().T.copy()))
            graph.graph.initializers["lm_head.weight"] = again
        else:
            value.name = "other"
        ir.save(graph, tmp_path / f"{change}.onnx", external_data=f"{change}.data")
        with pytest.raises(LimitError, match=said):
            check_numbers(tmp_path / f"{change}.onnx", model)


def test_what_ends_a_text_is_told_to_genai(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    for name, change in {
        "config.json": {"bos_token_id": None, "pad_token_id": None},
        "generation_config.json": {"eos_token_id": [5, 7]},
    }.items():
        settings = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(settings | change))
    export(checkpoint, tmp_path / "out", "fp32")
    told = json.loads((tmp_path / "out" / "fp32" / "genai_config.json").read_text())["model"]
    assert {5, 7, load_tokenizer(checkpoint).eos_token_id} == set(told["eos_token_id"])
    assert "bos_token_id" not in told
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    genai.Model(str(tmp_path / "out" / "fp32"))


def test_a_checkpoint_with_a_folder_of_graphs_is_a_checkpoint(pruned: Path, exported: Path) -> None:
    assert is_onnx(str(exported / "fp32"))
    assert not is_onnx(str(pruned))
    (pruned / "onnx").mkdir()
    assert not is_onnx(str(pruned))
    (pruned / "onnx").rmdir()
    assert not is_onnx(str(exported))


def test_a_graph_without_a_fixed_cache_grows_its_own(exported: Path, tmp_path: Path) -> None:
    """As graphs of other exporters, which do not say how their cache works."""
    graph = ir.load(exported / "fp32" / "onnx" / "model.onnx")
    graph.metadata_props.clear()
    ir.save(graph, tmp_path / "plain.onnx", external_data="plain.data")
    plain = open_model(tmp_path / "plain.onnx", n_ctx=160, n_threads=1, n_batch=40)
    ids = WINDOWS[0].numpy()
    found, expected = (
        np.concatenate([piece.copy() for piece in model.iter_logits(ids)])
        for model in (plain, opened(exported, "fp32"))
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(InputError, match="rewound"):
        plain.rewind(10)


def test_a_rope_that_changes_with_length_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    checkpoint = make_checkpoint("llama", rope_parameters=rope)
    with pytest.raises(InputError, match="rope_type"):
        export(checkpoint, tmp_path / "out", "fp32")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened_is_said_in_a_line(
    exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_model(tmp_path / "none.onnx", n_ctx=8, n_threads=1)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(InputError, match=r"cannot load .*broken\.onnx"):
        open_model(broken, n_ctx=8, n_threads=1)
    folder = shutil.copytree(exported / "fp32" / "onnx", tmp_path / "cut")
    with (folder / "model.onnx_data").open("r+b") as data:
        data.truncate(100)
    with pytest.raises(InputError, match="ONNX Runtime cannot load"):
        open_model(folder / "model.onnx", n_ctx=8, n_threads=1)
    assert capfd.readouterr() == ("", "")
    graph = opened(exported, "fp32", n_ctx=8)
    with pytest.raises(InputError, match="n_ctx"):
        graph.decode(list(range(9)))

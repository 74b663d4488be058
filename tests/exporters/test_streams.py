"""Models in which several hidden states of a token run beside each other, and channels compete (Gemma 3n)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InputError
from cfsp.models.architectures import FULL, WINDOWED, decoder_layers, feed_forward, model_shape, token_tables
from cfsp.models.block_pass import enter_blocks, last_hidden_states
from cfsp.models.checkpoint import load_pruned
from cfsp.models.gguf_file import read_gguf
from cfsp.models.reference import load_model
from cfsp.pruning.axes.vocabulary import cut_rows
from cfsp.pruning.gradients import LOOKUP, collect_weight_moments
from cfsp.pruning.outline import cut_to_shape
from cfsp.text.tokens import TokenWindows
from exporters.export_record import ParityReport
from exporters.gguf import runtime
from exporters.gguf.architecture import read_layout
from exporters.gguf.files import draft_gguf
from exporters.gguf.writer import write_gguf
from exporters.onnx import export_onnx
from exporters.parity import compare, reference_of
from exporters.provenance import read_provenance
from phoneready.main import main

NAME = "gemma3n_text"
pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4")
TinyPath = Callable[..., Path]
TEXT = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32", "--threads", "1"]
IDS = torch.randint(0, 330, (3, 40), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def files(tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint that lost tokens, and its GGUF files.

    Its FFNs are wide: llama.cpp divides by one channel less than transformers where it computes a deviation.
    """
    folder = tmp_path_factory.mktemp("files")
    dense = str(tiny_folder(NAME, intermediate_size=1024))
    removed = ["--prune-ratio", "0", "--vocabulary", "330", "--for", "Q8_0"]
    assert main(["prune", dense, "-o", str(folder / "pruned"), *removed, *TEXT]) == 0
    made = ["--gguf", "f32,Q8_0,Q4_0", "--threads", "1"]
    text = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"]
    assert main(["export", str(folder / "pruned"), "-o", str(folder / "gguf"), *made, *text]) == 0
    return folder / "pruned", folder / "gguf"


def test_what_pruning_leaves_is_proven_in_every_type(files: tuple[Path, Path]) -> None:
    """What llama.cpp's quantizer leaves alone is float32."""
    records = {one["quant"]: one for one in json.loads((files[1] / "export.json").read_text())["exports"]}
    assert records["f32"]["parity"]["kl_mean"] < 1e-5
    assert records["Q4_0"]["gptq_tensors"] > 30
    for record in records.values():
        assert record["architecture"] == "gemma3n"
        file = read_gguf(files[1] / record["file"])
        tensors = {tensor.name: tensor for tensor in file.tensors}
        assert tensors["token_embd.weight"].shape == (330, 64)
        assert tensors["per_layer_token_embd.weight"].shape == (330, 4 * 256)
        assert tensors["altup_proj.weight"].shape == (3, 64, 64)
        plain = [t.kind.name for name, t in tensors.items() if "altup" in name or "laurel" in name]
        assert set(plain) == {"F32"}


def test_a_checkpoint_loads_with_and_without_us(files: tuple[Path, Path], tmp_path: Path) -> None:
    ours = load_pruned(files[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(files[0])
    assert type(theirs).__name__ == "Gemma3nForCausalLM"
    theirs.save_pretrained(tmp_path / "again")
    expected = ours(IDS).logits
    for model in (theirs, load_pruned(tmp_path / "again")):
        assert torch.equal(model(IDS).logits, expected)
    written = [
        model.generate(IDS[:1], max_new_tokens=32, do_sample=False, use_cache=cache)
        for model in (ours, theirs)
        for cache in (True, False)
    ]
    assert all(torch.equal(one, written[0]) for one in written)


def test_a_file_is_judged_as_its_checkpoint_is(
    files: tuple[Path, Path], judged_alike: Callable[..., None]
) -> None:
    judged_alike(files, 2e-2, n_ids=60, context=40, last=50, n_tokens=32)


@torch.inference_mode()
@pytest.mark.parametrize(("share", "tolerance"), [(0.0, 1e-4), (0.95, None)])
def test_a_channel_that_gives_nothing_counts_where_a_threshold_is_computed_from_all(
    tiny_model: Callable[..., Any], share: float, tolerance: float | None
) -> None:
    """Which is why channels of such blocks stay: without those that never open, others close."""
    model, _ = tiny_model(NAME, activation_sparsity_pattern=[share] * 4)
    for layer in decoder_layers(model):
        ffn = feed_forward(model, layer)
        ffn.gate.weight[64:] *= 0.01
        ffn.down.weight[:, 64:] = 0
    before = model(IDS).logits
    cut_to_shape(model, model_shape(model).with_ffn_widths([64] * 4))
    difference = float((model(IDS).logits - before).abs().max())
    assert difference < tolerance if tolerance else difference > 0.1


def test_channels_go_from_blocks_in_which_none_compete(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are whole; the ratio is that of all. transformers' own class builds blocks of such widths."""
    dense = str(tiny_folder(NAME, activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0]))
    assert main(["prune", dense, "-o", str(tmp_path / "out"), "--prune-ratio", "0.25", *TEXT]) == 0
    model = load_pruned(tmp_path / "out")
    widths = model_shape(model).ffn_widths
    assert widths[:2] == (128, 128)
    assert sum(widths) == 3 * 128
    assert list(widths) == json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    capsys.readouterr()
    for options, said in (
        (["--prune-ratio", "0.5"], "below 0.5000"),
        (["--prune-ratio", "0.1", "--for", "Q8_0"], "256 channels stay where all blocks have one width"),
    ):
        assert main(["prune", dense, "-o", str(tmp_path / "none"), *options, *TEXT]) == 2
        assert said in (message := capsys.readouterr().err)
        assert message.splitlines()[-1].startswith("error")
    assert not (tmp_path / "none").exists()


def test_a_target_is_met_by_tokens(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = str(tiny_folder(NAME)), tmp_path / "out"
    target = ["--target-size", "1150K", "--for", "Q8_0"]
    assert main(["prune", dense, "-o", str(out), *target, *TEXT, "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)["budget"]
    assert budget["dense"] > 1150 * 1024 >= budget["reached"]
    assert {one["axis"] for one in budget["axes"] if one["removed"]} == {"vocabulary"}


def written(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_gguf(folder, folder / "model.gguf", tokenizer, read_provenance(folder))
    return folder / "model.gguf"


def measured(model: Any, path: Path) -> ParityReport:
    ids = torch.randint(0, 384, (1, 200), generator=torch.Generator().manual_seed(1))
    with runtime.open_model(path, n_ctx=200, n_batch=64, cache_type="f32") as opened:
        return compare(reference_of(model, TokenWindows(ids, "random", "")), opened.iter_logits, {})


def with_a_channel_more(model: Any) -> Any:
    """A copy in which each block has a channel whose gate is the mean of the others', and which gives nothing.

    Mean and sum of squared deviations are what they were, so that llama.cpp, which divides by one channel less than
    there are, has the model's own deviation.
    """
    wider = copy.deepcopy(model)
    for layer in decoder_layers(wider):
        ffn = feed_forward(wider, layer)
        gate, up, down = (linear.weight.detach() for linear in (ffn.gate, ffn.up, ffn.down))
        mean = gate.double().mean(0, keepdim=True).float()
        ffn.gate.weight = nn.Parameter(torch.cat([gate, mean]))
        ffn.up.weight = nn.Parameter(torch.cat([up, torch.zeros_like(up[:1])]))
        ffn.down.weight = nn.Parameter(torch.cat([down, torch.zeros_like(down[:, :1])], 1))
    wider.config.intermediate_size = [width + 1 for width in model.config.intermediate_size]
    return wider


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        ({}, 1e-3),
        ({"tied": False, "num_key_value_heads": 1, "sliding_window": 7}, 1e-3),
        # Float32 itself is off by so much after 22 random blocks.
        (
            {"num_hidden_layers": 22, "num_kv_shared_layers": 2, "intermediate_size": [128] * 20 + [96, 64]},
            2e-2,
        ),
    ],
)
def test_logits_are_the_models_but_for_gelu_and_the_deviation(
    tiny_model: Callable[..., Any], tmp_path: Path, overrides: dict[str, Any], limit: float
) -> None:
    """Of numbers beyond 10 ggml's GELU is exact; the deviation is made so."""
    model, tokenizer = tiny_model(NAME, **overrides)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.mlp.gate_proj.weight *= 1e5
            layer.per_layer_input_gate.weight *= 1e5
    report = measured(model, written(with_a_channel_more(model), tokenizer, tmp_path / "hf"))
    assert report.max_logit_diff < limit
    assert report.same_top1 == 1.0


def test_few_bits_are_written_of_a_file_with_keys_that_no_block_reads(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """llama.cpp wants them, and importances of them."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}
    checkpoint = make_checkpoint(NAME, num_hidden_layers=22, num_kv_shared_layers=2, **sizes)
    file = read_gguf(draft_gguf(checkpoint, tmp_path, ["IQ2_M"])["IQ2_M"])
    keys = {tensor.name: tensor for tensor in file.tensors if tensor.name.endswith("attn_k.weight")}
    assert len(keys) == 22
    assert not keys["blk.21.attn_k.weight"].dequantize().any()


@torch.inference_mode()
def test_blocks_run_one_after_the_other_over_all_hidden_states(tiny_model: Callable[..., Any]) -> None:
    """With keys that later blocks read, and what is behind the blocks."""
    model, _ = tiny_model(NAME, num_kv_shared_layers=2)
    (first, *_), _ = enter_blocks(model, decoder_layers(model), IDS)
    assert first.shape == (4, 1, 40, 64)
    expected = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    found = torch.cat(last_hidden_states(model, IDS, "running"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_of_a_folder_that_sees_and_hears_the_text_part_is_taken(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """As published ones are: with keys that no block reads, and fewer rows in the further table than tokens."""
    model, tokenizer = tiny_model(NAME, num_kv_shared_layers=2, vocab_size_per_layer_input=300)
    weights = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    weights["model.vision_tower.weight"] = torch.zeros(2)
    for part in ("k_proj", "v_proj", "k_norm"):
        own = weights[f"model.language_model.layers.1.self_attn.{part}.weight"]
        weights[f"model.language_model.layers.3.self_attn.{part}.weight"] = own.clone()
    tokenizer.save_pretrained(tmp_path)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = {"model_type": "gemma3n", "text_config": model.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load_model(tmp_path).model
    assert loaded.config.model_type == NAME
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_tokens_beyond_the_further_table_read_its_first_row(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """As in published folders, whose last tokens stand for images and sounds; every one can go then."""
    model, tokenizer = tiny_model(NAME, tied=False, vocab_size_per_layer_input=300)
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    ids = torch.arange(290, 310)[None]
    loaded = load_model(tmp_path / "hf").model
    assert [len(table.weight) for table in token_tables(loaded)] == [384, 384]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    kept = torch.tensor([7, *range(295, 305)])
    cut_rows(loaded, kept)
    assert loaded.config.vocab_size_per_layer_input == len(kept)
    torch.testing.assert_close(loaded(torch.arange(11)[None]).logits, model(kept[None]).logits[..., kept])


def test_a_lookups_gradient_is_that_of_the_rows(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model(NAME, tied=False)
    further = "model.embed_tokens_per_layer"
    moments = collect_weight_moments(model, [LOOKUP, further], IDS[:1, :7])
    assert all(float(moments[name].rows.sum()) > 0 for name in (LOOKUP, further))


def test_onnx_is_refused_in_a_line(tiny_folder: TinyPath, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no graph is written yet of blocks that read another block's keys"):
        export_onnx(tiny_folder(NAME), tmp_path / "out", ["fp32"])


def test_a_file_of_it_is_no_source(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="written here and not read"):
        load_model(written(*tiny_model(NAME), tmp_path / "hf"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"laurel_rank": 32, "altup_num_inputs": 3}, "altup_num_inputs 4, laurel_rank 64"),
        ({"final_logit_softcapping": 12.0}, "final_logit_softcapping 30.0"),
        (
            {"activation_sparsity_pattern": [0.95] * 3 + [0.0]},
            "leaves out 95% of the channels in the first 10",
        ),
        ({"num_kv_shared_layers": 2}, "of their own in the first 20 blocks, and in no others"),
        ({"layer_types": [FULL] * 4}, "a window in some block"),
        ({"intermediate_size": [128, 96, 128, 128]}, "one width for all blocks, as zeros beside channels"),
        ({"attention_bias": True}, "no bias on"),
        (
            {
                "num_hidden_layers": 22,
                "num_kv_shared_layers": 2,
                "layer_types": [WINDOWED, FULL] * 9 + [FULL, WINDOWED] * 2,
            },
            "from the last two before them alone",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tiny_folder: TinyPath, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"gemma3n: .*{said}") as caught:
        read_layout(tiny_folder(NAME, **overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size_per_layer_input": 400}, "vocab_size_per_layer_input 400 is not vocab_size 384"),
        ({"intermediate_size": [128, 128]}, "intermediate_size has 2 entries for 4 blocks"),
        ({"activation_sparsity_pattern": [0.95]}, "activation_sparsity_pattern has 1 entries for 4 blocks"),
        ({"activation_sparsity_pattern": [1.0] * 4}, "activation_sparsity_pattern"),
        ({"altup_active_idx": 4}, "altup_active_idx 4 is not below altup_num_inputs 4"),
        (
            {"per_layer_config": {"1": {"num_key_value_heads": 1}}},
            "blocks of this model type are stated otherwise",
        ),
        ({"model_type": "llama", "final_logit_softcapping": None}, "intermediate_size is a list"),
    ],
)
def test_folders_of_no_such_model(tiny_folder: TinyPath, settings: dict[str, Any], said: str) -> None:
    file = tiny_folder(NAME) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(InputError, match=said) as caught:
        load_model(file.parent)
    assert "\n" not in str(caught.value)

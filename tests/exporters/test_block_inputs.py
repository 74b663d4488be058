"""Models whose blocks get more of a token than its hidden state, and whose last blocks read others' keys (Gemma 4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")


from cfsp.models.architectures import model_shape, token_tables
from cfsp.models.checkpoint import load_pruned
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.gguf_file import read_gguf
from cfsp.models.offload import VARIABLE
from cfsp.models.reference import load_model
from exporters.checkpoint_reader import read_config
from exporters.gguf.files import draft_gguf
from phoneready.main import main
from runtime_bench.devices import gguf_facts

NAME = "gemma4_text"
pytestmark = pytest.mark.skipif(NAME not in transformers.CONFIG_MAPPING, reason="transformers 4")
TinyPath = Callable[..., Path]
TEXT = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32", "--threads", "1"]
REMOVED = ["--prune-ratio", "0.25", "--vocabulary", "330", "--for", "Q8_0"]
IDS = torch.randint(0, 330, (3, 40), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def files(tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint that lost channels and tokens, and its GGUF files."""
    folder = tmp_path_factory.mktemp("files")
    dense = str(tiny_folder(NAME, intermediate_size=192, num_hidden_layers=6))
    assert main(["prune", dense, "-o", str(folder / "pruned"), *REMOVED, *TEXT]) == 0
    made = ["--gguf", "f32,f16,Q8_0,Q4_0,Q4_K_M,mixed:500KiB", "--threads", "1"]
    text = ["--calibration", "builtin:python-docs", "--nsamples", "4", "--seqlen", "64", "--tune-scales"]
    assert main(["export", str(folder / "pruned"), "-o", str(folder / "gguf"), *made, *text]) == 0
    return folder / "pruned", folder / "gguf"


@pytest.mark.everything
def test_from_files_the_same_bytes_are_made_and_proven_as_a_whole(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for stream in ("always", "never"):
        monkeypatch.setenv(VARIABLE, stream)
        assert main(["export", str(files[0]), "-o", str(tmp_path / stream), "--gguf", "Q8_0"]) == 0
        (made[stream],) = json.loads((tmp_path / stream / "export.json").read_text())["exports"]
    assert made["always"]["blocks"] is None  # a block alone would lack what it is given of a token
    assert made["always"]["sha256"] == made["never"]["sha256"]


def test_what_pruning_leaves_is_proven_in_every_type(files: tuple[Path, Path]) -> None:
    records = {one["quant"]: one for one in json.loads((files[1] / "export.json").read_text())["exports"]}
    assert records["f32"]["parity"]["kl_mean"] < 1e-5
    assert records["Q4_0"]["gptq_tensors"] > 40
    widths = model_shape(load_pruned(files[0])).ffn_widths
    assert len(set(widths)) > 1
    for record in records.values():
        assert record["architecture"] == "gemma4"
        file = read_gguf(files[1] / record["file"])
        assert tuple(file.hyperparameter("feed_forward_length")) == widths
        shapes = {tensor.name: tensor.shape for tensor in file.tensors}
        assert shapes["token_embd.weight"] == (330, 64)
        assert shapes["per_layer_token_embd.weight"] == (330, 6 * 64)
        assert {name for name in shapes if name.endswith("attn_k.weight")} == {
            f"blk.{block}.attn_k.weight" for block in range(4)
        }


def test_a_file_is_judged_as_its_checkpoint_is(
    files: tuple[Path, Path], judged_alike: Callable[..., None]
) -> None:
    """Logits are capped in both, and windows end where they do."""
    judged_alike(files, 2e-2, n_ids=60, context=40, last=50, n_tokens=32)
    (path,) = files[1].glob("*f32.gguf")
    # What is read for a token leaves the further table out, and keys are kept of blocks that have their own.
    facts, model = gguf_facts(path), load_pruned(files[0])
    table = token_tables(model)[1].weight
    assert facts.weight_bytes - facts.read_bytes == table.numel() * table.itemsize
    assert facts.key_value_width == read_config(files[0]).key_value_width == 2 * 2 * (2 * 16 + 2 * 32)


def test_a_gguf_file_of_a_dense_model_is_a_source(tiny_folder: TinyPath, tmp_path: Path) -> None:
    """With windows in other blocks, heads of one size, and no cap."""
    kinds = [WINDOWED, WINDOWED, WINDOWED, FULL, WINDOWED, FULL]
    folder = tiny_folder(
        NAME, num_hidden_layers=6, layer_types=kinds, global_head_dim=16, final_logit_softcapping=None
    )
    path = draft_gguf(folder, tmp_path, ["f32"])["f32"]
    assert torch.equal(load_model(path).model(IDS).logits, load_model(folder).model(IDS).logits)


def test_keys_that_are_stored_and_never_read_are_left_out(tiny_folder: TinyPath, tmp_path: Path) -> None:
    """As published folders have them, of blocks that read another block's."""
    import safetensors.torch

    folder = tiny_folder(NAME)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    expected = load_model(folder).model(IDS).logits
    for part in ("k_proj", "v_proj", "k_norm"):
        name = f"model.layers.1.self_attn.{part}.weight"
        weights[name.replace("layers.1", "layers.3")] = weights[name].clone()
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(folder).model(IDS).logits, expected)
    path = draft_gguf(folder, tmp_path, ["f32"])["f32"]
    assert not any("blk.3.attn_k" in tensor.name for tensor in read_gguf(path).tensors)

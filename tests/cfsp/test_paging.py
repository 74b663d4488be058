"""Models whose weights stay in files: the same bytes come out, and one block is in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, token_tables
from cfsp.models.checkpoint import load_pruned, save_checkpoint
from cfsp.models.families import FAMILIES
from cfsp.models.offload import NARROW, VARIABLE, at_hand, copied, is_paged, last_hidden_states
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.prune import prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.text.calibration import load_calibration
from exporters.quantize.mixture import LOOKUP, collect_weight_moments
from phoneready.main import main

PUT_AWAY = ("always", "bfloat16")
WITH_INPUTS = [model_type for model_type, row in FAMILIES.items() if row.block_inputs]
TinyModel = Callable[..., tuple[Any, Any]]
MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> MakeFolder:
    """Factory of a model stored in bfloat16."""

    def make(*args: Any, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
        loaded = LoadedModel(*tiny_model(*args, **overrides), ModelSource("tiny", "folder", "tiny"), dtype)
        save_checkpoint(loaded, tmp_path / "model", force=True)
        return tmp_path / "model"

    return make


def load(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model that is whole (`never`), in files (`always`), or in memory in 16 bits, a name of a dtype."""
    narrow = how in NARROW
    monkeypatch.setenv(VARIABLE, "never" if narrow else how)
    loaded = load_model(folder, dtype=how if narrow else "auto", may_stream=True)
    assert is_paged(loaded.model) == (how != "never")
    return loaded


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_memory(model: Any) -> int:
    """Blocks that are at hand."""
    return sum(next(layer.parameters()).dtype == torch.float32 for layer in decoder_layers(model))


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [
        ("llama", {"blocks": 1, "kv_groups": 0.5, "attentions": 1, "vocabulary": 300}),
        *((model_type, {"vocabulary": 300}) for model_type in WITH_INPUTS),
    ],
)
def test_pruning_gives_the_same_bytes(
    asked: dict[str, Any],
    model_type: str,
    folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However weights are kept. A hidden size whose square root is no number of few bits tells most."""
    dense, made = folder(model_type, hidden_size=96), {}
    for stream in ("never", "always", "bfloat16"):
        loaded = load(dense, stream, monkeypatch)
        calibration = load_calibration(("builtin:python-docs",), loaded, nsamples=3, seqlen=24)
        result = prune_model(loaded, calibration, PruneSettings(prune_ratio=0.25, align=8, **asked))
        save_checkpoint(
            result.loaded, tmp_path / stream, plan=result.plan, input_moments=result.input_moments
        )
        made[stream] = files_of(tmp_path / stream)
    assert made["never"] == made["always"] == made["bfloat16"]
    stored = load_pruned(tmp_path / "always")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_of_a_table_of_tokens_a_call_has_the_rows_that_it_reads(
    folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = folder("gemma4_text")
    model = load(dense, "always", monkeypatch).model
    table, seen = model.get_decoder().embed_tokens_per_layer, []
    # Before what puts the rows back.
    table.register_forward_hook(
        lambda module, *_: seen.append((len(module.weight), module.weight.dtype)), prepend=True
    )
    whole = load(dense, "never", monkeypatch).model
    ids = torch.tensor([[7, 300, 7, 5, 5]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
        padding = table.padding_idx
        known = {7, 300, 5, *range(0 if padding is None else padding + 1)}
        assert seen == [(len(known), torch.float32)]
        with at_hand(table):
            model(ids)
    assert seen[1:] == [(len(whole.get_decoder().embed_tokens_per_layer.weight), torch.float32)]
    assert table.weight.dtype == torch.bfloat16


def test_one_block_is_in_memory_at_a_time(folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = load(folder(), "always", monkeypatch).model, []
    with torch.no_grad():
        last_hidden_states(model, torch.arange(4)[None], "a first block is asked what it returns")
    for layer in decoder_layers(model):
        layer.mlp.register_forward_hook(lambda *_: seen.append(in_memory(model)))
    with torch.no_grad():
        last_hidden_states(model, torch.arange(40).view(2, 20), "looking")
        model(torch.arange(20)[None])
    assert seen == [1] * (3 * len(decoder_layers(model)))
    assert in_memory(model) == 0


@pytest.mark.parametrize("how", PUT_AWAY)
def test_what_is_changed_stays(how: str, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder(tied=True), how, monkeypatch).model
    first, ends = decoder_layers(model)[0], (model.get_input_embeddings(), model.get_output_embeddings())
    before = first.mlp.up_proj.weight.detach().float()
    with at_hand(first, ends[0]), torch.no_grad():
        first.mlp.up_proj.weight.add_(1 / 3)  # no number of 16 bits
        first.mlp.down_proj.weight = nn.Parameter(torch.ones(64, 4))
        ends[0].weight[5] += 1 / 3
    expected = ends[0].weight[5].clone()
    for _ in range(2):
        with at_hand(first, ends[1]):
            assert torch.equal(first.mlp.up_proj.weight, before + 1 / 3)
            assert torch.equal(ends[1].weight[5], expected)
        assert first.mlp.up_proj.weight.dtype == torch.float32
        assert first.mlp.down_proj.weight.dtype == torch.bfloat16  # holds ones
        assert ends[0].weight is ends[1].weight
    with torch.no_grad():
        first.mlp.up_proj.weight.zero_()  # in place, between calls
    with at_hand(first):
        pass
    assert not first.mlp.up_proj.weight.any()


@pytest.mark.parametrize("how", PUT_AWAY)
def test_a_copy_shares_the_files_and_nothing_else(
    how: str, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder(), how, monkeypatch).model
    twin = copied(model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        with at_hand(decoder_layers(twin)[1]):
            decoder_layers(twin)[1].mlp.up_proj.weight.zero_()
        assert not torch.equal(twin(ids).logits, expected)
        del twin
        assert torch.equal(model(ids).logits, expected)
    with at_hand(decoder_layers(model)[0]), pytest.raises(RuntimeError, match="at hand"):
        copied(model)


@pytest.mark.parametrize(("model_type", "how"), [("llama", "always"), ("gemma4_text", "bfloat16")])
def test_weight_moments_are_those_of_a_model_in_memory(
    model_type: str, how: str, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients reach the block whose keys others read, every table of tokens, and what stands before the blocks."""
    shared = {"num_kv_shared_layers": 2} if model_type in WITH_INPUTS else {}
    dense, ids = folder(model_type, tied=False, **shared), torch.randint(0, 300, (3, 30))
    whole, paged = (load(dense, kept, monkeypatch).model for kept in ("never", how))
    names = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    tables = [name for name, module in whole.named_modules() if module in token_tables(whole)[1:]]
    paged.get_decoder().norm.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in paged.named_parameters()}
    expected, found = (
        collect_weight_moments(model, [*names, LOOKUP, *tables], ids) for model in (whole, paged)
    )
    assert {name: parameter.requires_grad for name, parameter in paged.named_parameters()} == before
    assert in_memory(paged) == 0
    assert expected.keys() == found.keys()
    read = [f"model.layers.{block}.self_attn.{part}_proj" for block in (0, 1) for part in "kv"]
    assert {*read, "lm_head", LOOKUP, *tables} <= expected.keys()
    for name, moments in expected.items():
        for part in ("rows", "columns", "inputs"):
            torch.testing.assert_close(
                getattr(found[name], part), getattr(moments, part), rtol=1e-4, atol=1e-12
            )


def test_numbers_too_large_for_float16_are_stored_as_float32(
    folder: MakeFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(folder(dtype=torch.float16))
    with torch.no_grad():
        decoder_layers(loaded.model)[0].mlp.up_proj.weight[0, 0] = 1e5
    assert save_checkpoint(loaded, tmp_path / "large").dtype == "float32"
    assert "too large for float16" in caplog.text
    assert decoder_layers(load_pruned(tmp_path / "large"))[0].mlp.up_proj.weight[0, 0] == 1e5


def test_bad_input_is_told_in_a_line(
    folder: MakeFolder,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense, text = (
        folder(),
        ["--calibration", "builtin:python-docs", "--set", "nsamples=3", "--set", "seqlen=24"],
    )
    file, asked = dense / "model.safetensors", ["prune", str(dense), "-o", str(tmp_path / "out"), *text]
    whole = file.read_bytes()
    for content, wish, told in (
        (whole, "sometimes", VARIABLE),
        (whole[:-100], "always", "damaged or cut short"),
        (whole, "always", "another folder (TMPDIR)"),
    ):
        file.write_bytes(content)
        monkeypatch.setenv(VARIABLE, wish)
        if "TMPDIR" in told:
            monkeypatch.setenv("TMPDIR", str(small_disk("200k")))
        assert main(asked) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_disk_that_becomes_full_is_told_in_a_line(
    folder: MakeFolder, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("64k")
    monkeypatch.setenv("TMPDIR", str(disk))
    first = decoder_layers(load(folder(), "always", monkeypatch).model)[0]
    with pytest.raises(InputError, match="no space left to write"), at_hand(first):
        _add_a_third(first)


def _add_a_third(layer: nn.Module) -> None:
    """Numbers that take 32 bits."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1 / 3)


@pytest.mark.parametrize("goes", [False, True])
def test_a_folder_that_changes_while_it_is_read_is_told(
    goes: bool, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = folder()
    model, file = load(dense, "always", monkeypatch).model, dense / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if not goes:
        file.write_bytes(content)
    with pytest.raises(InputError, match="changed while it was read"), at_hand(decoder_layers(model)[0]):
        pass


def test_gguf_files_are_read_block_by_block_too(
    tiny_model: TinyModel, write_gguf: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "dense.gguf", *tiny_model("gemma3_text"))
    made = []
    for stream in ("never", "always"):
        loaded = load(tmp_path / "dense.gguf", stream, monkeypatch)
        calibration = load_calibration(("builtin:python-docs",), loaded, nsamples=3, seqlen=24)
        result = prune_model(loaded, calibration, PruneSettings(prune_ratio=0.25, align=8, vocabulary=300))
        save_checkpoint(result.loaded, tmp_path / stream, plan=result.plan)
        made.append(files_of(tmp_path / stream))
    assert made[0] == made[1]


def test_what_copies_have_changed_does_not_stay_on_the_disk(
    folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model = load(folder(), "always", monkeypatch).model
    counts = set()
    for _ in range(4):
        twin = copied(model)
        for layer in decoder_layers(twin):
            for _ in range(3):
                with at_hand(layer):
                    _add_a_third(layer)
        counts.add(len(list(tmp_path.glob("phoneready-weights-*/*"))))
    assert len(counts) == 1  # those of the last copy
    del twin, layer
    gc.collect()
    assert not list(tmp_path.glob("phoneready-weights-*/*"))


def test_a_call_that_fails_leaves_nothing_in_memory(
    folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = load(folder(), "always", monkeypatch).model, torch.arange(9)[None]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    for register in ("register_forward_pre_hook", "register_forward_hook"):
        for first in (True, False):
            handle = getattr(decoder_layers(model)[1], register)(fail, prepend=first)
            with pytest.raises(ZeroDivisionError), torch.no_grad():
                model(ids)
            assert in_memory(model) == 0
            handle.remove()
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()

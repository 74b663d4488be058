"""Tiny pruned checkpoints, with everything that an export reads of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from cfsp.evaluation.language_model import Branches, LanguageModel
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.statistics import collect_input_moments
from cfsp.pruning.surgery import cut_channels, cut_groups, remove_attention, set_config_shape
from exporters.gguf.language_model import GGUFLanguageModel

MakeCheckpoint = Callable[..., Path]
JudgedAlike = Callable[..., None]


def _narrow(model: Any, widths: tuple[int, ...]) -> None:
    """Keep the first channels of every FFN."""
    with torch.no_grad():
        for layer, width in zip(decoder_layers(model), widths, strict=True):
            cut_channels(feed_forward(model, layer), torch.arange(width))
    set_config_shape(model)


@pytest.fixture(scope="session")
def make_checkpoint(
    tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> MakeCheckpoint:
    """Factory with `tiny_model`'s arguments, `widths=`, `silent=`, `groups=` and `moments=` -> a checkpoint folder."""

    def make(
        *args: Any,
        widths: tuple[int, ...] | None = None,
        silent: tuple[int, ...] = (),
        groups: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
        moments: bool = True,
        **overrides: Any,
    ) -> Path:
        model, tokenizer = tiny_model(*args, **overrides)
        for index in silent:
            remove_attention(decoder_layers(model)[index])
        with torch.no_grad():
            for index, kept in groups.items():
                cut_groups(decoder_layers(model)[index].self_attn, kept)
        if widths:
            _narrow(model, widths)
        source = ModelSource(
            "owner/dense",
            "hub",
            "Dense-1B",
            sha256="a" * 64,
            license="apache-2.0",
            base_model="owner/Base-1B",
        )
        windows = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
        folder = tmp_path_factory.mktemp("checkpoint") / "pruned"
        save_checkpoint(
            LoadedModel(model, tokenizer, source),
            folder,
            input_moments=collect_input_moments(model, windows) if moments else None,
            seed=7,
        )
        return folder

    return make


@pytest.fixture
def no_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let text be run as on a processor that torch rounds no products for: bit for bit what another one gives."""
    amx = torch.cpu._is_amx_tile_supported()
    monkeypatch.setattr("cfsp.precision._cpu_has", lambda name: name == "amx_tile" and amx)


@pytest.fixture(scope="session")
def judged_alike() -> JudgedAlike:
    """Holds what (checkpoint, folder of its exact file or graph) say of a text, and write, against each other."""

    def check(
        files: tuple[Path, Path], tolerance: float, *, n_ids: int, context: int, last: int, n_tokens: int
    ) -> None:
        loaded = load_model(files[0])
        ours: LanguageModel = TorchLanguageModel(loaded)
        theirs: LanguageModel
        if (files[1] / "fp32").is_dir():
            from exporters.onnx.language_model import OnnxLanguageModel  # needs an extra

            theirs = OnnxLanguageModel(str(files[1] / "fp32"), n_ctx=256, n_threads=1)
        else:
            # llama.cpp knows some tokens by their texts for such that end an answer, whatever the settings say.
            known = loaded.tokenizer.get_vocab()
            ends = [known[text] for text in ("<|endoftext|>", loaded.tokenizer.eos_token) if text in known]
            loaded.model.generation_config.eos_token_id = ends
            theirs = GGUFLanguageModel(next(files[1].glob("*f32.gguf")), n_ctx=256)
        ids = torch.randint(3, 320, (n_ids,), generator=torch.Generator().manual_seed(0)).tolist()
        several, one = ((5,), (5, 6, 7), (8, 9)), ((4, 3),)
        items = [Branches(tuple(ids[:context]), several), Branches(tuple(ids[9:20]), one)]
        scores = [
            [each.log_likelihood for row in model.score(items) for each in row] for model in (ours, theirs)
        ]
        assert scores[0] == pytest.approx(scores[1], abs=tolerance)
        prompts = [ids[:5], ids[5:18], ids[18:last]]
        assert ours.generate(prompts, n_tokens) == theirs.generate(prompts, n_tokens)
        theirs.close()

    return check


@pytest.fixture(scope="session")
def genai_agrees() -> Callable[..., None]:
    """`genai_agrees(folder, ids)`: GenAI writes what the folder's graph does; it reads `text`, if given, as the ids."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

    def check(folder: Path, ids: list[int], text: str | None = None) -> None:
        from exporters.onnx.folder import find_graph
        from exporters.onnx.runtime import open_model

        model = genai.Model(str(folder))
        assert text is None or [int(i) for i in genai.Tokenizer(model).encode(text)] == ids
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=64)
        generator = genai.Generator(model, parameters)
        for piece in (ids[:9], ids[9:]):
            generator.append_tokens(piece)
        graph = open_model(find_graph(str(folder), last_logits=True), n_ctx=64, n_threads=1)
        logits = graph.decode(ids)
        for _ in range(64 - len(ids)):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            assert token == int(logits[-1].argmax())
            if generator.is_done():
                break
            logits = graph.decode([token])

    return check

"""A checkpoint and its float32 files draw the same tokens by the same numbers, whatever is written beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.reference import load_model
from cfsp.text.choosing import Chooser, Sampling, choosers
from exporters.family import ExportOptions
from exporters.gguf.files import draft_gguf
from exporters.gguf.language_model import GGUFLanguageModel
from exporters.onnx import export_onnx
from exporters.onnx.language_model import OnnxLanguageModel

IDS = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = [IDS[:5], IDS[5:18], IDS[18:21], IDS[18:22]]
DRAWN = choosers(Sampling(0.8, 100, 0.95, 0.001, 1.1), 3, len(PROMPTS))
LENGTH = 24


def alone(model: LanguageModel, drawn: Sequence[Chooser]) -> list[list[int]]:
    pairs = reversed(list(zip(PROMPTS, drawn, strict=True)))
    return [model.generate([prompt], LENGTH, choosers=[one])[0] for prompt, one in pairs][::-1]


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_a_checkpoint_and_its_files_draw_the_same(
    make_checkpoint: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    checkpoint = make_checkpoint(model_type=model_type, moments=False)
    torch_model = TorchLanguageModel(load_model(checkpoint))
    written = torch_model.generate(PROMPTS, LENGTH, choosers=DRAWN)
    assert written != torch_model.generate(PROMPTS, LENGTH)
    assert written != torch_model.generate(PROMPTS, LENGTH, choosers=choosers(DRAWN[0].sampling, 4, 4))
    assert alone(torch_model, DRAWN) == written
    export_onnx(checkpoint, tmp_path / "onnx", ("fp32",), ExportOptions(n_threads=1))
    gguf = draft_gguf(checkpoint, tmp_path, ["f32"])["f32"]
    for model in (
        GGUFLanguageModel(gguf, n_ctx=256, n_threads=1),
        OnnxLanguageModel(str(tmp_path / "onnx" / "fp32"), n_ctx=256, n_threads=1),
    ):
        assert model.generate(PROMPTS, LENGTH, choosers=DRAWN) == written
        assert alone(model, DRAWN) == written
        model.close()


def test_a_draw_keeps_to_stop_strings(make_checkpoint: Callable[..., Path]) -> None:
    model = TorchLanguageModel(load_model(make_checkpoint(moments=False)))
    whole = model.generate(PROMPTS, LENGTH, choosers=DRAWN)
    stop = model.tokenizer.decode(whole[0][3:5])
    short = model.generate(PROMPTS, LENGTH, choosers=DRAWN, stop_strings=[stop])
    assert short[0] == whole[0][: len(short[0])]
    assert len(short[0]) <= 5

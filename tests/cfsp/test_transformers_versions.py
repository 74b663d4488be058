"""A checkpoint written under one major version of transformers loads under the other.

The other version is installed, with the few small packages that must match it, into a folder of the cache that is
put before this environment's own packages; torch and the rest are shared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import cfsp
from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.families import FAMILIES
from cfsp.models.reference import load_model
from cfsp.models.rope import partial_rope
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.surgery import cut_channels, cut_groups, remove_attention

pytestmark = pytest.mark.everything

REQUIREMENTS = {4: "transformers>=4.57,<4.58", 5: "transformers>=5,<6"}
HERE = int(transformers.__version__.partition(".")[0])
OTHER = 9 - HERE
IDS = torch.arange(60).view(2, 30)
TEXT = "It's 12 o'clock,\n\n and <|im_start|> the capital of France is Paris."
WIDTHS = {"different": (96, 64, 128, 32), "uniform": (64, 64, 64, 64)}
SCALED_ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        **partial_rope(
            {
                "rope_type": "longrope",
                "rope_theta": 50000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 24,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 9.0],
            },
            head_dim=16,
            context=192,
        ),
        "max_position_embeddings": 192,
    },
    "alpha": {
        "model_type": "hunyuan_v1_dense",
        "rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
}

# Runs under the other version: arguments are a folder of checkpoints, and one to write re-saved copies to.
SCRIPT = """
import json, sys
from pathlib import Path
import torch, transformers
from cfsp.models.checkpoint import load_pruned
from cfsp.pruning.statistics import collect_input_moments
from cfsp.text.tokens import TokenWindows
from exporters.onnx.decoder_graph import ropes_of
from exporters.proof import reference_of

def read(model, ids):
    "What pruning and exports read of a model."
    ropes, kinds = ropes_of(model)
    return {
        "moments": [float(values.sum()) for values in collect_input_moments(model, ids).values()],
        "states": float(reference_of(model, TokenWindows(ids, "", "")).hidden.square().mean()),
        "ropes": [float(ropes[kind][0].sum()) if kind else 0.0 for kind in kinds],
    }

source, target = map(Path, sys.argv[1:3])
ids, text = torch.arange(60).view(2, 30), json.loads(sys.argv[3])
report = {"version": transformers.__version__}
for folder in sorted(source.iterdir()):
    trust = bool(list(folder.glob("*.py")))
    auto = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    own = load_pruned(folder)
    auto.save_pretrained(target / folder.name)
    again = transformers.AutoModelForCausalLM.from_pretrained(target / folder.name, trust_remote_code=trust)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    report[folder.name] = {
        "logits": auto(ids).logits.tolist(),
        "equal": torch.equal(auto(ids).logits, own(ids).logits) and torch.equal(auto(ids).logits, again(ids).logits),
        "read": read(own, ids),
        "tokens": tokenizer(text)["input_ids"],
        "end": tokenizer.eos_token,
    }
print(json.dumps(report))
"""


def read_here(model: Any) -> dict[str, Any]:
    """What the script reads there."""
    known: dict[str, Any] = {}
    exec(SCRIPT.partition("source, target")[0], known)
    read: dict[str, Any] = known["read"](model, IDS)
    return read


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for every model type, tied or not, with widths different and uniform, heads too."""
    folder = tmp_path_factory.mktemp("written-here")
    for model_type, row in FAMILIES.items():
        if row.release > min(HERE, OTHER):
            continue
        for tied in (True, False):
            for kind, widths in WIDTHS.items():
                model, tokenizer = tiny_model(model_type, tied)
                for layer, width in zip(decoder_layers(model), widths, strict=True):
                    cut_channels(feed_forward(model, layer), torch.arange(width))
                if kind == "different" and not tied:
                    if not row.mixer:
                        remove_attention(decoder_layers(model)[2])
                    if not row.groups_stay:
                        cut_groups(decoder_layers(model)[1].self_attn, (1,))
                loaded = LoadedModel(model, tokenizer, ModelSource("tiny", "hub", "tiny"))
                save_checkpoint(loaded, folder / f"{model_type}-{'tied' if tied else 'untied'}-{kind}")
    for kind, scaled in SCALED_ROPES.items():
        model, tokenizer = tiny_model(**{"model_type": "mistral"} | scaled)
        loaded = LoadedModel(model, tokenizer, ModelSource("tiny", "hub", "tiny"))
        save_checkpoint(loaded, folder / f"scaled-{kind}")
    return folder


def test_the_other_version_loads_what_is_written_here(
    packages_folder: Callable[..., Path], checkpoints: Path, tmp_path: Path
) -> None:
    packages = packages_folder(f"transformers-{OTHER}", REQUIREMENTS[OTHER])
    root = str(Path(next(iter(cfsp.__path__))).parent)
    environment = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join([str(packages), root]),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = [sys.executable, "-c", SCRIPT, str(checkpoints), str(tmp_path / "again"), json.dumps(TEXT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report.pop("version").startswith(f"{OTHER}.")
    assert sorted(report) == sorted(folder.name for folder in checkpoints.iterdir())
    for name, found in report.items():
        loaded = load_model(checkpoints / name)
        assert found["equal"], name
        # The two versions mask attention differently, which changes the order of additions.
        torch.testing.assert_close(
            torch.tensor(found["logits"]), loaded.model(IDS).logits, atol=1e-4, rtol=1e-4
        )
        for what, values in read_here(loaded.model).items():
            assert found["read"][what] == pytest.approx(values, rel=1e-4), (name, what)
        tokenizer = loaded.tokenizer
        assert found["tokens"] == tokenizer(TEXT)["input_ids"], name
        assert found["end"] == tokenizer.eos_token

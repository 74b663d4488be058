"""Checkpoints load bit for bit, with and without phoneready; contradictions in a folder are found; shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward, model_shape
from cfsp.models.checkpoint import (
    is_pruned_checkpoint,
    load_input_moments,
    load_pruned,
    read_checkpoint_info,
    save_checkpoint,
)
from cfsp.models.config_file import dense_settings, shape_from_config
from cfsp.models.families import FAMILIES
from cfsp.models.reference import load_model
from cfsp.models.shape import BlockShape, ModelShape, require_supported
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.surgery import cut_channels
from cfsp.records import read_record

IDS = torch.arange(60).view(2, 30)
DIFFERENT = (96, 64, 128, 32)
UNIFORM = (64, 64, 64, 64)
SOURCE = ModelSource("someone/tiny", "hub", "tiny", sha256="0" * 64, license="mit", base_model="someone/base")
TEXT = "It's 12 o'clock,\n\n and <|im_start|> the capital of France is Paris."


@dataclass(frozen=True)
class TinyPlan:
    """As much of a plan as a checkpoint looks at."""

    KIND: ClassVar[str] = "tiny_plan"
    SCHEMA_VERSION: ClassVar[int] = 1

    shape: ModelShape


def pruned(tiny_model: Any, widths: Sequence[int], *args: Any, **overrides: Any) -> LoadedModel:
    """A tiny model with random channels cut away."""
    model, tokenizer = tiny_model(*args, **overrides)
    generator = torch.Generator().manual_seed(3)
    for layer, width in zip(decoder_layers(model), widths, strict=True):
        kept = torch.randperm(128, generator=generator)[:width].sort().values
        cut_channels(feed_forward(model, layer), kept)
    return LoadedModel(model, tokenizer, SOURCE)


def auto_load(folder: Path, *, trust: bool) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)


@pytest.mark.parametrize(
    ("model_type", "tied", "widths"),
    [
        *((name, number % 2 == 0, DIFFERENT) for number, name in enumerate(FAMILIES)),
        ("llama", False, UNIFORM),
        ("gemma4_text", True, UNIFORM),
    ],
)
def test_round_trip(
    model_type: str, tied: bool, widths: tuple[int, ...], tiny_model: Any, tmp_path: Path
) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("transformers 4")
    loaded = pruned(tiny_model, widths, model_type, tied)
    logits = loaded.model(IDS).logits
    folder = tmp_path / "checkpoint"
    info = save_checkpoint(loaded, folder)
    assert info.shape.ffn_widths == widths
    trust = len(set(widths)) > 1
    for model in (load_pruned(folder), auto_load(folder, trust=trust)):
        assert torch.equal(model(IDS).logits, logits)
        assert model_shape(model).ffn_widths == widths
        assert not model.training
        how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS[:1])}
        assert torch.equal(model.generate(IDS[:1], **how), loaded.model.generate(IDS[:1], **how))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == loaded.tokenizer(TEXT)["input_ids"]
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert tokenizer.eos_token == loaded.tokenizer.eos_token


def test_saving_again_through_transformers(tiny_model: Any, tmp_path: Path) -> None:
    loaded = pruned(tiny_model, DIFFERENT)
    save_checkpoint(loaded, tmp_path / "first")
    for number, model in enumerate(
        (load_pruned(tmp_path / "first"), auto_load(tmp_path / "first", trust=True))
    ):
        again = tmp_path / f"again-{number}"
        model.save_pretrained(again)
        assert model.config.intermediate_size == max(DIFFERENT)
        for reloaded in (load_pruned(again), auto_load(again, trust=True)):
            assert torch.equal(reloaded(IDS).logits, loaded.model(IDS).logits)


def test_reloaded_checkpoint_saves_the_same_again(tiny_model: Any, tmp_path: Path) -> None:
    first = save_checkpoint(pruned(tiny_model, DIFFERENT), tmp_path / "first")
    second = save_checkpoint(load_model(tmp_path / "first"), tmp_path / "second")
    assert second.weights_sha256 == first.weights_sha256
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()


def test_different_widths_are_written_as_transformers_documents_them(tiny_model: Any, tmp_path: Path) -> None:
    save_checkpoint(pruned(tiny_model, DIFFERENT), tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["per_layer_config"] == {str(i): {"intermediate_size": n} for i, n in enumerate(DIFFERENT)}
    assert config["architectures"] == ["LlamaForCausalLM"]
    code, _, name = config["auto_map"]["AutoModelForCausalLM"].partition(".")
    assert name == "PrunedLlamaForCausalLM"
    assert (tmp_path / "checkpoint" / f"{code}.py").is_file()
    with pytest.raises(RuntimeError):  # rather than load the dense shape
        auto_load(tmp_path / "checkpoint", trust=False)


def test_a_checkpoint_made_uniform_loses_its_code(tiny_model: Any, tmp_path: Path) -> None:
    save_checkpoint(pruned(tiny_model, (96, 64, 64, 64)), tmp_path / "first")
    loaded = load_model(tmp_path / "first")
    cut_channels(feed_forward(loaded.model, decoder_layers(loaded.model)[0]), torch.arange(64))
    save_checkpoint(loaded, tmp_path / "second")
    assert not list((tmp_path / "second").glob("*.py"))
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["intermediate_size"] == 64
    assert not {"auto_map", "per_layer_config"} & set(config)
    assert torch.equal(auto_load(tmp_path / "second", trust=False)(IDS).logits, loaded.model(IDS).logits)


def test_what_else_is_in_the_folder(tiny_model: Any, tmp_path: Path) -> None:
    loaded = pruned(tiny_model, DIFFERENT)
    plan = TinyPlan(ModelShape.of_ffn_widths(DIFFERENT))
    moments = {"model.layers.0.mlp.down_proj": torch.rand(96)}
    info = save_checkpoint(loaded, tmp_path / "c", plan=plan, input_moments=moments, seed=5)
    assert read_checkpoint_info(tmp_path / "c") == info
    assert (info.source, info.seed) == (SOURCE, 5)
    assert is_pruned_checkpoint(tmp_path / "c")
    assert read_record(TinyPlan, tmp_path / "c" / "pruning_plan.json") == plan
    stored = load_input_moments(tmp_path / "c")
    assert stored is not None
    assert torch.equal(stored["model.layers.0.mlp.down_proj"], moments["model.layers.0.mlp.down_proj"])
    assert (tmp_path / "c" / "LICENSE").read_text().strip().endswith("mit")
    loaded.model.generation_config.do_sample = False
    loaded.model.generation_config.temperature = 0.7  # which transformers would not save
    save_checkpoint(loaded, tmp_path / "bare")
    assert load_pruned(tmp_path / "bare").generation_config.temperature == 0.7
    assert load_input_moments(tmp_path / "bare") is None
    assert {"transformers", "torch", "phoneready"} <= set(info.versions)


def test_nothing_is_left_where_saving_fails(tiny_model: Any, tmp_path: Path) -> None:
    loaded = pruned(tiny_model, DIFFERENT)
    with pytest.raises(InputError, match="plan"):
        save_checkpoint(loaded, tmp_path / "c", plan=TinyPlan(ModelShape.of_ffn_widths(UNIFORM)))
    with torch.no_grad():
        loaded.model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        save_checkpoint(loaded, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


@pytest.fixture
def checkpoint(tiny_model: Any, tmp_path: Path) -> Path:
    save_checkpoint(
        pruned(tiny_model, DIFFERENT), tmp_path / "c", plan=TinyPlan(ModelShape.of_ffn_widths(DIFFERENT))
    )
    return tmp_path / "c"


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_pruned(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_widths_that_disagree_with_the_weights(checkpoint: Path) -> None:
    other = {str(i): {"intermediate_size": n} for i, n in enumerate((96, 64, 128, 64))}
    change_json(checkpoint / "config.json", per_layer_config=other)
    assert str(checkpoint) in refused(checkpoint)
    change_json(checkpoint / "config.json", per_layer_config={"7": {"intermediate_size": 64}})
    refused(checkpoint)


def test_info_that_disagrees_with_the_weights(checkpoint: Path) -> None:
    shape = json.loads((checkpoint / "phoneready.json").read_text())["shape"]
    for part, value in (("ffn_width", 96), ("kv_groups", 4), ("origin", 2), ("has_ffn", False)):
        other = shape | {"blocks": [*shape["blocks"][:-1], shape["blocks"][-1] | {part: value}]}
        change_json(checkpoint / "phoneready.json", shape=other)
        assert "phoneready.json disagrees" in refused(checkpoint), part
    change_json(checkpoint / "phoneready.json", shape=shape | {"vocab_size": 7})
    assert "phoneready.json disagrees" in refused(checkpoint)
    change_json(checkpoint / "phoneready.json", shape=shape, schema_version=99)
    assert "schema version" in refused(checkpoint)


def test_plan_that_is_another_or_gone(checkpoint: Path) -> None:
    change_json(checkpoint / "pruning_plan.json", shape=[1, 2, 3, 4])
    assert "pruning_plan.json" in refused(checkpoint)
    (checkpoint / "pruning_plan.json").unlink()
    assert "missing" in refused(checkpoint)


def test_sharded_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    model = load_pruned(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(load_pruned(tmp_path / "shards")(IDS).logits, model(IDS).logits)


CONFIG = {
    "vocab_size": 10,
    "num_hidden_layers": 3,
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
}
PLAIN = ModelShape(10, tuple(BlockShape(index, 8, 2) for index in range(3)))


def with_block(index: int, **changes: Any) -> ModelShape:
    blocks = list(PLAIN.blocks)
    blocks[index] = replace(blocks[index], **changes)
    return replace(PLAIN, blocks=tuple(blocks))


def stated_shape(per_layer: Any) -> ModelShape:
    """What config.json states with this under `per_layer_config`."""
    return shape_from_config(
        *dense_settings(CONFIG | {"per_layer_config": per_layer}, "config.json"), "config.json"
    )


def test_malformed_blocks_are_refused_by_file() -> None:
    wrong: list[Any] = [[1], {"a": {}}, {"0": 3}, {"3": {}}, {"-1": {}}]
    wrong += [{"0": {"intermediate_size": size}} for size in (0, "6")]
    for own in (*wrong, {"0": {"hidden_act": "gelu"}}):
        with pytest.raises(InputError, match=r"config\.json"):
            stated_shape(own)


def test_what_is_not_said_is_no_contradiction() -> None:
    assert ModelShape.of_ffn_widths((8, 8, 8)).agrees_with(PLAIN)
    assert not ModelShape.of_ffn_widths((8, 8)).agrees_with(PLAIN)
    assert not ModelShape.of_ffn_widths((8, 6, 8)).agrees_with(PLAIN)
    for other in (
        replace(PLAIN, vocab_size=9),
        with_block(2, kv_groups=1),
        with_block(0, has_attention=False),
    ):
        assert not other.agrees_with(PLAIN)
        assert not PLAIN.agrees_with(other)


def test_only_widths_and_groups_may_vary_yet() -> None:
    assert stated_shape({"1": {"intermediate_size": 6, "hidden_act": "silu"}}) == with_block(1, ffn_width=6)
    for varied in ({"ffn_width": 6}, {"kv_groups": 1}, {"kv_groups": 0, "has_attention": False}):
        require_supported(with_block(1, **varied), "x")
    assert PLAIN.has_equal_heads
    assert with_block(1, kv_groups=0, has_attention=False).has_equal_heads
    assert not with_block(1, kv_groups=1).has_equal_heads
    assert PLAIN.is_uniform
    assert not with_block(1, ffn_width=6).is_uniform
    for change in ({"kv_groups": 0}, {"has_attention": False}, {"has_ffn": False}):
        with pytest.raises(InputError, match=r"x: block 1 differs .* yet"):
            require_supported(with_block(1, **change), "x")


@pytest.mark.parametrize("model_type", ["gemma4_text", "lfm2"])
def test_a_model_has_the_shape_that_its_config_states(tiny_model: Any, model_type: str) -> None:
    model, _ = tiny_model(model_type)
    assert model_shape(model) == shape_from_config(model.config.to_dict(), {}, "x")

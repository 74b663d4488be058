"""The shape of a model: what it says, what contradicts it, and what no file is written for yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape
from cfsp.models.config_file import dense_settings, shape_from_config
from cfsp.models.shape import BlockShape, ModelShape, require_supported

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

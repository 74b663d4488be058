"""Which transformers architectures can be pruned, where their FFN lives, and what llama.cpp calls their files.

One frozen row a model type, keyed by `config.model_type`; docs/extending.md says what else a new one needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from cfsp.errors import InputError, look_up
from cfsp.models.shape import BlockShape, ModelShape


@dataclass(frozen=True)
class HeadNorms:
    """Norms of queries and keys, inside attention.

    Attributes:
        query: Of attention, the queries' norm.
        key: Of attention, the keys' norm.
        joint: Whether one norm sees the numbers of all heads together, (heads * head_dim,), in place of each head's.
        after_rope: Whether they are normed after they are rotated.
    """

    query: str = "q_norm"
    key: str = "k_norm"
    joint: bool = False
    after_rope: bool = False


@dataclass(frozen=True)
class Mixer:
    """What mixes tokens in attention's place in some blocks.

    Attributes:
        module: Of such a block, the module that does.
        kind: What `layer_types` calls such a block.
        name: In words.
    """

    module: str
    kind: str
    name: str


@dataclass(frozen=True)
class ArchitectureSpec:
    """A model type: its modules, and the GGUF files that hold such models.

    Attributes:
        model_type: transformers' name.
        layers: Module of the decoder blocks.
        attention: Of a block, its attention.
        output: Of attention, its output matrix.
        mixer: What mixes tokens in the blocks that do not attend; None where all attend.
        mlp: Of a block, its gated MLP.
        gate: Projection of the MLP.
        up: Projection of the MLP.
        down: Projection of the MLP.
        head_norms: How attention norms queries and keys; None where it does not.
        bias_settings: Keys of the configuration that say whether there are biases -> a module of block 0 that has one
            if so, by llama.cpp's name.
        rotated_setting: Key of the configuration that says of every block whether its queries and keys are rotated;
            empty where all are.
        rotates_windowed: Whether a model that has a window rotates in blocks that see it alone, and in no others.
        attention_norm: Of a block, the norm before attention; empty where it reads the residual sum as it is.
        ffn_norm: Of a block, the norm before the MLP; empty likewise.
        added_norms: Of a block, the norms of what attention and what the MLP add, between these and the residual sum;
            empty where there are none.
        last_norm: Of the decoder, the norm behind the blocks.
        epsilon_setting: Key of the configuration with what norms add to the mean of squares.
        norm_offset: What a norm adds to its weight before it multiplies.
        scaled_embedding: Whether embeddings are multiplied by sqrt(hidden_size).
        activation_setting: Key of the configuration that names the MLP's activation; empty where it is SiLU always.
        gated: Whether what attention gives is multiplied by the sigmoid of a gate, whose rows stand behind those of
            each head's query.
        partial_rope: Whether a part of each head is rotated alone.
        window_rope_setting: Key of the configuration with the rope's base in blocks that see a window alone, where
            they have a plain rope of their own base; empty in any other model.
        plain_window_rope: Whether they have a plain rope of the others' base, whatever scales that of the others.
        alpha_rope: Whether a `dynamic` rope with an alpha is a plain one of another base.
        scale_setting: Key of the configuration with s, where attention's scores are multiplied by 1 / sqrt(s); empty
            where s is head_dim.
        left_out: How names of tensors begin that folders have beside the model: heads that draft further tokens.
        gguf_name: llama.cpp's architecture whose files are read as this model type; None where another's are.
        gguf_settings: Settings of the configuration that no model has otherwise -> where a GGUF file has them, behind
            the architecture's name; or what they are in every file.
        gguf_interleaved: Whether rows of q and k are stored there with the rotary halves interleaved.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    output: str = "o_proj"
    mixer: Mixer | None = None
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    head_norms: HeadNorms | None = None
    bias_settings: Mapping[str, str] = field(default_factory=dict)
    rotated_setting: str = ""
    rotates_windowed: bool = False
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    added_norms: tuple[str, ...] = ()
    last_norm: str = "norm"
    epsilon_setting: str = "rms_norm_eps"
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    activation_setting: str = "hidden_act"
    gated: bool = False
    partial_rope: bool = False
    window_rope_setting: str = ""
    plain_window_rope: bool = False
    alpha_rope: bool = False
    scale_setting: str = ""
    left_out: tuple[str, ...] = ()
    gguf_name: str | None = None
    gguf_settings: Mapping[str, str | bool] = field(default_factory=dict)
    gguf_interleaved: bool = False

    @property
    def has_window_rope(self) -> bool:
        """Whether blocks that see a window alone may have another rope than those that see everything."""
        return bool(self.window_rope_setting) or self.plain_window_rope

    @property
    def has_windows(self) -> bool:
        """Whether a GGUF file of such a model says which blocks see a window alone."""
        return self.has_window_rope or self.rotates_windowed

    @property
    def attention_norms(self) -> tuple[str, ...]:
        """Names of a block's norms that are attention's: before it, and of what it adds, where there are such."""
        return tuple(filter(None, (self.attention_norm, *self.added_norms[:1])))

    @property
    def sees_neighbours(self) -> bool:
        """Whether a token sees what stands before it in its row whatever the attention mask says."""
        return self.mixer is not None

    @property
    def cuts_heads(self) -> bool:
        """Whether heads can go: not where a norm sees all of them, which then counts what stays as something else."""
        return self.mixer is None and (self.head_norms is None or not self.head_norms.joint)


@dataclass(frozen=True)
class FeedForward:
    """A block's gated MLP: down(act(gate(h)) * up(h)).

    gate.weight and up.weight are (intermediate_size, hidden_size), down.weight is (hidden_size, intermediate_size).
    """

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def width(self) -> int:
        """Number of intermediate channels."""
        return int(self.down.weight.shape[1])


FULL, WINDOWED = "full_attention", "sliding_attention"
"""What transformers' `layer_types` call a block that sees everything before it, and one that sees a window alone."""
_ATTENTION_BIAS = {"attention_bias": "attn_q"}
_EVERY_BIAS = _ATTENTION_BIAS | {"mlp_bias": "ffn_up"}
_OLMO2 = ArchitectureSpec(
    "olmo2",
    head_norms=HeadNorms(joint=True),
    bias_settings=_ATTENTION_BIAS,
    attention_norm="",
    ffn_norm="",
    added_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    gguf_name="olmo2",
)
_ROWS = (
    ArchitectureSpec(
        "llama",
        bias_settings=_EVERY_BIAS,
        gguf_name="llama",
        gguf_interleaved=True,
    ),
    ArchitectureSpec("mistral"),
    ArchitectureSpec("qwen2", gguf_name="qwen2"),
    ArchitectureSpec("qwen3", head_norms=HeadNorms(), bias_settings=_ATTENTION_BIAS, gguf_name="qwen3"),
    ArchitectureSpec(
        "smollm3",
        bias_settings=_EVERY_BIAS,
        rotated_setting="no_rope_layers",  # 1 where there is a rope, for all its name
        gguf_name="smollm3",
        gguf_interleaved=True,
    ),
    ArchitectureSpec(
        "gemma3_text",
        head_norms=HeadNorms(),
        bias_settings=_ATTENTION_BIAS,
        ffn_norm="pre_feedforward_layernorm",
        added_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        scaled_embedding=True,
        activation_setting="hidden_activation",
        window_rope_setting="rope_local_base_freq",
        scale_setting="query_pre_attn_scalar",
        gguf_name="gemma3",
    ),
    _OLMO2,
    replace(_OLMO2, model_type="olmo3", plain_window_rope=True),
    ArchitectureSpec(
        "exaone4",
        head_norms=HeadNorms(),
        rotates_windowed=True,
        attention_norm="",
        ffn_norm="",
        added_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        gguf_name="exaone4",
    ),
    ArchitectureSpec(
        "hunyuan_v1_dense",
        head_norms=HeadNorms("query_layernorm", "key_layernorm", after_rope=True),
        bias_settings=_ATTENTION_BIAS,
        alpha_rope=True,
        gguf_name="hunyuan-dense",
    ),
    ArchitectureSpec(
        "lfm2",
        output="out_proj",
        mixer=Mixer("conv", "conv", "a short convolution"),
        mlp="feed_forward",
        gate="w1",
        up="w3",
        down="w2",
        head_norms=HeadNorms("q_layernorm", "k_layernorm"),
        attention_norm="operator_norm",
        ffn_norm="ffn_norm",
        last_norm="embedding_norm",
        epsilon_setting="norm_eps",
        activation_setting="",
        gguf_name="lfm2",
        gguf_settings={"conv_L_cache": "shortconv.l_cache", "block_auto_adjust_ff_dim": False},
    ),
    ArchitectureSpec(
        "qwen3_5_text",
        mixer=Mixer("linear_attn", "linear_attention", "a gated delta net"),
        head_norms=HeadNorms(),
        bias_settings=_ATTENTION_BIAS,
        norm_offset=1.0,
        gated=True,
        partial_rope=True,
        left_out=("mtp.",),
    ),
)
ARCHITECTURES: Mapping[str, ArchitectureSpec] = MappingProxyType({row.model_type: row for row in _ROWS})
_QWEN_35 = "files that are written here and not read: prune the folder that they were made of"
_GEMMA_3N = "embeddings of each block's own, AltUp, and FFNs whose channels compete by their mean"
_GEMMA_4 = (
    "embeddings of each block's own, blocks that read another block's keys and values, and normed values"
)
LACKING: Mapping[str, str] = MappingProxyType(
    {
        "qwen35": _QWEN_35,
        **dict.fromkeys(("gemma3n", "gemma3n_text"), _GEMMA_3N),
        **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA_4),
    }
)
"""Model types, and llama.cpp's architectures, that people ask for -> what of them is not pruned or written here."""


def unsupported(name: str) -> str:
    """What is said of a model type, or an architecture of llama.cpp, that has no row."""
    reason = LACKING.get(name)
    return f"unsupported architecture, with {reason}" if reason else "unsupported architecture"


def spec_for(config: Any) -> ArchitectureSpec:
    """Row for a transformers config.

    Raises:
        InputError: The model type is not in the table; the message names the known ones.
    """
    model_type = str(getattr(config, "model_type", None))
    return look_up(ARCHITECTURES, model_type, unsupported(model_type), field="model_type")


def rotated_blocks(config: Any) -> tuple[bool, ...]:
    """Of every block of a transformers config, whether attention rotates its queries and keys."""
    spec, count = spec_for(config), config.num_hidden_layers
    if spec.rotates_windowed and config.sliding_window is not None:
        return tuple(window is not None for window in windows_of_blocks(config))
    key = spec.rotated_setting
    return tuple(map(bool, getattr(config, key)[:count])) if key else (True,) * count


def windows_of_blocks(config: Any) -> tuple[int | None, ...]:
    """Of every block of a transformers config, how many tokens attention sees, itself included; None where all."""
    window, count = getattr(config, "sliding_window", None), int(config.num_hidden_layers)
    if not window or not getattr(config, "use_sliding_window", True):
        return (None,) * count
    kinds = getattr(config, "layer_types", None) or (WINDOWED,) * count
    return tuple(int(window) if kind == WINDOWED else None for kind in kinds)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a causal LM, first to last."""
    return list(model.get_submodule(spec_for(model.config).layers).children())


def block_linears(model: nn.Module) -> tuple[dict[str, nn.Linear], ...]:
    """The Linear layers of every block by their names in the model, first block to last."""
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(
        {names[id(module)]: module for module in layer.modules() if isinstance(module, nn.Linear)}
        for layer in decoder_layers(model)
    )


def feed_forward(model: nn.Module, layer: nn.Module) -> FeedForward:
    """The gated MLP of one of `model`'s decoder blocks."""
    spec = spec_for(model.config)
    mlp = layer.get_submodule(spec.mlp)
    return FeedForward(mlp, *(_linear(mlp, name) for name in (spec.gate, spec.up, spec.down)))


def added_norms(model: nn.Module, layer: nn.Module) -> tuple[Any, Any]:
    """The norms of what a block's attention and its MLP add; None where it is added as it is."""
    names = spec_for(model.config).added_norms
    return tuple(map(layer.get_submodule, names)) if names else (None, None)  # type: ignore[return-value]


def attention_of(model: nn.Module, layer: nn.Module) -> Any:
    """The attention of one of `model`'s decoder blocks; None in a block that has none."""
    attention = getattr(layer, spec_for(model.config).attention, None)
    return attention if hasattr(attention, "k_proj") else None


def mixer_of(model: nn.Module, layer: nn.Module) -> Any:
    """What takes attention's place in one of `model`'s decoder blocks; None in any other block."""
    mixer = spec_for(model.config).mixer
    return getattr(layer, mixer.module, None) if mixer else None


def last_norm(model: Any) -> Any:
    """The norm behind the blocks, whose output the output matrix reads."""
    return model.get_decoder().get_submodule(spec_for(model.config).last_norm)


def norm_epsilon(config: Any) -> float:
    """What norms of a transformers config add to the mean of squares."""
    return float(getattr(config, spec_for(config).epsilon_setting))


def keyless_blocks(settings: Mapping[str, Any]) -> frozenset[int]:
    """Blocks in which something takes attention's place, of settings with defaults filled in."""
    row = ARCHITECTURES.get(settings.get("model_type", ""))
    mixer, kinds = row.mixer if row else None, settings.get("layer_types") or ()
    return frozenset(index for index, one in enumerate(kinds) if mixer and one == mixer.kind)


def model_shape(model: Any) -> ModelShape:
    """The shape that a model's weights have; every block counts as the dense model's of the same index."""
    blocks = []
    for index, layer in enumerate(decoder_layers(model)):
        attention, width = attention_of(model, layer), feed_forward(model, layer).width
        kv_groups = attention.k_proj.out_features // attention.head_dim if attention else 0
        mixes = attention is not None or mixer_of(model, layer) is not None
        blocks.append(BlockShape(index, width, kv_groups, has_attention=mixes))
    return ModelShape(model.get_input_embeddings().weight.shape[0], tuple(blocks))


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    projection = mlp.get_submodule(name)
    if not isinstance(projection, nn.Linear):
        raise InputError(
            "projections must be plain torch Linear layers (load the model unquantized)",
            field=name,
            value=type(projection).__name__,
        )
    return projection

"""Which transformers architectures can be pruned, where their FFN lives, and what llama.cpp calls their files.

One frozen row a model type, keyed by `config.model_type`; docs/extending.md says what else a new one needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
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
        step_key: In GGUF files, how many blocks lie from one that attends to the next; empty where numbers of key-value
            heads say which attend.
    """

    module: str
    kind: str
    name: str
    step_key: str = ""


@dataclass(frozen=True)
class BlockInputs:
    """What every block gets of a token beside its hidden state x, and what it makes of that.

    With e the token's embedding and T its row of a table of its own, P e and T cut into a part for each block, block l
    gets i_l = (norm((P e)_l / sqrt(hidden_size)) + sqrt(size) T_l) / sqrt(2), and behind its MLP it adds
    norm'(output(act(gate(x)) * i_l)).

    Attributes:
        size_setting: Key of the configuration with the numbers that a block gets; 0 where none does.
        rows_setting: Key with the table's rows.
        table: Of the decoder, the further embedding of tokens, (rows, n * size).
        projection: Of the decoder, P, (n * size, hidden_size).
        norm: Of the decoder, norm, (size,).
        gate: Of a block, (size, hidden_size).
        output: Of a block, (hidden_size, size).
        output_norm: Of a block, norm', (hidden_size,).
        argument: Under which name a block is given i_l.
    """

    size_setting: str = "hidden_size_per_layer_input"
    rows_setting: str = "vocab_size_per_layer_input"
    table: str = "embed_tokens_per_layer"
    projection: str = "per_layer_model_projection"
    norm: str = "per_layer_projection_norm"
    gate: str = "per_layer_input_gate"
    output: str = "per_layer_projection"
    output_norm: str = "post_per_layer_input_norm"
    argument: str = "per_layer_input"


@dataclass(frozen=True)
class SharedKeys:
    """Blocks with no keys and values of their own: the last ones read those of the last block of their kind that has.

    Attributes:
        count_setting: Key of the configuration with how many they are.
        wide_setting: Key that says whether their FFNs are twice as wide as it says of all.
        argument: Under which name blocks are given what they leave keys and values in.
    """

    count_setting: str = "num_kv_shared_layers"
    wide_setting: str = "use_double_wide_mlp"
    argument: str = "shared_kv_states"


@dataclass(frozen=True)
class ArchitectureSpec:
    """A model type: its modules, and the GGUF files that hold such models.

    Attributes:
        model_type: transformers' name.
        release: The first major version of transformers that has it as it is read here, of those that are supported.
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
        plain_window_rope: Whether they have a plain rope, whatever scales that of the others, of the base that is
            stated for them, or else of the others'.
        alpha_rope: Whether a `dynamic` rope with an alpha is a plain one of another base.
        scale_setting: Key of the configuration with s, where attention's scores are multiplied by 1 / sqrt(s); empty
            where s is head_dim.
        left_out: How names of tensors begin that folders have beside the model: heads that draft further tokens.
        plain_scores: Whether attention's scores are products of queries and keys as they are.
        own_heads: Key of the configuration with head_dim in blocks that see everything, where that may be another than
            in those that see a window; transformers says it of single blocks under `per_layer_config`, too.
        cap_setting: Key of the configuration with c, where logits z become c tanh(z / c); no c, or an empty key: they
            stay.
        scalar: Of a block, a number that its output is multiplied by; empty without.
        block_inputs: What every block gets of a token beside its hidden state; None for nothing.
        shared_keys: What says which blocks read another block's keys and values; None where every block has its own.
        refused: Settings of the configuration -> what of such a model is not pruned or written here, where they are on.
        gguf_name: llama.cpp's architecture whose files are read as this model type; None where another's are.
        gguf_settings: Settings of the configuration that no model has otherwise -> where a GGUF file has them, behind
            the architecture's name; or what they are in every file.
        gguf_interleaved: Whether rows of q and k are stored there with the rotary halves interleaved.
    """

    model_type: str
    release: int = 4
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
    plain_scores: bool = False
    own_heads: str = ""
    cap_setting: str = ""
    scalar: str = ""
    block_inputs: BlockInputs | None = None
    shared_keys: SharedKeys | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
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
        joint = self.head_norms is not None and self.head_norms.joint
        return not (self.mixer or self.shared_keys or joint)

    @property
    def goes_on(self) -> bool:
        """Whether a block does more with the residual sum behind its MLP than to hand it on."""
        return self.block_inputs is not None or self.scalar != ""

    @property
    def own_arguments(self) -> tuple[str, ...]:
        """Names of a block's arguments that every text has of its own."""
        return tuple(part.argument for part in (self.block_inputs, self.shared_keys) if part)


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
        release=5,
        mixer=Mixer("linear_attn", "linear_attention", "a gated delta net", "full_attention_interval"),
        head_norms=HeadNorms(),
        bias_settings=_ATTENTION_BIAS,
        norm_offset=1.0,
        gated=True,
        partial_rope=True,
        left_out=("mtp.",),
        gguf_name="qwen35",
        gguf_settings={
            "linear_conv_kernel_dim": "ssm.conv_kernel",
            "linear_num_key_heads": "ssm.group_count",
            "linear_num_value_heads": "ssm.time_step_rank",
            # llama.cpp knows heads of one size alone.
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), "ssm.state_size"),
        },
    ),
    ArchitectureSpec(
        "gemma4_text",
        release=5,
        head_norms=HeadNorms(),
        bias_settings=_ATTENTION_BIAS,
        ffn_norm="pre_feedforward_layernorm",
        added_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        scaled_embedding=True,
        activation_setting="hidden_activation",
        plain_window_rope=True,
        plain_scores=True,
        own_heads="global_head_dim",
        cap_setting="final_logit_softcapping",
        scalar="layer_scalar",
        block_inputs=BlockInputs(),
        shared_keys=SharedKeys(),
        refused={
            "enable_moe_block": "experts beside the FFN",
            "attention_k_eq_v": "values that are the keys",
        },
        gguf_name="gemma4",
        gguf_settings={
            "hidden_size_per_layer_input": "embedding_length_per_layer_input",
            "num_kv_shared_layers": "attention.shared_kv_layers",
            "global_head_dim": "attention.key_length",
        },
    ),
)
ARCHITECTURES: Mapping[str, ArchitectureSpec] = MappingProxyType({row.model_type: row for row in _ROWS})
LACKING: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("gemma3n", "gemma3n_text"), "several hidden states of a token that run beside each other (AltUp)"
    )
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


def state_size(config: Any) -> int:
    """Numbers that are held of a token while blocks run: its hidden states, and what every block gets beside them."""
    spec = spec_for(config)
    beside = (
        getattr(config, spec.block_inputs.size_setting) * config.num_hidden_layers if spec.block_inputs else 0
    )
    return int(config.hidden_size + beside)


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
    """The attention of one of `model`'s decoder blocks; None in a block that has none, or no keys of its own."""
    attention = getattr(layer, spec_for(model.config).attention, None)
    return attention if hasattr(attention, "k_proj") else None


def mixer_of(model: nn.Module, layer: nn.Module) -> Any:
    """What takes attention's place in one of `model`'s decoder blocks; None in any other block."""
    mixer = spec_for(model.config).mixer
    return getattr(layer, mixer.module, None) if mixer else None


def token_tables(model: Any) -> list[Any]:
    """The embedding, and where blocks get more of a token than that, the table of it."""
    inputs = spec_for(model.config).block_inputs
    further = getattr(model.get_decoder(), inputs.table, None) if inputs else None
    return [model.get_input_embeddings(), *([] if further is None else [further])]


def last_norm(model: Any) -> Any:
    """The norm behind the blocks, whose output the output matrix reads."""
    return model.get_decoder().get_submodule(spec_for(model.config).last_norm)


def norm_epsilon(config: Any) -> float:
    """What norms of a transformers config add to the mean of squares."""
    return float(getattr(config, spec_for(config).epsilon_setting))


def keyless_blocks(settings: Mapping[str, Any]) -> frozenset[int]:
    """Blocks that mix tokens without keys of their own, of settings with defaults filled in.

    Something takes attention's place in them, or they read another block's keys.
    """
    row = ARCHITECTURES.get(settings.get("model_type", ""))
    mixer, kinds = row.mixer if row else None, settings.get("layer_types") or ()
    mixed = (index for index, one in enumerate(kinds) if mixer and one == mixer.kind)
    return frozenset((*mixed, *_sharing_blocks(row, settings)))


def stated_widths(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """FFN widths of all blocks where none is stated of single ones, of settings with defaults filled in."""
    row, width = ARCHITECTURES.get(settings.get("model_type", "")), settings["intermediate_size"]
    sharing: Collection[int] = ()
    if row and row.shared_keys and settings.get(row.shared_keys.wide_setting):
        sharing = _sharing_blocks(row, settings)
    return tuple(width * (2 if index in sharing else 1) for index in range(settings["num_hidden_layers"]))


def width_settings(settings: Mapping[str, Any], widths: Sequence[int]) -> dict[str, Any]:
    """Settings from which the widths of all blocks follow, or where none say them, those of the widest in every block.

    Args:
        settings: Of a configuration, with defaults filled in.
        widths: FFN width of every block.
    """
    row = ARCHITECTURES[settings["model_type"]]
    one = {"intermediate_size": widths[0]}
    if stated_widths({**settings, **one}) == tuple(widths):
        return one
    alike = {row.shared_keys.wide_setting: False} if row.shared_keys else {}
    return {"intermediate_size": max(widths), **alike}


def _sharing_blocks(row: ArchitectureSpec | None, settings: Mapping[str, Any]) -> range:
    count = settings.get("num_hidden_layers", 0)
    shared = settings.get(row.shared_keys.count_setting) or 0 if row and row.shared_keys else 0
    return range(count - shared, count)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """What a model makes of its output matrix's products z: c tanh(z / c), or z where there is no c."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_cap(config: Any) -> float | None:
    """c of a transformers config whose model's logits are capped; None where they are not."""
    key = spec_for(config).cap_setting
    return getattr(config, key) if key else None


def output_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A model's logits (..., vocab_size) float32, of the output matrix's inputs (..., hidden_size)."""
    return capped(model.get_output_embeddings()(hidden).float(), logit_cap(model.config))


def model_shape(model: Any) -> ModelShape:
    """The shape that a model's weights have; every block counts as the dense model's of the same index."""
    blocks = []
    attention_name = spec_for(model.config).attention
    for index, layer in enumerate(decoder_layers(model)):
        attention, width = attention_of(model, layer), feed_forward(model, layer).width
        kv_groups = attention.k_proj.out_features // attention.head_dim if attention else 0
        attends = hasattr(getattr(layer, attention_name, None), "q_proj")
        mixes = attends or mixer_of(model, layer) is not None
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

"""What a family of models is: its modules, config.json, GGUF files and graphs; plain data, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import Field

FULL, WINDOWED = "full_attention", "sliding_attention"
"""What transformers' `layer_types` call a block that sees everything before it, and one that sees only a window."""
MAX_SIZE = 2**24
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(ge=0, lt=2**16)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
KernelLength = Annotated[int, Field(ge=2, le=2**10)]
Settings = Mapping[str, Any]  # of a configuration


class HeadNorms(NamedTuple):
    """Norms of queries and keys, inside attention."""

    query: str = "q_norm"
    key: str = "k_norm"
    joint: bool = False  # one norm sees all heads together, (heads * head_dim,), in place of one of each head
    after_rope: bool = False


class Mixer(NamedTuple):
    """What mixes tokens in attention's place in some blocks."""

    module: str
    kind: str  # what `layer_types` calls such a block; exporters know its graph by it
    name: str
    sizes: Mapping[str, str]  # what exporters call its sizes -> settings
    # GGUF: each so many blocks one attends; empty if numbers of key-value heads say which do.
    step_key: str = ""


class BlockInputs(NamedTuple):
    """What every block gets of a token beside its hidden state x, and what it makes of that.

    With e the token's embedding and T its row of another table, P e and T cut into a part for each block, block l gets
    i_l = (norm((P e)_l / sqrt(hidden_size)) + sqrt(size) T_l) / sqrt(2), and adds norm'(output(act(gate(x)) * i_l))
    behind its MLP.
    """

    size_setting: str = "hidden_size_per_layer_input"  # key of the numbers a block gets; 0 for none
    rows_setting: str = "vocab_size_per_layer_input"
    table: str = "embed_tokens_per_layer"  # of the decoder, (rows, n * size)
    projection: str = "per_layer_model_projection"  # of the decoder, P, (n * size, hidden_size)
    norm: str = "per_layer_projection_norm"  # of the decoder, (size,)
    gate: str = "per_layer_input_gate"  # of a block, (size, hidden_size)
    output: str = "per_layer_projection"  # of a block, (hidden_size, size)
    output_norm: str = "post_per_layer_input_norm"  # of a block, norm', (hidden_size,)
    argument: str = "per_layer_input"  # under which a block is given i_l


class SharedKeys(NamedTuple):
    """The last blocks have no keys and values, and read those of the last block of their kind that has."""

    count_setting: str = "num_kv_shared_layers"
    wide_setting: str = "use_double_wide_mlp"  # whether their FFNs are twice as wide
    argument: str = "shared_kv_states"  # under which blocks are given what they leave keys and values in


@dataclass(frozen=True)
class Layout:
    """What one of llama.cpp's architectures takes.

    `llama` and `deci` rotate neighbouring pairs of a head's values, so rows of q and k are interleaved; the others
    rotate halves, as Hugging Face's models do.
    """

    architecture: str  # in general.architecture
    per_layer_sizes: bool = False  # an FFN width and numbers of heads for each block; otherwise block 0's
    interleaved_rope: bool = False
    fused_qkv: bool = False  # q, k and v as one matrix, and head counts as arrays
    biases: frozenset[str] = frozenset()  # Linear layers of a block that may have one
    rope_factors: bool = False  # divisors of single frequencies (llama3's and longrope's scaling)
    free_head_dim: bool = True  # all heads together may be wider or narrower than hidden_size
    untied: bool = True  # an output matrix of its own
    tied: bool = True  # an output matrix that is the embedding
    attention_free: bool = False  # blocks without attention (head counts of 0)
    unrotated_step: int = 0  # every Nth block has no RoPE; 0: all have
    rotates_windowed: bool = False  # if there are sliding windows, only blocks with one have RoPE
    activation: str = "silu"  # of the FFN, as exporters name it
    window_base: bool = False  # a RoPE base of its own for blocks with a window
    full_step: int = 0  # every Nth block has no window, unless a file says which have; 0: takes none
    windowed_depth: int = 0  # models of so many blocks have a window in all, and others none; 0: any
    plain_scores: bool = False  # attention's scores times 1, and not 1 / sqrt(head_dim)
    own_heads: bool = False  # a head_dim of blocks with a window, and one of the others
    shares_keys: bool = False  # the last blocks read keys of the last two before them, one windowed, one not
    needs_window: bool = False  # aborts at a file in which no block has a window
    takes_inputs: bool = False  # has `BlockInputs`
    caps_logits: bool = False

    def rotated(self, windows: Sequence[int | None]) -> tuple[bool, ...]:
        """Whether each block has RoPE; windows: of every block, None if it sees all tokens."""
        if self.rotates_windowed and any(windows):
            return tuple(window is not None for window in windows)
        step = self.unrotated_step
        return tuple(not step or (block + 1) % step != 0 for block in range(len(windows)))


@dataclass(frozen=True)
class Family:
    """A model type of transformers. Modules with Llama's names need no more than `Family("name", layouts=...)`."""

    model_type: str
    # llama.cpp's architectures that can hold such a model, the preferred one first.
    layouts: tuple[Layout, ...]
    release: int = 4  # first major version of transformers that has it as it is read here
    folders: tuple[str, ...] = ()  # model types of multimodal folders whose text part it is
    kinds: Mapping[str, Any] = field(default_factory=dict)  # settings, "a b" for two -> what they must be

    # Modules, of a block unless they are the decoder's; empty for none.
    layers: str = "model.layers"
    attention: str = "self_attn"
    output: str = "o_proj"  # of attention
    mixer: Mixer | None = None  # None where all blocks attend
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    head_norms: HeadNorms | None = None
    attention_norm: str = "input_layernorm"  # before attention
    ffn_norm: str = "post_attention_layernorm"  # before the MLP
    added_norms: tuple[str, ...] = ()  # of what attention and what the MLP add
    last_norm: str = "norm"  # of the decoder, behind the blocks
    scalar: str = ""  # a number that the block's output is multiplied by
    block_inputs: BlockInputs | None = None
    shared_keys: SharedKeys | None = None
    left_out: tuple[str, ...] = ()  # beginnings of names of tensors beside the model: heads that draft tokens

    # What is computed, and the keys of config.json that say it.
    # Settings of biases -> a module of block 0 that has one then, in GGUF files.
    bias_settings: Mapping[str, str] = field(default_factory=dict)
    rotated_setting: str = ""  # whether each block has RoPE; empty if all have
    rotates_windowed: bool = False  # if there are sliding windows, only blocks with one have RoPE
    epsilon_setting: str = "rms_norm_eps"
    norm_offset: float = 0.0  # what a norm adds to its weight before it multiplies
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    activation_setting: str = "hidden_act"  # empty if it is always SiLU
    gated: bool = (
        False  # attention's output times the sigmoid of a gate, whose rows stand behind each head's query
    )
    partial_rope: bool = False  # a part of each head is rotated
    window_rope_setting: str = ""  # base of the plain RoPE of blocks with a window
    plain_window_rope: bool = False  # they have a plain RoPE, of the base stated for them or the others'
    alpha_rope: bool = False  # a `dynamic` RoPE with an alpha is a plain one of another base
    scale_setting: str = ""  # s: attention's scores are multiplied by 1 / sqrt(s); empty if s is head_dim
    plain_scores: bool = False  # they are not scaled
    own_heads: str = ""  # head_dim of blocks without a window; transformers also has it in `per_layer_config`
    cap_setting: str = ""  # c of capped logits c tanh(z / c)
    refused: Mapping[str, str] = field(default_factory=dict)  # settings -> why they must be off

    # GGUF files of its first layout's architecture are read as it; of two families of one, by whether it has windows.
    gguf_settings: Mapping[str, str | bool] = field(default_factory=dict)  # setting -> a file's key, or value
    gguf_kinds: Mapping[str, Any] = field(default_factory=dict)  # its own keys -> what they must be

    @property
    def gguf_name(self) -> str:
        """llama.cpp's architecture of the files that are read as this family."""
        return self.layouts[0].architecture

    @property
    def has_window_rope(self) -> bool:
        """Whether blocks with a window may have another RoPE than those without."""
        return bool(self.window_rope_setting) or self.plain_window_rope

    @property
    def has_windows(self) -> bool:
        """Whether a GGUF file of such a model says which blocks have a window."""
        return self.has_window_rope or self.rotates_windowed

    @property
    def attention_norms(self) -> tuple[str, ...]:
        """Names of a block's norms that are attention's: before it, and of what it adds."""
        return tuple(filter(None, (self.attention_norm, *self.added_norms[:1])))

    @property
    def sees_neighbours(self) -> bool:
        """Whether a token sees what stands before it whatever the attention mask says."""
        return self.mixer is not None

    @property
    def blocks_stay(self) -> str | None:
        """Why no block can be pruned; None if some can."""
        reason = (
            "every block has a part of its own in what is read of a token, or reads a certain block's keys"
        )
        return reason if self.block_inputs or self.shared_keys else None

    @property
    def attentions_stay(self) -> str | None:
        """Why no attention can be pruned, nor a part of one; None if some can."""
        if self.mixer:
            return "few blocks attend, as something else takes the place of attention in the others, and these stay"
        if self.shared_keys:
            return "blocks read keys and values of other blocks, and all attentions stay as they are"
        return None

    @property
    def groups_stay(self) -> str | None:
        """Why no key-value group can be pruned; None if some can."""
        if self.head_norms is not None and self.head_norms.joint:
            return "one norm sees all heads of a block, and without some it would change the others"
        return self.attentions_stay

    @property
    def goes_on(self) -> bool:
        """Whether a block does more with the residual sum behind its MLP than to hand it on."""
        return self.block_inputs is not None or self.scalar != ""

    @property
    def own_arguments(self) -> tuple[str, ...]:
        """Names of a block's arguments that differ between texts."""
        return tuple(part.argument for part in (self.block_inputs, self.shared_keys) if part)

    @property
    def not_in_graphs(self) -> str | None:
        """Why no ONNX graph of such blocks is written; None if one is."""
        reason = "that read another block's keys and values, or get more of a token than its hidden state"
        return reason if self.shared_keys or self.block_inputs else None


@dataclass(frozen=True)
class Fold:
    """A model type that is another one but for factors, order or names of weights: it is loaded as that one."""

    model_type: str
    target: str  # the same, if settings of the type can be said in a way that has one meaning
    # All functions get all settings. Last part of a module's name -> factor of its weight and bias; those of
    # `gguf_keys` may be 0 or None, for none.
    factors: Callable[[Settings], Mapping[str, float]] = lambda _: {}
    settings: Callable[[Settings], Settings] = lambda _: {}  # those of another name or meaning in the target
    # A parameter's name and value -> the target's.
    tensors: Callable[[str, Any, Settings], dict[str, Any]] = lambda name, tensor, _: {name: tensor}
    obstacle: Callable[[Settings], str | None] = lambda _: None  # why such a model cannot be the target
    applies: Callable[[Settings], bool] = lambda _: True  # whether it is loaded as the target at all
    kinds: Mapping[str, Any] = field(default_factory=dict)
    gguf_name: str | None = None
    gguf_keys: Mapping[str, str] = field(default_factory=dict)  # settings of factors -> a file's keys
    gguf_kinds: Mapping[str, Any] = field(default_factory=dict)


def head_dim_of(settings: Settings) -> int:
    """Numbers of a head, stated or not."""
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def heads_of(settings: Settings, name: str) -> int:
    """Heads whose rows a parameter of q or k has; 0 of any other."""
    heads: int = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2], 0)


def split_rows(name: str, module: str, tensor: Any, parts: Mapping[str, int]) -> dict[str, Any]:
    """The rows of a matrix as several matrices, in the proportion of the numbers."""
    unit = len(tensor) // sum(parts.values())
    rows = tensor.split([unit * count for count in parts.values()])
    return {name.replace(module, part): own for part, own in zip(parts, rows, strict=True)}


BIAS_OF_ATTENTION: Mapping[str, str] = {"attention_bias": "attn_q"}
BIASES: Mapping[str, str] = {**BIAS_OF_ATTENTION, "mlp_bias": "ffn_up"}
QKV_LAYERS = frozenset({"q_proj", "k_proj", "v_proj"})
NORMS_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")

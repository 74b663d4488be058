"""Reading a Hugging Face folder tensor by tensor: config as plain values, weights checked, nothing kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError, look_up
from cfsp.models.architectures import keyless_blocks, logit_cap, rotated_blocks, windows_of_blocks
from cfsp.models.config_file import dense_settings, read_model_config, shape_from_config
from cfsp.models.families import FAMILIES
from cfsp.models.families.row import FULL, WINDOWED, Family, head_dim_of
from cfsp.models.rope import alpha_rope, stated_rope, steady_context
from cfsp.models.shape import ModelShape, require_supported
from cfsp.models.weights import safetensors_files
from cfsp.reading import as_input_error

_SECTIONS = (11, 11, 10)  # what transformers takes for `mrope_section` where nothing is said
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
)
"""transformers' name of an activation -> the function: x sigmoid(x), or GELU in its approximation by tanh."""


class DeltaNet(NamedTuple):
    """Sizes of the gated delta nets that take attention's place in some blocks."""

    key_heads: int  # each is read by as many value heads
    value_heads: int  # all of them
    key_head_dim: int  # numbers of a key head, and of a query
    value_head_dim: int  # numbers of a value head
    length: int  # tokens that the convolution before queries, keys and values sees

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_head_dim

    @property
    def channels(self) -> int:
        """Of its convolution: queries, keys and values."""
        return 2 * self.key_width + self.value_width


@dataclass(frozen=True)
class ModelConfig:
    """What an export needs to know of config.json, in Hugging Face's names, whichever release wrote it."""

    model_type: str
    shape: ModelShape  # vocabulary and blocks, which differ in FFN widths, key-value heads, and attention
    hidden_size: int
    heads_per_group: int  # query heads that read one key-value head
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rotated: tuple[bool, ...]  # whether each block rotates its queries and keys
    windows: tuple[int | None, ...]  # tokens that attention sees in each block, itself included; None if all
    activation: str  # of the FFN, a name in ACTIVATIONS
    score_scale: float  # what attention's scores are multiplied by
    rope_theta: float  # base of the rotary frequencies
    rope_scaling: (
        Mapping[str, Any] | None
    )  # a scaled rope's parameters, with `rope_type`; None for a plain one
    window_rope_theta: float | None = None  # the base of blocks with a window, if they have their own rope
    convolution_length: int = 0  # tokens that a convolution in attention's place sees in some blocks
    delta_net: DeltaNet | None = None  # what takes attention's place in some blocks
    rotary_dim: int | None = None  # numbers of a head that are rotated; None if that is all of them always
    rope_sections: tuple[int, ...] = ()  # how many frequencies turn by time, height and width of an image
    full_head_dim: int | None = None  # in blocks that see everything, if the others have another
    sharing_blocks: int = 0  # how many of the last blocks read another block's keys and values
    block_inputs: int = 0  # numbers of a token that every block gets beside its hidden state
    logit_cap: float | None = None  # c, if logits are c tanh(z / c) of the output matrix's products z

    @property
    def spec(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size or 0

    @property
    def num_hidden_layers(self) -> int:
        return len(self.shape.blocks)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Key-value heads of every block, 0 without attention; a config always says them."""
        return tuple(block.kv_groups or 0 for block in self.shape.blocks)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Numbers of a head in every block."""
        full = self.full_head_dim or self.head_dim
        return tuple(self.head_dim if window else full for window in self.windows)

    @property
    def key_value_width(self) -> int:
        """Numbers that are kept of a token: the keys and values of all blocks."""
        return 2 * sum(heads * size for heads, size in zip(self.kv_heads, self.head_dims, strict=True))

    @property
    def kept_of_texts(self) -> Mapping[str, tuple[int, ...]]:
        """What blocks keep of a text that have something in attention's place: its kind -> its sizes, of any text."""
        if self.convolution_length:
            return {"conv": (self.hidden_size, self.convolution_length)}
        if net := self.delta_net:
            state = (net.value_heads, net.key_head_dim, net.value_head_dim)
            return {"conv": (net.channels, net.length), "recurrent": state}
        return {}

    @property
    def steady_context(self) -> int:
        """Longest context in which the rope's frequencies stay what they are; `longrope` has others beyond one."""
        return steady_context(self.rope_scaling or {}, self.max_position_embeddings)

    @property
    def narrowest(self) -> int | None:
        """The narrowest window of a block; None if every block sees everything."""
        return min((window for window in self.windows if window), default=None)

    def with_shape(self, shape: ModelShape) -> ModelConfig:
        """The same model with other blocks, each of which has one of these as its origin."""
        was = [self.shape.blocks[block.origin] for block in shape.blocks]
        blocks = (
            replace(block, kv_groups=old.kv_groups) if block.kv_groups is None else block
            for block, old in zip(shape.blocks, was, strict=True)
        )
        return replace(
            self,
            shape=ModelShape(shape.vocab_size or self.vocab_size, tuple(blocks)),
            rotated=tuple(self.rotated[block.origin] for block in shape.blocks),
            windows=tuple(self.windows[block.origin] for block in shape.blocks),
        )


def read_config(folder: Path) -> ModelConfig:
    """Read config.json; raises InputError: missing, an unknown architecture, or values that do not fit together."""
    import transformers

    raw = read_model_config(folder)
    plain, own = dense_settings(raw, str(folder / "config.json"))
    plain.pop("auto_map", None)
    with as_input_error(f"{folder / 'config.json'} is not a valid config"):
        read = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(plain)
        config = read.to_dict()
    shape = shape_from_config(config, own, str(folder / "config.json"))
    require_supported(shape, str(folder / "config.json"), keyless_blocks(config))
    spec = FAMILIES[config["model_type"]]
    message = "no exported graph computes this activation"
    stated = config.get(spec.activation_setting, "silu")
    activation = look_up(ACTIVATIONS, stated, message, field=spec.activation_setting)
    head_dim, rope = head_dim_of(config), rope_of(config, FULL)
    scale = 1.0
    if not spec.plain_scores:
        scale = float((config[spec.scale_setting] if spec.scale_setting else head_dim) ** -0.5)
    sizes = {name: config[key] for name, key in spec.mixer.sizes.items()} if spec.mixer else {}
    return ModelConfig(
        model_type=config["model_type"],
        shape=shape,
        hidden_size=config["hidden_size"],
        heads_per_group=config["num_attention_heads"]
        // (config.get("num_key_value_heads") or config["num_attention_heads"]),
        head_dim=head_dim,
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config[spec.epsilon_setting],
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        rotated=rotated_blocks(read),
        windows=windows_of_blocks(read),
        activation=activation,
        score_scale=scale,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        window_rope_theta=_window_theta(config, spec),
        rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)) if spec.partial_rope else None,
        rope_sections=tuple(rope.get("mrope_section") or _SECTIONS) if spec.partial_rope else (),
        full_head_dim=_full_head_dim(read, shape, head_dim) if spec.own_heads else None,
        logit_cap=logit_cap(read),
        delta_net=DeltaNet(**sizes) if "key_heads" in sizes else None,
        convolution_length=0 if "key_heads" in sizes else sizes.get("length", 0),
        sharing_blocks=config[spec.shared_keys.count_setting] if spec.shared_keys else 0,
        block_inputs=config[spec.block_inputs.size_setting] if spec.block_inputs else 0,
    )


def _full_head_dim(config: Any, shape: ModelShape, head_dim: int) -> int:
    """head_dim in blocks that see everything; raises InputError: they differ in it, or those that see a window do."""
    sizes = [int(config.per_layer_config[index].head_dim) for index in range(len(shape.blocks))]
    windows = windows_of_blocks(config)
    full = {size for size, window in zip(sizes, windows, strict=True) if not window}
    windowed = {size for size, window in zip(sizes, windows, strict=True) if window}
    if len(full) > 1 or not windowed <= {head_dim}:
        allowed = "one for blocks that see a window, and one for the others"
        raise InputError("unsupported", field="head_dim", value=sizes, allowed=allowed)
    return full.pop() if full else head_dim


def rope_of(config: Mapping[str, Any], kind_of_block: str) -> Mapping[str, Any]:
    """What blocks of a kind rotate by, of a config with defaults: `rope_type`, `rope_theta`, what the type wants."""
    rope = stated_rope(config, kind_of_block)
    is_alpha = FAMILIES[config["model_type"]].alpha_rope
    return alpha_rope(rope, head_dim_of(config)) if is_alpha else rope


def _window_theta(config: Mapping[str, Any], spec: Family) -> float | None:
    """The base in blocks with a window, under either release's name; None if blocks of this type are alike."""
    if not spec.has_window_rope:
        return None
    if config.get(spec.window_rope_setting):
        return float(config[spec.window_rope_setting])
    if WINDOWED not in (config.get("rope_parameters") or {}):
        return float(rope_of(config, FULL)["rope_theta"])
    rope = rope_of(config, WINDOWED)
    if (kind := rope["rope_type"]) != "default":
        raise InputError(
            "a scaled rope in blocks with a window", field="rope_type", value=kind, allowed="default"
        )
    return float(rope["rope_theta"])


@contextmanager
def open_tensors(folder: Path) -> Iterator[CheckpointTensors]:
    """The safetensors files of a folder, opened; raises InputError: there are none, or one is missing or damaged."""
    from safetensors import safe_open

    handles: dict[str, Any] = {}
    with ExitStack() as stack:
        for file in safetensors_files(folder):
            with as_input_error(f"{file} is damaged or cut short"):
                handle = stack.enter_context(safe_open(file, framework="pt"))
            handles.update(dict.fromkeys(handle.keys(), handle))
        yield CheckpointTensors(folder, handles)


class CheckpointTensors(NamedTuple):
    """Tensors of a folder's open files."""

    folder: Path  # Hugging Face folder
    handles: Mapping[str, Any]  # name of every stored tensor -> its open file

    def read(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """One tensor as float32; raises InputError: missing, of another shape than config.json says, or not finite."""
        handle = self.handles.get(name)
        if handle is None:
            raise InputError(f"{self.folder} lacks the tensor {name}")
        stored_shape = tuple(handle.get_slice(name).get_shape())
        if stored_shape != shape:
            raise InputError(
                f"{self.folder}: weights disagree with config.json",
                field=name,
                value=stored_shape,
                allowed=str(shape),
            )
        tensor = handle.get_tensor(name)
        if not tensor.is_floating_point():
            raise InputError(f"{self.folder}: {name} is stored as {tensor.dtype}; load the model unquantized")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{self.folder}: {name} holds NaN or infinite values")
        values: npt.NDArray[np.float32] = tensor.to(torch.float32).numpy()
        return values

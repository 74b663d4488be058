"""Metadata of a GGUF file: hyperparameters under the architecture's name, general.*, and our own provenance keys."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from cfsp.errors import InputError
from cfsp.models.gguf_model import SAMPLING
from cfsp.records import tool_version
from exporters.gguf.architecture import ChosenLayout
from exporters.gguf.rope import rope_metadata
from exporters.provenance import Provenance

_TOKENS_OF_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def check_name(name: str, tokens: Container[str]) -> None:
    """Raise InputError for a name at which llama.cpp looks for tokens that a model lacks, and fails."""
    lacked = [token for token in _TOKENS_OF_PHI3 if token not in tokens]
    if lacked and any(part in name.lower() for part in ("phi3", "phi-3")):
        raise InputError(
            f"llama.cpp takes a model of this name for Phi-3, whose tokens {', '.join(lacked)} it lacks",
            field="name",
            value=name,
            allowed="another one (--name)",
        )


def add_general(writer: Any, provenance: Provenance, file_type: int) -> None:
    """Write general.* and phoneready.*.

    Args:
        writer: gguf.GGUFWriter.
        provenance: Origin of the checkpoint.
        file_type: llama.cpp's `llama_ftype`.
    """
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(provenance.name)
    if provenance.license:
        writer.add_license(provenance.license)
    if provenance.base_model:
        writer.add_base_model_count(1)
        organization, _, name = provenance.base_model.rpartition("/")
        writer.add_base_model_name(0, name)
        if organization:
            writer.add_base_model_organization(0, organization)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{provenance.base_model}")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in (provenance.metadata() | {"phoneready.tool_version": tool_version()}).items():
        writer.add_string(key, value)
    if provenance.seed is not None:
        writer.add_int64("phoneready.seed", provenance.seed)


_MOST = {"temperature": 1000, "top_k": 2**31 - 1, "top_p": 1, "min_p": 1, "repetition_penalty": 1000}


def add_sampling(writer: Any, generation_config: Any) -> None:
    """Write how a generation config (or None) says to sample, which llama.cpp's programs do unless told otherwise.

    What is out of range is left out. A config that asks for sampling and says no more has transformers' temperature, 1.
    """
    stated = generation_config.to_diff_dict() if generation_config is not None else {}
    values = {name: stated[name] for name in SAMPLING.values() if stated.get(name) is not None}
    if not values and stated.get("do_sample"):
        values = {"temperature": 1.0}
    for key, name in SAMPLING.items():
        value: Any = values.get(name)
        kinds = (int,) if name == "top_k" else (int, float)
        may_be_zero = name in ("top_k", "min_p")
        if type(value) in kinds and (0 < value <= _MOST[name] or (value == 0 and may_be_zero)):
            getattr(writer, f"add_sampling_{key}")(value)


def add_hyperparameters(writer: Any, chosen: ChosenLayout) -> None:
    """Write the keys under the architecture's name, and the checkpoint's own shape under phoneready.*.

    Raises:
        InputError: A rope scaling that llama.cpp does not compute.
    """
    config, layout, widths = chosen.config, chosen.layout, chosen.widths
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(chosen.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(list(widths) if layout.per_layer_sizes else widths[0])
    # Blocks that read another block's keys need a number of heads all the same.
    kv_heads = tuple(
        n or (config.shape.most_kv_groups if config.sharing_blocks else 0) for n in config.kv_heads
    )
    heads = [n * config.heads_per_group for n in kv_heads]
    one = not layout.fused_qkv and len(set(kv_heads)) == 1
    if config.convolution_length:
        writer.add_shortconv_l_cache(config.convolution_length)
    if net := config.delta_net:
        writer.add_ssm_conv_kernel(net.length)
        writer.add_ssm_state_size(net.key_head_dim)
        writer.add_ssm_group_count(net.key_heads)
        writer.add_ssm_time_step_rank(net.value_heads)
        writer.add_ssm_inner_size(net.value_width)
        recurrent = [block.is_keyless for block in config.shape.blocks]
        step = recurrent.index(False) + 1
        writer.add_full_attention_interval(step)
        if recurrent != [(block + 1) % step != 0 for block in range(len(recurrent))]:
            writer.add_array(
                f"{writer.arch}.attention.recurrent_layers", recurrent
            )  # unknown to old releases
        one, kv_heads = True, (max(kv_heads),)
    # Where a short convolution takes attention's place, numbers of key-value heads say in which blocks.
    writer.add_head_count(max(heads) if one or config.convolution_length else heads)
    writer.add_head_count_kv(kv_heads[0] if one else list(kv_heads))
    writer.add_key_length(config.full_head_dim or config.head_dim)
    writer.add_value_length(config.full_head_dim or config.head_dim)
    if layout.own_heads:
        writer.add_key_length_swa(config.head_dim)
        writer.add_value_length_swa(config.head_dim)
    if layout.shares_keys:
        writer.add_shared_kv_layers(config.sharing_blocks)
    if layout.takes_inputs:
        writer.add_embedding_length_per_layer_input(config.block_inputs)
    if config.logit_cap:
        writer.add_final_logit_softcapping(config.logit_cap)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if layout.full_step and config.narrowest is not None:
        writer.add_sliding_window(config.narrowest)
        windowed = [window is not None for window in config.windows]
        if windowed != [(block + 1) % layout.full_step != 0 for block in range(len(windowed))]:
            writer.add_sliding_window_pattern(windowed)  # unknown to old releases
        if layout.window_base and config.window_rope_theta is not None:
            writer.add_rope_freq_base_swa(config.window_rope_theta)
    for key, value in rope_metadata(config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{writer.arch}.{key}", value)
    if config.rope_sections:
        writer.add_rope_dimension_sections([*config.rope_sections, 0])
    writer.add_string("phoneready.model_type", config.model_type)
    writer.add_array("phoneready.intermediate_sizes", list(config.shape.ffn_widths))

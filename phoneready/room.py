"""Whether memory and disk have room for what a command or a stage needs at least, asked before anything is written.

What is needed follows from shapes, which the heads of a model's files have. How long something takes is not foretold.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.files import large_temporary
from cfsp.memory import require_memory
from cfsp.models.architectures import spec_for, state_size
from cfsp.models.config_file import read_model_config
from cfsp.models.families import FAMILIES
from cfsp.models.gguf_file import EMBEDDING, OUTPUT, read_gguf
from cfsp.models.gguf_model import config_from_gguf, keeping_of_gguf
from cfsp.models.offload import AUTO, NARROW, WHOLE, Keeping, scratch_bytes
from cfsp.models.reference import config_from_settings, find_model, is_folded, keeping_of_folder, text_names
from cfsp.models.weights import OUTPUT_MATRIX, safetensors_files, uniform_dtype
from cfsp.progress import Progress, no_progress
from cfsp.pruning.prune import TOLD_WINDOWS
from cfsp.pruning.settings import PruneSettings
from cfsp.reading import as_input_error
from cfsp.recovery.settings import Training, method_of
from cfsp.units import format_bytes
from exporters.export_record import ExportFormat
from exporters.families import FileSettings, family_of, find_format
from exporters.proof import PARITY_SEQLEN
from exporters.quantize.walk import rounding_bytes

LESS = {
    "prune": "less text (--set nsamples, --set seqlen), or a smaller model",
    "quantize": "less text (--set nsamples, --set rounding_windows, --set seqlen), or a smaller model",
    "eval": "shorter windows (--set seqlen), or a smaller model",
    "search": "less text (--set nsamples), or a smaller model",
    "recover": "an adapter (--method lora), the loss next-token (no teacher), or a smaller model",
}
"""What takes less memory."""
_FLOATS_STAY = "gguf"
"""The family whose files of floats are there until all files of few bits are made of them."""
_FLOAT_BITS = 32.0


def check_room(
    what: str,
    models: Sequence[str],
    needs: Callable[[Sequence[Extent]], Needs],
    output: Path | None = None,
    *,
    device: torch.device = CPU,
    kept: str = "float32",
    progress: Progress = no_progress,
) -> None:
    """Refuse what cannot fit; `needs` is asked of the models, whose weights are kept in the dtype of that name.

    Nothing is checked if the heads of a model's files do not tell how large it is: what reads it says why.
    """
    try:
        paths = [Path(find_model(model, progress=progress).path or "") for model in models]
        extents = [read_extent(path, kept) for path in paths]
    except (InputError, OSError):
        return
    if device != CPU:  # nothing stays in files for a GPU, whose memory is asked for when a model is put there
        extents = [extent._replace(keeping=WHOLE) for extent in extents]
    least = needs(extents)
    if device != CPU:
        least = least._replace(memory=0)
    require_room(least, output, what, LESS[what])


def drawing_needs(extents: Sequence[Extent]) -> Needs:
    """Of the dense model as a checkpoint."""
    (dense,) = extents
    return Needs(dense.least_resident_bytes, _saved(dense))


def pruning_needs(
    extents: Sequence[Extent],
    settings: PruneSettings,
    windows: int,
    seqlen: int,
    *,
    only_plan: bool = False,
) -> Needs:
    """Of statistics, plan, reconstruction, and the checkpoint."""
    (dense,) = extents
    read = min(windows, TOLD_WINDOWS) if settings.keeps_blocks else windows
    memory = _passed(dense, read * seqlen if settings.prune_ratio else min(seqlen, read * seqlen))
    if only_plan:
        return Needs(memory)
    scratch = scratch_bytes(dense.least_weights) if dense.by_blocks else 0
    disk = 0
    if not any((settings.blocks, settings.attentions, settings.kv_groups, settings.vocabulary)):
        rounded = settings.align / 2 * len(dense.widths) / sum(dense.widths)
        share = max(0.0, 1 - settings.prune_ratio - rounded)
        disk = dense.stored_bytes * int(share * dense.block_weights + dense.end_weights)
    return Needs(memory, disk, scratch)


def exporting_needs(
    extents: Sequence[Extent],
    settings: FileSettings,
    windows: int | None,
    seqlen: int,
    *,
    is_saved: bool = False,
) -> Needs:
    """Of files, the floats that they are made of, and their proofs.

    `windows` are those of the text that files of few bits are rounded for, None without one; a model that is no folder
    is saved as one first.
    """
    (extent,) = extents
    if extent.by_blocks and not extent.is_alone:
        extent = extent._replace(keeping=WHOLE)
    memory, tokens = _passed(extent, PARITY_SEQLEN), (windows or 0) * seqlen
    if is_saved:
        extent = extent._replace(stored_bytes=4)
    there = _saved(extent) if is_saved else 0
    families: dict[str, list[ExportFormat]] = {}
    for name in settings.names:
        families.setdefault(family_of(name).name, []).append(find_format(name))
    most = 0
    for name, rows in families.items():
        floats = (extent.stored_bytes if extent.by_blocks else 4) * extent.least_weights
        in_blocks = extent.by_blocks and name != _FLOATS_STAY
        if in_blocks or any(row.bits == _FLOAT_BITS for row in rows):
            floats = 0
        files = sum(int(row.bits / 8 * extent.least_weights) for row in rows if row.is_sized)
        most = max(most, there + (floats + files if name == _FLOATS_STAY else max(floats, files)))
        there += files
        fitted = [row for row in rows if "calibration" in row.reads]
        if windows is not None and any(settings.gptq or "gptq" not in row.reads for row in fitted):
            rounding = extent.least_resident_bytes + rounding_bytes(tokens, max(extent.widths))
            memory = max(memory, _passed(extent, tokens), rounding)
    return Needs(memory, most)


def judging_needs(extents: Sequence[Extent], seqlen: int, few_bits: Sequence[bool]) -> Needs:
    """Of models beside each other, but for those whose own runtime maps a file of few bits into memory."""
    each = zip(extents, few_bits, strict=True)
    return Needs(sum(_passed(extent, seqlen) for extent, few in each if not few))


def recovering_needs(extents: Sequence[Extent], settings: Training) -> Needs:
    """Of training: gradients and AdamW's two moments of all weights, if these are trained; and the checkpoint."""
    (extent,) = extents
    method = method_of(settings)
    few = method.adapter or method.through_rounding
    # The models themselves are in memory already when this is asked.
    return Needs(0 if few else 12 * extent.least_weights, _saved(extent))


def _passed(extent: Extent, tokens: int) -> int:
    """Bytes of a pass through all blocks, with hidden states of so many tokens at once."""
    return extent.least_resident_bytes + extent.states_bytes(tokens)


def _saved(extent: Extent) -> int:
    return extent.stored_bytes * extent.least_weights


_BLOCK = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")
_EMBEDDINGS, _OUTPUTS = (EMBEDDING, "model.embed_tokens.weight"), (OUTPUT, OUTPUT_MATRIX)


class Extent(NamedTuple):
    blocks: tuple[tuple[tuple[int, int], ...], ...]  # of every block its matrices, (rows, columns)
    vocab_size: int  # rows of the embedding
    hidden_size: int  # its columns
    beside: int = 0  # weights of all other matrices, such as a further table of tokens
    stored_bytes: int = 4  # of a weight, in a checkpoint that is made of the model
    keeping: Keeping = WHOLE
    state_size: int = 0  # numbers held of a token between blocks; 0 for `hidden_size`
    is_alone: bool = True  # whether a block is given nothing but hidden states

    @property
    def block_weights(self) -> int:
        return sum(math.prod(shape) for block in self.blocks for shape in block)

    @property
    def end_weights(self) -> int:
        """Weights of the embedding, or of the output matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def least_weights(self) -> int:
        """All but norms and biases, if the output matrix is the embedding, which a file may hold twice."""
        return self.block_weights + self.beside + self.end_weights

    @property
    def widths(self) -> tuple[int, ...]:
        """FFN channels of every block: the most inputs of a matrix."""
        return tuple(max((columns for _, columns in block), default=0) for block in self.blocks)

    @property
    def by_blocks(self) -> bool:
        return self.keeping.in_files

    @property
    def least_resident_bytes(self) -> int:
        """Least bytes of weights in memory at once."""
        return 0 if self.keeping.in_files else self.keeping.dtype.itemsize * self.least_weights

    def states_bytes(self, tokens: int) -> int:
        """Bytes of hidden states at one depth, float32."""
        return 4 * tokens * (self.state_size or self.hidden_size)


def read_extent(path: Path, dtype: str = AUTO) -> Extent:
    """The size of a GGUF file or Hugging Face folder, its weights kept in a dtype, by headers; raises InputError."""
    stored, keeping = torch.float32, WHOLE
    if path.is_file():
        file = read_gguf(path)
        tensors = [(tensor.name, tensor.shape) for tensor in file.tensors]
        config, keeping = config_from_gguf(file), keeping_of_gguf(file, dtype)
    else:
        settings, config = read_model_config(path), None
        if (row := FAMILIES.get(settings["model_type"])) is not None and row.own_arguments:
            config = config_from_settings(settings, str(path))
        tensors = []
        for one in safetensors_files(path):
            with as_input_error(f"{one} is damaged or cut short"), safetensors.safe_open(one, "pt") as opened:
                names = text_names(path, opened.keys())
                tensors += [(ours, tuple(opened.get_slice(n).get_shape())) for n, ours in names.items()]
        if not is_folded(path):  # else it is float32 before it is anything else
            keeping = keeping_of_folder(path, dtype)
            stored = uniform_dtype(safetensors_files(path)) or torch.float32
    blocks: dict[int, list[tuple[int, int]]] = {}
    shapes, beside = dict(tensors), 0
    for name, shape in tensors:
        if len(shape) == 2 and (block := _BLOCK.search(name)):
            blocks.setdefault(int(block[1]), []).append((shape[0], shape[1]))
        elif len(shape) == 2 and name not in (*_EMBEDDINGS, *_OUTPUTS):
            beside += math.prod(shape)
    embedding = next((shapes[name] for name in _EMBEDDINGS if name in shapes), ())
    if not blocks or len(embedding) != 2:
        raise InputError(f"{path} holds no decoder with an embedding")
    own = config is not None and bool(spec_for(config).own_arguments)
    return Extent(
        tuple(tuple(blocks[index]) for index in sorted(blocks)),
        *embedding,
        beside=beside,
        stored_bytes=NARROW.get(dtype, stored).itemsize,
        keeping=keeping,
        state_size=state_size(config) if own else 0,
        is_alone=not own,
    )


class Needs(NamedTuple):
    """Least bytes in memory, at the output, and in the folder for temporary files."""

    memory: int = 0
    disk: int = 0
    scratch: int = 0


def require_room(needs: Needs, output: Path | None, what: str, less: str = "a smaller model") -> None:
    """Raise InputError for what cannot fit, before anything is written; `less`: what would take less memory."""
    require_memory(needs.memory, what, less)
    places = [(large_temporary(), needs.scratch, "another folder (TMPDIR)")]
    if output is not None:
        places.insert(0, (output, needs.disk, "another place (-o)"))
    # Each for itself, on one disk too: what is in the one may be gone before the other is written.
    for path, n_bytes, allowed in places:
        there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if n_bytes and n_bytes > (free := shutil.disk_usage(there).free):
            raise InputError(
                f"no space left to write {path}: {what} takes {format_bytes(n_bytes)} at least, and "
                f"{format_bytes(free)} are free",
                allowed=allowed,
            )

"""Records of an export: what was written, what it came from, and how it was proven."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from cfsp.models.shape import ModelShape
from exporters.recipe import Recipe


class ParityLimits(NamedTuple):
    """Bounds on a ParityReport's metrics; None is not checked. That to the difference of logits is for ones up to 10.

    The bounds of quantized files catch a runtime that computes something else with the proven numbers.
    """

    max_logit_diff: float | None = None
    kl_mean: float | None = None
    same_top1: float | None = None
    ppl_ratio: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The bounds that are set."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class ExportFormat:
    """A row of a family's table: one way to store the weights, and the bounds of the parity check."""

    name: str  # as users say it
    limits: ParityLimits

    @property
    def width_multiple(self) -> int:
        """FFN widths that are multiples of it are stored as asked."""
        return 1

    @property
    def is_sized(self) -> bool:
        """Whether a file's size follows from the shape of the model alone."""
        return True

    @property
    def bits(self) -> float:
        """Of a weight in most matrices."""
        return 32.0

    @property
    def needs_text(self) -> bool:
        """Whether it is worth sampling text for, if none is given."""
        return False

    @property
    def reads(self) -> frozenset[str]:
        """Fields of ExportOptions that matter to it and not to every format."""
        return frozenset()


@dataclass(frozen=True)
class ParityReport:
    """An exported file, run in its own runtime, against the checkpoint on the same text.

    P is the checkpoint's and Q the file's next-token distribution at a position; logarithms are natural.
    """

    n_tokens: int  # positions compared: windows x seqlen
    n_windows: int  # each run from an empty context
    seqlen: int
    text: str  # where it came from
    max_logit_diff: float  # largest absolute difference of a logit
    kl_mean: float  # over positions, of KL(P || Q) in nats
    kl_median: float
    kl_p99_9: float  # its 99.9th percentile
    same_top1: float  # share of positions whose most likely token is the same
    ppl_checkpoint: float
    ppl_export: float
    ppl_ratio: float  # ppl_export / ppl_checkpoint
    limits: dict[str, float]  # metric -> the bound that was held: an upper one, for same_top1 a lower one


@dataclass(frozen=True)
class BlockProof:
    """Blocks of a model too large to run whole as float32, each run in the file's runtime (`exporters.proof`)."""

    n_blocks: int
    n_tokens: int  # positions, of one window
    text: str  # where it came from
    max_difference: float  # the largest of any block, relative to the position's largest product
    limit: float


@dataclass(frozen=True)
class ExportRecord:
    """One exported file, where it comes from, and the proof that it is the checkpoint's model."""

    KIND: ClassVar[str] = "export"
    SCHEMA_VERSION: ClassVar[int] = 3

    file: str  # inside the output folder
    format: str  # "gguf" or "onnx"
    quant: str  # row of the table of quantizations or variants, such as "Q4_K_M" or "int4"
    architecture: str  # in the file, which may differ from the checkpoint's model type
    file_bytes: int  # with the weights that lie beside an ONNX graph
    sha256: str  # of the file; an ONNX graph has the hash of its weights in its metadata
    n_params: int  # elements of all tensors
    tensor_types: dict[str, int]  # stored type -> number of tensors, read back from the file
    shape: ModelShape  # of the checkpoint
    context_length: int  # longest context for which the file is the checkpoint's model
    source_model: str  # name of the dense model
    source_sha256: str | None  # of its weights
    checkpoint_sha256: str | None  # of the checkpoint's weights
    plan_sha256: str | None
    seed: int | None  # of the run that made the checkpoint
    parity: ParityReport
    warnings: tuple[str, ...]  # fallbacks, a shortened context, chats that are read otherwise
    runtime: str  # name and version of what proved the file
    imatrix_tensors: int = 0  # quantized with the importance matrix
    # Strings on which the file's tokenization was found equal to the checkpoint's; ONNX folders have the tokenizer.
    tokenizer_strings: int = 0
    chats: tuple[str, ...] = ()  # conversations that the runtime splits as the checkpoint's tokenizer does
    # Of the token ids that it was rounded for, its types chosen by, or its importance matrix measured on.
    calibration_sha256: str | None = None
    calibration_tokens: int = 0
    gptq_tensors: int = 0  # matrices of a GGUF file whose numbers were chosen for that text by GPTQ
    budget_bytes: int | None = None  # most that a mixture of bits was allowed to take
    eight_bit_layers: tuple[str, ...] = ()  # of a 4-bit variant, by module name, if text chose them
    chosen_types: dict[str, str] = field(default_factory=dict)  # tensor -> type, if chosen for a size
    predicted_loss: float | None = None  # divergence that those were expected to cost, nats a token
    tuned_tensors: int = 0  # scales and norms that training on the text changed
    trained_tensors: int = 0  # matrices that hold what training through the rounding has left
    blocks: BlockProof | None = None  # in place of the float32 file's proof, of a model too large for that
    plain_kl: float | None = (
        None  # mean divergence, nats, of the plain quantizer's numbers, if others were chosen
    )
    rounded_kl: float | None = None  # the same of those chosen for a text; the file has what loses less
    slopes: dict[str, float] = field(
        default_factory=dict
    )  # of matrices whose numbers were chosen (`exporters.proof`)
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class ExportManifest:
    """All files of one export: `export.json` in the output folder; `warnings`: what was asked for without effect."""

    KIND: ClassVar[str] = "export-manifest"
    SCHEMA_VERSION: ClassVar[int] = 3

    exports: tuple[ExportRecord, ...]
    warnings: tuple[str, ...] = ()

"""Records of an export: what was written, what it came from, and how it was proven."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import ClassVar

from cfsp.models.shape import ModelShape


@dataclass(frozen=True)
class ParityLimits:
    """Bounds on a ParityReport's metrics; None is not checked. That to the difference of logits is for ones up to 10.

    What a graph computes is proven on its float32 file, in the logits, and a quantized file's numbers row by row
    (`exporters.proof`). The bounds of quantized files catch a runtime that computes something else with them.
    """

    max_logit_diff: float | None = None
    kl_mean: float | None = None
    same_top1: float | None = None
    ppl_ratio: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The bounds that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ExportFormat:
    """A row of a family's table: one way to store the weights.

    Attributes:
        name: As users say it.
        limits: Bounds of the parity check.
    """

    name: str
    limits: ParityLimits

    @property
    def width_multiple(self) -> int:
        """FFN widths that are multiples of it are stored as asked."""
        return 1

    @property
    def is_sized(self) -> bool:
        """Whether a file's size follows from the shape of the model alone, or a bound that text keeps to."""
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

    Attributes:
        n_tokens: Positions compared: windows x seqlen.
        n_windows: Number of text windows, each run from an empty context.
        seqlen: Tokens a window.
        text: Where the text came from.
        max_logit_diff: Largest absolute difference of a logit.
        kl_mean: Mean over positions of KL(P || Q), in nats.
        kl_median: Median of the same.
        kl_p99_9: 99.9th percentile of the same.
        same_top1: Share of positions whose most likely token is the same.
        ppl_checkpoint: Perplexity of the checkpoint on the windows.
        ppl_export: Perplexity of the file on the windows.
        ppl_ratio: ppl_export / ppl_checkpoint.
        limits: Metric name to the bound that was held: an upper one, for same_top1 a lower one.
    """

    n_tokens: int
    n_windows: int
    seqlen: int
    text: str
    max_logit_diff: float
    kl_mean: float
    kl_median: float
    kl_p99_9: float
    same_top1: float
    ppl_checkpoint: float
    ppl_export: float
    ppl_ratio: float
    limits: dict[str, float]


@dataclass(frozen=True)
class BlockProof:
    """Blocks of a model that is too large to run whole as float32, each run in the file's runtime on what enters it.

    What comes out of a block goes through a norm that every channel passes alike, and is multiplied with what entered
    it: of these products the largest difference from the checkpoint's counts, relative to the position's largest.

    Attributes:
        n_blocks: All of the model's.
        n_tokens: Positions, of one window.
        text: Where the text came from.
        max_difference: The largest of any block.
        limit: The bound that it was held to.
    """

    n_blocks: int
    n_tokens: int
    text: str
    max_difference: float
    limit: float


@dataclass(frozen=True)
class TensorFallback:
    """Tensors that the quantizer stored in another type than asked, because their rows do not divide into blocks.

    Attributes:
        asked: The type the quantization would have used, such as "Q4_K".
        actual: The type in the file, such as "Q5_0".
        row_length: Elements in a row of these tensors.
        tensors: Their names in the file.
    """

    asked: str
    actual: str
    row_length: int
    tensors: tuple[str, ...]

    @property
    def said(self) -> str:
        """A warning."""
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return (
            f"stored as {self.actual} instead of {self.asked}, for rows of {self.row_length}: "
            f"{self.tensors[0]}{more}"
        )


@dataclass(frozen=True)
class ExportRecord:
    """One exported file.

    Attributes:
        file: Name of the file inside the output folder.
        format: "gguf" or "onnx".
        quant: Row of the table of quantizations or variants, such as "Q4_K_M" or "int4".
        architecture: The architecture name in the file, which may differ from the checkpoint's model type.
        file_bytes: Size on disk, with the weights that lie beside an ONNX graph.
        sha256: Of the file; an ONNX graph has the hash of its weights in its metadata.
        n_params: Elements of all tensors.
        tensor_types: Stored type to number of tensors, read back from the file.
        fallbacks: Where the stored type is not the one asked for.
        imatrix_tensors: Tensors quantized with the importance matrix; 0 without one.
        shape: Of the checkpoint.
        padded_width: Width to which every block was zero-padded; None if each keeps its own.
        context_length: Longest context for which the file is the checkpoint's model.
        tokenizer_strings: Strings on which the file's tokenization was found equal to the checkpoint's; 0 for ONNX,
            whose folders have the checkpoint's own tokenizer.
        chats: Conversations that the file's runtime (of an ONNX folder GenAI) reads as the checkpoint's tokenizer does,
            token by token; those that it reads otherwise are among the warnings.
        source_model: Name of the dense model.
        source_sha256: Hash of the dense model's weights.
        checkpoint_sha256: Hash of the checkpoint's weights.
        plan_sha256: Hash of the pruning plan.
        seed: Seed of the run that made the checkpoint.
        parity: The proof.
        warnings: What the user should know: fallbacks, padding, a shortened context.
        runtime: Name and version of the runtime that proved the file.
        ort_file: Of earlier versions: the same as an .ort file.
        calibration_sha256: Hash of the token ids that it was rounded for, its types chosen by, or its importance matrix
            measured on; None without.
        calibration_tokens: Their number.
        gptq_tensors: Matrices of a GGUF file whose numbers were chosen for it by GPTQ.
        tuned_tensors: Tensors of it that training on that text changed: matrices in their scales, and norms.
        trained_tensors: Matrices that hold what training through this format's rounding has left in the checkpoint.
        plain_kl: Mean divergence on the proof's text, in nats, with the plain quantizer's numbers; None if none were
            chosen for a text.
        rounded_kl: The same with the numbers chosen for a text. The file has those that lose less.
        budget_bytes: Most that a mixture of bits was allowed to take; None if it is not chosen for a size.
        eight_bit_layers: What of a 4-bit variant is in eight bits, by module name, if text chose it.
        chosen_types: Tensor of a GGUF file -> its type, if types were chosen for a size.
        predicted_loss: Divergence that those types were expected to cost, nats a token.
        blocks: The proof of the blocks that the file is quantized from, where they are too many to run as one; None
            where the float32 file was.
    """

    KIND: ClassVar[str] = "export"
    SCHEMA_VERSION: ClassVar[int] = 2

    file: str
    format: str
    quant: str
    architecture: str
    file_bytes: int
    sha256: str
    n_params: int
    tensor_types: dict[str, int]
    shape: ModelShape
    context_length: int
    source_model: str
    source_sha256: str | None
    checkpoint_sha256: str | None
    plan_sha256: str | None
    seed: int | None
    parity: ParityReport
    warnings: tuple[str, ...]
    runtime: str
    fallbacks: tuple[TensorFallback, ...] = ()
    imatrix_tensors: int = 0
    padded_width: int | None = None
    tokenizer_strings: int = 0
    chats: tuple[str, ...] = ()
    ort_file: str | None = None
    calibration_sha256: str | None = None
    calibration_tokens: int = 0
    gptq_tensors: int = 0
    budget_bytes: int | None = None
    eight_bit_layers: tuple[str, ...] = ()
    chosen_types: dict[str, str] = field(default_factory=dict)
    predicted_loss: float | None = None
    tuned_tensors: int = 0
    trained_tensors: int = 0
    blocks: BlockProof | None = None
    plain_kl: float | None = None
    rounded_kl: float | None = None


@dataclass(frozen=True)
class ExportManifest:
    """All files of one export: `export.json` in the output folder; `warnings`: what was asked for without effect."""

    KIND: ClassVar[str] = "export-manifest"
    SCHEMA_VERSION: ClassVar[int] = 2

    exports: tuple[ExportRecord, ...]
    warnings: tuple[str, ...] = ()

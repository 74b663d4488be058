"""`phoneready recover`: train back into a pruned checkpoint what pruning has cost."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.errors import PhonereadyError
from cfsp.files import refuse_existing
from phoneready.commands.options import (
    TEXT_HELP,
    DebugOption,
    ForceOption,
    JsonOption,
    SeedOption,
    ThreadsOption,
    TrustOption,
    split_names,
    text_references,
)
from phoneready.console import prepare_torch, show_progress, write_result

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cfsp.recovery import RecoveryRecord


def recover(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint of `phoneready prune`; or any model, to train it alike.",
            metavar="CHECKPOINT",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Checkpoint folder to create.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Training data; repeatable, mixed in equal shares. Chats (`messages`) are learnt from in their "
            f"answers. `self` (sampled from the teacher), {TEXT_HELP}.",
            metavar="REF",
            show_default="self",
        ),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(
            "--validation",
            help="Validation data, as --data.",
            metavar="REF",
            show_default="a held-out share of the data",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="ig-lora (ranks by importance), lora, or full (all weights).")
    ] = "ig-lora",
    rank: Annotated[int, typer.Option("--rank", help="Mean rank of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="LoRA's alpha, as a multiple of the rank.")] = 2.0,
    loss: Annotated[
        str, typer.Option("--loss", help="next-token, distill (from the teacher), or both.")
    ] = "next-token",
    temperature: Annotated[float, typer.Option("--temperature", help="Of distillation.")] = 1.0,
    distill_weight: Annotated[
        float, typer.Option("--distill-weight", help="Share of distillation in `--loss both`.")
    ] = 0.5,
    chat_labels: Annotated[
        str,
        typer.Option(
            "--chat-labels",
            help="What of a chat is learnt: answers, all, or auto (all for `--loss distill`, else answers).",
        ),
    ] = "auto",
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="Dense model.",
            metavar="MODEL",
            show_default="what the checkpoint was pruned from",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Peak.", show_default="1e-3 for adapters, 2e-4 for full"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Training budget in tokens.", show_default="1000000")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option("--epochs", help="Budget in passes over the data, instead of --max-tokens."),
    ] = None,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens in a training sequence.")] = 512,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Sequences in a forward pass, on each process.")
    ] = 4,
    gradient_accumulation_steps: Annotated[
        int,
        typer.Option(
            "--gradient-accumulation-steps", help="Forward passes behind one step, on each process."
        ),
    ] = 1,
    warmup_ratio: Annotated[
        float, typer.Option("--warmup-ratio", help="Share of the steps in which the learning rate rises.")
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option("--max-grad-norm", help="Gradients are clipped to it.")
    ] = 1.0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of matrix products: auto, float32 or bfloat16.")
    ] = "auto",
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", help="Steps between validations.", show_default="a tenth of all"),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", help="Steps between checkpoints.", show_default="as --eval-every"),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            "--patience", help="Stop after so many validations without a new best; 0: never.", min=0
        ),
    ] = 5,
    validation_windows: Annotated[
        int, typer.Option("--validation-windows", help="Most validation sequences.")
    ] = 16,
    self_tokens: Annotated[
        int, typer.Option("--self-tokens", help="Most tokens sampled for `--data self`.")
    ] = 131_072,
    seed: SeedOption = 0,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report-to",
            help="Trackers, as transformers names them: tensorboard, mlflow, ...",
            metavar="NAME,...",
            show_default="none",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder for training's own checkpoints.", show_default="DIR.work"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto (a GPU where there is one) or cpu.")] = "auto",
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a pruned checkpoint, and merge what was learnt: widths and speed stay the same.

    A killed run goes on when the same command is given again. `accelerate launch -m phoneready recover ...` trains
    on several processes or GPUs. What is kept is the best validation's weights.
    """
    inputs = [Path(name) for name in (checkpoint, teacher, *(data or []), *(validation or [])) if name]
    refuse_existing(output, force=force, inputs=inputs)
    with _one_voice():
        prepare_torch(threads)
        from cfsp.records import record_to_json
        from cfsp.recovery import RecoverySettings, check_outcome
        from cfsp.recovery import recover as run_recovery
        from cfsp.text.calibration import SELF

        settings = RecoverySettings(
            method=method,
            rank=rank,
            alpha=alpha,
            loss=loss,
            temperature=temperature,
            distill_weight=distill_weight,
            chat_labels=chat_labels,
            learning_rate=learning_rate,
            max_tokens=1_000_000 if max_tokens is None and epochs is None else max_tokens,
            epochs=epochs,
            seqlen=seqlen,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            warmup_ratio=warmup_ratio,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            dtype=dtype,
            eval_every=eval_every,
            save_every=save_every,
            patience=patience or None,
            validation_windows=validation_windows,
            self_tokens=self_tokens,
            seed=seed,
            report_to=tuple(name for name in split_names(report_to or []) if name != "none"),
        )
        with show_progress() as progress:
            result = run_recovery(
                checkpoint,
                output,
                settings,
                data=text_references(data or [SELF]),
                validation=text_references(validation or []),
                teacher=teacher,
                work=work,
                device=device,
                force=force,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        if result.is_main:
            text = format_recovery(result.record, output)
            write_result(text, record_to_json(result.record), as_json=json)
        check_outcome(result.record, output)


def format_recovery(record: RecoveryRecord, output: Path) -> str:
    """What training did, in words."""
    settings = record.settings
    ranks = f", rank {min(record.ranks)} to {max(record.ranks)}" if record.ranks else ""
    origin = "held out of it" if record.held_out else ", ".join(part.reference for part in record.validation)
    lines = [
        f"Validation perplexity {record.perplexity_before:.2f} before, {record.perplexity_after:.2f} after "
        f"(step {record.kept_step} of {len(record.losses)}, {sum(v.n_learnt for v in record.validation)} "
        f"tokens, {origin}).",
        f"Trained {record.n_trainable} weights ({settings.method}{ranks}; {settings.loss}) on "
        f"{record.tokens_seen} tokens of {', '.join(part.reference for part in record.training)} "
        f"in {record.seconds:.0f} s, {record.dtype} on {record.device}, processes: {record.processes}; "
        f"stopped by {record.stopped_by}.",
        f"Written to {output}.",
    ]
    return "\n".join(lines)


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes on a machine that fail alike, only the first says why."""
    try:
        yield
    except PhonereadyError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        raise typer.Exit(error.exit_code) from None

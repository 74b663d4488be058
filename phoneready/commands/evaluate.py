"""`phoneready eval`: judge a model, alone or against another one."""

from __future__ import annotations

from typing import Annotated

import typer

from phoneready.commands.options import (
    TEXT_HELP,
    DebugOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    TrustOption,
    text_references,
)
from phoneready.console import prepare_torch, show_progress, write_result

__all__ = ["evaluate"]


def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option("--against", help="Reference model, usually the dense one.", metavar="MODEL")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help=f"Text to measure on; repeatable. {TEXT_HELP}.",
            metavar="REF",
            show_default="builtin:python-docs",
        ),
    ] = None,
    chats: Annotated[
        list[str] | None,
        typer.Option(
            "--chats",
            help="Chats to measure on; repeatable. As --text, or `self`: sampled from the reference model.",
            metavar="REF",
        ),
    ] = None,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens in a window.", min=2)] = 1024,
    windows: Annotated[int, typer.Option("--windows", help="Most windows of each text.", min=1)] = 16,
    prompts: Annotated[
        bool, typer.Option("--prompts/--no-prompts", help="Also show answers to a few questions.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.", min=1)] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Seed of `--chats self`.", min=0)] = 1,
    trust_remote_code: TrustOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure perplexity, and with --against divergence (KL) and same-top-1; show what the models answer.

    Every figure is printed with its text and its number of tokens: without these it means nothing.
    """
    prepare_torch(threads)
    from cfsp.evaluation import PROMPTS
    from cfsp.model_reference import load_model
    from cfsp.records import record_to_json
    from cfsp.text import BUILTIN_TEXT
    from phoneready.pipeline import evaluation

    settings = evaluation.EvaluationSettings(
        text=text_references(text or ([] if chats else [BUILTIN_TEXT])),
        chats=text_references(chats or []),
        seqlen=seqlen,
        max_windows=windows,
        prompts=PROMPTS if prompts else (),
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    with show_progress() as progress:
        loaded = load_model(model, trust_remote_code=trust_remote_code, progress=progress)
        dense = (
            load_model(against, trust_remote_code=trust_remote_code, progress=progress) if against else None
        )
        result = evaluation.evaluate(loaded, dense, settings, progress=progress)
    table = evaluation.format_evaluation(result)
    answers = evaluation.format_answers(result, ("reference", "model"))
    measured = f"Windows of {seqlen} tokens, each without context before it.\n"
    write_result("\n".join([table, measured, answers]), record_to_json(result), as_json=json)

"""Training and validation sequences: documents become tokens with targets, packed to one length.

`targets[t]` is the token that position t has to predict, or IGNORED if nothing is learnt there.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.recovery.recovery_record import DataRecord
from cfsp.recovery.settings import DISTILL, RecoverySettings
from cfsp.text.respelling import Respelling
from cfsp.text.self_sampling import TRANSFORMERS, Writer, sample_windows, without_loops
from cfsp.text.settings import SELF
from cfsp.text.tokens import (
    document_ids,
    encode_in_place,
    load_documents,
    render_chat,
    shuffled,
    started,
    tokens_sha256,
)

IGNORED = -100
"""Target of a position where nothing is learnt, as torch and transformers have it."""
INSIDE = -1
"""Place in the teacher's text of a position that is inside one of the teacher's tokens."""
_SENTINEL = "\N{SNOWMAN}answer\N{SNOWMAN}"
_VALIDATION_SEED = 2
"""Added to the seed, so that `self` is neither what is trained on nor what a release judges with, the seed after."""
MOST_LOOPS = 0.5
"""Share of a model's texts that may be loops, above which it is not one to learn from."""
HELD_OUT_SHARE = 0.1
"""Most of the data that is held out if no validation data is given."""

Labelled = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and for each whether it is to be learnt."""


@dataclass(frozen=True)
class Sequences:
    """Sequences of one source."""

    input_ids: torch.Tensor  # (n, seqlen) int64
    targets: torch.Tensor  # (n, seqlen) int64; IGNORED if nothing is learnt, the last position always
    source: str  # reference of the data
    sha256: str  # hash of ids and targets
    # (n, seqlen) int64, the same text in the teacher's tokens if these are others.
    teacher_ids: torch.Tensor | None = None
    # (n, seqlen) int64, which of these each position is the last part of, or INSIDE.
    teacher_places: torch.Tensor | None = None
    n_loops: int = 0  # texts of the source that a model wrote in loops, and that are left out

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """One sequence, as `Student.forward` takes it."""
        item = {"input_ids": self.input_ids[row], "labels": self.targets[row]}
        if self.teacher_ids is not None and self.teacher_places is not None:
            item |= {"teacher_ids": self.teacher_ids[row], "teacher_places": self.teacher_places[row]}
        return item

    @property
    def record(self) -> DataRecord:
        """What the record of a run says of it."""
        count, n_learnt = len(self.input_ids), int((self.targets != IGNORED).sum())
        return DataRecord(self.source, self.sha256, count, self.input_ids.numel(), n_learnt, self.n_loops)


class TrainingMix(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences of several sources in turn, so that each gives the same share of tokens.

    A source that is used up starts again in another order. Item i depends on the seed and i alone.
    """

    def __init__(self, sources: Sequence[Sequences], count: int, seed: int) -> None:
        self.sources, self.count, self.seed = tuple(sources), count, seed
        self._orders: dict[tuple[int, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return self.count

    def first_windows(self, tokens: int) -> torch.Tensor:
        """The input ids of about the first so many tokens, (n, seqlen)."""
        count = min(len(self), math.ceil(tokens / self.sources[0].input_ids.shape[1]))
        return torch.stack([self[i]["input_ids"] for i in range(count)])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        turn, which = divmod(index, len(self.sources))
        source = self.sources[which]
        round_, place = divmod(turn, len(source.input_ids))
        return source[int(self._order(which, round_)[place])]

    def _order(self, which: int, round_: int) -> torch.Tensor:
        key = (which, round_)
        if key not in self._orders:
            # Distinct for any two small (seed, source, round), on every machine.
            key_seed = (self.seed * 1_000_003 + which) * 1_000_003 + round_
            generator = torch.Generator().manual_seed(key_seed % (1 << 63))
            count = len(self.sources[which].input_ids)
            self._orders[key] = torch.randperm(count, generator=generator)
        return self._orders[key]


def load_recovery_data(
    references: Sequence[str],
    validation: Sequence[str],
    tokenizer: Any,
    settings: RecoverySettings,
    *,
    dense: LoadedModel | None = None,
    respelling: Respelling | None = None,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    progress: Progress = no_progress,
) -> tuple[list[Sequences], list[Sequences]]:
    """Read, label and pack training and validation data.

    Distillation learns all of a chat: the teacher's distribution is as good a target in the user's turn. Other losses
    learn the answers.

    Args:
        references: `self`, or text references as in `cfsp.text.tokens`; they are mixed in equal shares.
        validation: The same; without any a share of the training data is held out.
        tokenizer: Of the model that is trained.
        dense: The dense model, if a reference is `self`, or if the model has fewer tokens.
        respelling: How the model spells the dense model's tokens, if it has fewer.
        writers: What may have the dense model write; the first that can does.

    Raises:
        InputError: No reference, no usable rows, chats without an answer, a model that writes loops, or too little
            data.
    """
    if not references:
        raise InputError("no training data given", allowed="self, or one or more text references")
    seqlen, whole_chats = settings.seqlen, settings.loss == DISTILL
    if respelling is not None and dense is not None:
        tokenizer = dense.tokenizer

    def read(reference: str, wanted: int, seed: int, most: int | None = None) -> Sequences:
        """About `wanted` sequences, never more than `most`."""
        if reference == SELF:
            return _own_text(dense, tokenizer, wanted, seed, settings, writers, progress)
        chats: list[Labelled] = []
        stream: list[int] = []
        documents, used = load_documents(reference), 0
        for done, document in enumerate(shuffled(documents, seed), 1):
            if used + len(stream) >= wanted * seqlen:
                break
            if document.messages is None:
                if stream and tokenizer.eos_token_id is not None:
                    stream.append(tokenizer.eos_token_id)
                stream += document_ids(document, tokenizer)
            else:
                ids, learnt = labelled_chat(document.messages, tokenizer)
                if any(learnt[1:]):
                    chats.append((ids, (True,) * len(ids) if whole_chats else learnt))
                    used += min(len(ids), seqlen)
            progress(f"reading {reference}", done, len(documents))
        progress(f"reading {reference}", len(documents), len(documents))
        if not chats and not stream and any(document.messages for document in documents):
            raise InputError(
                f"no chat in {reference} has an answer to learn from",
                field="messages",
                allowed='chats with a non-empty message of role "assistant"',
            )
        packed, flags = _pack_chats(chats, seqlen, tokenizer)
        count = len(stream) // seqlen
        text = torch.tensor(stream[: count * seqlen], dtype=torch.int64).view(count, seqlen)
        rows = torch.cat([packed, started(text, tokenizer)])
        targets = _targets(rows, torch.cat([flags, torch.ones_like(text, dtype=torch.bool)]))
        useful = (targets != IGNORED).any(dim=1)
        rows, targets = rows[useful], targets[useful]
        if not len(rows):
            raise InputError(
                f"{reference} gives no training sequence: {len(stream)} tokens of text and {len(chats)} chats "
                f"for sequences of {seqlen}",
                allowed="more text, chats with answers, or a smaller seqlen",
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]
        return _sequences(rows[order], targets[order], reference)

    share = math.ceil(settings.validation_windows / len(validation or references))
    wanted = math.ceil(settings.max_tokens / seqlen / len(references)) + share
    loaded = [read(reference, wanted, settings.seed) for reference in references]
    if validation:
        held = [read(reference, share, settings.seed + _VALIDATION_SEED, share) for reference in validation]
    else:
        whole, loaded, held = loaded, [], []
        for part in whole:  # the last sequences are held out
            count = len(part.input_ids)
            if count < 2:
                raise InputError(
                    f"{part.source} fills one sequence only, which cannot be both trained on and validated with",
                    allowed="more data, a smaller seqlen, or validation data of its own",
                )
            first = count - max(1, min(share, int(count * HELD_OUT_SHARE)))
            ids, targets = part.input_ids, part.targets
            loaded.append(_sequences(ids[:first], targets[:first], part.source, n_loops=part.n_loops))
            held.append(_sequences(ids[first:], targets[first:], part.source))
    if respelling:
        loaded, held = ([respelled(part, respelling) for part in parts] for parts in (loaded, held))
    return loaded, held


def _own_text(
    dense: LoadedModel | None,
    tokenizer: Any,
    wanted: int,
    seed: int,
    settings: RecoverySettings,
    writers: Sequence[Writer],
    progress: Progress,
) -> Sequences:
    """Text that the dense model writes, without what it wrote in loops."""
    if dense is None:
        raise InputError(f"`{SELF}` needs the model that the text is sampled from", field="teacher")
    seqlen = settings.seqlen
    count = min(max(2, settings.self_tokens // seqlen), max(2, wanted))
    ids = sample_windows(dense, nsamples=count, seqlen=seqlen, seed=seed, writers=writers, progress=progress)
    windows, n_texts, n_loops = without_loops(ids, dense)
    if n_loops > MOST_LOOPS * n_texts or len(windows) < 2:
        raise InputError(
            f"{n_loops} of {n_texts} texts that {dense.source.name} wrote are loops, which is too "
            "many to learn from it",
            field="data",
            value=SELF,
            allowed="text that was written by others",
        )
    ids = started(windows, tokenizer)
    return _sequences(ids, _targets(ids, torch.ones_like(ids, dtype=torch.bool)), SELF, n_loops=n_loops)


def check_readable(references: Iterable[str]) -> None:
    """Read the files of text references, each once; not what models write or what is to be downloaded.

    Raises InputError: one cannot be read, or has nothing usable in it; MissingExtraError: parquet without the `data`
    extra.
    """
    for reference in dict.fromkeys(references):
        if reference != SELF and not reference.startswith("hub:"):
            load_documents(reference)


def labelled_chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> Labelled:
    """Tokens of a chat in the model's template; learnt are those of the answers, the end of the turn included.

    An answer begins where the messages before it end when they are rendered with the generation prompt, which is what
    the model sees when it has to answer. Raises InputError: no chat template, or one that refuses the chat or cannot
    be split at an answer.
    """
    text = render_chat(tokenizer, messages)
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    # Such as <|im_end|>, or nothing.
    end_of_turn = render_chat(tokenizer, probe).rpartition(_SENTINEL)[2].strip()
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        answer = message["content"].strip()
        if message["role"] != "assistant" or not answer:
            continue
        before = render_chat(tokenizer, messages[:index], add_generation_prompt=True) if index else ""
        start = len(before)
        answer_start = text.find(answer, start) if text.startswith(before) else -1
        if answer_start < 0:
            raise InputError(
                "the model's chat template cannot be split at an answer: "
                "it renders a chat's beginning differently when more follows, or changes the answer",
                field="messages",
                value=answer[:60],
            )
        end = answer_start + len(answer)
        if text[end:].lstrip().startswith(end_of_turn):
            end = text.index(end_of_turn, end) + len(end_of_turn)
        spans.append((start, end))
    tokens = encode_in_place(tokenizer, text)
    learnt = [any(start <= first < end and last > first for start, end in spans) for _, first, last in tokens]
    return [token for token, *_ in tokens], learnt


def _pack_chats(chats: Sequence[Labelled], seqlen: int, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole chats in as few sequences as best-fit decreasing finds; the rest of a sequence is padding.

    A chat that is longer than a sequence loses its end. An answer never stands without its question.
    """
    bins: list[list[Labelled]] = []
    room: list[tuple[int, int]] = []  # (free positions, index of the bin), ascending
    for chat in sorted(chats, key=lambda chat: -len(chat[0])):
        size = min(len(chat[0]), seqlen)
        place = bisect.bisect_left(room, (size, -1))
        free, index = room.pop(place) if place < len(room) else (seqlen, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(chat)
        bisect.insort(room, (free - size, index))
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ids = torch.full((len(bins), seqlen), pad, dtype=torch.int64)
    learnt = torch.zeros((len(bins), seqlen), dtype=torch.bool)
    for row, members in enumerate(bins):
        tokens = [token for chat, _ in members for token in chat][:seqlen]
        # The first token of a chat is never predicted: what stands before it has nothing to do with it.
        flags = [flag and place > 0 for _, of in members for place, flag in enumerate(of)][:seqlen]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        learnt[row, : len(flags)] = torch.tensor(flags)
    return ids, learnt


def _targets(ids: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:].masked_fill(~learnt[:, 1:], IGNORED)
    return targets


def _sequences(ids: torch.Tensor, targets: torch.Tensor, source: str, *, n_loops: int = 0) -> Sequences:
    return Sequences(ids, targets, source, tokens_sha256(torch.stack([ids, targets])), n_loops=n_loops)


def respelled(sequences: Sequences, respelling: Respelling) -> Sequences:
    """The same text in the model's tokens, the teacher's beside it; what is too long for a sequence loses its end.

    Raises InputError: nothing that is to be learnt is left.
    """
    size = sequences.input_ids.shape[1]
    ids, learnt, places = [], [], []
    for window, is_learnt in zip(
        sequences.input_ids, sequences.targets.roll(1, dims=1) != IGNORED, strict=True
    ):
        text = respelling.spell(window.tolist())
        ids.append(text.ids[:size])
        learnt.append(is_learnt[text.owners[:size]])
        places.append(text.owners.where(text.ends, INSIDE)[:size])
    targets = _targets(torch.stack(ids), torch.stack(learnt))
    useful = (targets != IGNORED).any(dim=1)
    if not useful.any():
        raise InputError(
            f"in sequences of {size} tokens of this vocabulary no answer of {sequences.source} has room",
            field="seqlen",
            value=size,
            allowed="longer ones",
        )
    spelled = _sequences(
        torch.stack(ids)[useful], targets[useful], sequences.source, n_loops=sequences.n_loops
    )
    return replace(
        spelled, teacher_ids=sequences.input_ids[useful], teacher_places=torch.stack(places)[useful]
    )

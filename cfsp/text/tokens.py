"""Text that is calibrated on or measured with: references, documents, chats in the model's template, token ids.

A reference is one of
    FILE.txt                      one document, taken as it stands
    FILE.jsonl, FILE.parquet      one document a row: a column `text`, or a chat in `messages`
    hub:NAME[@CONFIG][:SPLIT]     a Hugging Face data set with such columns (split `train` unless given)
    builtin:python-docs           the language reference that every CPython carries: English prose, no download

A chat template is a program from the model's folder. transformers runs it in Jinja's sandbox; its time and memory are
bounded here.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cfsp.errors import InputError, require_extra
from cfsp.reading import MAX_TEXT_BYTES, as_input_error, one_line, read_json_lines, read_text
from cfsp.text.settings import BUILTIN_TEXT

WHOLE = 2**19  # characters up to which a text is tokenized in one go; a token then takes some 250 bytes
_PIECE = 2**17
_OVERLAP = 2**12
_AGREEING = 32
_CHARACTERS = 8  # of a text, for each token that is wanted; a token of English takes some four

Token = tuple[int, int, int]
"""Id, and where in the text it begins and ends."""


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text; raises InputError if the tokenizer has no token for a part of it."""
    with as_input_error("the model's tokenizer cannot take the text"):
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])


def decode(tokenizer: Any, ids: torch.Tensor | Sequence[int]) -> str:
    """The text of token ids (n,), special tokens included, and nothing of it tidied."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def start_token(tokenizer: Any) -> int | None:
    """The start token that a tokenizer puts before any text; None if it puts none."""
    plain, whole = (encode(tokenizer, "a", add_special_tokens=added) for added in (False, True))
    return tokenizer.bos_token_id if whole[:1] == [tokenizer.bos_token_id] and whole != plain else None


def encode_long(tokenizer: Any, text: str, limit: int | None = None) -> array[int]:
    """Token ids of a text of any length, without special tokens; raises as `encode`.

    Pieces overlap, and the next continues at tokens that both have at the same places. A text without such tokens (one
    endless word) is cut.
    """
    size = _PIECE if limit is None else min(_PIECE, _CHARACTERS * limit + 2 * _OVERLAP)
    if len(text) <= (WHOLE if limit is None else size):
        return array("i", encode(tokenizer, text))
    ids = array("i")
    before: list[Token] = []
    for start in range(0, len(text) - _OVERLAP, size - _OVERLAP):
        # The last tokens before a cut may be others than the text's.
        if limit is not None and len(ids) + len(before) >= limit + _AGREEING:
            break
        piece = encode_in_place(tokenizer, text[start : start + size], start)
        end, begin = _seam(before, piece, start) if before else (0, 0)
        ids.extend(token for token, *_ in before[:end])
        before = piece[begin:]
    ids.extend(token for token, *_ in before)
    return ids


def encode_in_place(tokenizer: Any, text: str, start: int = 0) -> list[Token]:
    """Tokens of a text with their places in it, or in the one that it begins at `start` of; raises as `encode`."""
    with as_input_error("the model's tokenizer cannot take the text"):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(token, start + first, start + last) for token, (first, last) in pairs]


def _seam(before: Sequence[Token], after: Sequence[Token], start: int) -> tuple[int, int]:
    """Where to leave the one piece and to enter the next, which begins at `start` in the text."""
    first = bisect_left(before, start, key=lambda token: token[1])
    shared = before[first:]
    known = {tuple(after[i : i + _AGREEING]): i for i in range(min(len(after), 2 * len(shared)))}
    middle = len(shared) // 2
    for place in (*range(middle, len(shared)), *range(middle)):
        run = tuple(shared[place : place + _AGREEING])
        if len(run) == _AGREEING and run in known:
            return first + place + _AGREEING // 2, known[run] + _AGREEING // 2
    end = before[-1][2]
    return len(before), bisect_left(after, end, key=lambda token: token[1])


_MOST_SECONDS = 5.0  # of processor time for one chat; templates take fractions of a millisecond
_MOST_CHARACTERS = 2**28
_MOST_BYTES = 2**30  # of memory while a chat is rendered, beyond what the process has
_SIZES = Path("/proc/self/statm")


def render_chat(
    tokenizer: Any, messages: Iterable[Mapping[str, Any]], *, what: str = "a chat", **options: Any
) -> str:
    """A chat's text in the model's own template; `options` are the template's, such as add_generation_prompt.

    Raises InputError if there is none, it refuses the chat, or does not come to an end.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{what} cannot be rendered: the model has no chat template; use plain text")
    try:
        with _bounded():
            text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options)
    except MemoryError as error:
        raise InputError(
            f"the model's chat template takes more than {_MOST_BYTES >> 30} GiB of memory for {what}"
        ) from error
    except Exception as error:  # templates raise whatever Jinja or they themselves define
        raise InputError(f"the model's chat template refuses {what}: {one_line(error)}") from error
    if len(text) > _MOST_CHARACTERS:
        raise InputError(f"the model's chat template makes {len(text)} characters of {what}")
    return str(text)


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """A user's turn, up to where the model has to answer; raises as `render_chat`."""
    return render_chat(
        tokenizer, [{"role": "user", "content": prompt}], what="a prompt", add_generation_prompt=True
    )


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise TimeoutError or MemoryError inside beyond `_MOST_SECONDS` and `_MOST_BYTES`, in POSIX's main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> None:
        raise TimeoutError(f"it does not come to an end within {_MOST_SECONDS:g} s")

    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, give_up))
        # Again and again: Jinja goes on after what is raised while it folds constants.
        signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS, 0.5)
        stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        if _SIZES.is_file():
            import resource

            pages = int(_SIZES.read_text(encoding="ascii").split()[0])
            most = pages * resource.getpagesize() + _MOST_BYTES
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            tighter = most if soft == resource.RLIM_INFINITY else min(most, soft)
            resource.setrlimit(resource.RLIMIT_AS, (tighter, hard))
        yield


class Document(NamedTuple):
    """One piece of text, or one chat as a sequence of {"role", "content"} messages."""

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None


class TokenWindows(NamedTuple):
    """Windows (n_windows, seqlen) int64 of a text, its reference, and the hash of the token ids."""

    ids: torch.Tensor
    source: str
    sha256: str


def load_documents(reference: str) -> list[Document]:
    """Read every document behind a reference; empty rows are left out.

    Raises InputError: unknown or unreadable reference, or nothing usable in it; MissingExtraError: parquet or hub
    without the `data` extra.
    """
    path = Path(reference)
    if reference == BUILTIN_TEXT:
        from pydoc_data.topics import topics

        documents = [Document(text="\n\n".join(topics[key] for key in sorted(topics)))]
    elif reference.startswith("hub:") and reference != "hub:":
        documents = _read_hub(reference.removeprefix("hub:"))
    elif path.suffix not in _SUFFIXES:
        raise InputError(
            "unknown built-in text" if reference.startswith("builtin:") else "unknown kind of text",
            field="text",
            value=reference,
            allowed=f"a file ending in {', '.join(_SUFFIXES)}, hub:NAME, or {BUILTIN_TEXT}",
        )
    elif not path.is_file():
        raise InputError(f"text file {path} does not exist")
    elif path.suffix == ".parquet":
        documents = _read_parquet(path)
    elif path.suffix == ".jsonl":
        rows = read_json_lines(path, MAX_TEXT_BYTES)
        documents = [_document_from_row(row, where) for where, row in rows]
    else:
        documents = [Document(text=read_text(path, MAX_TEXT_BYTES))]
    kept = [d for d in documents if d.messages or (d.text and d.text.strip())]
    if not kept:
        raise InputError(f"{reference} has no usable text (no non-empty `text` or `messages`)")
    return kept


def document_ids(document: Document, tokenizer: Any, limit: int | None = None) -> array[int]:
    """Token ids of a document, a chat in the model's template, without special tokens; raises as `render_chat`."""
    chat = document.messages
    text = document.text or "" if chat is None else render_chat(tokenizer, chat)
    return encode_long(tokenizer, text, limit)


def join_documents(
    documents: Iterable[Document], tokenizer: Any, *, limit: int | None = None
) -> torch.Tensor:
    """One token stream of many documents, int32; plain texts are separated by the end-of-sequence token."""
    stream = array("i")
    for index, document in enumerate(documents):
        if limit is not None and len(stream) >= limit:
            break
        if index and document.messages is None and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += document_ids(document, tokenizer, limit)
    # Four bytes a token, and no copy: an endless line of one sign has a token a byte.
    return torch.from_numpy(
        np.frombuffer(stream, dtype=np.int32)[:limit] if stream else np.empty(0, np.int32)
    )


def token_windows(
    reference: str, tokenizer: Any, *, seqlen: int, max_windows: int | None = None, skip_windows: int = 0
) -> TokenWindows:
    """Windows for measuring: the stream cut in order, without the incomplete last window; see `started`."""
    stop = None if max_windows is None else skip_windows + max_windows
    documents = load_documents(reference)
    stream = join_documents(documents, tokenizer, limit=None if stop is None else stop * seqlen)
    count = len(stream) // seqlen
    if count <= skip_windows:
        raise InputError(
            f"{reference} has {len(stream)} tokens, too few for window {skip_windows + 1} of {seqlen}"
        )
    ids = started(stream[: count * seqlen].view(count, seqlen)[skip_windows:stop].long(), tokenizer)
    return TokenWindows(ids, reference, tokens_sha256(ids))


def started(windows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Windows with the start token in place of the first, if the tokenizer puts one before texts.

    Gemma 3 270M has 1.15 bits per byte on chats without it, 0.82 with it.
    """
    ids, start = windows.clone(), start_token(tokenizer)
    if start is not None:
        ids[:, 0] = start
    return ids


def tokens_sha256(ids: torch.Tensor) -> str:
    """Hex SHA-256 of token ids as little-endian int64, preceded by their shape."""
    data = ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(str(tuple(ids.shape)).encode() + data).hexdigest()


def _document_from_row(row: Mapping[str, Any], where: str) -> Document:
    def content(value: Any) -> str:
        """What a message says: a text, a list of texts as parts, or nothing beside a tool call."""
        if value is None or isinstance(value, str):
            return value or ""
        parts = [part["text"] for part in value if part["type"] == "text"]
        if len(parts) != len(value):
            raise TypeError("a part that is no text")
        return "".join(parts)

    messages = row.get("messages")
    if messages is not None:
        try:
            chat = tuple({"role": str(m["role"]), "content": content(m["content"])} for m in messages)
        except (TypeError, KeyError) as error:
            raise InputError(f"{where}: `messages` must list objects with role and content (text)") from error
        return Document(messages=chat)
    if "text" not in row:
        raise InputError(f"{where}: no `text` and no `messages`", allowed="one of the two in every row")
    if not isinstance(row["text"] or "", str):
        raise InputError(f"{where}: `text` is no text", value=row["text"])
    return Document(text=row["text"])


_SUFFIXES = (".txt", ".raw", ".jsonl", ".parquet")
_COLUMNS = ("text", "messages")
_ROWS_AT_ONCE = 64
"""A column may hold the same long text in a million rows, compressed to nothing."""


def _read_parquet(path: Path) -> list[Document]:
    require_extra("pyarrow", "data")
    import pyarrow.parquet

    rows, n_bytes = [], 0
    with as_input_error(f"{path} cannot be read as parquet"), pyarrow.parquet.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            n_bytes += batch.nbytes
            if n_bytes > MAX_TEXT_BYTES:
                raise InputError(
                    f"{path} is too large", allowed=f"up to {MAX_TEXT_BYTES // 2**20} MiB of rows"
                )
            rows += batch.to_pylist()
    return [_document_from_row(row, f"{path}, row {n}") for n, row in enumerate(rows)]


def _read_hub(name: str) -> list[Document]:
    require_extra("datasets", "data")
    import datasets

    name, _, split = name.partition(":")
    name, _, config = name.partition("@")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub client's errors have no common base
        raise InputError(f"data set {name} cannot be loaded from the hub: {one_line(error)}") from error
    rows = rows.select_columns([column for column in rows.column_names if column in _COLUMNS])
    if rows.data.nbytes > MAX_TEXT_BYTES:
        raise InputError(
            f"data set {name} is too large",
            allowed=f"up to {MAX_TEXT_BYTES // 2**20} MiB of rows; a part: hub:{name}:{split or 'train'}[:1%]",
        )
    return [_document_from_row(row, f"hub:{name}, row {n}") for n, row in enumerate(rows)]


def shuffled(documents: Sequence[Document], seed: int) -> Iterator[Document]:
    """The documents in an order that depends only on the seed."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return (documents[int(i)] for i in order)

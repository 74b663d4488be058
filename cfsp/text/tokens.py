"""Text that is calibrated on or measured with: references, documents, and windows of token ids.

A reference is one of
    FILE.txt                      one document, taken as it stands
    FILE.jsonl, FILE.parquet      one document a row: a column `text`, or a chat in `messages`
    hub:NAME[@CONFIG][:SPLIT]     a Hugging Face data set with such columns (split `train` unless given)
    builtin:python-docs           the language reference that every CPython carries: English prose, no download
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from cfsp.errors import InputError, require_extra
from cfsp.reading import MAX_TEXT_BYTES, as_input_error, one_line, read_json_lines, read_text
from cfsp.text.encoding import encode_long, start_token
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.templates import render_chat


@dataclass(frozen=True)
class Document:
    """One piece of text, or one chat as a sequence of {"role", "content"} messages."""

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclass(frozen=True)
class TokenWindows:
    """Consecutive, non-overlapping windows of a token stream.

    Attributes:
        ids: (n_windows, seqlen) int64.
        source: The reference the text came from.
        sha256: Hash of the token ids, so that equal hashes mean equal windows.
    """

    ids: torch.Tensor
    source: str
    sha256: str


def load_documents(reference: str) -> list[Document]:
    """Read every document behind a reference; empty rows are left out.

    Raises:
        InputError: Unknown or unreadable reference, or nothing usable in it.
        MissingExtraError: parquet or hub without the `data` extra.
    """
    prefix, _, rest = reference.partition(":")
    if prefix in _SCHEMES and rest:
        documents = _SCHEMES[prefix](rest)
    else:
        path = Path(reference)
        if path.suffix not in _READERS:
            raise InputError(
                "cannot tell what kind of text this is",
                field="text",
                value=reference,
                allowed=f"a file ending in {', '.join(_READERS)}, hub:NAME, or {BUILTIN_TEXT}",
            )
        if not path.is_file():
            raise InputError(f"text file {path} does not exist")
        documents = _READERS[path.suffix](path)
    kept = [d for d in documents if d.messages or (d.text and d.text.strip())]
    if not kept:
        raise InputError(f"{reference} has no usable text (no non-empty `text` or `messages`)")
    return kept


def most_tokens(reference: str) -> int | None:
    """Tokens that a text has at most, by its size: tokenizers make no more than one of a byte.

    None where only reading it tells, as chats, rows and data sets, and what cannot be read.
    """
    if reference == BUILTIN_TEXT:
        return sum(len((document.text or "").encode()) for document in load_documents(reference))
    path = Path(reference)
    return path.stat().st_size if _READERS.get(path.suffix) is _read_text and path.is_file() else None


def document_ids(document: Document, tokenizer: Any, limit: int | None = None) -> array[int]:
    """Token ids of a document, without special tokens; a chat is rendered in the model's own template.

    Raises:
        InputError: A chat, but the tokenizer has no chat template, or the template refuses the chat; or as `encode`.
    """
    chat = document.messages
    text = document.text or "" if chat is None else render_chat(tokenizer, chat)
    return encode_long(tokenizer, text, limit)


def join_documents(
    documents: Iterable[Document], tokenizer: Any, *, limit: int | None = None
) -> torch.Tensor:
    """One token stream of many documents; plain texts are separated by the end-of-sequence token.

    Args:
        documents: In the order they are to be read.
        tokenizer: A transformers tokenizer.
        limit: Stop once this many tokens are there.
    """
    stream: array[int] = array("q")
    for index, document in enumerate(documents):
        if limit is not None and len(stream) >= limit:
            break
        if index and document.messages is None and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += document_ids(document, tokenizer, limit)
    return torch.from_numpy(np.array(stream[:limit], dtype=np.int64))


def token_windows(
    reference: str, tokenizer: Any, *, seqlen: int, max_windows: int | None = None, skip_windows: int = 0
) -> TokenWindows:
    """Windows for measuring: the stream cut in order, the incomplete last window dropped; see `started`.

    Raises:
        InputError: Fewer tokens than one window.
    """
    stop = None if max_windows is None else skip_windows + max_windows
    documents = load_documents(reference)
    stream = join_documents(documents, tokenizer, limit=None if stop is None else stop * seqlen)
    count = len(stream) // seqlen
    if count <= skip_windows:
        raise InputError(
            f"{reference} has {len(stream)} tokens, too few for window {skip_windows + 1} of {seqlen}"
        )
    ids = started(stream[: count * seqlen].view(count, seqlen)[skip_windows:stop], tokenizer)
    return TokenWindows(ids, reference, tokens_sha256(ids))


def started(windows: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Windows of a text as the model reads any text: with the start token first, if its tokenizer puts one there.

    It takes the place of the first token, which nothing predicts. Some models read nothing without it: Gemma 3 270M has
    1.15 bits per byte on chats then, and 0.82 with it.

    Args:
        windows: (n_windows, seqlen) int64; unchanged.
        tokenizer: A transformers tokenizer.
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
    messages = row.get("messages")
    if messages is not None:
        try:
            chat = tuple({"role": str(m["role"]), "content": _content(m["content"])} for m in messages)
        except (TypeError, KeyError) as error:
            raise InputError(f"{where}: `messages` must list objects with role and content (text)") from error
        return Document(messages=chat)
    if "text" not in row:
        raise InputError(f"{where}: no `text` and no `messages`", allowed="one of the two in every row")
    if not isinstance(row["text"] or "", str):
        raise InputError(f"{where}: `text` is no text", value=row["text"])
    return Document(text=row["text"])


def _content(value: Any) -> str:
    """What a message says: a text, a list of texts as parts, or nothing beside a tool call."""
    if value is None or isinstance(value, str):
        return value or ""
    parts = [part["text"] for part in value if part["type"] == "text"]
    if len(parts) != len(value):
        raise TypeError("a part that is no text")
    return "".join(parts)


def _read_text(path: Path) -> list[Document]:
    return [Document(text=read_text(path, MAX_TEXT_BYTES))]


def _read_jsonl(path: Path) -> list[Document]:
    return [_document_from_row(row, where) for where, row in read_json_lines(path, MAX_TEXT_BYTES)]


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


def _read_builtin(name: str) -> list[Document]:
    if name != BUILTIN_TEXT.partition(":")[2]:
        raise InputError("unknown built-in text", field="text", value=f"builtin:{name}", allowed=BUILTIN_TEXT)
    from pydoc_data.topics import topics

    return [Document(text="\n\n".join(topics[key] for key in sorted(topics)))]


_SCHEMES: Mapping[str, Callable[[str], Sequence[Document]]] = MappingProxyType(
    {"hub": _read_hub, "builtin": _read_builtin}
)
_READERS: Mapping[str, Callable[[Path], Sequence[Document]]] = MappingProxyType(
    {".txt": _read_text, ".raw": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
)


def shuffled(documents: Sequence[Document], seed: int) -> Iterator[Document]:
    """The documents in an order that depends on the seed alone."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return (documents[int(i)] for i in order)

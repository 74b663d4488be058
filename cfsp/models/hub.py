"""Models on the Hugging Face hub."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from cfsp.errors import InputError
from cfsp.models.config_file import read_model_config
from cfsp.models.folder_format import NOTICE_PATTERNS
from cfsp.models.weights import INDEX_FILE, SINGLE_FILE, quiet_transformers, shard_names
from cfsp.progress import Progress, no_progress
from cfsp.reading import one_line

_REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_TOKENIZER_PATTERNS = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template*")
_MODEL_PATTERNS = (INDEX_FILE, "generation_config.json")
_NOTICE_PATTERNS = ("README.md", *NOTICE_PATTERNS)


def hub_reference(text: str) -> tuple[str, str | None] | None:
    """(OWNER/NAME, revision) of a hub reference; None where `text` cannot be one."""
    match = _REFERENCE.fullmatch(text)
    return (match["name"], match["revision"]) if match else None


def fetch_hub_model(
    name: str,
    revision: str | None,
    *,
    tokenizer_only: bool = False,
    code: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Folder of a hub model in the hub client's cache; config.json is fetched and judged before the weights.

    Args:
        name: OWNER/NAME.
        revision: Branch, tag or commit; the default branch for None.
        tokenizer_only: Fetch no weights.
        code: Fetch the model's own Python files too, which nothing runs unless they are trusted.
        progress: Told when the download begins and ends.

    Raises:
        InputError: No such model, no access to it, no network, or an architecture that is not in the table.
    """
    import huggingface_hub

    progress(f"fetching {name}", 0, 1)
    patterns = [*_TOKENIZER_PATTERNS, *(() if tokenizer_only else (*_MODEL_PATTERNS, *_NOTICE_PATTERNS))]
    patterns += ["*.py"] if code else []
    try:
        with quiet_transformers():
            config = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
            read_model_config(Path(config).parent)
            commit = Path(config).parent.name
            fetch = partial(huggingface_hub.snapshot_download, name, revision=commit, ignore_patterns=["*/*"])
            folder = Path(fetch(allow_patterns=["config.json", *patterns]))
            if not tokenizer_only:
                # Weights lie in other forms beside these, as large again.
                index = folder / INDEX_FILE
                fetch(allow_patterns=[SINGLE_FILE, *(shard_names(index) if index.is_file() else ())])
    except InputError:
        raise
    except Exception as error:  # the client's errors, and those of what it sends requests with, share no base
        raise InputError(
            f"{name} is no local path and cannot be fetched from the hub: {one_line(error, 160)}",
            allowed="a folder, a .gguf file, or a hub model that can be reached",
        ) from error
    progress(f"fetching {name}", 1, 1)
    return folder

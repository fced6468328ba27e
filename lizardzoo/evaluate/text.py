"""Text for evaluation, cut into sequences of one length."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lizardzoo.errors import LizardzooError


def sequences(
    text_or_path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int = 2048,
    limit: int | None = None,
) -> Tensor:
    """Non-overlapping sequences [N, length] (int64) from a text's start; an incomplete last one is left out.

    Where the tokenizer itself puts a beginning-of-text token in front (Llama 3, Mistral), every sequence
    begins with one, in its length: models trained so are not themselves without it.

    Args:
        text_or_path: a file (UTF-8, plain or .gz), or the text itself.
        tokenizer: the teacher's.
        length: tokens per sequence.
        limit: take at most so many sequences.

    Raises:
        LizardzooError: a file that is missing or not UTF-8, a text shorter than one sequence.
    """
    _at_least("length", length, 2)
    if limit is not None:
        _at_least("limit", limit, 1)
    text, source = read_text_or_path(text_or_path)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = begin_of_text(tokenizer)
    body = length - len(prefix)
    count = len(ids) // body
    if count == 0:
        raise LizardzooError(
            f"{source} has {len(ids)} tokens, fewer than one sequence of {length}; "
            f"give a longer text or a smaller length"
        )
    count = count if limit is None else min(count, limit)
    rows = torch.tensor(ids[: count * body], dtype=torch.long).view(count, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(count, -1), rows], 1)


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise LizardzooError(f"{name} must be a whole number of at least {least}, got {value!r}")


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] where the tokenizer begins every text with it, else nothing."""
    own = tokenizer("")["input_ids"]
    return own[:1] if own and own[0] == tokenizer.bos_token_id else []


def read_text_or_path(text_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """The text, and what to call it in an error."""
    if isinstance(text_or_path, str) and not _names_a_file(text_or_path):
        start = text_or_path[:40] + ("..." if len(text_or_path) > 40 else "")
        return text_or_path, f"the text {start!r} (no file has that name)"
    return read_text(text_or_path), f"the text in {os.fspath(text_or_path)}"


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a file, UTF-8, plain or .gz.

    Raises:
        LizardzooError: the file is missing, not UTF-8, or not a whole gzip file.
    """
    path = Path(path)
    if not path.is_file():
        raise LizardzooError(f"there is no text file {str(path)!r}; give the path of a .txt or .txt.gz file")
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LizardzooError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LizardzooError(f"{path} is not a whole gzip file ({error}); pack it again") from error


def _names_a_file(text: str) -> bool:
    return os.path.isfile(text)  # False for what can be no name at all; Path.is_file would raise

"""Text in, packed sequences out: `load_data` reads files, strings or a dataset and cuts them for training.

Documents are shuffled, joined with the tokenizer's EOS and cut into full sequences, which are shuffled again;
the tokens left over at the end are dropped. The same arguments always give the same sequences.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lizardzoo.errors import LizardzooError
from lizardzoo.hub.weights import file_hash

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Tokens = NDArray[np.int32]

Source: TypeAlias = "str | Path | Sequence[str | Path] | Dataset"

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[^\s/]+))?")

# The prompt that Alpaca's models were trained with (tatsu-lab/stanford_alpaca, README).
ALPACA = (
    "Below is an instruction that describes a task{and_input}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
)
COLUMNS = '"text", or "instruction" and "output" (and "input")'


def load_data(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    isolate_documents: bool = False,
    mixing: str = "concatenate",
    seed: int = 0,
) -> Dataset:
    """Packed sequences from text.

    Args:
        source: a file or a list of files (.txt: one document; .jsonl: one a line; both also .gz), a list of
            texts, a `datasets.Dataset`, or the name of one, "org/name" or "org/name:split". Rows have a
            "text", or "instruction", "output" and perhaps "input", which become Alpaca's prompt. A dataset
            that has "input_ids" (what `load_data` returns) is taken as it is.
        tokenizer: must have an EOS token; where it begins texts with BOS, every document begins with it.
        sequence_length: tokens per row.
        isolate_documents: also return `position_ids`, which restart where a document begins.
        mixing: of several files, "concatenate" takes everything, "equal" as many sequences of each.
        seed: of the shuffling.

    Returns:
        a `datasets.Dataset`; each row has `input_ids` [sequence_length] (int32), and `position_ids` if asked.

    Raises:
        LizardzooError: a source that is missing, unreadable, has other columns or is shorter than one
            sequence; a tokenizer without EOS.
    """
    datasets = _datasets()
    if isinstance(source, datasets.Dataset) and "input_ids" in source.column_names:
        return _checked(source, sequence_length, isolate_documents)
    if tokenizer.eos_token_id is None:
        raise LizardzooError(
            f"{type(tokenizer).__name__} has no EOS token, which separates packed documents; set tokenizer.eos_token"
        )
    named = {name: list(documents) for name, documents in _open(source)}
    if mixing == "concatenate":
        named = {", ".join(named): [document for documents in named.values() for document in documents]}
    rng = np.random.default_rng(seed)
    parts = [_pack(*entry, tokenizer, sequence_length, rng) for entry in named.items()]
    count = min(len(tokens) for tokens, _ in parts) if mixing == "equal" else None
    tokens, starts = (np.concatenate([part[i][:count] for part in parts]) for i in (0, 1))
    order = rng.permutation(len(tokens))
    columns = {"input_ids": tokens[order]}
    if isolate_documents:
        columns["position_ids"] = _positions(starts[order])
    return datasets.Dataset.from_dict({name: list(rows) for name, rows in columns.items()})


def names_of(source: Source) -> dict[str, str | None]:
    """{name: sha256} of a source's files, {name: None} of a data set on the Hub; {} of what was given in Python."""
    entries = [source] if isinstance(source, (str, Path)) else source if isinstance(source, (list, tuple)) else []
    files = [
        Path(entry) for entry in entries if isinstance(entry, Path) or (isinstance(entry, str) and _is_file(entry))
    ]
    if isinstance(source, str) and not files:
        return {source: None} if HUB_NAME.fullmatch(source) else {}
    files = list(dict.fromkeys(files))
    last = [file.name for file in files]
    return {file.name if last.count(file.name) == 1 else "/".join(file.parts[-2:]): file_hash(file) for file in files}


def fingerprint(dataset: Dataset) -> str:
    """A hash of every token and position, the same in every process."""
    digest = hashlib.sha256()
    for column in ("input_ids", "position_ids"):
        if column in dataset.column_names:
            for rows in dataset.select_columns([column]).with_format("numpy").iter(batch_size=1024):
                digest.update(np.ascontiguousarray(rows[column], dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]


def _pack(
    name: str, documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, rng: np.random.Generator
) -> tuple[Tokens, NDArray[np.bool_]]:
    """Tokens [N, length] and where documents start in them."""
    pieces, starts = [], []
    for piece in _tokenize([documents[i] for i in rng.permutation(len(documents))], tokenizer):
        pieces.append(piece)
        starts.append(np.arange(len(piece)) == 0)
    total = sum(len(piece) for piece in pieces)
    rows = total // length
    if rows == 0:
        raise LizardzooError(
            f"{name}: {total} tokens of text are fewer than one sequence of {length}; "
            f"give more text or a smaller sequence_length"
        )
    shape = (rows, length)
    return (
        np.concatenate(pieces)[: rows * length].reshape(shape),
        np.concatenate(starts)[: rows * length].reshape(shape),
    )


def _tokenize(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """One array per document that is not blank, EOS included."""
    eos = tokenizer.eos_token_id
    first = [token for token in tokenizer("")["input_ids"] if token != eos]  # [BOS], where that is its habit
    documents = [document for document in documents if document.strip()]
    for i in range(0, len(documents), 1000):
        batch = tokenizer(documents[i : i + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        for tokens in batch:
            yield np.array([*first, *tokens, eos], dtype=np.int32)


def _positions(starts: NDArray[np.bool_]) -> Tokens:
    """Distance to the last start, a row's own beginning being one."""
    index = np.arange(starts.shape[1], dtype=np.int32)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def _open(source: Source) -> Iterator[tuple[str, Iterable[str]]]:
    """(name, documents) of every source."""
    if isinstance(source, _datasets().Dataset):
        yield "the dataset", _rows(source, "the dataset")
    elif isinstance(source, Path) or (isinstance(source, str) and _is_file(source)):
        yield str(source), _read(Path(source))
    elif isinstance(source, str) and (match := HUB_NAME.fullmatch(source)):
        yield source, _rows(_load_dataset(match["name"], match["split"] or "train"), source)
    elif isinstance(source, Sequence) and not isinstance(source, (str, bytes)) and len(source) > 0:
        files = [isinstance(entry, Path) or (isinstance(entry, str) and _is_file(entry)) for entry in source]
        if all(files):
            for entry in dict.fromkeys(source):
                yield str(entry), _read(Path(entry))
        elif not any(files) and all(isinstance(entry, str) for entry in source):
            yield "the list of texts", [str(entry) for entry in source]
        else:
            raise LizardzooError("a list of data holds files or texts, not both; write the texts to a .jsonl file")
    else:
        given = repr(source) if len(repr(source)) < 80 else f"{repr(source)[:76]}..."
        raise LizardzooError(
            f"data is a file ({', '.join(SUFFIXES)}), a list of files, a list of texts, a datasets.Dataset "
            f'or the name of one ("org/name:split"), got {given}'
        )


def _is_file(name: str) -> bool:
    return "\n" not in name and name.endswith(SUFFIXES)


def _read(path: Path) -> Iterator[str]:
    """The documents of one file."""
    if not path.name.endswith(SUFFIXES):
        raise LizardzooError(f"{path}: data files end in {', '.join(SUFFIXES)}; rename or convert it")
    if not path.is_file():
        raise LizardzooError(f"{path}: there is no such file; check the path")
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            if path.name.endswith(SUFFIXES[:2]):
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _document(json.loads(line), f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LizardzooError(
            f"{path}: cannot be read ({error}); it should be UTF-8 text, or JSON on each line"
        ) from error


def _rows(dataset: Dataset, name: str) -> Iterator[str]:
    for number, row in enumerate(dataset):
        yield _document(row, f"{name}, row {number}")


def _document(row: Any, where: str) -> str:
    """One text from a row's columns."""
    if not isinstance(row, Mapping):
        raise LizardzooError(f"{where}: expected columns {COLUMNS}, got {type(row).__name__}")
    keys = ["text"] if "text" in row else ["instruction", "output"]
    values = {key: row.get(key) for key in keys}
    if "text" not in row:
        values["input"] = row.get("input") or ""
    if not all(isinstance(value, str) for value in values.values()):
        raise LizardzooError(f"{where}: expected columns {COLUMNS} that hold strings, got {', '.join(map(str, row))}")
    if "text" in row:
        return str(values["text"])
    given = str(values["input"]).strip()
    return ALPACA.format(
        and_input=", paired with an input that provides further context" if given else "",
        instruction=values["instruction"],
        input=f"### Input:\n{given}\n\n" if given else "",
        output=values["output"],
    )


def _checked(dataset: Dataset, length: int, isolate_documents: bool) -> Dataset:
    """A packed dataset, if it is packed as asked for."""
    columns = ["input_ids", "position_ids"] if isolate_documents else ["input_ids"]
    lengths = sorted({len(row) for row in dataset["input_ids"]})
    if lengths != [length] or not set(columns) <= set(dataset.column_names):
        raise LizardzooError(
            f"the packed dataset has {', '.join(dataset.column_names)} and rows of {lengths} tokens, "
            f"the recipe wants {' and '.join(columns)} with {length}; "
            f"pack it with load_data(..., sequence_length={length}, "
            f"isolate_documents={isolate_documents})"
        )
    return dataset.select_columns(columns)


def _load_dataset(name: str, split: str) -> Dataset:
    datasets = _datasets()
    try:
        with _quiet(datasets):
            return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LizardzooError(
            f'cannot load the dataset "{name}", split "{split}" ({reason}); check the name, or give files'
        ) from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise LizardzooError("training needs the package datasets; pip install 'lizardzoo[train]'") from error
    return datasets

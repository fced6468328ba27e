"""What has to be true of a folder of hub_cards/, and a tiny base as `lizardzoo.smollm2` leaves one in its cache."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from lizardzoo import LizardzooError, smollm2
from lizardzoo.hub import check_card
from lizardzoo.hub.difference import DIFFERENCE, difference_of
from lizardzoo.hub.low_rank import read
from lizardzoo.hub.render import EVALUATION, RECIPE, render_card
from lizardzoo.hub.stub import STUB

HUB_CARDS = Path(__file__).parents[2] / "hub_cards"
NAME = "SmolLM2-135M-Instruct"
WEIGHTS = f"{DIFFERENCE}.safetensors"
NEEDED = {"README.md", "config.json", "generation_config.json", WEIGHTS, STUB, EVALUATION}
LARGEST = 16 * 2**20
"""Bytes of a file that a repository of source code may hold."""
OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|mnt|work|Users|opt|data)/")


def published() -> list[Path]:
    """The models of hub_cards/."""
    return sorted(path for path in HUB_CARDS.iterdir() if path.is_dir())


def problems(folder: Path) -> list[str]:
    """What is wrong with a published folder, [] when all is well: its card is what its JSON says, byte for byte."""
    files = {path.name: path for path in folder.iterdir()}
    found = [f"{name} is missing" for name in sorted(NEEDED - files.keys())]
    found += [f"{name} is no file of a published model" for name in sorted(files.keys() - NEEDED - {RECIPE})]
    found += [f"{name} is too large" for name, path in files.items() if path.stat().st_size > LARGEST]
    if found:
        return found
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if name != WEIGHTS}
    found += [f"{name} names a path of a machine" for name, text in texts.items() if OF_A_MACHINE.search(text)]
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place) / folder.name, ignore=shutil.ignore_patterns("README.md")))
        try:
            card = render_card(copy, repo_id=f"hub_cards/{folder.name}").text
            if difference_of(json.loads(texts["config.json"])) is None:
                found.append("config.json names no base")
            read(files[WEIGHTS])
        except LizardzooError as error:
            return [*found, str(error)]
    if card.encode() != files["README.md"].read_bytes():
        found.append("README.md is not what its JSON files say; write it again with `lizardzoo card`")
    return found + check_card(card)


def put_in_cache(cache: Path, model: Path, source: str, name: str = NAME) -> Path:
    """A folder as `teacher_folder` would have built it from that source, in its cache."""
    folder = Path(shutil.copytree(model, cache / name))
    package, _, file = smollm2.BUILT_FROM.partition("/")
    told = {
        "hub": {"source": "hub", "repository": smollm2.REPOSITORY, "revision": "c0ffee"},
        "wheel": {"source": "wheel", "package": package, "file": file},
    }
    (folder / smollm2.SOURCE_FILE).write_text(json.dumps(told[source]))
    return folder

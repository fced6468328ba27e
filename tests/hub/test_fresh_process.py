"""What a stranger does: a new interpreter, the Hub's id, and one of the ways to load.

All ways are tried at once: one interpreter imports torch and transformers, then forks for each of them, so that none
has seen what another imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lizardzoo as lz
from lizardzoo.hub import check_card, read_card
from tests.adapters.families import FAMILIES
from tests.hub.conftest import command, connected
from tests.hub.test_card import figures
from tests.hub.test_round_trip import logits, student

STUB = "modeling_lizardzoo.py"
MODELS = [*FAMILIES, "measured", "difference"]
"""The repositories of alice: a mixed layers list of every family, what `measured` is, and a difference."""
PROGRAM = """
import os, sys, traceback
import torch, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
assert "lizardzoo" not in sys.modules

def load(*before, names={names!r}, **how):
    for name in before:
        __import__(name)
    for name in names:
        model = AutoModelForCausalLM.from_pretrained("alice/" + name, **how)
        assert type(model).__module__.startswith("lizardzoo.adapters."), type(model)
        with torch.no_grad():
            torch.save(model(torch.arange(3, 43)[None] % 50).logits, "logits-" + name)
        model.save_pretrained("again-" + name)

def refused(**how):
    try:
        load(names=["llama"], **how)
    except (ImportError, ValueError) as error:
        print(error)

class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "lizardzoo":
            raise ModuleNotFoundError("No module named 'lizardzoo'", name="lizardzoo")

def without(**how):
    sys.meta_path.insert(0, Missing)
    refused(**how)

for way, run in {{
    "import": lambda: load("lizardzoo"),
    "stub": lambda: load(trust_remote_code=True),
    "not trusted": lambda: refused(trust_remote_code=False),
    "not installed": lambda: without(trust_remote_code=True),
}}.items():
    pid = os.fork()
    if not pid:
        os.makedirs(way)
        os.chdir(way)
        code = 1
        try:
            with open("said", "w") as sys.stdout:
                run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, way
"""


class Strangers(NamedTuple):
    """What lies on the Hub, how often weights were fetched, and the folder of each way."""

    place: Path
    files: dict[str, dict[str, bytes]]
    logits: dict[str, torch.Tensor]
    fetched: dict[str, int]


@pytest.fixture(scope="module")
def strangers(measured: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Strangers:
    """The models published, `measured` by the command line, and the program run."""
    place = tmp_path_factory.mktemp("strangers")
    final, report = shutil.copytree(measured / "run", place / "run") / "final", measured / "report" / "report.json"
    with connected(place / "cache") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_alice")
        hub.put("org/base", {path.name: path.read_bytes() for path in tiny_folder.iterdir()})
        models = {family: student(family) for family in FAMILIES}
        for family, model in models.items():
            model.push_to_hub(f"alice/{family}")
        command("card", final, "--report", report, "--base", "org/base", "--license", "mit")
        command("push", final, "alice/measured")
        command("push", final, "alice/difference", "--difference", "--base", "org/base")
        models |= dict.fromkeys(("measured", "difference"), lz.from_pretrained(final))
        hub.requests.clear()
        result = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM.format(names=MODELS)],
            env=os.environ
            | {
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(place / "home"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return Strangers(
            place,
            {name: hub.files(f"alice/{name}") for name in MODELS},
            {name: logits(model) for name, model in models.items()},
            {name: hub.count("GET", f"{name}/resolve/.*safetensors$") for name in (*MODELS, "org/base")},
        )


@pytest.mark.parametrize("way", ["import", "stub"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_loads_the_same_and_saving_again_keeps_the_stub(
    strangers: Strangers, way: str, name: str
) -> None:
    place, published = strangers.place / way, strangers.files[name]
    assert torch.equal(torch.load(place / f"logits-{name}"), strangers.logits[name])
    again = place / f"again-{name}"
    assert [path.name for path in again.glob("*.py")] == [STUB]  # and no source of the package
    assert (again / STUB).read_bytes() == published[STUB]
    config = json.loads((again / "config.json").read_text())
    assert config["auto_map"] == json.loads(published["config.json"])["auto_map"]
    assert (again / "model.safetensors").is_file()


def test_the_second_process_fetches_no_weights(strangers: Strangers) -> None:
    assert strangers.fetched == dict.fromkeys([*MODELS, "org/base"], 1)


def test_without_the_package_or_trust_the_error_says_what_to_do(strangers: Strangers) -> None:
    assert "pip install lizardzoo" in (strangers.place / "not installed" / "said").read_text()
    assert "trust_remote_code=True" in (strangers.place / "not trusted" / "said").read_text()


@pytest.mark.parametrize("name", ["measured", "difference"])
def test_the_card_of_the_measured_model_is_the_reports(strangers: Strangers, measured: Path, name: str) -> None:
    card = strangers.files[name]["README.md"].decode()
    assert check_card(card) == []
    results = read_card(card).data["model-index"][0]["results"]
    values = [metric["value"] for result in results for metric in result["metrics"]]
    assert sorted(values) == sorted(figures(json.loads((measured / "report" / "report.json").read_text()), "final"))
    assert "Recipe `mine` of" in card
    assert read_card(card).data["license"] == "mit"

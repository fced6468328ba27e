"""A card is rendered from what lies in the folder: config, report and recipe; nothing in it is typed by hand.

Its figures come from evaluation.json and recipe.json, which `write_card` puts beside it, so that anyone can compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from lizardzoo import mixers as _builtin_mixers  # noqa: F401  registers the mixers that a config.json may name
from lizardzoo import smollm2
from lizardzoo.config import LINEARIZED, describe_spec, layer_map, resolve_layers
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.card import README, card_beside, card_hash, is_by_hand, license_of
from lizardzoo.hub.difference import REPO_ID, difference_of, on_hub
from lizardzoo.hub.reports import read_report
from lizardzoo.hub.reproduce import commands
from lizardzoo.hub.results import Results, environment, plain
from lizardzoo.hub.training import data_of, read_recipe

EVALUATION, RECIPE = "evaluation.json", "recipe.json"
TRAINED_ON = "trained_on"
"""Metadata of our own: the data's names where some are not on the Hub, which its `datasets` may not hold."""
TEMPLATE = "card.md.jinja"


class Rendered(NamedTuple):
    """A card's text, and what lies beside it: the report and the recipe, where there are any."""

    text: str
    report: dict[str, Any] | None
    recipe: dict[str, Any] | None


def write_card(folder: str | Path, *, force: bool = False, **given: Any) -> Path:
    """Render README.md of a saved model, and put what it says of results and training beside it as JSON.

    Args:
        folder: a linearized model, as saved.
        force: replace a README.md that was written by hand.
        given: see `render_card`.

    Raises:
        LizardzooError: a README.md written by hand, or input that cannot be read. Nothing is written then.
    """
    folder = Path(folder)
    path = folder / README
    if not force and is_by_hand(folder):
        raise LizardzooError(f"{path} was written or changed by hand; keep it, or replace it with force=True (--force)")
    card = render_card(folder, **given)
    for name, values in ((EVALUATION, card.report), (RECIPE, card.recipe)):
        if values is not None:
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    path.write_text(card.text, encoding="utf-8")
    return path


def render_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    report: Any = None,
    row: str | None = None,
    recipe: Any = None,
    base: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> Rendered:
    """The card of a saved model; writes nothing.

    Args:
        folder: a linearized model, as saved. What its present card says, if it was not written by hand, is the
            default of base, license, datasets and tags.
        repo_id: what the snippet loads; by default the folder, as it is given here.
        report: what `lizardzoo eval --out` or `lizardzoo.evaluate` made: a file, a dict or a Report, or a list of
            them that become one; by default the folder's evaluation.json.
        row: which row of the report is this model, where it measures several.
        recipe: a recipe.json, its dict or a Recipe; by default the folder's, or that of the run the folder lies in.
        base: the Hub id of the base model; by default what the config says.
        license: an identifier as the Hub knows it ("apache-2.0"); by default that of the base model's card.
        datasets: what it was trained on, by default what the run has noted; Hub ids go into the metadata.
        tags: more tags for the metadata.

    Raises:
        LizardzooError: input that cannot be read.
    """
    folder = Path(folder)
    old = card_beside(folder)
    kept = {} if old is None or old.by_hand else old.data
    config = _read_config(folder)
    results = read_report(report if report is not None else _beside(folder, EVALUATION), folder, row)
    training = read_recipe(recipe if recipe is not None else _beside(folder, RECIPE), folder)
    difference = difference_of(config)
    name = base or _base_of(config) or kept.get("base_model")
    text = _render(
        config,
        repo_id or shown_name(folder),
        results,
        training,
        base=name,
        license=license or kept.get("license") or (difference and difference.license) or license_of(name),
        datasets=list(datasets) or kept.get(TRAINED_ON, kept.get("datasets", [])) or list(data_of(training)),
        tags=list(tags) or kept.get("tags", []),
        has_tokenizer=any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")),
    )
    return Rendered(text, None if results is None else results.raw, training)


def shown_name(folder: Path) -> str:
    """What a snippet loads: a folder as it is given, but no path of this machine."""
    return folder.resolve().name if folder.is_absolute() else folder.as_posix()


def _render(
    config: dict[str, Any],
    repo_id: str,
    results: Results | None,
    training: Any,
    *,
    base: Any,
    license: Any,
    datasets: Any,
    tags: Any,
    has_tokenizer: bool,
) -> str:
    try:
        specs = resolve_layers(config["layers"], config["num_hidden_layers"])
    except (KeyError, TypeError) as error:
        raise LizardzooError(f"config.json names no layers ({error}); save the model again") from error
    name = repo_id.rpartition("/")[2]
    difference = difference_of(config)
    here = [each for each, sha256 in data_of(training).items() if sha256]
    on_hub = [each for each in datasets if REPO_ID.fullmatch(each) and each not in here]
    constant = not any(spec.keeps_softmax for spec in specs)
    metadata = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if difference else "finetune",
        license=license,
        library_name="transformers",  # by which the Hub chooses its own snippet
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["lizardzoo", "linear-attention", *["constant-memory"] * constant, *tags])),
        datasets=on_hub or None,
        **({} if on_hub == datasets else {TRAINED_ON: datasets}),
        model_name=name,
        eval_results=[EvalResult(**values) for values in results.figures()] or None if results else None,
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )  # Markdown, not HTML: there is nothing to escape but what `plain` takes out
    template = environment.from_string((Path(__file__).parent / TEMPLATE).read_text(encoding="utf-8"))
    body = template.render(
        title=name,
        repo_id=repo_id,
        base=base,
        family=str(config["model_type"]).removeprefix(LINEARIZED),
        constant=constant,
        difference=difference,
        builds_base=difference is not None and difference.built_from == smollm2.BUILT_FROM,
        has_tokenizer=has_tokenizer,
        layer_map=layer_map(specs),
        specs=[f"{describe_spec(spec)}: {_fields(spec)}" for spec in dict.fromkeys(specs) if _fields(spec)],
        stages=None if training is None or not training["trained"] else _stages(training["trained"]),
        recipe_name=None if training is None else plain(training["recipe"].get("name") or ""),
        datasets=[plain(each) for each in datasets],
        measured=results is not None,
        measured_with=None if results is None else results.measured_with(),
        saved_by=plain(config.get("transformers_version") or ""),
        reproduce=commands(name, base, difference, config.get("dtype"), training, results),
        positions=[] if results is None else results.positions(),
        memory=None if results is None else results.memory(),
        recall=None if results is None else results.recall(),
        tasks=None if results is None else results.tasks(),
        limits=_limits(specs, training, results),
    )
    body = "\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    head = metadata.to_yaml()
    return f"---\n{head}\n---\n{body}\n<!-- lizardzoo card {card_hash(yaml.safe_load(head), body)} -->\n"


def _limits(specs: Sequence[Any], training: Any, results: Results | None) -> list[str]:
    """What a reader must not expect."""
    converted = [spec for spec in specs if not spec.keeps_softmax]
    limits = []
    if windows := sorted({spec.window for spec in converted if hasattr(spec, "window")}):
        size = f"{windows[0]}" if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
        limits.append(
            f"Mixers see what lies more than {size} tokens back through a memory of fixed size, or not at all."
        )
    elif converted:
        limits.append("The past is seen through a memory of fixed size: exact recall from far back may fail.")
    if len(converted) < len(specs) and converted:
        limits.append(f"{len(specs) - len(converted)} of {len(specs)} layers keep softmax: their cache grows.")
    if training is None:
        limits.append("Nothing says that the mixers were trained.")
    if results is None:
        limits.append("Nothing was measured: compare it with its base model before you rely on it.")
    limits.append("It inherits the biases and the mistakes of its base model.")
    return limits


def _fields(spec: Any) -> str:
    return ", ".join(f"{name} = {value}" for name, value in spec.to_dict().items() if name != "type")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not str(config["model_type"]).startswith(LINEARIZED):
            raise LizardzooError(f"{folder} holds a plain {config['model_type']!r} model, not a linearized one")
    except LizardzooError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LizardzooError(f"{folder} holds no config.json of a model ({error}); save the model first") from error
    return config


def _base_of(config: Mapping[str, Any]) -> str | None:
    """The Hub id of the base; a folder of this machine is none."""
    difference = difference_of(config)
    if difference is not None:
        return difference.name
    name = config.get("base_model_name_or_path")
    return name if on_hub(name) else None


def _beside(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None


STAGE_COLUMNS = {
    "name": "stage",
    "steps": "steps",
    "batch_size": "sequences per step",
    "sequence_length": "tokens per sequence",
    "tokens": "tokens",
}


def _stages(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of what was trained, and what it was trained with."""
    return {
        "header": list(STAGE_COLUMNS.values()),
        "rows": [[_cell(stage[key]) for key in STAGE_COLUMNS] for stage in stages],
        "with": [f"{plain(stage['name'])}: {how}" for stage in stages if (how := _how(stage))],
    }


def _how(stage: Mapping[str, Any]) -> str:
    """Such as "84 seconds, lizardzoo 0.1.0, torch 2.13.0, on 2 x NVIDIA H200"."""
    many = f"{stage['processes']} x " if (stage.get("processes") or 1) > 1 else ""
    facts = {**stage, "device": f"{many}{stage['device']}" if stage.get("device") else None}
    seconds = f"{stage['seconds']:,.0f} seconds" if stage.get("seconds") is not None else ""
    return ", ".join(filter(None, (seconds, environment(facts))))


def _cell(value: Any) -> str:
    return plain(value) if isinstance(value, str) else "?" if value is None else f"{value:,}"

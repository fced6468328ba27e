"""`difference`, `card` and `push`: a model without what its base has, its model card, and both to the Hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lizardzoo.cli.base import app, err, new_folder, out
from lizardzoo.cli.models import Dtype, is_linearized, load_config, load_model, load_tokenizer
from lizardzoo.errors import LizardzooError
from lizardzoo.hub import check_card, push_folder, write_card
from lizardzoo.hub.card import README, is_by_hand
from lizardzoo.hub.render import EVALUATION, RECIPE, shown_name
from lizardzoo.hub.reports import read_report
from lizardzoo.hub.training import read_recipe
from lizardzoo.hub.upload import published_files

BaseOption = Annotated[
    str | None,
    typer.Option(help="Of a difference: its base, a Hub id or a folder that lizardzoo built; by default the config's."),
]
BaseRevisionOption = Annotated[
    str | None, typer.Option(help="Of a difference: its base's commit or branch, where main is another by now.")
]
ReportOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="The report.json of `lizardzoo eval --out`; it is put beside the card. Give it again where the model was "
        "measured in several goes."
    ),
]
RowOption = Annotated[str | None, typer.Option(help="Which of the report's models this is, where it has several.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a linearized model.")]


@app.command()
def card(
    folder: FolderArgument,
    report: ReportOption = None,
    row: RowOption = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe.json of the run; found by itself in a run's final/.")
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo", help="The Hub id that its snippet loads; the folder by default, and `push` puts the id in."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The Hub id of the base model, where the config names none.")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="As the Hub knows it (apache-2.0); the base model's by default.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="What it was trained on; may be given again.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that was written by hand.")] = False,
) -> None:
    """Write DIR/README.md, the model card, from what was configured, trained and measured; then check it.

    \b
      lizardzoo eval runs/first/final --text wiki.txt --out report \\
          --teacher HuggingFaceTB/SmolLM2-135M-Instruct
      lizardzoo card runs/first/final --report report/report.json --license apache-2.0

    A README.md that a person wrote or changed is left alone without --force.
    """
    path = write_card(
        folder,
        repo_id=repo,
        report=report or None,
        row=row,
        recipe=recipe,
        base=base,
        license=license_,
        datasets=dataset or (),
        force=force,
    )
    _print_problems(path)
    out.print(f"wrote {escape(str(path))}", soft_wrap=True, highlight=False)


def _print_problems(path: Path) -> None:
    for problem in check_card(path.read_text(encoding="utf-8")):
        err.print(f"note: {problem}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def difference(
    folder: FolderArgument,
    place: Annotated[Path, typer.Option("--out", "-o", help="New folder, as hub_cards/Lizard-SmolLM2-135M.")],
    base: BaseOption = None,
    base_revision: BaseRevisionOption = None,
    report: ReportOption = None,
    row: RowOption = None,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer", help="Put the tokenizer in too; without it the base's is used.")
    ] = False,
) -> None:
    """Write what DIR has and its base model has not, with its card: a few MB that load as the whole model.

    \b
      lizardzoo difference runs/first/final --out hub_cards/mine
      lizardzoo eval hub_cards/mine --teacher ... --text wiki.txt --out report
      lizardzoo card hub_cards/mine --report report/report.json

    Of a projection that `distill` merged LoRA into, the factors are kept, once it
    is seen that they give back the very weights. The base has to be on the Hub,
    or to be what lizardzoo.smollm2.teacher_folder() builds; loading checks its hash.
    """
    kept = {name: path if (path := folder / name).is_file() else None for name in (EVALUATION, RECIPE)}
    results = read_report(report or kept[EVALUATION], folder, row)
    training = read_recipe(kept[RECIPE], folder)
    with new_folder(place) as made:
        with err.status(f"comparing {folder} with its base"):
            _load_student(folder).save_difference(made, base, base_revision)
        if tokenizer:
            load_tokenizer(str(folder)).save_pretrained(made)
        told = None if results is None else results.raw
        write_card(made, repo_id=shown_name(place), report=told, recipe=training)
    _print_problems(place / README)
    for path in sorted(place.iterdir()):
        size = f"{path.stat().st_size / 2**20:.2f} MiB"
        out.print(f"wrote {escape(str(path))} ({size})", soft_wrap=True, highlight=False)


@app.command()
def push(
    folder: FolderArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The Hub id, as me/Lizard-SmolLM2-135M.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; main by default.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "Upload model",
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Propose it instead.")] = False,
    difference: Annotated[
        bool, typer.Option("--difference", help="Send only what differs from the base model, which the Hub has.")
    ] = False,
    base: BaseOption = None,
    base_revision: BaseRevisionOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md on the Hub written by hand.")] = False,
) -> None:
    """Publish a folder's model, tokenizer and card in one commit, as the account of `hf auth login`.

    \b
      lizardzoo card runs/first/final --report report/report.json
      lizardzoo push runs/first/final me/Lizard-SmolLM2-135M --private

    After an interruption the same command sends what is missing.
    """
    given: dict[str, Any] = {
        "private": private or None,
        "revision": revision,
        "commit_message": message,
        "create_pr": pull_request,
        "force": force,
    }
    with err.status(f"sending {folder} to {repo}"):
        if difference:
            with tempfile.TemporaryDirectory() as made:
                done = push_folder(_as_difference(folder, Path(made), base, base_revision), repo, **given)
        else:
            done = push_folder(folder, repo, **given)
    if done.kept_readme:
        err.print("note: the README.md on the Hub was written by hand and stays; --force replaces it", soft_wrap=True)
    out.print(done.url, soft_wrap=True, highlight=False, markup=False)


def _load_student(folder: Path) -> Any:
    config = load_config(str(folder))
    if not is_linearized(config):
        raise LizardzooError(f"{folder} holds a plain {config.model_type!r} model, not a linearized one")
    return load_model(str(folder), Dtype.auto, device="cpu")


def _as_difference(folder: Path, made: Path, base: str | None, revision: str | None) -> Path:
    """A copy of a folder in `made` whose weights are the difference; a card of ours says so, a person's stays."""
    files = published_files(folder)
    model = _load_student(folder)
    place = made / folder.resolve().name  # by which a recipe.json tells the stages
    for path in files:
        if path.suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
            (place / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / path.relative_to(folder))
    model.save_difference(place, base, revision)
    recipe = folder / RECIPE
    if not is_by_hand(place):
        write_card(place, recipe=read_recipe(recipe if recipe.is_file() else None, folder))
    return place

"""`card` and `push`: a model gets its model card, and goes to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lizardzoo.cli.base import app, err, out
from lizardzoo.cli.models import Dtype, load_model, load_tokenizer
from lizardzoo.errors import LizardzooError
from lizardzoo.hub import check_card, push_folder, read_card, write_card

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a linearized model.")]


@app.command()
def card(
    folder: FolderArgument,
    report: Annotated[
        Path | None, typer.Option(help="The report.json of `lizardzoo eval --out`; it is put beside the card.")
    ] = None,
    row: Annotated[str | None, typer.Option(help="Which of the report's models this is, where it has several.")] = None,
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
        report=report,
        row=row,
        recipe=recipe,
        base=base,
        license=license_,
        datasets=dataset or (),
        force=force,
    )
    for problem in check_card(path.read_text(encoding="utf-8")):
        err.print(f"note: {problem}", soft_wrap=True, markup=False, highlight=False)
    out.print(f"wrote {escape(str(path))}", soft_wrap=True, highlight=False)


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
    base: Annotated[str | None, typer.Option(help="For --difference: its Hub id, where the config names none.")] = None,
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
    own = folder / "README.md"
    by_hand = own.is_file() and read_card(own.read_text(encoding="utf-8", errors="replace")).by_hand
    if difference:
        if by_hand:
            raise LizardzooError(f"{own} was written by hand, and --difference writes a card of its own; move it away")
        model = load_model(str(folder), Dtype.auto, device="cpu")
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        kept = {
            name: path
            for name, path in {"report": folder / "evaluation.json", "recipe": folder / "recipe.json"}.items()
            if path.is_file()
        }
        tokenizer = load_tokenizer(str(folder)) if has_tokenizer else None
        with err.status(f"sending {folder} to {repo}"):
            done = model.push_to_hub(repo, tokenizer=tokenizer, difference=True, base=base, **kept, **given)
    else:
        with err.status(f"sending {folder} to {repo}"):
            done = push_folder(folder, repo, **given)
    if done.kept_readme:
        err.print("note: the README.md on the Hub was written by hand and stays; --force replaces it", soft_wrap=True)
    out.print(done.url, soft_wrap=True, highlight=False, markup=False)

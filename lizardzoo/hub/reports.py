"""Reports of `lizardzoo eval` are read, checked, and made one where a model was measured in several goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lizardzoo.errors import LizardzooError
from lizardzoo.hub.results import Results
from lizardzoo.hub.training import read_json

TEACHER = "teacher"


def read_report(source: Any, folder: Path, row: str | None) -> Results | None:
    """A report from a file, a dict or `lizardzoo.evaluate`'s Report, or several of them as one.

    Args:
        source: one, or a list of them; None gives None.
        folder: the model's, which a report may name.
        row: which of the models that were measured the folder holds.

    Raises:
        LizardzooError: it is no such report, or does not say which of its models this one is; or two that are not of
            one model and teacher, or measure the same thing.
    """
    if source is None:
        return None
    with _readable():
        parts = [_read(each, folder, row) for each in (source if isinstance(source, (list, tuple)) else [source])]
        return Results(merged([part.raw for part in parts]), parts[0].row) if parts else None


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all that several have measured of one model, by the first one's name for it.

    Raises:
        LizardzooError: they are of another model or teacher, or have the same text or task, or retrieval twice.
    """
    whole, *others = reports
    for other in others:
        if other["row"] != whole["row"]:
            if _weights(whole) is None or _weights(whole) != _weights(other):
                raise LizardzooError(
                    f"the reports call this model {whole['row']!r} and {other['row']!r}, and do not say that the "
                    f"weights are the same; measure it by one name"
                )
            other = _renamed(other, other["row"], whole["row"])
        _check_weights(whole, other)
        if whole.get("retrieval") and other.get("retrieval"):
            raise LizardzooError("two of the reports measure retrieval; leave one out")
        scores = {
            name: _union("task", (whole.get("tasks") or {}).get(name), (other.get("tasks") or {}).get(name))
            for name in {**(whole.get("tasks") or {}), **(other.get("tasks") or {})}
        }
        whole = {
            **whole,
            "models": {**(whole.get("models") or {}), **(other.get("models") or {})},
            "teacher": whole.get("teacher") or other.get("teacher"),
            "texts": {**(whole.get("texts") or {}), **(other.get("texts") or {})},
            "positions": _union("text", whole.get("positions"), other.get("positions")),
            "retrieval": whole.get("retrieval") or other.get("retrieval"),
            "tasks": scores,
            "runs": [*(whole.get("runs") or ()), *(other.get("runs") or ())],
        }
    return whole


def _union(what: str, one: Any, other: Any) -> dict[str, Any]:
    one, other = one or {}, other or {}
    if both := [name for name in one if name in other]:
        raise LizardzooError(f"two of the reports have the {what} {both[0]!r}; leave one out")
    return {**one, **other}


def _weights(report: Mapping[str, Any]) -> str | None:
    """The hash of the weights of the model that a report is read for, where all its runs say the same one."""
    found = {(run.get("weights") or {}).get(report["row"]) for run in report.get("runs") or ()}
    return found.pop() if len(found) == 1 else None


def _renamed(value: Any, name: str, to: str) -> Any:
    """A report in which a model has another name, and so has what is called after it."""
    if isinstance(value, str):
        return to if value == name else value.replace(f"(for {name})", f"(for {to})")
    if isinstance(value, Mapping):
        return {_renamed(key, name, to): _renamed(each, name, to) for key, each in value.items()}
    return [_renamed(each, name, to) for each in value] if isinstance(value, (list, tuple)) else value


def _check_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """By the hashes in their runs, where they say them."""
    known: dict[str, str] = {}
    for run in (*(one.get("runs") or ()), *(other.get("runs") or ())):
        for name, sha256 in (run.get("weights") or {}).items():
            if name in (TEACHER, one["row"]) and known.setdefault(name, sha256) != sha256:
                raise LizardzooError(
                    f"the reports measure {name!r} with other weights ({known[name][:12]}... and {sha256[:12]}...); "
                    f"measure one model beside one teacher, in one dtype"
                )


def _read(source: Any, folder: Path, row: str | None) -> Results:
    if isinstance(source, (str, Path)):
        given = read_json(Path(source), "report")
    else:
        given = dict(source) if isinstance(source, Mapping) else source.to_dict()
    if "rows" in given:  # of `evaluate.compare`, which knows no name of the text
        given = {"positions": {"text": given}}
    places = _models(given)
    here = [name for name, place in places.items() if Path(place).resolve() == folder.resolve()]
    chosen = row or given.get("row") or (here[0] if here else None)
    if chosen is None and len(places) == 1:
        chosen = next(iter(places))
    if chosen not in places:
        raise LizardzooError(
            f"the report measures {', '.join(places) or 'no model'}, and {row or 'none of them'!r} is not "
            f"this model's row; say which one is (row=, --row)"
        )
    raw, chosen = _without_paths(given | {"row": chosen}), _short(chosen)
    results = Results(raw, chosen)
    results.figures(), results.positions(), results.memory(), results.recall(), results.tasks(), results.measured_with()
    return results


@contextmanager
def _readable() -> Iterator[None]:
    """What is not as a report has it becomes one sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, LizardzooError):
            raise
        raise LizardzooError(
            f"the report is not one that lizardzoo eval wrote ({type(error).__name__}: {error}); give its report.json"
        ) from error


def _models(report: Mapping[str, Any]) -> dict[str, str]:
    """The names of the models that a report measures, and where they lay."""
    if report.get("models"):
        return {str(name): str(place) for name, place in report["models"].items()}
    rows = [row for each in (report.get("positions") or {}).values() for row in each["rows"]]
    return {row["name"]: row["name"] for row in rows if not row["without"] and row["model"] != TEACHER}


def _without_paths(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with paths of this machine cut to their last two parts, wherever they are part of a name."""
    named = [*(report.get("models") or ()), *(report.get("texts") or ()), report.get("teacher")]
    named += [*(report.get("models") or {}).values(), *(report.get("texts") or {}).values()]
    long = sorted({str(name) for name in named if name and _short(str(name)) != name}, key=len, reverse=True)

    def cut(value: Any) -> Any:
        if isinstance(value, str):
            for name in long:
                value = value.replace(name, _short(name))
            return value
        if isinstance(value, Mapping):
            return {cut(name): cut(each) for name, each in value.items()}
        return [cut(each) for each in value] if isinstance(value, (list, tuple)) else value

    return cut(report)


def _short(name: str) -> str:
    """The last two parts of an absolute path; any other name as it is."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name

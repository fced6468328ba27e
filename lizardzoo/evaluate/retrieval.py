"""Retrieval by distance: facts in a text, asked for again after a given number of tokens.

A prompt is some filler text, one fact or several ("The magic number of Oslo is 48213."), `distance` tokens of filler,
and then the same sentences again, in another order, up to their numbers. One fact is the needle in the haystack;
several are multi-query associative recall (arXiv:2312.04927), in words. Every answer lies more than `distance` tokens
before its question: with `distance` at least the window, no window sees both.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.plan import Planned, plan
from lizardzoo.evaluate.positions import CHUNK_SIZE, Progress, Reader, Run, check_chunks, in_eval_mode
from lizardzoo.evaluate.report import figures, save_figure
from lizardzoo.evaluate.text import begin_of_text, read_text_or_path

if TYPE_CHECKING:
    from rich.table import Table

DISTANCES = (64, 128, 256, 512, 1024, 2048)
LEAD = 64
"""Tokens of filler before the facts: the first tokens of a text are kept for ever, and must not be the facts."""
DIGITS = 5
NAMES = """
Accra Athens Baku Berlin Bogota Boston Cairo Caracas Chicago Dakar Dallas Delhi Denver Dhaka Doha
Dublin Geneva Havana Helsinki Houston Jakarta Kabul Kiev Kingston Lagos Lima Lisbon London Lusaka
Madrid Manila Miami Milan Minsk Moscow Mumbai Munich Nairobi Naples Osaka Oslo Ottawa Paris Prague
Quito Rabat Riga Rome Seattle Seoul Sofia Sydney Taipei Tehran Tokyo Toronto Tripoli Tunis Venice
Vienna Vilnius Warsaw Yangon Zagreb
"""
PLACES = NAMES.split()


@dataclass(frozen=True)
class Recall:
    """What was recalled at one distance.

    Attributes:
        distance: tokens between the facts and the questions.
        questions: how many were asked.
        accuracy: the share of them whose answer greedy decoding gives in full.
        nll: mean negative log-likelihood of the answers' tokens, in nats.
    """

    distance: int
    questions: int
    accuracy: float
    nll: float


@dataclass(frozen=True)
class RecallRow:
    """One model, or one model with a branch switched off (`without` names it)."""

    name: str
    model: str
    without: str | None
    points: list[Recall]


@dataclass(frozen=True)
class RecallReport:
    """What `retrieval` found.

    Attributes:
        pairs: facts in a text.
        samples: texts at each distance.
        rows: a teacher's comes first.
    """

    pairs: int
    samples: int
    rows: list[RecallRow]

    def __getitem__(self, name: str) -> RecallRow:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise LizardzooError(f"the report has no row {name!r}; its rows are: {', '.join(r.name for r in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    @property
    def title(self) -> str:
        """Such as "share of facts recalled (1 fact in each of 32 texts)"."""
        facts = "1 fact" if self.pairs == 1 else f"{self.pairs} facts"
        return f"share of facts recalled ({facts} in each of {self.samples} texts)"

    def table(self) -> Table:
        """The share that was recalled, by distance."""
        from rich.table import Table

        table = Table(title=f"{self.title}, by distance in tokens")
        table.add_column("model", overflow="fold")
        for point in self.rows[0].points:
            table.add_column(f"{point.distance:,}", justify="right")
        for row in self.rows:
            table.add_row(row.name, *(f"{point.accuracy:.2f}" for point in row.points))
        return table

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write the share by distance as a picture (PNG, or what the suffix says); returns the path.

        Raises:
            LizardzooError: matplotlib is not installed.
        """
        figure = figures()(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for index, row in enumerate(self.rows):
            axis.plot(
                [point.distance for point in row.points],
                [point.accuracy for point in row.points],
                label=row.name, color=f"C{index % 10}", ls="--" if row.without else "-", marker="o", ms=3,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(xlabel="distance, tokens", ylabel=self.title, ylim=(-0.02, 1.02))
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
        return save_figure(figure, path)


@dataclass(frozen=True)
class Prompt:
    """Token ids [T] with the answers in them, and where these are."""

    ids: Tensor
    answers: list[slice]


def retrieval(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    filler: str | os.PathLike[str],
    *,
    distances: Sequence[int] = DISTANCES,
    pairs: int = 1,
    samples: int = 32,
    ablate: bool | Sequence[str] = False,
    seed: int = 0,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
) -> RecallReport:
    """How much of what a text said the models can still tell, by how far back it was said.

    Args:
        models, teacher, ablate: as for `lizardzoo.evaluate.compare`; all get the same prompts.
        tokenizer: the teacher's.
        filler: a file (UTF-8, plain or .gz) or the text itself, longer than the largest distance.
        distances: tokens of filler between the facts and the questions.
        pairs: facts in a text, all of them asked for; 1 is the needle in the haystack.
        samples: texts at each distance.
        seed: of the facts and of the places they are put at.
        chunk_size: tokens per forward; a longer prompt is read in pieces through a cache.
        progress: called with the prompts done and their number.

    Returns:
        per row and distance the share of questions whose answer greedy decoding gives in full, and the mean negative
        log-likelihood of the answers' tokens.

    Raises:
        LizardzooError: a filler that is missing or too short, numbers that are no counts, names as for `compare`.
    """
    rows = plan(models, teacher, ablate)
    text, _ = read_text_or_path(filler)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompts = {n: make_prompts(tokenizer, tokens, n, pairs=pairs, samples=samples, seed=seed) for n in distances}
    if not prompts:
        raise LizardzooError("there is no distance to measure at; give one or more, such as distances=(256, 1024)")
    vocabulary = min(row.run.model.get_output_embeddings().weight.shape[0] for row in rows)
    if (largest := max(int(prompt.ids.max()) for each in prompts.values() for prompt in each)) >= vocabulary:
        raise LizardzooError(
            f"the tokenizer gives the token id {largest}, but a model has {vocabulary} words; use the models' own"
        )
    points: list[list[Recall]] = [[] for _ in rows]
    done, total = 0, len(prompts) * samples
    with ExitStack() as stack:
        for model in {id(row.run.model): row.run.model for row in rows}.values():
            stack.enter_context(in_eval_mode(model))
        for distance, each in prompts.items():
            found: list[list[tuple[bool, float, int]]] = [[] for _ in rows]
            for prompt in each:
                for index, row in enumerate(rows):
                    found[index] += answer(row.run, prompt, chunk_size)
                done += 1
                if progress is not None:
                    progress(done, total)
            for index, results in enumerate(found):
                right, nll, tokens = zip(*results)
                points[index].append(Recall(distance, len(results), sum(right) / len(results), sum(nll) / sum(tokens)))
    return RecallReport(pairs, samples, [_row(row, each) for row, each in zip(rows, points)])


@torch.no_grad()
def answer(run: Run, prompt: Prompt, chunk_size: int = CHUNK_SIZE) -> list[tuple[bool, float, int]]:
    """For each answer: whether every token of it is the likeliest, the sum of their -log p, and their number."""
    check_chunks([run], chunk_size)
    length = len(prompt.ids) - 1
    asked = torch.tensor([i for part in prompt.answers for i in range(part.start - 1, part.stop - 1)])
    reader = Reader(run, prompt.ids[None], cached=length > chunk_size)
    pieces = []
    for start in range(0, length, chunk_size):
        chunk = slice(start, min(start + chunk_size, length))
        inside = asked[(asked >= chunk.start) & (asked < chunk.stop)] - chunk.start
        pieces.append(reader.read(chunk)[0, inside.to(reader.ids.device)])
    log_probs = run.model.get_output_embeddings()(torch.cat(pieces)).float().log_softmax(-1).cpu()
    targets = prompt.ids[asked + 1]
    right = log_probs.argmax(-1) == targets
    nll = -log_probs.gather(-1, targets[:, None]).squeeze(-1)
    sizes = [part.stop - part.start for part in prompt.answers]
    parts = zip(right.split(sizes), nll.split(sizes), sizes)
    return [(bool(a.all()), float(b.double().sum()), size) for a, b, size in parts]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    filler: list[int],
    distance: int,
    *,
    pairs: int = 1,
    samples: int = 32,
    seed: int = 0,
    length: int | None = None,
) -> list[Prompt]:
    """The prompts of `retrieval` at one distance (see there), from the filler's token ids.

    length: of every prompt, by more filler before the facts; None: there are LEAD tokens of it.
    """
    for name, value, most in (("distance", distance, None), ("pairs", pairs, len(PLACES)), ("samples", samples, None)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole or (most is not None and value > most):
            limit = "" if most is None else f" and at most {most}"
            raise LizardzooError(f"{name} must be a whole number of at least 1{limit}, got {value!r}")
    needed = LEAD + distance if length is None else length
    if len(filler) < needed:
        raise LizardzooError(
            f"the filler has {len(filler)} tokens, fewer than the {needed} that a distance of {distance} needs; "
            f"give a longer text or smaller distances"
        )
    draw = random.Random(f"{seed} {distance} {pairs}")
    prompts = []
    for _ in range(samples):
        start = draw.randrange(len(filler) - needed + 1)
        facts = [(place, str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))) for place in draw.sample(PLACES, pairs)]
        begin = begin_of_text(tokenizer)
        told = [token for fact in facts for token in _fact(tokenizer, *fact)[0]]
        questions: list[int] = []
        answers = []
        for fact in draw.sample(facts, pairs):
            sentence, number = _fact(tokenizer, *fact)
            answers.append(slice(len(questions) + number.start, len(questions) + number.stop))
            questions += sentence
        questions = questions[: answers[-1].stop]
        between = start + (LEAD if length is None else length - len(begin) - len(told) - distance - len(questions))
        if between < start + LEAD:
            raise LizardzooError(
                f"{pairs} fact{'s' * (pairs > 1)}, {distance} tokens between and the questions do not fit into "
                f"{length} tokens; give a greater length, or smaller distances"
            )
        ids = [*begin, *filler[start:between], *told, *filler[between : between + distance]]
        moved = [slice(part.start + len(ids), part.stop + len(ids)) for part in answers]
        prompts.append(Prompt(torch.tensor(ids + questions), moved))
    return prompts


def recall_sequences(
    filler: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int = 2048,
    limit: int = 32,
    *,
    distances: Sequence[int] = (512, 1536),
    pairs: int = 1,
    seed: int = 0,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The prompts of `retrieval` as sequences of one length, and where their answers are: to choose layers by recall.

    Args:
        filler: a file (UTF-8, plain or .gz) or the text itself, of at least `length` tokens.
        tokenizer: the teacher's.
        length: tokens of every sequence; what a prompt does not need is filler before its facts.
        limit: sequences, shared out among the distances.
        distances, pairs, seed: as for `retrieval`.
        share: how much of all weight the answers have; what is left is shared out evenly among the other tokens.

    Returns:
        token ids [limit, length], and 1 at each token of an answer, else 0 (above 0 with a `share` below 1), fp32
        [limit, length]: the `sequences` and `weights` of `lizardzoo.select_layers` and `lizardzoo.select_windows`.

    Raises:
        LizardzooError: a filler that is missing or too short, numbers that are no counts or do not fit into the length.
    """
    if not distances or limit < len(distances):
        raise LizardzooError(
            f"every distance needs a sequence: give one distance or more and a limit of as many, got "
            f"distances={tuple(distances)} and limit={limit}"
        )
    if not 0 < share <= 1:
        raise LizardzooError(
            f"share, the part of all weight that answers have, must be above 0 and at most 1, got {share!r}"
        )
    text, _ = read_text_or_path(filler)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids, weights = torch.empty(limit, length, dtype=torch.long), torch.zeros(limit, length)
    for index, distance in enumerate(distances):
        rows = range(index, limit, len(distances))
        prompts = make_prompts(
            tokenizer, tokens, distance, pairs=pairs, samples=len(rows), seed=seed, length=length
        )  # fmt: skip
        for row, prompt in zip(rows, prompts):
            ids[row] = prompt.ids
            for part in prompt.answers:
                weights[row, part] = 1
    others = weights == 0
    others[:, 0] = False  # nothing predicts it
    weights[others] = float(weights.sum() / others.sum()) * (1 - share) / share
    return ids, weights


def _fact(tokenizer: PreTrainedTokenizerBase, place: str, number: str) -> tuple[list[int], slice]:
    """The tokens of one fact, and where its number is in them."""
    stem = f"\nThe magic number of {place} is"
    ends = (f"{stem} {number}", f"{stem} {number}.\n")
    open_end, whole = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in ends)
    shorter = tokenizer(stem, add_special_tokens=False, verbose=False)["input_ids"]
    begin = _common(shorter, whole)
    return whole, slice(begin, _common(open_end, whole))


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens at their start are alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _row(row: Planned, points: list[Recall]) -> RecallRow:
    return RecallRow(row.name, row.model, row.without, points)

"""Perplexity and KL to the teacher by position.

The position is that of the token that predicts: at position i a model has seen i + 1 tokens and is asked for
the next one. So positions below the window are those where a windowed model has seen all there was. A
sequence of T tokens has T - 1 predictions; the last token predicts nothing that could be checked.

Memory is bounded: a sequence longer than `chunk_size` is read in pieces, each model going on from its own cache, and
of a piece's logits only a part exists at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lizardzoo.adapters.masks import CACHE_KEYWORD
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of

EDGES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DEFAULT_WINDOW = 128
CURVE_POINTS = 64
CHUNK_SIZE = 4096
LOGITS_AT_ONCE = 1 << 23  # 32 MB of fp32: 2,048 x 49,152 logits would be 400 MB for every tensor of the formula

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bucket:
    """The predictions made at positions start .. stop - 1, over all sequences.

    Attributes:
        start: the first position.
        stop: one behind the last.
        tokens: how many predictions.
        perplexity: exp(mean negative log-likelihood).
        kl: mean KL(teacher || model) in nats per token; None without a teacher.
    """

    start: int
    stop: int
    tokens: int
    perplexity: float
    kl: float | None

    @property
    def label(self) -> str:
        """Such as "0-127"."""
        return f"{self.start}-{self.stop - 1}" if self.stop - self.start > 1 else str(self.start)


@dataclass(frozen=True)
class ByPosition:
    """One model on one text.

    Attributes:
        buckets: they partition the predictions.
        overall: all of them.
        curve: a finer cut of the same.
    """

    buckets: list[Bucket]
    overall: Bucket
    curve: list[Bucket]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def by_position(
    model: PreTrainedModel,
    sequences: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    buckets: Sequence[int] | None = None,
    window: int | None = None,
    batch_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
) -> ByPosition:
    """Perplexity and KL(teacher || model) by position bucket.

    Args:
        model: a linearized model or any other causal LM of transformers.
        sequences: [N, T] token ids, as `lizardzoo.evaluate.sequences` makes them; no padding.
        teacher: the model that KL is measured from; None measures perplexity alone.
        buckets: where a new bucket begins, e.g. (128, 512); by default the window, then 512, 1024, 2048, ... 32768.
        window: the first edge of the default buckets; by default the model's narrowest window, or 128 without
            one.
        batch_size: sequences per forward.
        chunk_size: tokens per forward; a longer sequence is read in pieces through a cache.
        progress: called with the sequences done and their number.

    Raises:
        LizardzooError: token ids that do not fit the model, edges that do not rise, different vocabularies.
    """
    edges = bucket_edges([model], buckets, window)
    (curves,) = measure([Run(model)], sequences, teacher, batch_size, chunk_size, progress)
    return curves.cut(edges)


@dataclass(frozen=True)
class Run:
    """A model, the context in which it is run (an ablation), and how far it looks back.

    recent: None reads all that came before; n reads every chunk anew with what is before it, n tokens in all, so that
    each prediction is made from the last n tokens at most (and from more than n - chunk_size).
    """

    model: PreTrainedModel
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    recent: int | None = None


class Reader:
    """One run on one batch [B, T], a chunk after the other; `cached` keeps what it needs of the chunks before."""

    def __init__(self, run: Run, ids: Tensor, cached: bool) -> None:
        self.run = run
        self.ids = ids.to(run.model.device)
        self.cached = cached and run.recent is None
        self.past: dict[str, Any] = {}

    def read(self, chunk: slice) -> Tensor:
        """[B, n, hidden] of the chunk: what the model hands to its vocabulary projection."""
        start = chunk.start
        if self.run.recent is not None:
            start = max(0, chunk.stop - self.run.recent)
        with self.run.context():
            out = self.run.model.get_decoder()(
                input_ids=self.ids[:, start : chunk.stop], use_cache=self.cached, **self.past
            )
        if self.cached:
            self.past = {CACHE_KEYWORD: out[CACHE_KEYWORD]}
        return out.last_hidden_state[:, chunk.start - start :]


@dataclass(frozen=True)
class Curves:
    """Sums over the sequences at every position, float64 [T - 1]; `weight` is what the means are taken over."""

    sequences: int
    weight: Tensor
    nll: Tensor
    kl: Tensor | None

    def cut(self, edges: Sequence[int]) -> ByPosition:
        """The buckets between these edges."""
        count = len(self.nll)
        width = math.ceil((count + 1) / CURVE_POINTS)
        return ByPosition(
            buckets=self._buckets(edges),
            overall=self._bucket(0, count + 1),
            curve=self._buckets(range(width, count + 1, width)),
        )

    def _buckets(self, edges: Sequence[int]) -> list[Bucket]:
        """The last position predicts nothing: an edge there would begin an empty bucket."""
        length = len(self.nll) + 1
        inner = [edge for edge in edges if edge < length - 1]
        return [self._bucket(start, stop) for start, stop in zip([0, *inner], [*inner, length])]

    def _bucket(self, start: int, stop: int) -> Bucket:
        nll = self.nll[start:stop]
        weight = self.weight[start:stop].sum()
        kl = None if self.kl is None else float(self.kl[start:stop].sum() / weight)
        return Bucket(start, stop, self.sequences * len(nll), float((nll.sum() / weight).exp()), kl)


def bucket_edges(models: Sequence[PreTrainedModel], buckets: Sequence[int] | None, window: int | None) -> list[int]:
    """The rising positions at which a new bucket begins."""
    if buckets is not None and window is not None:
        raise LizardzooError("buckets and window both say where the first bucket ends; give one of them")
    if buckets is None:
        first = _narrowest_window(models) if window is None else window
        edges = [first, *(edge for edge in EDGES if edge > first)]
    else:
        edges = list(buckets)
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) and edge > 0 for edge in edges)
    if not whole or edges != sorted(set(edges)):
        raise LizardzooError(f"the edges of position buckets must be rising whole numbers above 0, got {edges}")
    return edges


def _narrowest_window(models: Sequence[PreTrainedModel]) -> int:
    """What lies beyond it is what the models may have lost."""
    specs = [mixer.spec for model in models for mixer in mixers_of(model).values()]
    return min((spec.window for spec in specs if hasattr(spec, "window")), default=DEFAULT_WINDOW)


@torch.no_grad()
def measure(
    runs: Sequence[Run],
    sequences: Tensor,
    teacher: PreTrainedModel | Run | None,
    batch_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
    weights: Tensor | None = None,
) -> list[Curves]:
    """All runs on the same batches, so that the teacher runs once; per token in fp32, summed in float64.

    weights: [N, T], what the prediction of each token counts (the first one's is never made); None: all the same.
    """
    goal_run = teacher if isinstance(teacher, Run) or teacher is None else Run(teacher)
    everyone = [*runs, *([] if goal_run is None or goal_run in runs else [goal_run])]
    models = list({id(run.model): run.model for run in everyone}.values())
    check_sequences(models, sequences)
    if batch_size < 1:
        raise LizardzooError(f"batch_size must be at least 1, got {batch_size}")
    check_chunks(runs, chunk_size)
    count, length = sequences.shape
    weights = torch.ones(sequences.shape) if weights is None else weights
    weights = weights[:, 1:].double().cpu()
    nll = [torch.zeros(length - 1, dtype=torch.float64) for _ in runs]
    kl = [torch.zeros(length - 1, dtype=torch.float64) for _ in runs]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(in_eval_mode(model))
            _check_head(model, sequences[:1, :8])
        for start in range(0, count, batch_size):
            ids, counted = sequences[start : start + batch_size], weights[start : start + batch_size]
            readers = [Reader(run, ids, cached=length - 1 > chunk_size) for run in everyone]
            for chunk in _slices(0, length - 1, chunk_size):
                hidden = [reader.read(chunk) for reader in readers]
                expected = None if goal_run is None else hidden[everyone.index(goal_run)]
                for part in _slices(chunk.start, chunk.stop, _logits_at_once(len(ids), models[0])):
                    inner = slice(part.start - chunk.start, part.stop - chunk.start)
                    target = ids[:, part.start + 1 : part.stop + 1]
                    goal = None
                    if goal_run is not None and expected is not None:
                        goal = _log_probs(goal_run.model, expected[:, inner])
                    for index, run in enumerate(runs):
                        log_probs = _log_probs(run.model, hidden[index][:, inner])
                        chosen = log_probs.gather(-1, target.to(log_probs.device).unsqueeze(-1)).squeeze(-1)
                        nll[index][part] -= (counted[:, part] * chosen.cpu().double()).sum(0)
                        if goal is not None:
                            lost = _kl(goal.to(log_probs.device), log_probs).cpu().double()
                            kl[index][part] += (counted[:, part] * lost).sum(0)
            if progress is not None:
                progress(min(start + batch_size, count), count)
    total = weights.sum(0)
    return [Curves(count, total, a, None if teacher is None else b) for a, b in zip(nll, kl)]


def _log_probs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[B, n, vocabulary] in fp32."""
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)


def _kl(goal: Tensor, log_probs: Tensor) -> Tensor:
    """[B, n]: KL(goal || model)."""
    return (goal.exp() * (goal - log_probs)).sum(-1)


def _logits_at_once(batch: int, model: PreTrainedModel) -> int:
    """Positions."""
    return max(1, LOGITS_AT_ONCE // (batch * model.config.vocab_size))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards in the one it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_sequences(models: Sequence[PreTrainedModel], sequences: Tensor) -> None:
    """Refuse what is no [N, T] of token ids that all the models know."""
    if not isinstance(sequences, Tensor) or sequences.ndim != 2 or sequences.is_floating_point():
        raise LizardzooError(
            f"sequences are token ids [N, T], got {_describe(sequences)}; make them with lizardzoo.evaluate.sequences"
        )
    if sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise LizardzooError(f"sequences must be at least one of at least 2 tokens, got {_describe(sequences)}")
    sizes = {model.get_output_embeddings().weight.shape[0] for model in models}
    if len(sizes) > 1:
        raise LizardzooError(
            f"the models have vocabularies of {' and '.join(map(str, sorted(sizes)))} words; "
            f"only models of one vocabulary can be compared"
        )
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= min(sizes):
        raise LizardzooError(
            f"sequences hold the token ids {low} to {high}, but the vocabulary has {min(sizes)} words; "
            f"use the models' own tokenizer, and no padding"
        )


def check_chunks(runs: Sequence[Run], chunk_size: int) -> None:
    """Refuse chunks of no token, and those that leave a run of the last tokens with almost none."""
    if chunk_size < 1:
        raise LizardzooError(f"chunk_size must be at least 1 token, got {chunk_size}")
    for run in runs:
        if run.recent is not None and run.recent < 2 * chunk_size:
            raise LizardzooError(
                f"a model that reads its last {run.recent} tokens needs a chunk_size of at most half of them, "
                f"got {chunk_size}; otherwise the first tokens of a chunk would see almost nothing"
            )


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """The logits here are lm_head(hidden states): refuse a family that then scales or caps them."""
    own = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    here = model.get_output_embeddings()(Reader(Run(model), ids, cached=False).read(slice(0, ids.shape[1]))).float()
    if not torch.allclose(own, here, rtol=1e-2, atol=1e-2):
        raise LizardzooError(
            f"{type(model).__name__} does more to its logits than lm_head(hidden states), which is all that "
            f"is measured here; compare models of the Llama, Mistral and Qwen kind"
        )

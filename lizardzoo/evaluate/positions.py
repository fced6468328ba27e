"""Perplexity and KL to the teacher by position.

The position is that of the token that predicts: at position i a model has seen i + 1 tokens and is asked for
the next one. So positions below the window are those where a windowed model has seen all there was. A
sequence of T tokens has T - 1 predictions; the last token predicts nothing that could be checked.
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

from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of

EDGES = (512, 1024, 2048)
DEFAULT_WINDOW = 128
CURVE_POINTS = 64
LOGITS_AT_ONCE = 1 << 23  # 32 MB of fp32: 2,048 x 49,152 logits would be 400 MB for every tensor of the formula

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bucket:
    """The predictions made at positions start .. stop - 1, over all sequences.

    perplexity = exp(mean negative log-likelihood); kl = mean KL(teacher || model) in nats per token, None
    without a teacher.
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
    """One model on one text: `buckets` partition the predictions, `overall` is all, `curve` a finer cut."""

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
    progress: Progress | None = None,
) -> ByPosition:
    """Perplexity and KL(teacher || model) by position bucket.

    Args:
        model: a linearized model or any other causal LM of transformers.
        sequences: [N, T] token ids, as `lizardzoo.evaluate.sequences` makes them; no padding.
        teacher: the model that KL is measured from; None measures perplexity alone.
        buckets: where a new bucket begins, e.g. (128, 512); by default the window, then 512, 1024 and 2048.
        window: the first edge of the default buckets; by default the model's narrowest window, or 128 without
            one.
        batch_size: sequences per forward.
        progress: called with the sequences done and their number.

    Raises:
        LizardzooError: token ids that do not fit the model, edges that do not rise, different vocabularies.
    """
    edges = bucket_edges([model], buckets, window)
    (curves,) = measure([Run(model)], sequences, teacher, batch_size, progress)
    return curves.cut(edges)


@dataclass(frozen=True)
class Run:
    """A model, and the context in which it is run (an ablation)."""

    model: PreTrainedModel
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Curves:
    """Sums over the sequences at every position, float64 [T - 1]."""

    sequences: int
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
        tokens = self.sequences * len(nll)
        kl = None if self.kl is None else float(self.kl[start:stop].sum() / tokens)
        return Bucket(start, stop, tokens, float((nll.sum() / tokens).exp()), kl)


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
    teacher: PreTrainedModel | None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[Curves]:
    """All runs on the same batches, so that the teacher runs once; per token in fp32, summed in float64."""
    models = list({id(m): m for m in [*(run.model for run in runs), *([teacher] if teacher else [])]}.values())
    _check(models, sequences, batch_size)
    count, length = sequences.shape
    nll = [torch.zeros(length - 1, dtype=torch.float64) for _ in runs]
    kl = [torch.zeros(length - 1, dtype=torch.float64) for _ in runs]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_in_eval_mode(model))
            _check_head(model, sequences[:1, :8])
        for start in range(0, count, batch_size):
            ids = sequences[start : start + batch_size]
            expected = None if teacher is None else _hidden(Run(teacher), ids)
            hidden = [_hidden(run, ids) for run in runs]
            for part in _slices(len(ids), length - 1, models[0].config.vocab_size):
                target = ids[:, part.start + 1 : part.stop + 1]
                goal = None if teacher is None or expected is None else _log_probs(teacher, expected[:, part])
                for index, run in enumerate(runs):
                    log_probs = _log_probs(run.model, hidden[index][:, part])
                    chosen = log_probs.gather(-1, target.to(log_probs.device).unsqueeze(-1)).squeeze(-1)
                    nll[index][part] -= chosen.cpu().double().sum(0)
                    if goal is not None:
                        kl[index][part] += _kl(goal.to(log_probs.device), log_probs).cpu().double().sum(0)
            if progress is not None:
                progress(min(start + batch_size, count), count)
    return [Curves(count, a, None if teacher is None else b) for a, b in zip(nll, kl)]


def _hidden(run: Run, ids: Tensor) -> Tensor:
    """[B, T, hidden]: what the model hands to its vocabulary projection."""
    with run.context():
        return run.model.get_decoder()(input_ids=ids.to(run.model.device), use_cache=False).last_hidden_state


def _log_probs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[B, n, vocabulary] in fp32."""
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)


def _kl(goal: Tensor, log_probs: Tensor) -> Tensor:
    """[B, n]: KL(goal || model)."""
    return (goal.exp() * (goal - log_probs)).sum(-1)


def _slices(batch: int, positions: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, LOGITS_AT_ONCE // (batch * vocabulary))
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check(models: Sequence[PreTrainedModel], sequences: Tensor, batch_size: int) -> None:
    if not isinstance(sequences, Tensor) or sequences.ndim != 2 or sequences.is_floating_point():
        raise LizardzooError(
            f"sequences are token ids [N, T], got {_describe(sequences)}; make them with lizardzoo.evaluate.sequences"
        )
    if sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise LizardzooError(f"sequences must be at least one of at least 2 tokens, got {_describe(sequences)}")
    if batch_size < 1:
        raise LizardzooError(f"batch_size must be at least 1, got {batch_size}")
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


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """The logits here are lm_head(hidden states): refuse a family that then scales or caps them."""
    own = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    here = model.get_output_embeddings()(_hidden(Run(model), ids)).float()
    if not torch.allclose(own, here, rtol=1e-2, atol=1e-2):
        raise LizardzooError(
            f"{type(model).__name__} does more to its logits than lm_head(hidden states), which is all that "
            f"is measured here; compare models of the Llama, Mistral and Qwen kind"
        )

"""What `compare.py` compares: one mixer per row, each told by what differs from the hybrid's defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import lizardzoo as lz
from lizardzoo.config import PRESETS, MixerSpec
from lizardzoo.kernels.state import state_tensors
from lizardzoo.mixers import AttentionShape
from lizardzoo.mixers.branches import MAX_SIZE

HYBRID: Any = PRESETS.get("hybrid")


@dataclass(frozen=True)
class Variant:
    """A row. `spec` for all layers: a spec, or what makes one of the teacher; but for `chosen` of them, those with most
    recall, which have `give`; `share`: sizes ("window", "heavy") differ by layer, as measured, same state in all.

    by_recall: how much the answers of questions count where sizes are shared out; 0: they are on training text.
    rounds: of sharing out, at most.
    loss: weights of cross-entropy and KL in stage 2.
    """

    name: str
    spec: MixerSpec | Callable[[Any], MixerSpec]
    differs: str
    chosen: int = 0
    give: MixerSpec = field(default_factory=lz.Softmax)
    share: tuple[str, ...] = ()
    by_recall: float = 0.0
    rounds: int = 1
    loss: tuple[float, float] = (0.0, 1.0)

    def spec_for(self, teacher: Any) -> MixerSpec:
        """The mixer's spec for this teacher's shapes and dtype."""
        return self.spec if isinstance(self.spec, MixerSpec) else self.spec(teacher)


def shape_of(config: Any) -> AttentionShape:
    """What a mixer of this teacher is built for, as far as its parameters and its state go."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads
    return AttentionShape(config.hidden_size, *heads, head_dim, head_dim**-0.5)


def state_of(teacher: Any, spec: MixerSpec) -> int:
    """Bytes of one layer's state for one sequence."""
    state = spec.build(shape_of(teacher.config)).init_state(1, teacher.dtype, "meta")
    return sum(x.nbytes for x in {id(x): x for x in state_tensors(state)}.values())


def at_state_of(spec: Any, other: MixerSpec, size: str = "window") -> Callable[[Any], MixerSpec]:
    """The spec with the largest window (or other size) that takes no more bytes of state than another spec."""
    return within(spec, size, lambda teacher: state_of(teacher, other))


def beside(spec: Any, size: str, give: MixerSpec, count: int) -> Callable[[Any], MixerSpec]:
    """The spec with the largest size that leaves room for `count` layers of another, at the hybrid's state in all."""

    def budget(teacher: Any) -> int:
        layers = teacher.config.num_hidden_layers
        if layers <= count:
            raise SystemExit(
                f"of {give} in {count} layers the others are made smaller, and the teacher has {layers} layers"
            )
        return (layers * state_of(teacher, HYBRID) - count * state_of(teacher, give)) // (layers - count)

    return within(spec, size, budget)


def within(spec: Any, size: str, budget: Callable[[Any], int]) -> Callable[[Any], MixerSpec]:
    """The spec with the largest size that takes no more bytes of state."""

    def make(teacher: Any) -> MixerSpec:
        most = budget(teacher)
        low, high = 0, MAX_SIZE
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if state_of(teacher, replace(spec, **{size: middle})) <= most else (low, middle)
        if low == 0:
            raise SystemExit(f"{spec} takes more than {most} bytes of state with any {size}")
        return replace(spec, **{size: low})

    return make


def hybrid(name: str, differs: str = "", **changes: Any) -> Variant:
    """The hybrid with other fields."""
    return Variant(name, replace(HYBRID, **changes), differs or ", ".join(f"{k}={v!r}" for k, v in changes.items()))


def wide(window: int) -> list[Variant]:
    """The hybrid with another window, and the bare window with as many bytes."""
    spec = replace(HYBRID, window=window)
    return [
        Variant(f"window-{window}", spec, f"window={window}"),
        Variant(
            f"bare-{window}", at_state_of(lz.Window(keep=4), spec), f"a bare window with the state of window-{window}"
        ),
    ]


def by_layer(name: str, spec: Any, *share: str, by_recall: float = 0.0, rounds: int = 4, **others: Any) -> Variant:
    """Sizes shared out among the layers, the same state in all."""
    what = " and ".join({"window": "windows", "heavy": "heavy tokens"}[each] for each in share)
    by = {0.0: "", 1.0: " by recall"}.get(by_recall, " by recall and text")
    given = f", beside {others['chosen']} with {others['give']}" if others else ""
    differs = f"{what} shared out among the layers{by}{given}, same state, {rounds} round{'s' * (rounds > 1)}"
    return Variant(name, spec, differs, share=share, by_recall=by_recall, rounds=rounds, **others)


WIDE = lz.Window(window=1024, keep=4)
BARE = at_state_of(lz.Window(keep=4), HYBRID)
HEAVY = at_state_of(lz.Heavy(window=128), HYBRID, "heavy")
HEAVY_BESIDE_WIDE = beside(lz.Heavy(window=128), "heavy", WIDE, 4)
BOTH = ("window", "heavy")
MIXED = 0.1
"""What answers count where all tokens do: they are few, and differ by far more."""

VARIANTS: list[Variant] = [
    Variant("hybrid", HYBRID, ""),
    Variant("bare", BARE, "a bare window with as many bytes of state"),
    Variant("heavy", HEAVY, "a window of 128 and the tokens that drew most attention in it, as many bytes"),
    Variant(
        "heavy-window-64",
        at_state_of(lz.Heavy(window=64), HYBRID, "heavy"),
        "the same with a window of 64 and more of those tokens",
    ),
    Variant("heavy-lasting", at_state_of(lz.Heavy(half_life=None), HYBRID, "heavy"), "heavy, half_life=None"),
    *(
        Variant(
            f"heavy-half-life-{count}",
            at_state_of(lz.Heavy(half_life=count), HYBRID, "heavy"),
            f"heavy, half_life={count}",
        )
        for count in (128, 512, 1024)
    ),
    by_layer("heavy-by-layer", HEAVY, "heavy", rounds=1),
    by_layer("heavy-by-layer-rounds", HEAVY, "heavy"),
    by_layer("heavy-by-layer-recall", HEAVY, "heavy", by_recall=1.0),
    by_layer("heavy-by-layer-mixed", HEAVY, "heavy", by_recall=MIXED),
    by_layer("heavy-by-layer-both", HEAVY, *BOTH),
    by_layer("heavy-by-layer-both-recall", HEAVY, *BOTH, by_recall=1.0),
    by_layer("heavy-by-layer-both-mixed", HEAVY, *BOTH, by_recall=MIXED),
    by_layer("bare-by-layer", BARE, "window"),
    by_layer("bare-by-layer-mixed", BARE, "window", by_recall=MIXED),
    *(
        Variant(
            f"heavy-softmax-{count}", HEAVY, f"heavy, softmax kept in {count} layer{'s' * (count > 1)}", chosen=count
        )
        for count in (1, 2, 4, 8)
    ),
    Variant(
        "heavy-wide-4",
        HEAVY_BESIDE_WIDE,
        "a window of 1,024 in 4 layers, and fewer heavy tokens in the others: same state in all",
        chosen=4,
        give=WIDE,
    ),
    by_layer("heavy-wide-4-by-layer", HEAVY_BESIDE_WIDE, *BOTH, by_recall=MIXED, chosen=4, give=WIDE),
    Variant("lizard", PRESETS.get("lizard"), "the paper's formula"),
    Variant("lizard-rope", PRESETS.get("lizard-rope"), "the paper's, with RoPE in the window"),
    Variant("lolcats", PRESETS.get("lolcats"), "LoLCATs'"),
    hybrid("gate-none", gate=None),
    hybrid("gate-token", gate="token"),
    hybrid("gate-query-head", gate="query_head"),
    *(hybrid(f"gate-start-{start}", gate_init=start) for start in (0.5, 0.9, 0.99, 0.9999)),
    hybrid("no-input-gate", input_gate=False),
    hybrid("scale-none", log_scale=None),
    hybrid("scale-head", log_scale="head"),
    hybrid("sum", merge="sum", alpha="head", log_scale=None),
    hybrid("unnormalized", merge="none", alpha="head", log_scale=None),
    hybrid("overlap", disjoint=False),
    hybrid("features-after-rope", feature_rope=True),
    *(hybrid(f"keep-{count}", keep=count) for count in (0, 1, 16)),
    hybrid("sinks", keep=0, sinks=4),
    hybrid("keep-and-sinks", sinks=4),
    hybrid("maps-layer", maps="layer"),
    hybrid("features-exp", activation="exp"),
    *(hybrid(f"features-{dim}", feature_dim=dim) for dim in (32, 128)),
    *(
        Variant(
            f"features-{dim}-same-state",
            at_state_of(replace(HYBRID, feature_dim=dim), HYBRID),
            f"feature_dim={dim}, and a window for the bytes that this saves",
        )
        for dim in (16, 32)
    ),
    *(variant for window in (64, 256, 512) for variant in wide(window)),
    by_layer("windows-by-layer", HYBRID, "window", rounds=1),
    Variant("loss-ce", HYBRID, "stage 2 with cross-entropy", loss=(1.0, 0.0)),
    Variant("loss-both", HYBRID, "stage 2 with cross-entropy and KL", loss=(0.5, 0.5)),
    *(
        Variant(f"softmax-{count}", HYBRID, f"softmax kept in {count} layer{'s' if count > 1 else ''}", chosen=count)
        for count in (1, 2, 4, 8)
    ),
]

BY_NAME = {variant.name: variant for variant in VARIANTS}

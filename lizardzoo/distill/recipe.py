"""Recipes: every number that decides what distillation learns, as frozen, typed values.

One recipe serves every student: what it says of stage 1 is used where the mixers have parameters of their own.
A recipe says nothing about the machine: how many sequences fit in memory at once and how often a checkpoint
is written are arguments of `lizardzoo.distill`. `Recipe.to_dict` and `Recipe.from_dict` are exact inverses,
also through JSON. Change a recipe with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lizardzoo.errors import LizardzooError

SCHEDULES = ("cosine", "linear", "constant")
MIXINGS = ("concatenate", "equal")


@dataclass(frozen=True)
class Stage:
    """A stage of training; by itself stage 1 (transfer): only new parameters train, against the layer error.

    The mixers' parameters fall into three groups that learn at very different speeds: `scalar_rate` for those
    that are added or multiplied directly (log-scales, alpha, sink logits, biases), `projection_rate` for the
    weights that read the token (gates), `feature_map_rate` for the feature maps.
    """

    steps: int | None = None
    """Optimizer steps; give either steps or epochs."""
    epochs: float | None = None
    """Passes over the packed data."""
    batch_size: int = 16
    """Sequences per optimizer step, over all devices."""
    sequence_length: int = 1024
    """Tokens per sequence."""
    scalar_rate: float = 1e-2
    projection_rate: float = 1e-3
    feature_map_rate: float = 1e-2
    schedule: str = "cosine"
    """How the learning rates fall after the warm-up: cosine, linear or constant."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rates rise, from `floor` to their peak."""
    floor: float = 0.1
    """Fraction of its peak at which a learning rate starts, and where a cosine or linear schedule ends."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """AdamW's, on matrices alone."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 never clips."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _tuple(self.betas))
        alone = f"given alone, or else epochs alone (epochs={self.epochs!r})"
        _require(self, "steps", (self.steps is None) != (self.epochs is None), alone)
        _require(self, "steps", self.steps is None or _count(self.steps), "a whole number above 0")
        _require(self, "epochs", self.epochs is None or _number(self.epochs, above=0), "a number above 0")
        _require(self, "batch_size", _count(self.batch_size), "a whole number above 0")
        _require(self, "sequence_length", _count(self.sequence_length, least=2), "a whole number above 1")
        for name in ("scalar_rate", "projection_rate", "feature_map_rate", "weight_decay", "clip"):
            _require(self, name, _number(getattr(self, name), least=0), "a number of at least 0")
        _require(self, "schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        _require(self, "warmup", _number(self.warmup, least=0) and self.warmup < 1, "a number in [0, 1)")
        _require(self, "floor", _number(self.floor, least=0) and self.floor <= 1, "a number in [0, 1]")
        _require(self, "eps", _number(self.eps, above=0), "a number above 0")
        pair = _all(self.betas, lambda beta: _number(beta, least=0) and beta < 1) and len(self.betas) == 2
        _require(self, "betas", pair, "two numbers in [0, 1)")

    def total_steps(self, sequences: int) -> int:
        """Optimizer steps on a data set of so many sequences, whose last incomplete batch is dropped."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * (sequences // self.batch_size)))


@dataclass(frozen=True)
class Finetune(Stage):
    """Stage 2: LoRA on the projections, the mixers go on training, against the logits.

    loss = ce_weight * cross-entropy + kl_weight * KL(teacher || student), both in nats per token.
    """

    scalar_rate: float = 1e-3
    projection_rate: float = 5e-4
    feature_map_rate: float = 1e-3
    lora_rate: float = 5e-4
    """Learning rate of the LoRA factors."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """The product of the LoRA factors is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Last parts of the names of the linear modules that get LoRA."""
    ce_weight: float = 0.0
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lora_targets", _tuple(self.lora_targets))
        for name in ("lora_rate", "ce_weight", "kl_weight"):
            _require(self, name, _number(getattr(self, name), least=0), "a number of at least 0")
        _require(self, "kl_weight", self.ce_weight + self.kl_weight > 0, "above 0 unless ce_weight is")
        _require(self, "lora_rank", _count(self.lora_rank), "a whole number above 0")
        _require(self, "lora_alpha", _number(self.lora_alpha, above=0), "a number above 0")
        names = _all(self.lora_targets, lambda name: isinstance(name, str))
        _require(self, "lora_targets", names, "a tuple of one module name or more")


@dataclass(frozen=True)
class Recipe:
    """Both stages, and how the text is packed for them."""

    name: str
    transfer: Stage
    """Stage 1; unused where no mixer has parameters of its own."""
    finetune: Finetune
    mixing: str = "concatenate"
    """Several sources: `concatenate` takes all of each, `equal` the same number of sequences of each."""
    isolate_documents: bool = False
    """Documents packed into one sequence do not see each other (their positions restart)."""
    seed: int = 0
    """Of the shuffling of the data and of LoRA's start."""

    def __post_init__(self) -> None:
        _require(self, "name", _is(self.name, str) and self.name != "", "a word")
        _require(self, "transfer", type(self.transfer) is Stage, "a Stage")
        _require(self, "finetune", _is(self.finetune, Finetune), "a Finetune")
        _require(self, "mixing", self.mixing in MIXINGS, f"one of {', '.join(MIXINGS)}")
        _require(self, "isolate_documents", _is(self.isolate_documents, bool), "True or False")
        _require(self, "seed", _count(self.seed, least=0), "a whole number of at least 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them (lists for tuples)."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; unknown and missing fields raise."""
        if not isinstance(values, Mapping):
            raise LizardzooError(f"a recipe is a name, a Recipe or a dict of its fields, got {values!r}")
        nested: dict[str, type[Stage]] = {"transfer": Stage, "finetune": Finetune}
        fields = dict(values)
        for name, stage in nested.items():
            if isinstance(fields.get(name), Mapping):
                fields[name] = _build(stage, fields[name])
        return _build(cls, fields)


def _build(cls: type[Any], values: Mapping[str, Any]) -> Any:
    fields = dataclasses.fields(cls)
    names = sorted(field.name for field in fields)
    if unknown := sorted(set(values) - set(names)):
        raise LizardzooError(f"{cls.__name__} has no field {unknown[0]!r}; its fields are: {', '.join(names)}")
    if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]:
        raise LizardzooError(f"{cls.__name__} needs the field {missing[0]!r}; give it in the recipe")
    return cls(**values)


def _require(value: object, name: str, condition: bool, expected: str) -> None:
    """Raise the one error text of a field that does not fit."""
    if not condition:
        given = f"{type(value).__name__}({name}={getattr(value, name)!r})"
        raise LizardzooError(f"{given}: {name} must be {expected}; change the recipe")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    """The tuple that JSON made a list of."""
    return tuple(value) if isinstance(value, list) else value


def _all(values: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and len(values) > 0 and all(holds(value) for value in values)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind)


def _number(value: Any, *, least: float = -math.inf, above: float = -math.inf) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and value >= least and value > above


def _count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


RECIPES: dict[str, Recipe] = {}
"""Every named recipe; `register_recipe` adds one."""


def register_recipe(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name.

    Raises:
        LizardzooError: another recipe has that name.
    """
    if RECIPES.setdefault(recipe.name, recipe) != recipe:
        raise LizardzooError(f"the recipe name {recipe.name!r} is already taken; choose another name")
    return recipe


def recipe_from(recipe: str | Recipe | Mapping[str, Any]) -> Recipe:
    """A recipe from its name, itself or its dict.

    Raises:
        LizardzooError: an unknown name (the message lists what exists), fields that are unknown, missing or do not fit.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        return Recipe.from_dict(recipe)
    if recipe not in RECIPES:
        raise LizardzooError(f"unknown recipe {recipe!r}; there are: {', '.join(sorted(RECIPES))}")
    return RECIPES[recipe]


# The paper's (arXiv:2507.09025; numbers from secondary transcriptions: Alpaca, about 20M tokens a stage).
register_recipe(
    Recipe(
        name="lizard",
        transfer=Stage(
            epochs=2,
            batch_size=8,
            sequence_length=2048,
            scalar_rate=1e-3,
            projection_rate=1e-3,
            feature_map_rate=1e-3,
        ),
        finetune=Finetune(
            epochs=2,
            batch_size=8,
            sequence_length=2048,
            scalar_rate=5e-4,
            projection_rate=5e-4,
            feature_map_rate=5e-4,
            lora_targets=("q_proj", "k_proj", "v_proj"),
            ce_weight=1.0,
            kl_weight=0.0,
        ),
    )
)

# 3.3M and 4.1M tokens, half instructions, half books. KL to the teacher instead of cross-entropy, which fits
# the training text and leaves the teacher (a hybrid of SmolLM2-135M, WikiText: KL 0.265 against 0.357).
register_recipe(Recipe(name="recommended", transfer=Stage(steps=200), finetune=Finetune(steps=250), mixing="equal"))

# 51K tokens in all: some four minutes for a hybrid of SmolLM2-135M on two CPU cores, in 6 GB. Single sequences teach
# more than half as many pairs, and leave no step for a warm-up. For the layers' attention 512 tokens are as good as
# 1,024; for the logits they are not (KL beyond the window, from 20K tokens: 0.238 with 1,024 tokens, 0.244 with 512).
register_recipe(
    Recipe(
        name="demo",
        transfer=Stage(steps=64, batch_size=1, sequence_length=512, projection_rate=6e-3, warmup=0.0),
        finetune=Finetune(
            steps=24,
            batch_size=1,
            sequence_length=768,
            scalar_rate=5e-3,
            projection_rate=2e-3,
            feature_map_rate=5e-3,
            lora_rate=1e-3,
            warmup=0.0,
        ),
    )
)

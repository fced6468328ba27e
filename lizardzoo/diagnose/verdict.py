"""What the numbers say: findings in words, none for a healthy model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lizardzoo.diagnose.layers import Layer
from lizardzoo.diagnose.letters import Letters

DEAD_HALF_LIFE = 4.0
"""Tokens. A gate that starts at 0.5 has 1, one that starts at 0.999 as `Hybrid`'s do has 693."""
BYPASSED = 0.1
"""Of what the teacher puts where the branch looks. Calibrated and not yet trained, SmolLM2's linear branches carry from
a fifth to three quarters of it, without calibration a hundredth."""
LEAST_TEACHER_SHARE = 0.02
"""Below it the teacher itself has no use for the branch (the upper layers of SmolLM2 and the far past)."""
BYPASSED_ALONE = 0.01
"""Where the teacher's attention cannot be divided between the branches: of the output."""
COLLAPSED = 0.95
"""Of all answers one and the same, where no letter is right more than COLLAPSED_RIGHT of the time."""
COLLAPSED_RIGHT = 0.6
LEAST_QUESTIONS = 8


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: "not finite", "worse than a constant", "dead gate", "bypassed branch", "frozen parameter", "untrained" or
            "letter collapse".
        layer: None for the whole model.
        part: the gate's, branch's or parameter's name, or the letter.
        message: a sentence without the layer.
    """

    kind: str
    layer: int | None
    part: str | None
    message: str


def judge(layers: Sequence[Layer], frozen: Mapping[int, list[str] | None], letters: Letters | None) -> list[Finding]:
    """All findings, from the first layer to the last."""
    found = []
    untrained = bool(frozen) and all(names is None for names in frozen.values())
    for layer in layers:
        found += [*_output(layer), *_gates(layer), *_branches(layer)]
        if not untrained:
            found += _parameters(layer.layer, frozen.get(layer.layer, []))
    if untrained:
        text = "no parameter of any mixer has moved from its start: the model is not trained; run distill first"
        found.append(Finding("untrained", None, None, text))
    return found + list(_letters(letters))


def in_words(findings: Sequence[Finding]) -> str:
    """One line for each thing that is wrong, with all its layers; numbers are those of the first of them."""
    groups: dict[tuple[str, str | None], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.part), []).append(finding)
    lines = []
    for first, *others in groups.values():
        line = first.message if first.layer is None else f"layer {first.layer}: {first.message}"
        if others:
            line += f" (and layer{'s' if len(others) > 1 else ''} {', '.join(str(other.layer) for other in others)})"
        lines.append(line)
    return "\n".join(lines) or "nothing is wrong"


def _output(layer: Layer) -> Iterator[Finding]:
    bad = [head for head, error in enumerate(layer.error) if not math.isfinite(error)]
    if bad:
        yield Finding("not finite", layer.layer, None, f"the output of {_heads(bad)} is not finite")
        return
    mean = sum(layer.error) / len(layer.error)
    if mean > 1:
        text = f"its output is {mean:.2f} times as far from the teacher's as a constant would be"
        yield Finding("worse than a constant", layer.layer, None, text)


def _gates(layer: Layer) -> Iterator[Finding]:
    for gate, half_lives in layer.half_life.items():
        dead = [head for head, tokens in enumerate(half_lives) if tokens < DEAD_HALF_LIFE]
        if dead:
            shortest = min(half_lives)
            yield Finding(
                "dead gate",
                layer.layer,
                gate,
                f"the gate {gate} is dead: {_heads(dead)} of {len(half_lives)} forget half of "
                f"what they hold within {shortest:.2g} tokens; start it near 1 (gate_init=0.999)",
            )


def _branches(layer: Layer) -> Iterator[Finding]:
    for branch, heads in layer.shares.items():
        share = sum(heads) / len(heads)
        expected = layer.teacher_shares.get(branch)
        beside = f"{share:.2%} of the output"
        if expected is None:
            bypassed = len(layer.shares) > 1 and share < BYPASSED_ALONE
        else:
            teacher = sum(expected) / len(expected)
            bypassed = teacher >= LEAST_TEACHER_SHARE and share < BYPASSED * teacher
            beside += f", where the teacher puts {teacher:.1%} of its attention"
        if bypassed:
            text = f"the branch {branch} is bypassed: it carries {beside}"
            yield Finding("bypassed branch", layer.layer, branch, text)


def _parameters(layer: int, names: list[str] | None) -> Iterator[Finding]:
    if names is None:
        text = "no parameter of the mixer has moved from its start"
        yield Finding("frozen parameter", layer, None, text)
    for name in names or ():
        text = f"the parameter {name} has not moved from its start; does it train, in fp32?"
        yield Finding("frozen parameter", layer, name, text)


def _letters(letters: Letters | None) -> Iterator[Finding]:
    if letters is None or letters.questions < LEAST_QUESTIONS:
        return
    letter, times = max(letters.model.items(), key=lambda item: item[1])
    one_is_right = max(letters.right.values()) > COLLAPSED_RIGHT * letters.questions
    if times < COLLAPSED * letters.questions or one_is_right:
        return
    right = f"which is right {letters.right[letter]} times"
    text = f"{times} of {letters.questions} questions are answered with {letter}, {right}"
    if letters.teacher is not None:
        text += f"; the teacher says it {letters.teacher[letter]} times"
    yield Finding("letter collapse", None, letter, text)


def _heads(heads: list[int]) -> str:
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"

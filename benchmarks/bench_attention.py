"""Verify, then time: one layer's attention, ours beside softmax, flex_attention, fla and what can be composed of them.

    python benchmarks/bench_attention.py                      # on a CUDA device: everything, about 15 minutes
    python benchmarks/bench_attention.py --quick --peers none # the headline cases without compiling fla: a minute
    python benchmarks/bench_attention.py --check              # on a CPU: the formulas and gradients only
    python benchmarks/bench_attention.py --render FILE.json   # the tables and the picture of a run, or of shapes' runs

Each contender is first checked in bf16 against the same formula in float64, output and gradients; what is red is not
timed. All figures are of one run on one device, so that ratios count. Written to --out: attention.json, .md, .png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import decoding
import torch
from contenders import HALF_LIFE, HEAVY, KEEP, MIXERS, SHAPES, WINDOW, Contender, Inputs, Shape, draw, ours
from measure import attempt, machine, measure, verify
from report import joined, markdown, plot, render, rounded, save

CASES = {
    "1b": ((8, 1024), (8, 2048), (1, 8192), (1, 32768), (1, 131072)),
    "8b": ((8, 1024), (4, 2048), (1, 8192), (1, 16384), (1, 32768)),
    "smollm2": ((8, 1024), (8, 2048), (1, 8192), (1, 32768), (1, 131072)),
}
"""Batch and tokens."""
QUICK = {"1b": ((8, 2048), (1, 32768)), "8b": ((4, 2048),), "smollm2": ((8, 2048),)}
HEADLINES = ("1b", "8b")
CHECKED = (2, 640)
"""Of the inputs that a contender is checked on: five windows."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all, or the headline ones")
    parser.add_argument("--lengths", type=int, nargs="+", help="only the cases with so many tokens in a sequence")
    parser.add_argument("--quick", action="store_true", help="only the headline cases")
    parser.add_argument("--peers", choices=("full", "forward", "none"), default="full", help="fla compiles 2 minutes")
    parser.add_argument("--compilers", type=int, default=0, help="processes that first compile what fla will try")
    parser.add_argument("--impl", default="auto", help="of lizardzoo's kernels: auto, triton or reference")
    parser.add_argument("--only", action="append", help="only contenders with this in their name")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="no decoding steps")
    parser.add_argument("--check", action="store_true", help="verify ours in plain PyTorch on the CPU, time nothing")
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="FILE.json",
        help="tables and picture of an earlier run; of several, one for each shape, together in --out",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for what is written")
    given = parser.parse_args()
    least = 2 * len(shapes_of(given))
    if given.compilers and (given.peers != "full" or given.compilers < least):
        parser.error(f"--compilers needs --peers full, and 2 for each shape: at least {least} here")
    return given


def shapes_of(arguments: argparse.Namespace) -> list[str]:
    """The shapes that were asked for."""
    return arguments.shape or list(HEADLINES if arguments.quick else SHAPES)


def main() -> None:
    """Verify, time, print, write."""
    arguments = parse()
    if arguments.render:
        path = arguments.render[0]
        if len(arguments.render) > 1:
            path = arguments.out / "attention.json"
            save(joined(arguments.render), path)
        render(path, markdown, plot)
    elif arguments.check:
        check()
    elif not torch.cuda.is_available():
        raise SystemExit("bench_attention times kernels on a CUDA device, and torch finds none here; see --check")
    else:
        bench(arguments)


def check() -> None:
    """Ours by the reference kernels in bf16 on the CPU."""
    torch.manual_seed(0)
    contenders = ours("reference")
    inputs = draw(Shape(4, 2, 16, 16), 2, 300, "cpu")
    if len([verdict for verdict in verdicts(contenders, inputs, "full") if verdict["right"]]) < len(contenders):
        raise SystemExit("not all are right")


def bench(arguments: argparse.Namespace) -> None:
    """All cases of all shapes; the file is written after each contender: a run cut short leaves what it has."""
    torch.manual_seed(0)
    run: dict[str, Any] = {"machine": machine(), "window": WINDOW, "keep": KEEP, "heavy": HEAVY, "half_life": HALF_LIFE}
    run |= {"verified": [], "results": [], "decode": []}
    print(run["machine"])
    contenders = chosen(arguments)
    shapes = shapes_of(arguments)
    if arguments.compilers:
        from compile_peers import compile_ahead

        compile_ahead(shapes, arguments.compilers)
    for name in shapes:
        shape = SHAPES[name]
        found = verdicts(contenders, draw(shape, *CHECKED, "cuda"), arguments.peers)
        run["verified"] += [{"shape": name, **verdict} for verdict in found]
        for batch, tokens in cases(name, arguments):
            for contender in [verdict["contender"] for verdict in found if verdict["right"]]:
                figures = attempt(figures_of, contenders[contender], shape, batch, tokens, arguments.peers)
                case = {"shape": name, "batch": batch, "tokens": tokens, "contender": contender}
                run["results"].append(case | figures)
                print(*case.values(), rounded(figures), flush=True)
                save(run, arguments.out / "attention.json")
    if arguments.decode:
        run["decode"] += decode(arguments)
    save(run, arguments.out / "attention.json")
    render(arguments.out / "attention.json", markdown, plot)


def chosen(arguments: argparse.Namespace) -> dict[str, Contender]:
    """The contenders that are wanted, softmax first and ours last."""
    from peers import peers

    contenders = ours(arguments.impl)
    found = {"sdpa": contenders.pop("sdpa")} | peers() | contenders
    return {
        name: contender
        for name, contender in found.items()
        if not (arguments.peers == "none" and contender.tunes)
        and (arguments.only is None or any(word in name for word in arguments.only))
    }


def cases(name: str, arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Batch and tokens of what is timed."""
    wanted = QUICK if arguments.quick else CASES
    return [case for case in wanted[name] if arguments.lengths is None or case[1] in arguments.lengths]


def verdicts(contenders: dict[str, Contender], inputs: Inputs, peers: str) -> list[dict[str, Any]]:
    """Whether each contender's output and gradients are right; prints how much they differ from float64."""
    return [
        {"contender": name, **attempt(verdict_on, name, contender, inputs, peers)}
        for name, contender in contenders.items()
    ]


def verdict_on(name: str, contender: Contender, inputs: Inputs, peers: str) -> dict[str, Any]:
    """Right or not, and the errors."""
    verdict = verify(contender, inputs, peers == "full" or not contender.tunes)
    gradients = ", ".join(f"{key} {error:.1e}" for key, error in verdict.gradients.items())
    print(f"{name}: output {verdict.output:.1e}; gradients {gradients or '-'}; first call {verdict.first_s:.1f} s")
    if verdict.red:
        print(f"  RED, not timed: {', '.join(verdict.red)}")
    return {"right": not verdict.red, **verdict._asdict()}


def figures_of(contender: Contender, shape: Shape, batch: int, tokens: int, peers: str) -> dict[str, Any]:
    """Figures of one contender in one case."""
    backward = peers == "full" or not contender.tunes
    figures = measure(contender, draw(shape, batch, tokens, "cuda"), backward)
    return figures | ({"note": contender.note} if contender.note and backward else {})


def decode(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps at the 1b shape: ours after short and long contexts, and the peers."""
    shape, impl = SHAPES["1b"], arguments.impl
    wanted: list[tuple[Any, ...]] = []
    for kind in MIXERS:
        error = attempt(decoding.verify_step, kind, shape, impl).get("error", math.inf)
        print(f"decode, lizardzoo {kind} mixer: relative error {error:.1e} against float64")
        if error < decoding.TOLERANCE:
            steps = {f"lizardzoo {kind}": decoding.kernel_step, f"lizardzoo {kind} mixer": decoding.mixer_step}
            wanted += [(name, c, step, kind, shape, impl, c) for name, step in steps.items() for c in decoding.CONTEXTS]
    if arguments.peers != "none":
        wanted += [("fla recurrent step, features given", 0, decoding.fla_recurrent, shape)]
    wanted += [("sdpa", context, decoding.cached_softmax, shape, context) for context in decoding.CACHES]
    found = []
    for contender, context, *call in wanted:
        found.append({"shape": "1b", "contender": contender, "context": context, **attempt(*call)})
        print("decode", rounded(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    main()

"""Which mixer recovers a teacher best from one budget? Train each variant the same way, measure it, tell the numbers.

    python benchmarks/compare.py --train novel.txt alpaca.jsonl.gz --text wiki.txt:2048:16 book.txt:8192:4 \\
        --variants hybrid bare 'gate-*' --stages 1 --minutes 25 --out out/compare
    python benchmarks/compare.py --list                        # the variants
    python benchmarks/compare.py --render --out out/compare    # the tables and the picture again

Every variant gets the same sequences in the same order, the recommended recipe's rates, and is measured on the same
texts beside its teacher: at the start, after stage 1 (transfer), after stage 2 (finetune). What has been measured
stands in --out/results.json after each stage of each variant; the same command goes on where it was stopped, in the
middle of a stage too. --minutes stops between variants, before one that would not fit. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from fnmatch import fnmatchcase
from pathlib import Path

from compare_report import markdown, plot
from comparison import RANKED, Comparison, Results
from transformers.utils import logging as transformers_logging
from variants import VARIANTS


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="training text: .txt, .jsonl, also .gz")
    parser.add_argument("--text", nargs="+", default=[], help="text to measure on: FILE[:LENGTH[:SEQUENCES]]")
    parser.add_argument("--teacher", type=Path, help="folder of the teacher; default: lizardzoo.smollm2's")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
    parser.add_argument("--variants", nargs="+", default=["*"], help="names or patterns such as 'gate-*'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", type=int, choices=[0, 1, 2], default=1, help="0: only measure the start")
    parser.add_argument("--steps", type=int, nargs=2, default=[200, 250], help="of stage 1 and of stage 2")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a training sequence")
    parser.add_argument("--micro-batch", type=int, help="sequences per forward pass, where sizes are chosen too")
    parser.add_argument("--distances", type=int, nargs="*", default=[], help="also retrieval, in the first text")
    parser.add_argument("--questions", type=Path, nargs="*", default=[], help="also these files of questions")
    parser.add_argument("--few-shot", type=int, default=0)
    parser.add_argument("--few-shot-from", type=Path)
    parser.add_argument("--question-limit", type=int)
    parser.add_argument("--minutes", type=float, help="stop before a variant that would not fit into so many")
    parser.add_argument("--keep-models", action="store_true", help=f"keep every model, not only {RANKED}'s")
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    parser.add_argument("--list", action="store_true", help="list the variants and stop")
    parser.add_argument("--render", action="store_true", help="only write tables and picture of what is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, measure, tell."""
    began = time.monotonic()
    arguments = parse(argv)
    if arguments.list:
        print("\n".join(f"{variant.name:24} {variant.differs}" for variant in VARIANTS))
        return
    results = Results(arguments.out / "results.json")
    if not arguments.render:
        chosen = [v for v in VARIANTS if any(fnmatchcase(v.name, pattern) for pattern in arguments.variants)]
        unknown = [p for p in arguments.variants if not any(fnmatchcase(v.name, p) for v in VARIANTS)]
        if unknown or not arguments.train or not arguments.text:
            wrong = f"no variant is called {unknown[0]!r} (see --list)" if unknown else "give --train and --text"
            raise SystemExit(wrong)
        transformers_logging.disable_progress_bar()
        comparison = Comparison(arguments, results)
        todo = [(v, seed) for seed in arguments.seeds for v in chosen if not comparison.is_done(v, seed)]
        print(f"{len(todo)} of {len(chosen) * len(arguments.seeds)} runs to do", flush=True)
        longest = 0.0
        for number, (variant, seed) in enumerate(todo):
            start = time.monotonic()
            if arguments.minutes is not None and start - began + longest > 60 * arguments.minutes:
                print(
                    f"stopped after {number} runs, {len(todo) - number} are left; the same command goes on", flush=True
                )
                break
            comparison.run(variant, seed)
            longest = max(longest, time.monotonic() - start)
    if not results.values["runs"]:
        print(f"there is nothing in {results.path}")
        return
    (arguments.out / "results.md").write_text(markdown(results.values), encoding="utf-8")
    plot(results.values, arguments.out / "results.png")
    print(markdown(results.values))


if __name__ == "__main__":
    main()

"""Verify, then time: a whole model generating, the teacher beside its student, against the length of the context.

    python benchmarks/bench_generation.py                  # on a CUDA device, random weights of SmolLM2-135M's shape
    python benchmarks/bench_generation.py --teacher FOLDER # a real checkpoint; the student is linearized from it
    python benchmarks/bench_generation.py --tiny           # a smoke run anywhere, without CUDA graphs on a CPU
    python benchmarks/bench_generation.py --render FILE.json

The logits of a step, as PyTorch runs it and replayed from a CUDA graph, are first compared with plain PyTorch in fp32;
what is red is not timed. Then: a step behind contexts of several lengths, reading such contexts, and one text that the
student generates past the last position its teacher was trained for. Written to --out: generation.json, .md, .png.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import generation
import torch
from generation import Decoder
from generation_report import markdown, plot
from measure import attempt, machine, relative_error, times
from report import render, rounded, save
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

import lizardzoo as lz
from lizardzoo.cache import cache_bytes
from lizardzoo.kernels import Impl

CONTEXTS, BATCHES = (2048, 8192, 32768, 131072), (1, 16)
LONG = (1025, 33792, 2048)
"""Tokens of the prompt (the last begins the first step), tokens generated behind it, and tokens from mark to mark."""
TINY: dict[str, Any] = {"contexts": (64, 128), "batches": (1, 2), "long": (140, 24, 8)}
CHECKED = (2, 304)
"""Rows and tokens of the text that steps are verified on: more than two windows."""
STEPS = 16  # what is read before is a multiple of 16 too, as are the contexts: no kernel is compiled twice
TOLERANCE = 1e-4
"""Of logits; where plain PyTorch in the model's dtype has more than half of it against fp32, twice that."""
READ_AT_ONCE = 2**19
"""Tokens of all rows together; the teacher reads no more: its time grows with the square of the length."""
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    initializer_range=0.04,  # attention scores of about 1
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=96, initializer_range=0.15,
)  # fmt: skip


class Contender(NamedTuple):
    """A model and its caches: behind a text less its last token, and of that size for timing.

    `steps`: how many can be taken behind it.
    """

    model: Any
    behind: Callable[[Any, Tensor], Any]
    sized: Callable[[Any, Tensor], Any]
    steps: int = STEPS


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", type=Path, help="folder of a checkpoint; default: random weights (--random)")
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2-135M's shape, the default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, short contexts; on a CPU too")
    parser.add_argument("--contexts", type=int, nargs="+", help=f"tokens before a step; default: {CONTEXTS}")
    parser.add_argument("--batches", type=int, nargs="+", help=f"sequences at once; default: {BATCHES}")
    parser.add_argument(
        "--long", type=int, nargs=3, metavar=("PROMPT", "NEW", "MARK"), help=f"the long text; default: {LONG}"
    )
    parser.add_argument("--impl", default="auto", help="of lizardzoo's kernels: auto, triton or reference")
    parser.add_argument("--no-prefill", dest="prefill", action="store_false", help="do not time reading")
    parser.add_argument("--no-long", dest="far", action="store_false", help="no long text")
    parser.add_argument("--render", type=Path, metavar="FILE.json", help="tables and picture of an earlier run")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for what is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Verify, time, print, write."""
    arguments = parse(argv)
    if arguments.render:
        render(arguments.render, markdown, plot)
    elif not torch.cuda.is_available() and not arguments.tiny:
        raise SystemExit("bench_generation times models on a CUDA device, and torch finds none here; see --tiny")
    elif arguments.teacher and (arguments.random or arguments.tiny):
        raise SystemExit("--teacher FOLDER is a model of its own; leave out --random and --tiny")
    else:
        bench(arguments)


def bench(arguments: argparse.Namespace) -> None:
    """The file is written after each case, so that a run cut short leaves what it has."""
    set_seed(0)
    path = arguments.out / "generation.json"
    teacher = obtain(arguments)
    student = linearized(teacher, arguments.impl)
    run: dict[str, Any] = {"machine": machine(), "model": described(teacher, arguments), "seed": 0}
    run |= {"verified": [], "decode": [], "prefill": []}
    print(run["machine"], run["model"], sep="\n", flush=True)
    contenders = {
        "teacher": Contender(teacher, generation.full_cache, generation.drawn_full_cache, steps=1),
        "teacher, static cache": Contender(teacher, generation.static_cache, generation.drawn_static_cache),
        "student": Contender(student, generation.state_cache, lambda *text: generation.read_by_student(*text)[0]),
    }
    for name, contender in contenders.items():
        run["verified"].append({"contender": name, **attempt(verdict, name, contender)})
        print(name, rounded(run["verified"][-1]), flush=True)
    right = [entry["contender"] for entry in run["verified"] if entry["right"]]
    for batch, context in cases(arguments):
        where = {"batch": batch, "context": context}
        ids = random_tokens(teacher, batch, context)
        for name in right:
            run["decode"].append({"contender": name, **where, **attempt(step_figures, contenders[name], ids)})
            print(rounded(run["decode"][-1]), flush=True)
        for name in [name for name in ("teacher", "student") if name in right and arguments.prefill]:
            run["prefill"].append({"contender": name, **where, **attempt(read_figures, contenders[name].model, ids)})
            print("reading", rounded(run["prefill"][-1]), flush=True)
        save(run, path)
    if arguments.far and "student" in right:
        run["long"] = attempt(long_text, student, *(arguments.long or (TINY["long"] if arguments.tiny else LONG)))
    save(run, path)
    render(path, markdown, plot)


def obtain(arguments: argparse.Namespace) -> Any:
    """The teacher: bf16 on a CUDA device, else fp32."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if arguments.teacher is not None:
        model = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=dtype).to(device)
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(SMALL if arguments.tiny else SMOLLM2, dtype=dtype)
    if getattr(model.config, "sliding_window", None) is not None:
        raise SystemExit("the teacher has sliding windows of its own; give one whose cache holds all tokens")
    model.set_attn_implementation("sdpa")
    return model.eval()


def linearized(teacher: Any, impl: str) -> Any:
    """The hybrid in every layer, its gates and maps near their start values."""
    student = lz.linearize(teacher, "hybrid").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mixer in student.mixers().values():
            mixer.impl = Impl(impl)
            for parameter in mixer.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return student


def described(teacher: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is timed."""
    shape = "a tiny Llama" if arguments.tiny else "SmolLM2-135M's shape"
    return {
        "name": arguments.teacher.name if arguments.teacher else f"random weights of {shape}",
        "parameters": teacher.num_parameters(),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "positions": teacher.config.max_position_embeddings,
        "piece": generation.PIECE,
        "room": generation.ROOM,
    }


def cases(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Batch and context, the small ones first."""
    batches = arguments.batches or (TINY["batches"] if arguments.tiny else BATCHES)
    contexts = arguments.contexts or (TINY["contexts"] if arguments.tiny else CONTEXTS)
    return [(batch, context) for batch in batches for context in contexts]


def random_tokens(model: Any, batch: int, length: int) -> Tensor:
    """[batch, length]."""
    return torch.randint(model.config.vocab_size, (batch, length), device=model.device)


@torch.no_grad()
def verdict(name: str, contender: Contender) -> dict[str, Any]:
    """Relative errors of logits against plain PyTorch in fp32: of the whole text at once, of steps, of replayed steps.

    `plain` is that of plain PyTorch in the model's dtype, twice which is allowed.
    """
    model, steps = contender.model, contender.steps
    ids = random_tokens(model, *CHECKED)
    reference = copy.deepcopy(model)
    for mixer in reference.mixers().values() if hasattr(reference, "mixers") else ():
        mixer.impl = Impl.REFERENCE
    last = partial(whole, ids=ids, count=steps)
    plain, exact = last(reference), last(reference.float())
    answers = {"whole": last(model), "eager": stepped(contender, ids)}
    if torch.cuda.is_available():
        answers["graph"] = stepped(contender, ids, generation.replayed)
    errors = {name: relative_error(answer, exact) for name, answer in answers.items()}
    errors["plain"] = relative_error(plain, exact)
    allowed = max(TOLERANCE, 2 * errors["plain"])
    if "graph" in answers:
        errors["graph against eager"] = relative_error(answers["graph"], answers["eager"])
    return {"right": all(error <= allowed for error in errors.values()), "allowed": allowed, **errors}


def whole(model: Any, ids: Tensor, count: int) -> Tensor:
    """The last logits [B, count, V] of one forward."""
    return model(ids, use_cache=False, logits_to_keep=count).logits.float()


def stepped(contender: Contender, ids: Tensor, wrap: Callable[[Any], Any] = lambda run: run) -> Tensor:
    """The same by steps."""
    start = ids.shape[1] - contender.steps
    decoder = Decoder(
        contender.model, contender.behind(contender.model, ids[:, : start + 1]), ids[:, start : start + 1]
    )
    run, found = wrap(decoder.step), []
    for token in ids[:, start:].split(1, 1):
        decoder.token.copy_(token)
        run()
        found.append(decoder.logits.float())
    return torch.stack(found, 1)


def step_figures(contender: Contender, ids: Tensor) -> dict[str, Any]:
    """Milliseconds of a step, MiB of its cache, and MiB beside the weights while it runs."""
    before = settled()
    cache = contender.sized(contender.model, ids)
    decoder = Decoder(contender.model, cache, ids[:, -1:])
    decoder.step()
    figures: dict[str, Any] = {"cache MiB": cache_bytes(cache) / 2**20}
    _, memory = generation.watched(lambda: figures.update(times("step", decoder.step)))
    return figures | beyond(before, memory)


def read_figures(model: Any, ids: Tensor) -> dict[str, Any]:
    """Milliseconds of reading ids into an empty cache, and MiB beside the weights meanwhile."""
    if hasattr(model, "mixers"):
        reader = generation.read_by_student
    elif ids.numel() <= READ_AT_ONCE:
        reader = generation.read_by_teacher
    else:
        return {"missing": f"not timed above {READ_AT_ONCE:,} tokens"}
    before = settled()
    reader(model, ids[:, : CONTEXTS[0]])
    runs = [generation.watched(lambda: reader(model, ids)) for _ in range(3 if ids.numel() <= READ_AT_ONCE // 4 else 1)]
    return {"ms": 1e3 * statistics.median(seconds for seconds, _ in runs), **beyond(before, runs[-1][1])}


def long_text(student: Any, prompt: int, count: int, mark: int) -> dict[str, Any]:
    """Marks of the long text; `error` is that of its last logits, relative to those of reading it all in pieces."""
    ids = random_tokens(student, 1, prompt)
    before = settled()
    marks, text, logits = generation.generate(student, ids, count, mark)
    for entry in marks:
        entry |= beyond(before, entry)
        print("long text", rounded(entry), flush=True)
    again = generation.read_by_student(student, torch.cat([ids, text[:, :-1]], 1))[1]
    return {"prompt": prompt, "generated": count, "marks": marks, "error": relative_error(logits, again)}


def settled() -> float:
    """MiB on the device when all that nobody holds is gone."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**20


def beyond(before: float, memory: dict[str, float]) -> dict[str, float]:
    """MiB more than there were."""
    return {key: memory[key] - before for key in ("MiB", "peak MiB") if key in memory}


if __name__ == "__main__":
    main()

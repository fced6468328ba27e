"""Do the Triton kernels train as the reference does? Stage 1 of SmolLM2 with hybrids, the same batches, several times.

    python benchmarks/convergence.py --data novel.txt other.txt.gz      # on a CUDA device
    python benchmarks/convergence.py --data novel.txt --tiny --impl auto --steps 5    # a smoke test anywhere

Four runs: with `--impl`; with the reference; with the reference in other chunks, another order of summing (which the
rounding of outputs to bf16 hides nearly all of); and exactly: with the reference computing each mixer in fp32 from the
same bf16 q, k and v. The kernels are as good as the reference where they stay as close to the exact run as it does.
Written to --out: each step's loss, the relative differences of losses, tokens per second, peak memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from scaling import TimedLog
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import lizardzoo as lz
from lizardzoo.distill.recipe import Stage, recipe_from
from lizardzoo.distill.trainer import read_log, training_arguments
from lizardzoo.distill.transfer import transfer
from lizardzoo.kernels import Impl
from lizardzoo.kernels.gated_linear import reference as linear_reference
from lizardzoo.kernels.window import reference as window_reference
from lizardzoo.smollm2 import load_teacher

CHUNK = 32
"""Of the second reference run; the reference's own is 64."""
REFERENCE, EXACT = "reference", "exact"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="text files, plain or .gz")
    parser.add_argument("--teacher", type=Path, help="folder of the teacher; default: lizardzoo.smollm2's")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama on bytes instead")
    parser.add_argument("--impl", default="triton", help="what is compared with the reference")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--out", type=Path, default=Path("out/bench/convergence.json"))
    return parser.parse_args()


def main() -> None:
    """Train, compare, write."""
    arguments = parse()
    teacher, tokenizer = obtain(arguments)
    text = "".join(map(read, arguments.data))
    batches = sequences(text, tokenizer, arguments.steps * arguments.batch, arguments.tokens)
    stage = dataclasses.replace(
        recipe_from("recommended").transfer,
        steps=arguments.steps, batch_size=arguments.batch, sequence_length=arguments.tokens,
    )  # fmt: skip
    runs = {arguments.impl: train(teacher, batches, stage, arguments.impl)}
    runs[REFERENCE] = train(teacher, batches, stage, REFERENCE)
    with chunks_of(CHUNK):
        runs[f"{REFERENCE}, chunks of {CHUNK}"] = train(teacher, batches, stage, REFERENCE)
    runs[EXACT] = train(teacher, batches, stage, REFERENCE, exact=True)
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "stage": dataclasses.asdict(stage),
        "runs": runs,
        "differences": {
            base: {name: differences(run, runs[base]) for name, run in runs.items()} for base in (REFERENCE, EXACT)
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


def obtain(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher in bf16 and its tokenizer (None: bytes)."""
    if arguments.tiny:
        set_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, initializer_range=0.15,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(torch.bfloat16).eval(), None
    if arguments.teacher is None:
        return load_teacher(torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(arguments.teacher)


def read(path: Path) -> str:
    """A text file, packed or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def sequences(text: str, tokenizer: Any, count: int, length: int) -> list[dict[str, Tensor]]:
    """The first `count` sequences of the text."""
    text = text[: 8 * count * length]  # more than enough: a token has about four characters
    tokens = list(text.encode()) if tokenizer is None else tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < count * length:
        raise SystemExit(
            f"the data hold {len(tokens):,} tokens; {count} sequences of {length} need more: name more files"
        )
    return [{"input_ids": row} for row in torch.tensor(tokens[: count * length]).view(count, length)]


def train(
    teacher: Any, batches: Sequence[dict[str, Tensor]], stage: Stage, impl: str, exact: bool = False
) -> dict[str, Any]:
    """Losses by step, tokens per second and peak memory of one run from the start values."""
    set_seed(0)
    student = lz.linearize(teacher, "hybrid")
    for mixer in student.mixers().values():
        mixer.impl = Impl(impl)
        if exact:
            mixer.register_forward_pre_hook(_widen)
            mixer.register_forward_hook(_narrow)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        log = TimedLog("transfer", Path(folder) / "log.jsonl")
        steps = stage.total_steps(len(batches))
        settings = training_arguments(
            stage, Path(folder), steps=steps, seed=0, micro_batch_size=None, checkpoint_every=steps
        )
        transfer(student, stage, list(batches), settings, log)
        losses = [entry["loss"] for entry in read_log(log.path)]
    seconds = statistics.median(b - a for a, b in zip(log.ends, log.ends[1:]))
    run: dict[str, Any] = {"losses": losses, "tokens/s": stage.batch_size * stage.sequence_length / seconds}
    if torch.cuda.is_available():
        run["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        del student
        torch.cuda.empty_cache()
    print(f"{impl}: loss {losses[0]:.5f} -> {losses[-1]:.5f}, {run['tokens/s']:,.0f} tokens/s", flush=True)
    return run


def _widen(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A mixer's inputs in fp32."""
    inputs, *others = arguments
    return inputs.each(lambda x: x.float() if x.is_floating_point() else x), *others


def _narrow(_: Any, __: Any, result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Its output in the model's dtype again."""
    return result[0].to(torch.bfloat16), result[1]


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Inside, the reference kernels work in chunks of another size."""
    modules: list[Any] = [linear_reference, window_reference]
    before = [module.CHUNK for module in modules]
    for module in modules:
        module.CHUNK = size
    try:
        yield
    finally:
        for module, chunk in zip(modules, before):
            module.CHUNK = chunk


def differences(run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """Of the losses, step by step, relative to the baseline's."""
    each = [abs(a - b) / b for a, b in zip(run["losses"], baseline["losses"])]
    return {"max": max(each), "mean": statistics.fmean(each), "last": each[-1]}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{found['device']}, torch {found['torch']}, {found['stage']['steps']} steps; differences of losses, relative, "
        f"mean (largest):",
        "",
        "| run | first loss | last loss | to the reference | to the exact run | tokens/s | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in found["runs"].items():
        apart = [found["differences"][base][name] for base in (REFERENCE, EXACT)]
        cells = [name, f"{run['losses'][0]:.5f}", f"{run['losses'][-1]:.5f}"]
        cells += [f"{difference['mean']:.1e} ({difference['max']:.1e})" for difference in apart]
        cells += [f"{run['tokens/s']:,.0f}", f"{run.get('peak MiB', 0):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

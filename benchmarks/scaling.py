"""What several GPUs give: both stages on one, and on all with whole and with shared out (FSDP2) frozen weights.

    torchrun --nproc-per-node 2 benchmarks/scaling.py                       # a random Llama of 1B, two GPUs, ~5 minutes
    torchrun --nproc-per-node 2 benchmarks/scaling.py --size 8b --steps 10 --batch 8 --micro 1
    python benchmarks/scaling.py --processes 2 --size tiny --tokens 128     # a smoke test on CPUs, by gloo

The same batches in every case, in micro batches of the same size, so the losses have to agree: those of the first step
but for the order of sums, later ones within what bf16 makes of that. Printed, and written to --out after every case:
tokens per second, peak memory of a device, loss differences. It needs neither `datasets` nor a network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lizardzoo as lz
from lizardzoo.distill import processes
from lizardzoo.distill.finetune import finetune
from lizardzoo.distill.recipe import Finetune, Stage
from lizardzoo.distill.trainer import StepLog, read_log, training_arguments
from lizardzoo.distill.transfer import transfer

SIZES = {  # hidden, mlp, layers, heads, kv heads, head_dim, vocabulary
    "tiny": (64, 128, 4, 4, 2, 16, 512),
    "135m": (576, 1536, 30, 9, 3, 64, 49152),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),
}
CASES = ("one", "whole", "sharded")
"""One process; all of them, each with the whole model; all of them, frozen weights shared out."""
STAGES = ("transfer", "finetune")
FIRST, LATER = 1e-4, 5e-2
"""Relative differences of the losses that are allowed: in the first step, and in any."""


class TimedLog(StepLog):
    """Notes when each step ended; reading its loss has waited for the device."""

    def __init__(self, stage: str, path: Path) -> None:
        super().__init__(stage, path, progress=False)
        self.ends: list[float] = []

    def on_log(self, *arguments: Any, **kwargs: Any) -> None:
        """One step."""
        super().on_log(*arguments, **kwargs)
        self.ends.append(time.perf_counter())


class RandomTokens:
    """Sequences that depend on their index alone: every process makes its own."""

    def __init__(self, count: int, tokens: int, vocabulary: int) -> None:
        self.count, self.tokens, self.vocabulary = count, tokens, vocabulary

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(self.vocabulary, (self.tokens,), generator=generator)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=processes.launched(), help="as torchrun says, unless given")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--layers", default="hybrid", help="a preset")
    parser.add_argument("--steps", type=int, default=30, help="of each stage")
    parser.add_argument("--skip", type=int, default=5, help="steps that are not timed: kernels are compiled there")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, over all devices")
    parser.add_argument("--micro", type=int, default=4, help="sequences per device at a time")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in finetune")
    parser.add_argument("--timeout", type=float, default=400, help="seconds after which a case is given up")
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not 0 < given.skip < given.steps:
        parser.error("--skip has to be above 0 and below --steps")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Every case in processes of its own, so that none inherits memory; 1 where losses disagree or a case fails."""
    given = parse(arguments)
    if given.worker:
        work(given)
        return 0
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun has said how many; the first one starts the others anew
        return 0
    if given.processes < 2:
        sys.exit("scaling compares one process with several; start it with torchrun --nproc-per-node 2")
    results: dict[str, Any] = {}
    print(f"{given.size}, {given.steps} steps of {given.batch} x {given.tokens}, micro batches of {given.micro}")
    print(f"{torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}", flush=True)
    for case in given.cases:
        results[case] = launch(given, case)
        given.out.write_text(json.dumps({"arguments": vars(given) | {"out": str(given.out)}, "results": results}))
        print("\n".join(row(case, results[case], results.get("one"), given)), flush=True)
    red = problems(results)
    print("\n".join(f"RED: {problem}" for problem in red) or "losses agree", flush=True)
    return 1 if red else 0


def launch(given: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run a case in new processes and read what the first of them measured; {"error": ...} if they fail."""
    strip = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
    environment = {k: v for k, v in os.environ.items() if not k.removeprefix("LOCAL_").startswith(strip)}
    environment.setdefault("OMP_NUM_THREADS", "4")
    command = [sys.executable]
    if case != "one":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command += ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(given.processes)]
        command += ["--master-addr", "127.0.0.1", "--master-port", port]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command += [__file__, "--worker", case, "--out", str(result)]
        for name in ("size", "layers", "steps", "skip", "batch", "micro", "tokens"):
            command += [f"--{name}", str(getattr(given, name))]
        command += ["--gradient-checkpointing"] if given.gradient_checkpointing else []
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=given.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return {"error": f"not done after {given.timeout:g} s", "output": output[-4000:]}
        finally:
            if process.poll() is None:  # interrupted
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode or not result.is_file():
            return {"error": f"exit code {process.returncode}", "output": output[-4000:]}
        return json.loads(result.read_text())


def work(given: argparse.Namespace) -> None:
    """What each process of a case does; the first writes the result."""
    state = processes.start()
    device = state.device
    model = student(given, device)
    data = RandomTokens(given.batch * given.steps, given.tokens, model.config.vocab_size)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage_name in STAGES:
            kind = Stage if stage_name == "transfer" else Finetune
            stage = kind(steps=given.steps, batch_size=given.batch, sequence_length=given.tokens)
            settings = training_arguments(
                stage,
                folder / stage_name,
                steps=given.steps,
                seed=0,
                micro_batch_size=given.micro,
                checkpoint_every=given.steps + 1,
            )
            log = TimedLog(stage_name, folder / "log.jsonl")
            shard = given.worker == "sharded"
            model.to("cpu")
            reset_memory(device)
            if stage_name == "transfer":
                transfer(model, stage, data, settings, log, shard=shard)
            else:
                checkpointing = given.gradient_checkpointing
                finetune(model, stage, data, settings, log, shard=shard, gradient_checkpointing=checkpointing)
            seconds = log.ends[-1] - log.ends[given.skip - 1]
            measured[stage_name] = {
                "tokens_per_s": given.batch * given.tokens * (given.steps - given.skip) / seconds,
                "peak_bytes": peak_memory(device),
            }
        state.wait_for_everyone()
        if state.is_main_process:
            for entry in read_log(folder / "log.jsonl"):
                measured[entry["stage"]].setdefault("losses", []).append(entry["loss"])
            given.out.write_text(json.dumps(measured))
    state.destroy_process_group()


def student(given: argparse.Namespace, device: torch.device) -> Any:
    """The same random student in every process, on the CPU."""
    return lz.linearize(random_teacher(given.size, given.tokens, device), given.layers).to("cpu")


def random_teacher(size: str, tokens: int, device: torch.device) -> LlamaForCausalLM:
    """Always the same random Llama: in bf16 on a GPU, where it is made for speed, else in fp32."""
    hidden, mlp, layers, heads, kv_heads, head_dim, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=tokens,
        initializer_range=hidden**-0.5,  # scores and logits of about 1: with less, attention would be a plain mean
        tie_word_embeddings=size != "8b",
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(config, dtype=config.dtype)


def reset_memory(device: torch.device) -> None:
    """What was allocated until here does not count."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors took on this device at most; without one, of the process, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(case: str, result: dict[str, Any], one: dict[str, Any] | None, given: argparse.Namespace) -> list[str]:
    """Lines for people."""
    if "error" in result:
        return [f"{case}: FAILED, {result['error']}", *result["output"].splitlines()[-40:]]
    count = 1 if case == "one" else given.processes
    lines = []
    for stage in STAGES:
        found = result[stage]
        text = f"{case:8} {count} x {stage:9} {found['tokens_per_s']:10,.0f} tokens/s"
        text += f"  {found['peak_bytes'] / 2**30:6.2f} GiB peak"
        text += f"  loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}"
        if one is not None and "error" not in one and case != "one":
            first, most = differences(found["losses"], one[stage]["losses"])
            text += f"  {found['tokens_per_s'] / one[stage]['tokens_per_s']:.2f} times one"
            text += f"; losses differ by {first:.1e} in step 1, at most {most:.1e}"
        lines.append(text)
    return lines


def differences(losses: list[float], expected: list[float]) -> tuple[float, float]:
    """Relative differences: of the first step, and the largest."""
    relative = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return relative[0], max(relative, key=lambda value: (math.isnan(value), value))


def problems(results: dict[str, Any]) -> list[str]:
    """What is red: cases that failed, losses that are not those of one process."""
    red = [f"{case} failed: {result['error']}" for case, result in results.items() if "error" in result]
    one = results.get("one", {"error": ""})
    for case, result in results.items():
        if case == "one" or "error" in result or "error" in one:
            continue
        for stage in STAGES:
            first, most = differences(result[stage]["losses"], one[stage]["losses"])
            if not (first <= FIRST and most <= LATER):
                red.append(f"{case}, {stage}: losses differ by {first:.1e} in step 1, at most {most:.1e}")
    return red


if __name__ == "__main__":
    sys.exit(main())

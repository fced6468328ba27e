"""What converting a large checkpoint takes: memory, time, and whether a stopped conversion ends in the same files.

    python benchmarks/streaming.py --folder /tmp/streaming          # 2 GB in, 2 GB out, twice; about a minute

Makes a Llama of --gigabytes in bf16, of random weights, in shards of --shard-megabytes. Then, each in a process of its
own: converts it; converts it again, killed when half of the files are there, and goes on. Printed: peak resident memory
above that of the interpreter with everything imported (on Linux), and whether all files are the same byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lizardzoo.streaming import INDEX, linearize_checkpoint, unfinished

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32000


def main(arguments: list[str] | None = None) -> int:
    """Make, convert, stop, go on, compare; 1 where the files differ or --limit-megabytes is passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="new; three times --gigabytes fit there")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-megabytes", type=int, default=400)
    parser.add_argument("--limit-megabytes", type=float, default=700, help="above the interpreter's own")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop-at", type=int, default=-1, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    teacher, whole, stopped = (given.folder / name for name in ("teacher", "whole", "stopped"))
    if given.convert is not None:
        print(json.dumps(convert(teacher, given.convert, given.stop_at)))
        return 0
    given.folder.mkdir(parents=True)
    files = make_teacher(teacher, given.gigabytes * 1e9, given.shard_megabytes * 10**6)
    size = sum(path.stat().st_size for path in teacher.glob("*.safetensors"))
    print(f"teacher: {size / 1e9:.2f} GB in {files} files, the largest of about {given.shard_megabytes} MB")
    first = run(given.folder, whole)
    print(f"converted in {first['seconds']:.1f} s, {first['peak'] / 1e6:.0f} MB above the {first['base'] / 1e6:.0f} MB")
    run(given.folder, stopped, stop_at=files // 2)
    found = len(list(unfinished(stopped).glob("*.safetensors")))
    print(f"killed with {found} files there; loadable: {(unfinished(stopped) / 'config.json').exists()}")
    run(given.folder, stopped)
    same = hashes(whole) == hashes(stopped)
    print(f"the files of the stopped conversion are {'the same' if same else 'OTHERS'}: {len(hashes(whole))}")
    shutil.rmtree(given.folder)
    return 0 if same and found == files // 2 and first["peak"] < given.limit_megabytes * 1e6 else 1


def make_teacher(folder: Path, size: float, shard: int) -> int:
    """A Llama of about `size` bytes, written a file at a time; the number of files."""
    layer = 2 * HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * MLP)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        num_hidden_layers=max(1, round((size - 4 * HIDDEN * VOCABULARY) / layer)),
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    names: list[list[str]] = [[]]
    filled = 0
    for name, tensor in empty.items():
        if filled and filled + tensor.nbytes > shard:
            names.append([])
            filled = 0
        names[-1].append(name)
        filled += tensor.nbytes
    weight_map = {}
    for number, part in enumerate(names, 1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        save_file({name: torch.randn(empty[name].shape).bfloat16() for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(names)


def run(folder: Path, out: Path, stop_at: int = -1) -> dict[str, float]:
    """Convert in a new process; what it measured, nothing if it was to be killed."""
    command = [sys.executable, __file__, "--folder", str(folder), "--convert", str(out), "--stop-at", str(stop_at)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=stop_at < 0)
    return json.loads(result.stdout.splitlines()[-1]) if stop_at < 0 else {}


def convert(teacher: Path, out: Path, stop_at: int) -> dict[str, float]:
    """Bytes that were resident before and at most more later, and seconds; dies when `stop_at` files are there."""

    def progress(done: int, total: int) -> None:
        if done == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    base = peak_resident()
    start = time.perf_counter()
    linearize_checkpoint(teacher, out, progress=progress)
    seconds = time.perf_counter() - start
    return {"base": base, "peak": peak_resident() - base, "seconds": seconds}


def peak_resident() -> int:
    """Bytes of this program's memory at its fullest; getrusage would begin with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def hashes(folder: Path) -> dict[str, str]:
    """Every file's."""
    found = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        found[path.name] = digest.hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main())

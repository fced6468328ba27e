"""Fill Triton's cache with all that fla's autotuning will compile, in several processes, each in another order.

fla tries some hundred settings of its kernels at the first call of a shape, and compiles them one by one, for minutes.
Here each process walks through them in an order of its own and times nothing; what one has compiled, the others find.
The benchmark's own process then tunes as fla does, without the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from typing import Any

import torch
from contenders import SHAPES
from peers import SUMS, lift_refusal, refuses_backward

TOKENS = (2, 640)


def compile_ahead(shapes: list[str], processes: int) -> None:
    """For these shapes, as many processes in all, two or more each; ends once one of each has compiled everything."""
    if importlib.util.find_spec("fla") is None:
        raise SystemExit("--compilers compiles what fla will try, and fla is not installed; leave it out")
    begun = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        (shape, subprocess.Popen([sys.executable, __file__, shape, str(number)], env=environment))
        for number in range(processes // len(shapes))
        for shape in shapes
    ]
    try:
        for shape in shapes:
            mine = [process for name, process in running if name == shape]
            while not any(process.poll() == 0 for process in mine):
                if all(process.poll() is not None for process in mine):
                    break  # all have failed; the benchmark will say why
                time.sleep(0.5)
    finally:
        for _, process in running:
            process.kill()
            process.wait()
    print(f"compiled fla's kernels for {', '.join(shapes)} in {time.monotonic() - begun:.0f} s", flush=True)


def compile_all(shape: str, seed: int) -> None:
    """Everything that a forward and backward of this shape tries, in the order of this seed."""
    from fla.ops.simple_gla import chunk_simple_gla
    from triton.runtime.autotuner import Autotuner

    order, prune = random.Random(seed), Autotuner.prune_configs

    def shuffled(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = list(prune(self, kwargs))
        return order.sample(configs, len(configs))

    def once(_: Any) -> Any:
        def run(call: Any, quantiles: Any) -> list[float]:
            call()
            return [1.0] * len(quantiles)

        return run

    Autotuner.prune_configs, Autotuner.do_bench = shuffled, property(once)  # type: ignore[method-assign,assignment]
    if refuses_backward():
        lift_refusal()
    heads, _, dim, feature_dim = SHAPES[shape]

    def tokens(*size: int) -> torch.Tensor:
        return torch.rand(*TOKENS, heads, *size, device="cuda", requires_grad=True)

    q, k, v = (tokens(size).bfloat16() for size in (2 * feature_dim, 2 * feature_dim, dim + SUMS))
    chunk_simple_gla(q, k, v, g=-tokens(), scale=1.0)[0].sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    compile_all(sys.argv[1], int(sys.argv[2]))

"""Decode steps as Triton compiles and launches them for Hopper, without a device: how many forms, how many launches."""

from __future__ import annotations

from tests.kernels.cases import run_compiling

STEPS = """
import torch
import host
import lizardzoo.kernels.heavy.step
from lizardzoo.kernels.heavy import triton_step as heavy
from lizardzoo.kernels.hybrid import triton_step as hybrid
from lizardzoo.kernels.window import triton_step as window
from lizardzoo import Heavy, Hybrid, Window
from lizardzoo.mixers import AttentionShape, MixerInputs, far
from lizardzoo.mixers.base import Turns

host.pretend()
SHAPE = AttentionShape(hidden_size=32, heads=4, kv_heads=2, head_dim=16, scale=0.25)
KERNELS = {Window: window.step_kernel, Heavy: heavy.step_kernel, Hybrid: hybrid.step}

def turns(batch, seed):
    angles = torch.rand(batch, 1, 16, generator=torch.Generator().manual_seed(seed))
    return Turns(angles.cos(), angles.sin())

def step(spec, batch, turns):
    mixer = spec.build(SHAPE)
    mixer.impl = "triton"
    state = mixer.init_state(batch, torch.bfloat16, "cpu")
    q, k, v = (torch.zeros(batch, 1, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    x, cos = torch.zeros(batch, 1, 32, dtype=torch.bfloat16), torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    return lambda: far.step_(mixer, MixerInputs(q, k, v, x, cos, cos, turns=turns), state)

for kind, kernel in KERNELS.items():
    def forms():
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    counts = []
    for given in (None, turns(2, 0)):
        run = step(kind(window=32, keep=4), 2, given)
        run()
        assert forms() == len(counts) + 1, f"{kind.__name__}: the kernel of this test is not the one that runs"
        counts.append(host.counts(run))
    assert counts[0] == counts[1], f"{kind.__name__}: launches, allocations, operations {counts}"
    for window_size, keep, batch, seed in [(1, 4, 2, 1), (128, 4, 3, 2), (17, 1, 2, 3), (64, 16, 1, 4), (100, 3, 4, 5)]:
        for given in (None, turns(batch, seed)):
            step(kind(window=window_size, keep=keep), batch, given)()
    assert forms() == 2, f"{kind.__name__}: {forms()} forms"
"""


def test_a_turn_costs_no_launch_and_no_size_or_turn_compiles_a_step_again() -> None:
    """Two forms of each step's kernel, with a turn of the kept keys and without, serve all windows and batches."""
    run_compiling(STEPS)

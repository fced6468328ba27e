"""Shared memory of every kernel on every kind of device, without one: `python benchmarks/shared_memory.py`.

Triton compiles the kernels for each compute capability as they would be launched there, and says how many bytes a block
takes. A block that takes more than the device has does not start (Triton's OutOfResources): then the exit status is 1.
Another version of Triton may need more or less: the table names it. Nothing runs, and the last steps of the compiler,
which do not change the number, are left out.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from host import Driver, pretend
from triton.backends.nvidia import compiler

from lizardzoo.config import MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.launching import device, forget
from lizardzoo.mixers import AttentionShape, GatedLinear, Heavy, Hybrid, MixerInputs, Window

MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB that a block may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DIMS = (32, 64, 128, 256)
SPECS: tuple[MixerSpec, ...] = (Heavy(sinks=1), Hybrid(), Hybrid(activation="exp"))
"""Their kernels are those of the window and of gated linear attention as well, but for two steps:"""
STEPS: tuple[MixerSpec, ...] = (Window(sinks=1), GatedLinear())
TOKENS = 320


class Need(NamedTuple):
    """A kernel as it is compiled for a device, and the bytes of shared memory that its blocks take."""

    kernel: str
    dtype: str
    dim: int
    capability: int
    shared: int

    @property
    def fits(self) -> bool:
        """Whether the device's blocks have as much."""
        return self.shared <= MEMORY[self.capability] << 10


class Endless(Driver):
    """A device whose blocks may take anything: else Triton would stop at the first one that takes too much."""

    class utils(Driver.utils):
        """What Triton asks of the device."""

        @staticmethod
        def get_device_properties(index: int) -> dict[str, int]:
            return {**Driver.utils.get_device_properties(index), "max_shared_mem": 1 << 30}


def prepare(folder: str) -> Driver:
    """Compile as far as the number, into a folder of its own, for what is made here cannot run."""

    def named(_: Any, source: str, metadata: dict[str, Any], *rest: Any) -> str:
        metadata["name"] = "kernel"
        return ""

    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    compiler.CUDABackend.make_ptx, compiler.CUDABackend.make_cubin = named, lambda *_: b""
    compiler.llvm.optimize_module = lambda *_, **__: None
    triton.knobs.cache.dir = folder
    found = Endless()
    pretend(found)
    return found


def kernels() -> Iterator[tuple[str, Any]]:
    """All of Triton's that have been imported, by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lizardzoo.kernels.") and isinstance(module, ModuleType):
            for kernel in vars(module).values():
                if hasattr(kernel, "device_caches") and kernel.fn.__module__ == name:
                    yield f"{name.split('.')[2]}: {kernel.fn.__name__}", kernel


def forms() -> dict[str, list[Any]]:
    """What has been compiled of every kernel, by its name."""
    return {name: [x for cache in k.device_caches.values() for x in cache[0].values()] for name, k in kernels()}


def run(
    spec: MixerSpec, dim: int, dtype: torch.dtype, groups: int, *, step_only: bool = False, flags: bool = True,
    frozen: bool = False,
) -> None:  # fmt: skip
    """A step of a mixer, and unless `step_only` a forward and backward: with `flags` of packed documents, whose kernels
    are the largest; `frozen`: of the mixer's own parameters alone."""
    shape = AttentionShape(hidden_size=64, heads=2 * groups, kv_heads=2, head_dim=dim, scale=dim**-0.5)
    mixer = spec.build(shape)
    mixer.impl = "triton"

    def inputs(count: int, flags: torch.Tensor | None) -> MixerInputs:
        q, k, v = (torch.zeros(1, count, heads, dim, dtype=dtype) for heads in (2 * groups, 2, 2))
        tokens = [x.requires_grad_(not frozen) for x in (q, k, v, torch.zeros(1, count, 64, dtype=dtype))]
        cos = torch.zeros(1, count, dim, dtype=dtype)
        return MixerInputs(*tokens, cos, cos, flags, flags)

    if not step_only:
        y = mixer(inputs(TOKENS, torch.ones(1, TOKENS, dtype=torch.bool) if flags else None))[0]
        if y.requires_grad:  # not where all is frozen and the mixer has no parameters
            y.sum().backward()
    with torch.no_grad():
        mixer.step_(inputs(1, None), mixer.init_state(1, dtype, "cpu"))


def needs(
    driver: Driver, capability: int, dtype: str, dim: int, specs: Iterable[MixerSpec], groups: Iterable[int] = (4,)
) -> list[Need]:
    """Of every kernel that these mixers launch; the most that any of its forms takes."""
    driver.capability, device.ON_CPU = capability, MEMORY[capability]
    forget()
    for _, kernel in kernels():
        kernel.device_caches.clear()
    for spec, group in itertools.product(specs, groups):
        with suppress(LizardzooError):  # refused, in a sentence, where no tile would fit
            run(spec, dim, DTYPES[dtype], group, step_only=spec in STEPS)
    return [
        Need(name, dtype, dim, capability, max(form.metadata.shared for form in found))
        for name, found in sorted(forms().items())
        if found
    ]


def case(arguments: tuple[int, str, int, tuple[int, ...]]) -> list[Need]:
    """`needs` of all mixers at this size; in a process of its own."""
    capability, dtype, dim, groups = arguments
    with tempfile.TemporaryDirectory() as folder:
        return needs(prepare(folder), capability, dtype, dim, (*SPECS, *STEPS), groups)


def table(found: Sequence[Need]) -> Iterator[str]:
    """A line for each kernel, dtype and dim: KB by capability, with a mark where they are not there."""
    capabilities = sorted({need.capability for need in found})
    heads = "".join(f"{f'{c // 10}.{c % 10}':>9}" for c in capabilities)
    yield f"{f'KB a block, triton {triton.__version__}, compute capability':52}{heads}"
    yield f"{'  of which there are':52}" + "".join(f"{MEMORY[c]:9}" for c in capabilities)
    for name, group in itertools.groupby(sorted(found), lambda need: need[:3]):
        kernel, dtype, dim = name
        cells = {n.capability: f"{n.shared / 1024:.0f}{' ' if n.fits else '!'}" for n in group}
        yield f"{kernel:40}{dtype:6}{dim:4}  " + "".join(f"{cells.get(c, '-'):>9}" for c in capabilities)


def main() -> int:
    """Print the table; 1 where a kernel does not fit a device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capability", type=int, choices=MEMORY, nargs="+", default=[80, 86, 90], help="80 is 8.0")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="head_dim and feature_dim")
    parser.add_argument("--groups", type=int, nargs="+", default=[4], help="query heads of a key head")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    a = parser.parse_args()
    cases = [(*sizes, tuple(a.groups)) for sizes in itertools.product(a.capability, a.dtype, a.dim)]
    with multiprocessing.get_context("spawn").Pool(a.jobs, maxtasksperchild=1) as pool:
        found = [need for part in pool.imap_unordered(case, cases, chunksize=1) for need in part]
    print(*table(found), sep="\n")
    missing = [need for need in found if not need.fits]
    print(f"{len(found)} forms, {len(missing)} of which do not fit (!); -: refused, or not compiled there")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

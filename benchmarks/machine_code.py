"""Does the assembler leave out a move? Every kernel's machine code for Hopper: `python benchmarks/machine_code.py`.

ptxas 12.8, which Triton 3.6 brings along, was seen to read a register that nothing had written: the copy from which the
descriptors of a product's second operand count on was left out, so that the product read anywhere in shared memory or
outside it (`chunk_states` with tiles of 32 features, see NOTES.md). Descriptors are in uniform registers, which only
instructions write: one that is read before the text of a kernel has written it is that bug. No device is needed:
kernels are compiled as they would be launched (`shared_memory.py` says how), assembled, disassembled and read.

It looks at the Triton that is installed, whose version and ptxas stand in the first line; exit status 1: a kernel has
the bug. All that there is takes half an hour of two cores. What was seen, with Triton 3.6 (3.9 finds nothing there):

    python benchmarks/machine_code.py --narrowest 1 --spec "hybrid, 32 features" --dim 64
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import shared_memory
import torch
import triton
from host import pretend

from lizardzoo.config import PRESETS, MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.gated_linear import launch
from lizardzoo.kernels.gated_linear.tables import NARROWEST
from lizardzoo.kernels.launching import forget
from lizardzoo.mixers import GatedLinear, Heavy, Hybrid, Window

DTYPES = {**shared_memory.DTYPES, "fp16": torch.float16}
SPECS: dict[str, MixerSpec] = {
    "heavy": Heavy(),
    "heavy, sinks": Heavy(sinks=1),
    "window": Window(),
    "hybrid": Hybrid(),
    "hybrid, exp": Hybrid(activation="exp"),
    "hybrid, overlap": Hybrid(disjoint=False),
    "hybrid, gate of query heads": Hybrid(gate="query_head"),
    "hybrid, no gates": Hybrid(gate=None, input_gate=False, log_scale=None),
    "hybrid, 16 features": Hybrid(feature_dim=16),
    "hybrid, 32 features": Hybrid(feature_dim=32),
    "hybrid, 48 features": Hybrid(feature_dim=48),
    "hybrid, 128 features": Hybrid(feature_dim=128),
    "gated linear": GatedLinear(),
    "lizard": PRESETS.get("lizard"),
    "lolcats": PRESETS.get("lolcats"),
}
DIMS = (32, 64, 80, 128, 256)

WRITERS = ("U", "R2UR", "S2UR", "CS2UR", "LDCU", "REDUX", "VOTEU")
"""How instructions begin that write a uniform register, which then is their first operand."""
UNIFORM = re.compile(r"(\bg?desc\[|\b)UR(\d+)\b")
"""A uniform register, or the first of a descriptor's."""


class Case(NamedTuple):
    """A mixer at a size; whether its sequences have flags (padding, packed documents) and only parameters learn; the
    narrowest tile of features."""

    spec: str
    dtype: str
    dim: int
    groups: int
    flags: bool
    frozen: bool
    narrowest: int = NARROWEST


class Read(NamedTuple):
    """A register that nothing has written, where it is read."""

    kernel: str
    case: Case
    at: str
    instruction: str
    registers: tuple[int, ...]


def unwritten(code: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """From a disassembly: address and text of each instruction that reads uniform registers not yet written, and which.

    The text's order stands for that of control: what a loop carries has been written in front of it.
    """
    written: set[int] = set()
    for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code):
        name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
        target = re.match(r"UR(\d+),", operands) if name.startswith(WRITERS) else None
        reads = set()
        for prefix, number in UNIFORM.findall(operands[target.end() :] if target else operands):
            # Memory has one descriptor, a product two; with its first operand in registers it reads the second alone.
            size = {"": 1, "desc[": 2, "gdesc[": 4}[prefix]
            alone = prefix == "gdesc[" and re.search(r"\bR\d+(\.reuse)?, R\d+(\.reuse)?, gdesc", operands)
            reads |= set(range(int(number) + (2 if alone else 0), int(number) + size))
        if missing := tuple(sorted(reads - written)):
            yield at, text, missing
            written |= set(missing)  # once is enough
        if target:
            size = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            written |= set(range(int(target[1]), int(target[1]) + size))


def look(case: Case) -> tuple[int, list[Read]]:
    """How many forms of kernels a case compiles, and what is wrong with them; in a process of its own."""
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        pretend(shared_memory.Endless())
        forget()
        launch.NARROWEST = case.narrowest
        with suppress(LizardzooError):  # refused, in a sentence
            shared_memory.run(
                SPECS[case.spec], case.dim, DTYPES[case.dtype], case.groups, flags=case.flags, frozen=case.frozen
            )
        forms = [(name, form) for name, compiled in shared_memory.forms().items() for form in compiled]
        found = []
        for name, form in forms:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(form.asm["cubin"])
            found += [Read(name, case, *read) for read in unwritten(disassembled(file))]
        return len(forms), found


def disassembled(file: Path) -> str:
    """By the nvdisasm that Triton brings along."""
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Print what was found; 1 where it is anything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--spec", choices=SPECS, nargs="+", default=list(SPECS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="head_dim")
    parser.add_argument("--groups", type=int, nargs="+", default=[3], help="query heads of a key head")
    parser.add_argument("--narrowest", type=int, default=NARROWEST, help="columns of a tile of features at least")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    a = parser.parse_args()
    ptxas = triton.knobs.nvidia.ptxas
    print(f"triton {triton.__version__}, ptxas {ptxas.version}, sm_90", flush=True)
    flags = ((False, False), (True, False), (False, True))
    cases = [Case(*x[:4], *x[4], a.narrowest) for x in itertools.product(a.spec, a.dtype, a.dim, a.groups, flags)]
    total, wrong = 0, 0
    with multiprocessing.get_context("spawn").Pool(a.jobs, maxtasksperchild=1) as pool:
        for count, found in pool.imap_unordered(look, cases, chunksize=1):
            total, wrong = total + count, wrong + len({read.kernel for read in found})
            for read in found:
                print(f"{read.kernel}: {read.instruction} reads UR{read.registers} ({read.case})", flush=True)
    print(f"{total} forms, {wrong} of which read what nothing has written")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Registers that nothing has written: found where one is, and in no kernel as the installed Triton assembles it."""

from __future__ import annotations

from tests.kernels.cases import run_compiling

READS = '''
from machine_code import unwritten

# What ptxas 12.8 made of two steps of a product in `chunk_states` with tiles of 32 features.
SPOILT = """
        /*0ae0*/                   S2UR UR5, SR_CgaCtaId ;
        /*0af0*/                   UMOV UR7, 0x400 ;
        /*0ca0*/                   ULEA UR7, UR5, UR7, 0x18 ;
        /*1060*/                   UIADD3 UR5, UR7, 0x2000, URZ ;
        /*10a0*/                   USGXT.U32 UR12, UR5, 0xe ;
        /*1fb0*/                   USHF.R.U32.HI UR8, URZ, 0x4, UR7 ;
        /*2000*/                   UMOV UR9, 0x40000040 ;
        /*2010*/                   UMOV UR10, UR12 ;
        /*2020*/                   UMOV UR11, 0x80000020 ;
        /*2030*/                   WARPGROUP.ARRIVE ;
        /*2040*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, RZ, !UPT ;
        /*2050*/                   UIADD3 UR14, UP0, UR14, 0x40, URZ ;
        /*2060*/                   UIADD3 UR12, UP1, UR8, 0x80, URZ ;
        /*2070*/                   UMOV UR5, URZ ;
        /*2080*/                   UIADD3.X UR15, UR15, -0x7fffffe0, URZ, UP0, !UPT ;
        /*2090*/                   UIADD3.X UR13, UR5, 0x40000040, URZ, UP1, !UPT ;
        /*20b0*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR12].tnspA.tnspB, R24 ;
"""
SOUND = SPOILT.replace("UR14, UP0, UR14", "UR14, UP0, UR10").replace("UR15, UR15,", "UR15, URZ,")
assert [(at, registers) for at, _, registers in unwritten(SPOILT)] == [("2050", (14,)), ("2080", (15,))]
assert not list(unwritten(SOUND))
LACKS = {"S2UR UR5": ("0ca0", 5), "UMOV UR7": ("0ca0", 7), "USGXT": ("2010", 12), "USHF": ("2040", 8),
         "UMOV UR9": ("2040", 9), "UMOV UR10": ("2040", 10), "UMOV UR11": ("2040", 11), "UIADD3.X UR13": ("20b0", 13)}
for left_out, (at, register) in LACKS.items():
    lines = [line for line in SOUND.splitlines() if left_out not in line]
    assert (at, (register,)) in [(at, registers) for at, _, registers in unwritten(" ".join(lines))], left_out
# An operand in registers of its own has no descriptor; 64-bit instructions write two registers; memory's is a pair.
PRODUCT = "/*0020*/ HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR56], R24 ;"
assert not list(unwritten("/*0010*/ ULDC.64 UR58, c[0x0][0x8] ;" + PRODUCT))
assert [registers for *_, registers in unwritten("/*0010*/ ULDC UR58, c[0x0][0x8] ;" + PRODUCT)] == [(59,)]
STORE = "/*0020*/ @!P3 STG.E desc[UR4][R2.64+UR6], R0 ;"
assert [registers for *_, registers in unwritten("/*0010*/ ULDC UR4, c[0x0][0x8] ;" + STORE)] == [(5, 6)]
'''

KERNELS = """
from lizardzoo.kernels.gated_linear import launch
from machine_code import Case, look

tiles, original = [], launch.launch


def noted(kernel, grid, pointers, numbers, constants, **options):
    tiles.append((constants.get("F"), constants.get("BF")))
    original(kernel, grid, pointers, numbers, constants, **options)


launch.launch = noted
for spec, dim in (("hybrid, 32 features", 64), ("heavy", 64)):
    count, found = look(Case(spec, "bf16", dim, 3, False, False))
    assert count > 5, f"{count} forms were compiled"
    assert not found, found
assert {filled for features, filled in tiles if features == 32} == {64}, tiles
"""


def test_a_register_that_nothing_has_written_is_found() -> None:
    run_compiling(READS)


def test_no_kernel_reads_one() -> None:
    """For Hopper, without such a device; `benchmarks/machine_code.py` does it for all mixers and sizes.

    Tiles of 32 features are filled up, whatever this Triton would make of them: 3.6 would read one.
    """
    run_compiling(KERNELS)

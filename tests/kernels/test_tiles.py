"""Tiles by what a block of the device may hold: the lookup, what is refused, and that the entries fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lizardzoo import LizardzooError
from lizardzoo.kernels.gated_linear import tables
from lizardzoo.kernels.launching import device, entry, launch, prepared, program, shared_memory, table_key
from tests.kernels.cases import run_compiling

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {99: None, 163: None, 227: None}),
        ([99], {99: 99, 100: 99, 162: 99, 163: None, 227: None}),
        ([163], {99: 163, 163: 163, 226: 163, 227: None, 228: None}),
        ([99, 163], {64: 99, 99: 99, 163: 163, 227: None}),
    ],
)
def test_a_device_gets_the_entry_of_its_class_or_the_next_smaller_that_there_is(
    more: list[int], expected: dict[int, int | None]
) -> None:
    """From the smallest class up; a device with Hopper's memory gets Hopper's entry, whatever else the table has."""
    table = {(2, 128): "whole", (4, 128, 99): "other", **{(2, 128, limit): str(limit) for limit in more}}
    found = {memory: table[table_key(table, 2, 128, memory)] for memory in expected}
    assert found == {memory: "whole" if limit is None else str(limit) for memory, limit in expected.items()}


def test_a_device_is_asked_for_what_its_blocks_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=101_376)  # an RTX 4090's
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert shared_memory(torch.device("cuda", 1)) == 99
    assert entry({(2, 64): "whole", (2, 64, 99): "small"}, 2, 64, torch.device("cuda", 1)) == "small"
    assert shared_memory(CPU) == device.WHOLE


def test_a_device_too_old_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        device.check_device(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    device.check_device(CPU)
    with pytest.raises(LizardzooError, match=r"^Tesla T4 \(cuda:0\) has .* 7\.5, and .* 8\.0 .* impl='reference'"):
        device.check_device(torch.device("cuda", 0))


def test_every_call_of_a_kernel_asks_how_old_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is launched: what every op does goes through `prepared`."""
    asked: list[torch.device] = []

    def check(found: torch.device) -> None:
        asked.append(found)
        raise LizardzooError("too old")

    @prepared
    def function(x: Any) -> tuple[Any, ...]:
        launch(None, (1,), (x, x), (), {})
        raise AssertionError("the device was not asked")

    monkeypatch.setattr(program, "check_device", check)
    with pytest.raises(LizardzooError, match="too old"):
        function(torch.zeros(3))
    assert asked == [CPU]


@pytest.mark.parametrize("memory", [99, 163, 227])
def test_what_one_call_of_gated_linear_attention_takes_is_in_every_table(
    monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """And with 99 KB and numbers of fp32 that is less: two tiles of 64 KB are more than there is."""
    monkeypatch.setattr(device, "ON_CPU", memory)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        widest = tables.widest(torch.zeros(1, dtype=dtype))
        assert widest == (64 if memory < 163 and dtype != torch.bfloat16 else 128)
        for dim in (16, widest // 2, widest - 16, widest):
            found = tables.tile_of(torch.zeros(1, 1, 1, dim, dtype=dtype), dim, dim)
            each = [tables.CHUNKS, tables.MAP_TILES, tables.HOLDS, *tables.LAUNCHES.values()]
            assert all(entry(table, *found) is not None for table in each)  # type: ignore[arg-type]


FITS = """
import tempfile
import shared_memory
from lizardzoo import Heavy, Hybrid

with tempfile.TemporaryDirectory() as folder:
    driver = shared_memory.prepare(folder)
    found = shared_memory.needs(driver, 86, "bf16", 128, [Hybrid()])
    found += shared_memory.needs(driver, 86, "bf16", 256, [Heavy()])
names = {need.kernel for need in found}
expected = {"hybrid: step", "gated_linear: outputs", "window: query_gradient_kernel",
            "window: key_gradient_kernel", "heavy: candidate_gradient_kernel"}
assert expected <= names, f"{expected - names} were not compiled"
assert not [need for need in found if not need.fits], [need for need in found if not need.fits]
assert max(need.shared for need in found) > 64 << 10, "nothing here would show too large an entry"
"""


def test_the_largest_tiles_fit_a_device_of_99_kb() -> None:
    """Compiled for capability 8.6 without such a device; `benchmarks/shared_memory.py` does it for all sizes."""
    run_compiling(FITS)

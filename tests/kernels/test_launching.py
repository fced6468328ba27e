"""Prepared functions launch what Triton would: the same compiled forms, on the right memory, device or none."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels.launching import forget, launch, prepared, program
from tests.kernels.cases import run_compiling

STREAM = 77


class Compiled:
    """A compiled form that notes how it is called."""

    def __init__(self, form: tuple[Any, ...]):
        self.form, self.function, self.packed_metadata = form, "function", "metadata"
        self.calls: list[tuple[Any, ...]] = []
        self.told: list[tuple[Any, ...]] = []

    def run(self, x: int, y: int, z: int, stream: int, function: str, metadata: str, *arguments: Any) -> None:
        assert (stream, function, metadata, arguments[:3]) == (STREAM, "function", "metadata", (None, None, None))
        self.calls.append(((x, y, z), *arguments[3:]))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, stream: self.told.append((grid, *arguments))


class Kernel:
    """Has a compiled form for each dtype and alignment of its pointers, as a Triton kernel has."""

    arg_names = ("x", "between", "y", "count", "BLOCK")

    def __init__(self) -> None:
        self.forms: dict[tuple[Any, ...], Compiled] = {}
        self.first: list[tuple[Any, ...]] = []
        self.fails = False

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, BLOCK: int, num_warps: int) -> Compiled:
            if self.fails:
                raise RuntimeError("out of resources")
            self.first.append((grid, *arguments))
            form = tuple((x.dtype, x.data_ptr() % 16 == 0) for x in arguments if isinstance(x, Tensor))
            return self.forms.setdefault((*form, BLOCK, num_warps), Compiled(form))

        return start


def doubled(kernel: Kernel) -> Any:
    """A prepared function: scratch memory of the size of x, and an output of half its length."""

    @prepared
    def function(x: Any, block: int) -> tuple[Any, ...]:
        between, y = x.new_empty(x.shape), x.new_empty((x.shape[0] // 2,), dtype=torch.float32)
        count = x.shape[0]
        launch(kernel, (count,), (x, between, y), (count,), {"BLOCK": block}, num_warps=4)
        launch(kernel, (count, 2), (y, None, x), (count,), {"BLOCK": block}, num_warps=4)
        return y, count

    return function


@pytest.fixture(autouse=True)
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Triton of a version that is known, whose hooks can be set; a current stream."""
    runtime = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[])
    )  # fmt: skip
    fake = SimpleNamespace(__version__="3.6.0", knobs=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "triton", fake)
    monkeypatch.delitem(sys.modules, "lizardzoo.kernels.launching.triton", raising=False)
    monkeypatch.delattr(sys.modules["lizardzoo.kernels.launching"], "triton", raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, raising=False)
    yield fake
    sys.modules.pop("lizardzoo.kernels.launching.triton", None)
    vars(sys.modules["lizardzoo.kernels.launching"]).pop("triton", None)


def calls(kernel: Kernel) -> list[tuple[Any, ...]]:
    """Of all forms, and forgotten."""
    found = [call for form in kernel.forms.values() for call in form.calls]
    for form in kernel.forms.values():
        form.calls.clear()
    return found


def test_a_second_call_runs_the_form_by_address() -> None:
    kernel = Kernel()
    function = doubled(kernel)
    function(torch.zeros(64), 8)
    assert len(kernel.first) == 2 and calls(kernel) == []
    x = torch.zeros(64)
    y, count = function(x, 8)
    assert len(kernel.first) == 2 and y.shape == (32,) and count == 64
    (grid, *pointers, number, block), second = calls(kernel)
    assert (grid, number, block) == ((64, 1, 1), 64, 8)
    assert pointers[0] == x.data_ptr() and pointers[2] == y.data_ptr() and pointers[1] not in (0, *pointers[::2])
    assert second == ((64, 2, 1), y.data_ptr(), None, x.data_ptr(), 64, 8)


@pytest.mark.parametrize(
    ("other", "same_form"),
    [
        (torch.zeros(65)[1:], False),  # 4 bytes behind a multiple of 16
        (torch.zeros(64, dtype=torch.bfloat16), False),
        (torch.zeros(128)[::2], True),
        (torch.zeros(96), True),
    ],
    ids=["misaligned", "dtype", "stride", "length"],
)
def test_another_kind_of_arguments_asks_triton_again(other: Tensor, same_form: bool) -> None:
    kernel = Kernel()
    function = doubled(kernel)
    function(torch.zeros(64), 8)
    forms = set(kernel.forms)
    function(other, 8)
    assert len(kernel.first) == 4 and calls(kernel) == []
    assert (set(kernel.forms) == forms) == same_form
    function(other, 8)
    assert len(kernel.first) == 4
    expected = {(x.dtype, x.data_ptr() % 16 == 0) for x in (other,)}
    assert all(expected <= set(form.form) for form in kernel.forms.values() if form.calls)
    assert all(call[1] == other.data_ptr() or call[3] == other.data_ptr() for call in calls(kernel))


def test_a_plain_argument_is_part_of_the_kind() -> None:
    kernel = Kernel()
    function, x = doubled(kernel), torch.zeros(64)
    for block in (8, 16, 8, 16):
        function(x, block)
    assert len(kernel.first) == 4 and [call[-1] for call in calls(kernel)].count(16) == 2


def test_one_tensor_given_twice_stays_two_arguments() -> None:
    """The first call must not take them for one memory."""
    kernel = Kernel()

    @prepared
    def function(x: Any, other: Any) -> tuple[Any, ...]:
        launch(kernel, (1,), (x, other, x), (0,), {"BLOCK": 8}, num_warps=4)
        return ()

    x, other = torch.zeros(64), torch.zeros(64)
    function(x, x)
    function(x, other)
    assert calls(kernel) == [((1, 1, 1), x.data_ptr(), other.data_ptr(), x.data_ptr(), 0, 8)]


def test_scratch_memory_is_apart_and_begins_at_multiples() -> None:
    kernel = Kernel()

    @prepared
    def function(x: Any) -> tuple[Any, ...]:
        first, second = x.new_empty((150,), dtype=torch.bfloat16), x.new_empty((10, 15))
        launch(kernel, (1,), (first, second, second.part(4, (20,), x.dtype)), (0,), {"BLOCK": 8}, num_warps=4)
        return ()

    function(torch.zeros(64))
    function(torch.zeros(64))
    ((_, first, second, part, *_),) = calls(kernel)
    assert second == first + 2 * program.ALIGNED and part == second + 4  # 300 bytes lie before it


def test_a_launch_that_fails_is_tried_again() -> None:
    kernel = Kernel()
    function = doubled(kernel)
    kernel.fails = True
    with pytest.raises(RuntimeError, match="out of resources"):
        function(torch.zeros(64), 8)
    kernel.fails = False
    function(torch.zeros(64), 8)
    assert len(kernel.first) == 2


def test_nothing_can_be_computed_in_a_prepared_function() -> None:
    """It would be computed in the first call alone."""
    function = prepared(lambda x: (torch.exp(x),))
    with pytest.raises(TypeError, match="must be Tensor, not Outline"):
        function(torch.zeros(3))


def test_only_whole_memory_of_its_own_is_returned() -> None:
    for returned in (lambda x: (x,), lambda x: (x.new_empty((4,)).part(4, (2,), x.dtype),)):
        with pytest.raises(AssertionError, match="whole tensors of its own"):
            prepared(returned)(torch.zeros(3))


def test_who_watches_launches_hears_of_them(hooks: Any) -> None:
    kernel = Kernel()
    function, x = doubled(kernel), torch.zeros(64)
    function(x, 8)
    hooks.knobs.runtime.launch_exit_hook.calls.append(print)
    function(x, 8)
    (form, second) = kernel.forms.values()
    assert len(form.told) + len(second.told) == 2 and calls(kernel) == []


@pytest.mark.parametrize(("version", "direct"), [("3.5.1", False), ("3.9.0+cu130", True), ("3.10.0", False)])
def test_only_in_known_versions_is_triton_called_past_its_front(hooks: Any, version: str, direct: bool) -> None:
    hooks.__version__ = version
    kernel = Kernel()
    function, x = doubled(kernel), torch.zeros(64)
    function(x, 8)
    function(x, 8)
    told = sum(len(form.told) for form in kernel.forms.values())
    assert (len(calls(kernel)), told) == ((2, 0) if direct else (0, 2))


def test_a_changed_table_is_read_after_forget() -> None:
    kernel, table = Kernel(), [8]
    function = prepared(
        lambda x: (launch(kernel, (1,), (x, x, x), (0,), {"BLOCK": table[0]}, num_warps=4),)
    )  # fmt: skip
    x = torch.zeros(64)
    function(x)
    table[0] = 16
    forget()
    function(x)
    assert [key[-2] for key in kernel.forms] == [8, 16]


def test_it_keeps_a_bounded_number_of_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "PROGRAMS", 2)
    kernel = Kernel()
    function = doubled(kernel)
    for length in (8, 16, 24, 8):
        function(torch.zeros(length), 8)
    assert len(kernel.first) == 8


REAL = """
import torch
import host
from lizardzoo.kernels import rotate
from lizardzoo.kernels.rotary.triton import rotate_kernel

launched = []
class Noted(host.Driver.launcher_cls):
    def __init__(self, source, *_):
        self.source = source
    def __call__(self, *_):
        launched.append(self.source)
host.Driver.launcher_cls = Noted
host.pretend()

def run(length, dtype=torch.bfloat16, begin=0):
    q = torch.zeros(length * 2 * 16 + 8, dtype=dtype)[begin : begin + length * 2 * 16].view(1, length, 2, 16)
    cos = torch.zeros(1, length, 16, dtype=dtype)
    rotate(q, q, cos, cos, impl="triton")

def count():
    return sum(len(cache[0]) for cache in rotate_kernel.device_caches.values())

def forms(**options):
    launched.clear()
    run(**options)
    run(**options)
    first, second = launched
    assert first is second, (first, second)
    return first, count()

plain, one = forms(length=16)
assert forms(length=48) == (plain, one)
misaligned, two = forms(length=16, begin=1)
assert misaligned is not plain and two == one + 1
assert ("tt.divisibility", 16) not in [tuple(x) for at, found in misaligned.attrs.items() if at == (0,) for x in found]
full, three = forms(length=16, dtype=torch.float32)
assert full is not plain and three == two + 1
assert forms(length=16) == (plain, three)
"""


def test_triton_itself_takes_the_forms_that_it_would_take() -> None:
    """Its compiler for Hopper, its choice of forms, and a launcher that notes which one it is given."""
    run_compiling(REAL)

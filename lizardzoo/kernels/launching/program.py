"""Functions of kernel launches, traced once and run again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import wraps
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels.launching.device import check_device

PROGRAMS = 1_000
"""That a function keeps; a new length is a new one."""
ALIGNED = 256
"""Bytes that a piece of scratch memory begins at a multiple of; torch's allocator has 512 on a device, 64 on a CPU."""
_TRACE = threading.local()
_PREPARED: list[dict[tuple[Any, ...], Program]] = []


class Outline:
    """What a `prepared` function sees of a tensor: all but its numbers, so that nothing can be computed of them.

    Attributes:
        shape, dtype, device, ndim, stride, element_size, numel, new_empty: as of a tensor.
        memory: the argument's place among the arguments; of one's own memory, below zero, a number for each.
        offset: bytes from the beginning of that memory.
    """

    __slots__ = ("dtype", "memory", "offset", "shape", "strides")

    def __init__(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, memory: int, offset: int = 0
    ):  # fmt: skip
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), dtype
        self.memory, self.offset = memory, offset

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        device: torch.device = _TRACE.current.device  # all arguments lie on one
        return device

    def stride(self, axis: int | None = None) -> Any:
        return self.strides if axis is None else self.strides[axis]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def numel(self) -> int:
        return prod(self.shape)

    def new_empty(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Outline:
        """An allocation: an output if the function returns it, scratch memory otherwise."""
        made: list[Outline] = _TRACE.current.made
        made.append(_contiguous(shape, dtype or self.dtype, -1 - len(made)))
        return made[-1]

    def part(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Outline:
        """What lies `offset` bytes behind the beginning of this contiguous tensor."""
        return _contiguous(shape, dtype, self.memory, self.offset + offset)


def _contiguous(shape: Sequence[int], dtype: torch.dtype, memory: int, offset: int = 0) -> Outline:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Outline(shape, strides[::-1], dtype, memory, offset)


class Launch(NamedTuple):
    """One launch; pointers are numbers of a program's places, 0 is None."""

    kernel: Any
    grid: tuple[int, int, int]
    pointers: tuple[int, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


class Call(NamedTuple):
    """A launch whose compiled form is known: how to call it, and under a watch; of all pointers its own; the rest."""

    fast: Callable[..., None]
    told: Callable[..., None]
    own: Callable[[list[int | None]], tuple[int | None, ...]]
    rest: tuple[Any, ...]


class _Trace:
    """The launches of a function and the memory that it makes; of each pointer, once, memory, offset and dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches: list[Launch] = []
        self.made: list[Outline] = []
        self.places: dict[tuple[int, int, torch.dtype], int] = {}

    def number(self, x: Outline | None) -> int:
        """Of the place that x points to."""
        return 0 if x is None else self.places.setdefault((x.memory, x.offset, x.dtype), len(self.places) + 1)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[Any, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """`kernel[grid](*pointers, *numbers, **constants, **options)`, in a `prepared` function.

    pointers: `Outline`s of tensors, or None; constants: the compile-time arguments, which the kernel has last.
    """
    assert len(pointers) > 1, "of one pointer alone, `itemgetter` would not give a tuple"
    trace: _Trace = _TRACE.current
    names = kernel.arg_names[len(pointers) + len(numbers) :]
    assert set(names) == set(constants), f"compile-time arguments are {names}, got {list(constants)}"
    width, height, depth = (*grid, 1, 1)[:3]
    places = tuple([trace.number(x) for x in pointers])
    ordered = {name: constants[name] for name in names}  # a compiled form is called by position
    trace.launches.append(Launch(kernel, (width, height, depth), places, numbers, ordered, options))


class Program:
    """What a function does with one kind of arguments: allocate its outputs and scratch memory, and launch.

    Args:
        function: see `prepared`.
        arguments: which the function is traced with; the tensors' numbers are not looked at.
        device: on which they lie.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], arguments: tuple[Any, ...], device: torch.device):
        outlines = [
            Outline(x.shape, x.stride(), x.dtype, place) if isinstance(x, Tensor) else x
            for place, x in enumerate(arguments)
        ]
        _TRACE.current = trace = _Trace(device)
        try:
            returned = function(*outlines)
        finally:
            del _TRACE.current
        self.launches = trace.launches
        # Bases are the arguments, then the scratch memory, then the outputs.
        bases = {place: (place, 0) for place in range(len(arguments))}
        self.outputs: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.returned: list[tuple[int | None, Any]] = []  # number of an output, or what it is in its place
        for x in returned:
            if not isinstance(x, Outline):
                self.returned.append((None, x))
                continue
            own = trace.made[-1 - x.memory] if x.memory < 0 else None
            whole = own is not None and (own.shape, own.dtype) == (x.shape, x.dtype)
            assert whole, f"a prepared function returns whole tensors of its own, got a {list(x.shape)} that is none"
            if x.memory not in bases:
                self.outputs.append((x.shape, x.dtype))
                bases[x.memory] = len(arguments) + len(self.outputs), 0
            self.returned.append((bases[x.memory][0] - len(arguments) - 1, None))
        self.scratch = 0
        for x in trace.made:
            if x.memory not in bases:
                bases[x.memory] = len(arguments), self.scratch
                self.scratch += -(-x.numel() * x.element_size() // ALIGNED) * ALIGNED
        self.places = [(bases[memory][0], bases[memory][1] + offset) for memory, offset, _ in trace.places]
        self.dtypes = [dtype for _, _, dtype in trace.places]
        self.calls: list[Call] = []
        self.watched: Callable[[], bool] = bool

    def __call__(self, arguments: tuple[Any, ...], addresses: list[int], device: torch.device) -> tuple[Any, ...]:
        """The function's results. addresses: of the arguments (0: no tensor), which lie on the current device."""
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.outputs]
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device) if self.scratch else None
        if not self.calls:
            self._first([*arguments, scratch, *outputs])
        else:
            bases = [*addresses, 0 if scratch is None else scratch.data_ptr(), *[x.data_ptr() for x in outputs]]
            pointers = [None, *[bases[base] + offset for base, offset in self.places]]
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            if self.watched():
                for _, told, own, rest in self.calls:
                    told(stream, *own(pointers), *rest)
            else:
                for fast, _, own, rest in self.calls:
                    fast(stream, *own(pointers), *rest)
        return tuple([x if number is None else outputs[number] for number, x in self.returned])

    def _first(self, bases: list[Any]) -> None:
        """Launch as Triton does, on tensors: it compiles, or finds, the form that each launch takes from now on."""
        from lizardzoo.kernels.launching import triton

        tensors = [_pointer(bases[base], offset, dtype) for (base, offset), dtype in zip(self.places, self.dtypes)]
        pointers, calls = [None, *tensors], []
        for kernel, grid, numbers_of, numbers, constants, options in self.launches:
            compiled = kernel[grid](*[pointers[number] for number in numbers_of], *numbers, **constants, **options)
            if compiled is not None:  # Triton's interpreter compiles nothing
                rest = (*numbers, *constants.values())
                fast, told = triton.callers(compiled, grid)
                calls.append(Call(fast, told, itemgetter(*numbers_of), rest))
        self.watched, self.calls = triton.watched, calls  # all or none: a launch that Triton refuses is refused again


def _pointer(base: Tensor | None, offset: int, dtype: torch.dtype) -> Tensor:
    """A tensor that begins `offset` bytes behind the beginning of base, as a kernel takes it: its shape is nothing.

    base None: all scratch memory is empty.
    """
    base = torch.empty(0) if base is None else base
    storage, start = base.untyped_storage(), base.storage_offset() * base.element_size() + offset
    size = (min(1, max(0, storage.nbytes() - start)),)  # an empty tensor has no address
    return torch.empty(0, dtype=dtype, device=base.device).set_(storage, int(start) // dtype.itemsize, size, (1,))


def prepared(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A function that allocates (by `new_empty` of an argument) and launches, as fast as it can be done again.

    Its arguments are tensors, None, and what can be hashed. It is traced once for each kind of them: shapes, strides,
    dtypes, devices, which of them are None, alignment, and the value of all that is no tensor. It sees an `Outline` of
    each tensor, so it may decide by all of these, and by tables that stay as they are (else: `forget`). It returns a
    tuple of tensors that it has allocated, of None and of plain values; all its other memory is scratch, one
    allocation. Kernels may write to arguments.

    What the first call of a kind launches goes Triton's way and decides the compiled forms; later calls launch the same
    forms by address, on torch's current stream. Under Triton's interpreter every call is a first one. A CUDA device
    that is too old for the kernels raises at a first call.
    """
    programs: dict[tuple[Any, ...], Program] = {}
    _PREPARED.append(programs)

    @wraps(function)
    def run(*arguments: Any) -> tuple[Any, ...]:
        kind: list[Any] = []
        addresses, together, device = [], 0, None
        for x in arguments:
            if isinstance(x, Tensor):
                address = x.data_ptr()
                addresses.append(address)
                together |= address
                kind += (x.shape, x.stride(), x.dtype, x.get_device())
                device = device or x.device
            else:
                addresses.append(0)
                kind.append(x)
        if together % 16:  # Triton compiles another form for a pointer that is no multiple of 16
            kind.append(tuple([address % 16 for address in addresses]))
        assert device is not None, f"{function.__name__} takes a tensor"
        key = tuple(kind)
        program = programs.get(key)
        if program is None:
            check_device(device)
            program = Program(function, arguments, device)
            if len(programs) >= PROGRAMS:
                programs.clear()
            programs[key] = program
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return program(arguments, addresses, device)
        return program(arguments, addresses, device)

    return run


def forget() -> None:
    """Trace every prepared function again at its next call: after a change in what it reads beside its arguments."""
    for programs in _PREPARED:
        programs.clear()

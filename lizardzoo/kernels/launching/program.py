"""Functions of kernel launches, traced once and run again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PROGRAMS = 1_000
"""That a function keeps; a new length is a new one."""
ALIGNED = 256
"""Bytes that a piece of scratch memory begins at a multiple of; torch's allocator has 512 on a device, 64 on a CPU."""
_TRACE = threading.local()


class Launch(NamedTuple):
    """One launch; pointers are numbers of a program's places, 0 is None."""

    kernel: Any
    grid: tuple[int, int, int]
    pointers: tuple[int, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


class Place(NamedTuple):
    """Where a pointer points: the memory, bytes from its beginning, and a tensor there."""

    memory: int
    offset: int
    like: Tensor


class Call(NamedTuple):
    """A launch whose compiled form is known: how to call it, and under a watch; of all pointers its own; the rest."""

    fast: Callable[..., None]
    told: Callable[..., None]
    own: Callable[[list[int | None]], tuple[int | None, ...]]
    rest: tuple[Any, ...]


class _Trace(TorchDispatchMode):
    """Notes the launches of a function on meta tensors, and where their tensors lie."""

    def __init__(self, stand_ins: list[Any]):
        super().__init__()
        self.launches: list[Launch] = []
        self.places: list[Place] = []
        self.numbers: dict[tuple[int, int, torch.dtype], int] = {}
        self.stand_ins = {_memory(x): number for number, x in enumerate(stand_ins) if isinstance(x, Tensor)}
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        allocates = func.overloadpacket in (aten.empty, aten.empty_like, aten.new_empty)
        # A program would run without the operation: its results would be those of the first call, or of none.
        assert allocates or func.is_view, f"a prepared function allocates, views and launches, got {func}"
        result = func(*args, **(kwargs or {}))
        if allocates:
            self.made[_memory(result)] = result
        return result

    def number(self, x: Tensor | None) -> int:
        """Of the place that x points to."""
        if x is None:
            return 0
        memory, offset = _memory(x), int(x.storage_offset()) * x.element_size()
        number = self.numbers.setdefault((memory, offset, x.dtype), len(self.places) + 1)
        if number > len(self.places):
            self.places.append(Place(memory, offset, x))
        return number


def _memory(x: Tensor) -> int:
    """The same number for all tensors of one allocation, while it lives."""
    return int(x.untyped_storage()._cdata)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """`kernel[grid](*pointers, *numbers, **constants, **options)`, in a `prepared` function.

    constants: the kernel's compile-time arguments, in its own order, behind all others.
    """
    trace: _Trace = _TRACE.current
    names = kernel.arg_names[len(pointers) + len(numbers) :]
    assert names == list(constants), f"compile-time arguments are {names}, got {list(constants)}"
    assert len(pointers) > 1
    width, height, depth = (*grid, 1, 1)[:3]
    places = tuple([trace.number(x) for x in pointers])
    trace.launches.append(Launch(kernel, (width, height, depth), places, numbers, constants, options))


class Program:
    """What a function does with one kind of arguments: allocate its outputs and scratch memory, and launch.

    Args:
        function: see `prepared`.
        arguments: which the function is traced with; the tensors' numbers are not looked at.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], arguments: tuple[Any, ...]):
        stand_ins = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
            for x in arguments
        ]
        trace = _Trace(stand_ins)
        _TRACE.current = trace
        try:
            with torch.no_grad(), trace:
                returned = function(*stand_ins)
        finally:
            del _TRACE.current
        self.launches = trace.launches
        # Bases are the arguments, then the scratch memory, then the outputs.
        bases = {memory: (number, 0) for memory, number in trace.stand_ins.items()}
        self.outputs: list[tuple[torch.Size, torch.dtype]] = []
        self.returned: list[tuple[int | None, Any]] = []  # number of an output, or what it is in its place
        for x in returned:
            if not isinstance(x, Tensor):
                self.returned.append((None, x))
                continue
            memory = _memory(x)
            own = trace.made.get(memory)
            whole = own is not None and (own.shape, own.dtype) == (x.shape, x.dtype)
            assert whole, f"a prepared function returns whole tensors of its own, got a {list(x.shape)} that is none"
            if memory not in bases:
                self.outputs.append((x.shape, x.dtype))
                bases[memory] = len(arguments) + len(self.outputs), 0
            self.returned.append((bases[memory][0] - len(arguments) - 1, None))
        self.scratch = 0
        for memory, x in trace.made.items():
            if memory not in bases:
                bases[memory] = len(arguments), self.scratch
                self.scratch += -(-x.untyped_storage().nbytes() // ALIGNED) * ALIGNED
        self.places = [(bases[at.memory][0], bases[at.memory][1] + at.offset) for at in trace.places]
        self.likes = [at.like for at in trace.places]
        self.calls: list[Call] = []
        self.watched: Callable[[], bool] = bool

    def __call__(self, arguments: tuple[Any, ...], addresses: list[int], device: torch.device) -> tuple[Any, ...]:
        """The function's results. addresses: of the arguments (0: no tensor), which lie on the current device."""
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.outputs]
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
        if not self.calls:
            self._first([*arguments, scratch, *outputs])
        else:
            bases = [*addresses, scratch.data_ptr(), *[x.data_ptr() for x in outputs]]
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

        tensors = [_view(bases[base], offset, like) for (base, offset), like in zip(self.places, self.likes)]
        pointers, calls = [None, *tensors], []
        for kernel, grid, numbers_of, numbers, constants, options in self.launches:
            compiled = kernel[grid](*[pointers[number] for number in numbers_of], *numbers, **constants, **options)
            if compiled is not None:  # Triton's interpreter compiles nothing
                rest = (*numbers, *constants.values())
                fast, told = triton.callers(compiled, grid)
                calls.append(Call(fast, told, itemgetter(*numbers_of), rest))
        self.watched, self.calls = triton.watched, calls  # all or none: a launch that Triton refuses is refused again


def _view(base: Tensor, offset: int, like: Tensor) -> Tensor:
    """The tensor that lies `offset` bytes behind the beginning of base, with the shape, strides and dtype of `like`."""
    start = base.storage_offset() * base.element_size() + offset
    found = torch.empty(0, dtype=like.dtype, device=base.device)
    return found.set_(base.untyped_storage(), start // like.element_size(), like.shape, like.stride())


def prepared(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A function that allocates (torch.empty), views and launches, as fast as it can be done again.

    Its arguments are tensors, None, and what can be hashed; it is traced on meta tensors for each kind of them: shapes,
    strides, dtypes, devices, which of them are None, alignment, and the value of all that is no tensor. So it
    may decide by all of these, but not by numbers in a tensor. It returns a tuple of tensors that it has allocated, of
    None and of plain values; all its other memory is scratch, one allocation. Arguments may be written to.

    What the first call of a kind launches goes Triton's way and decides the compiled forms; later calls launch the same
    forms by address, on torch's current stream. Under Triton's interpreter every call is a first one.
    """
    programs: dict[tuple[Any, ...], Program] = {}

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
            kind.append(tuple([address % 16 == 0 for address in addresses]))
        assert device is not None, f"{function.__name__} takes a tensor"
        key = tuple(kind)
        program = programs.get(key)
        if program is None:
            program = Program(function, arguments)
            if len(programs) >= PROGRAMS:
                programs.clear()
            programs[key] = program
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return program(arguments, addresses, device)
        return program(arguments, addresses, device)

    return run

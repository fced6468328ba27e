"""Names to objects: how config.json, the command line and plug-ins find mixers, presets and adapters.

A third party registers with the decorator, or declares an entry point in its own package::

    [project.entry-points."lizardzoo.mixers"]
    toy = "my_package.toy:Toy"

An entry point is loaded when its own name is first asked for: importing lizardzoo imports no plug-in, nor does a name
that nobody has, out of a stranger's config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from lizardzoo.errors import LizardzooError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of unique names; `group` is the entry-point group that plug-ins may use."""

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register `entry`; a name that is taken by another entry raises."""
        known = self._entries.get(name)
        if known is not None and known is not entry:
            raise LizardzooError(f"the {self.kind} name {name!r} is already taken by {known!r}; choose another name")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """The decorator form of `add`."""
        return lambda entry: self.add(name, entry)

    def remove(self, name: str) -> None:
        """Forget a name (for tests and notebooks that define a plug-in twice)."""
        self._entries.pop(name, None)

    def get(self, name: str) -> T:
        """The entry of that name; an unknown name lists the names that exist."""
        if name not in self._entries:
            self._load_plugins(name)
        if name not in self._entries:
            raise LizardzooError(f"unknown {self.kind} {name!r}; there are: {', '.join(self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, those of plug-ins included, sorted; loads nothing."""
        return sorted({*self._entries, *(point.name for point in self._points())})

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _points(self) -> Iterable[EntryPoint]:
        return () if self.group is None else entry_points(group=self.group)

    def _load_plugins(self, name: str) -> None:
        for point in self._points():
            if point.name == name:
                self.add(name, point.load())

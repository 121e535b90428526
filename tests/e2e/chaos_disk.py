"""A disk that may forget what was not synced: the model that a power cut is tried on.

As POSIX promises and no better: the bytes of a file are on the disk once the file is synced, its
name once the directory is. Until then each page of 4 KiB and each change of a directory may have
reached the disk or not, in any combination; a rename is there or not there, never half.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from tests.e2e.chaos_trace import Did, Event

_PAGE = 4096


Tree = Mapping[str, bytes | None]
"""Path below the root -> content; None is a directory, which comes before what is in it."""


@dataclass(eq=False, repr=False)
class File:
    synced: bytearray = field(default_factory=bytearray)
    unsynced: list[Change] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.unsynced:
            change.apply(self.synced)
        self.unsynced.clear()

    def current(self) -> bytes:
        content = bytearray(self.synced)
        for change in self.unsynced:
            change.apply(content)
        return bytes(content)

    def after_a_cut(self, lucky: Lucky) -> bytes:
        content = bytearray(self.synced)
        for change in self.unsynced:
            for part in change.parts():
                if lucky():
                    part.apply(content)
        return bytes(content)


@dataclass(frozen=True)
class Change:
    """Bytes at an offset; or, without any, a new size."""

    offset: int
    data: bytes | None

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.offset :]
            content.extend(bytes(self.offset - len(content)))
            return
        end = self.offset + len(self.data)
        content.extend(bytes(max(0, end - len(content))))
        content[self.offset : end] = self.data

    def parts(self) -> Iterable[Change]:
        """What reaches the disk as one: a page, or a truncation."""
        if self.data is None:
            return [self]
        first_end = _PAGE - self.offset % _PAGE
        cuts = [0, *range(first_end, len(self.data), _PAGE), len(self.data)]
        return [Change(self.offset + start, self.data[start:end]) for start, end in pairwise(cuts)]


@dataclass(eq=False, repr=False)
class Directory:
    synced: dict[str, Node] = field(default_factory=dict)
    current: dict[str, Node] = field(default_factory=dict)


Node: TypeAlias = File | Directory


@dataclass(frozen=True, eq=False)
class Entry:
    """``name`` becomes ``node``, or goes."""

    directory: Directory
    name: str
    node: Node | None

    def apply(self, entries: dict[str, Node]) -> None:
        if self.node is None:
            entries.pop(self.name, None)
        else:
            entries[self.name] = self.node


Naming = tuple[Entry, ...]
"""One change of names; a rename has two entries, and the first one's sync makes it durable."""


class Lucky:
    """Whether something that was not synced has reached the disk all the same."""

    def __init__(self, generator: random.Random, chance: float) -> None:
        self._random = generator
        self._chance = chance

    def __call__(self) -> bool:
        return self._random.random() < self._chance


class Disk:
    """Follows events from what is below ``root`` now, all of it taken as synced; ``after_a_cut``
    is what would be found if the power failed."""

    def __init__(self, root: Path) -> None:
        self._path = root
        self._root = Directory()
        self._by_inode: dict[int, Node] = {root.stat().st_ino: self._root}
        self._directories = [self._root]
        """All that there ever were: inodes are used again."""
        self._namings: list[Naming] = []
        for path in sorted(root.rglob("*")):  # parents first
            node = Directory() if path.is_dir() else File(bytearray(path.read_bytes()))
            directory, name = self._place(str(path))
            directory.synced[name] = directory.current[name] = node
            self._know(path.stat().st_ino, node)

    # ----------------------------------------------------------------- events

    def follow(self, event: Event) -> None:
        match event.did:
            case Did.OPEN:
                self._opened(event)
            case Did.WRITE:
                self._file(event.inode).unsynced.append(Change(event.value, event.data))
            case Did.TRUNCATE:
                self._file(event.inode).unsynced.append(Change(event.value, None))
            case Did.SYNC:
                self._sync(self._by_inode[event.inode])
            case Did.RENAME:
                self._renamed(*event.name.split("\0"))
            case Did.UNLINK:
                directory, name = self._place(event.name)
                self._name(Entry(directory, name, None))
            case Did.MKDIR:
                self._appear(event, Directory())
            case Did.LINK:
                directory, name = self._place(event.name)
                self._name(Entry(directory, name, self._by_inode[event.inode]))
            case Did.MMAP:
                name = self._name_of(self._by_inode[event.inode])
                assert name.endswith("-shm"), f"{name} is written through memory, unseen"

    def _opened(self, event: Event) -> None:
        if event.value & os.O_DIRECTORY or Path(event.name) == self._path:
            return
        directory, name = self._place(event.name)
        node = directory.current.get(name)
        known = self._by_inode.get(event.inode)
        if node is None and known is not None and (old := _name_in(directory, known)) is not None:
            # Rust's tempfile renames by a system call of its own, which the recorder does not see.
            self._name(Entry(directory, name, known), Entry(directory, old, None))
        elif node is None or node is not known:
            self._appear(event, File())
        elif event.value & os.O_TRUNC:
            self._file(event.inode).unsynced.append(Change(0, None))

    def _appear(self, event: Event, node: Node) -> None:
        directory, name = self._place(event.name)
        self._know(event.inode, node)
        self._name(Entry(directory, name, node))

    def _know(self, inode: int, node: Node) -> None:
        self._by_inode[inode] = node
        if isinstance(node, Directory):
            self._directories.append(node)

    def _renamed(self, source: str, target: str) -> None:
        (from_directory, old), (to_directory, new) = self._place(source), self._place(target)
        node = from_directory.current[old]
        self._name(Entry(to_directory, new, node), Entry(from_directory, old, None))

    def _name(self, *naming: Entry) -> None:
        _apply(naming, lambda directory: directory.current)
        self._namings.append(naming)

    def _sync(self, node: Node) -> None:
        if isinstance(node, File):
            node.sync()
            return
        for naming in _with_what_it_needs(self._namings, node):
            _apply(naming, lambda directory: directory.synced)
            self._namings.remove(naming)

    # ----------------------------------------------------------------- looking things up

    def _file(self, inode: int) -> File:
        node = self._by_inode[inode]
        assert isinstance(node, File)
        return node

    def _place(self, path: str) -> tuple[Directory, str]:
        *parents, name = Path(path).relative_to(self._path).parts
        directory = self._root
        for parent in parents:
            node = directory.current[parent]
            assert isinstance(node, Directory)
            directory = node
        return directory, name

    def _name_of(self, node: Node) -> str:
        names = (_name_in(directory, node) for directory in self._directories)
        return next(name for name in names if name is not None)

    # ----------------------------------------------------------------- what is found

    def current(self) -> Tree:
        """As it is without any cut."""
        return _tree(self._root, lambda directory: directory.current, File.current)

    def after_a_cut(self, lucky: Lucky) -> Tree:
        entries = {directory: dict(directory.synced) for directory in self._directories}
        for naming in self._namings:
            if lucky():
                _apply(naming, entries.__getitem__)
        return _tree(self._root, entries.__getitem__, lambda file: file.after_a_cut(lucky))


class Folder:
    """Becomes one disk after the other, and writes only what is not there yet."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self._tree: Tree = {}

    def become(self, tree: Tree) -> Path:
        """Whoever looks at it may change databases, and nothing else."""
        for path in sorted(self.path.rglob("*"), reverse=True):  # what is in it goes first
            name = str(path.relative_to(self.path))
            if name in tree and (tree[name] is None) == path.is_dir():
                continue
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
        for name, content in tree.items():
            if content is None:
                (self.path / name).mkdir(exist_ok=True)
            elif ".db" in name or content != self._tree.get(name):
                (self.path / name).write_bytes(content)
        self._tree = tree
        return self.path


def read(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


def _apply(naming: Naming, entries_of: Callable[[Directory], dict[str, Node]]) -> None:
    for entry in naming:
        entry.apply(entries_of(entry.directory))


def _with_what_it_needs(namings: Sequence[Naming], synced: Directory) -> list[Naming]:
    """Changes that go to the disk with ``synced``, and what was done to the same names before."""
    names: set[tuple[int, str]] = set()
    found = []
    for naming in reversed(namings):
        touched = {(id(entry.directory), entry.name) for entry in naming}
        if naming[0].directory is synced or names & touched:
            names |= touched
            found.append(naming)
    return found[::-1]


def _tree(
    directory: Directory,
    entries_of: Callable[[Directory], dict[str, Node]],
    content_of: Callable[[File], bytes],
    prefix: str = "",
) -> Tree:
    """A directory comes before what is in it."""
    tree: dict[str, bytes | None] = {}
    for name, node in entries_of(directory).items():
        path = prefix + name
        if isinstance(node, File):
            tree[path] = content_of(node)
        else:
            tree[path] = None
            tree |= _tree(node, entries_of, content_of, f"{path}/")
    return tree


def _name_in(directory: Directory, node: Node) -> str | None:
    return next((name for name, each in directory.current.items() if each is node), None)

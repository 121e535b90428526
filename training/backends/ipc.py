"""Messages between ``LocalBackend`` and its engine process, and their frames on a socket.

A frame is a head (number of parts, bytes of the body), the lengths of the parts, and the parts:
first a pickle (protocol 5), then the array buffers it refers to, each padded to 64 bytes.
Arrays are received as views of the frame's one buffer, without another copy. Both ends are ours and
the socket is a private pair, so pickle carries no foreign data.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from training.backends.base import AdamParams, Capabilities, LoraSpec, SampleRequest, TrainUnit
from training.config import EngineConfig

HEAD = struct.Struct("<IQ")
_ALIGNMENT = 64
_JOIN_BYTES = 1 << 16  # smaller parts are copied together: one system call instead of many
SOCKET_BUFFER_BYTES = 4 << 20


# --------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class Configure:
    """First message to the child: what to load."""

    base_model: str
    model_path: Path
    context_length: int | None
    engine: EngineConfig


@dataclass(frozen=True)
class Ready:
    """The child's first message when it has loaded."""

    capabilities: Capabilities


@dataclass(frozen=True)
class StartFailed:
    """The child's first and only message when it cannot load; ``message`` is for the operator."""

    message: str


@dataclass(frozen=True)
class LoadSlot:
    slot: int
    spec: LoraSpec
    state_dir: Path | None
    with_optimizer: bool


@dataclass(frozen=True)
class UnloadSlot:
    slot: int


@dataclass(frozen=True, eq=False)
class ForwardBackward:
    unit: TrainUnit


@dataclass(frozen=True, eq=False)
class Forward:
    unit: TrainUnit


@dataclass(frozen=True)
class OptimStep:
    params: Mapping[int, AdamParams]


@dataclass(frozen=True)
class DiscardGrads:
    slot: int


@dataclass(frozen=True)
class SaveState:
    slot: int
    directory: Path


@dataclass(frozen=True)
class ExportAdapter:
    slot: int
    directory: Path


@dataclass(frozen=True)
class Publish:
    snapshot_id: str
    directory: Path


@dataclass(frozen=True)
class Retire:
    snapshot_id: str


@dataclass(frozen=True, eq=False)
class Sample:
    request: SampleRequest


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass(frozen=True)
class Stop:
    """Ends the child after the work it is on; there is no answer but the end of the socket."""


TrainingCommand = (
    LoadSlot
    | UnloadSlot
    | ForwardBackward
    | Forward
    | OptimStep
    | DiscardGrads
    | SaveState
    | ExportAdapter
)
SamplingCommand = Publish | Retire | Sample | Cancel
WORK = ForwardBackward | Forward | OptimStep | SaveState | ExportAdapter | Sample
"""Commands for whose results an engine is there."""
Command = TrainingCommand | SamplingCommand | Stop


@dataclass(frozen=True, eq=False)
class Call:
    """A command and the number that its reply will carry: 1 and so on, in the order of sending."""

    call_id: int
    command: Command


@dataclass(frozen=True, eq=False)
class Reply:
    """``error`` or the value that the command's method returns. Of ``SaveState`` and
    ``ExportAdapter``: the state is captured."""

    call_id: int
    value: object = None
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class Written:
    """Beside the reply to ``SaveState`` or ``ExportAdapter``, which tells of the capture alone: the
    files are on disk, or this is why they are not."""

    call_id: int
    error: Exception | None = None


# --------------------------------------------------------------------------- frames


def encode(message: object) -> list[bytes | memoryview]:
    """Pieces to send one after the other; large arrays are among them uncopied."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts: list[bytes | memoryview] = [pickled, *(buffer.raw() for buffer in buffers)]
    lengths = [len(part) for part in parts]
    table = struct.pack(f"<{len(parts)}Q", *lengths)
    body_bytes = sum(_padded(length) for length in [len(table), *lengths])
    small = [HEAD.pack(len(parts), body_bytes), _pad(table)]
    pieces: list[bytes | memoryview] = []
    for part in parts:
        if len(part) < _JOIN_BYTES:
            small.append(_pad(bytes(part)))
        else:
            pieces += [b"".join(small), part]
            small = [bytes(_padded(len(part)) - len(part))]
    return [*pieces, b"".join(small)]


def decode(num_parts: int, body: bytearray) -> object:
    """The message of a frame's body; its arrays are views of ``body``."""
    view = memoryview(body)
    table_bytes = 8 * num_parts
    lengths = struct.unpack_from(f"<{num_parts}Q", view)
    start = _padded(table_bytes)
    parts = []
    for length in lengths:
        parts.append(view[start : start + length])
        start += _padded(length)
    return pickle.loads(parts[0], buffers=parts[1:])


def send(sock: socket.socket, message: object) -> None:
    """Blocking; one caller at a time."""
    for piece in encode(message):
        sock.sendall(piece)


def receive(sock: socket.socket, begin: Callable[[], None] = lambda: None) -> object | None:
    """Blocking; None at the end of the stream. ``begin``: called when a message is on its way."""
    head = bytearray(HEAD.size)
    if not _fill(sock, head):
        return None
    begin()
    num_parts, body_bytes = HEAD.unpack(head)
    body = bytearray(body_bytes)
    return decode(num_parts, body) if _fill(sock, body) else None


async def send_async(loop: asyncio.AbstractEventLoop, sock: socket.socket, message: object) -> None:
    """One caller at a time, never cancelled half-way: the rest of the frame would be missing."""
    for piece in encode(message):
        await loop.sock_sendall(sock, piece)


async def receive_async(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> object | None:
    """None at the end of the stream."""
    head = bytearray(HEAD.size)
    if not await _fill_async(loop, sock, head):
        return None
    num_parts, body_bytes = HEAD.unpack(head)
    body = bytearray(body_bytes)
    return decode(num_parts, body) if await _fill_async(loop, sock, body) else None


def _fill(sock: socket.socket, buffer: bytearray) -> bool:
    view = memoryview(buffer)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


async def _fill_async(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, buffer: bytearray
) -> bool:
    view = memoryview(buffer)
    while view:
        count = await loop.sock_recv_into(sock, view)
        if count == 0:
            return False
        view = view[count:]
    return True


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _ALIGNMENT


def _pad(part: bytes) -> bytes:
    return part + bytes(-len(part) % _ALIGNMENT)

"""Frames: what goes in comes out, arrays without copies where they are large."""

from __future__ import annotations

import asyncio
import socket
import threading

import numpy as np
import pytest

from tests.backends.harness import datum, op, unit
from training.backends import ipc
from training.core.errors import UserError

SIZES = (0, 1, 63, 64, 65, 16_384, 16_385, 1_000_000)


def framed(message: object) -> tuple[object, bytearray]:
    """The message decoded, and the body that its arrays should lie in."""
    whole = b"".join(bytes(piece) for piece in ipc.encode(message))
    num_parts, body_bytes = ipc.HEAD.unpack_from(whole)
    body = bytearray(whole[ipc.HEAD.size :])
    assert len(body) == body_bytes
    return ipc.decode(num_parts, body), body


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64, np.float64])
def test_arrays_of_every_size_come_back(dtype: type[np.generic]) -> None:
    arrays = [np.arange(size).astype(dtype) for size in SIZES]
    arrays.append(np.arange(12).astype(dtype).reshape(3, 4))
    arrays.append(np.arange(12).astype(dtype).reshape(3, 4).T)
    arrays.append(np.arange(12).astype(dtype)[::3])
    found, _ = framed(arrays)
    assert isinstance(found, list)
    for array, back in zip(arrays, found, strict=True):
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_large_arrays_are_neither_copied_on_sending_nor_on_receiving() -> None:
    array = np.arange(100_000, dtype=np.float32)
    pieces = ipc.encode({"data": array})
    views = [np.frombuffer(piece, np.uint8) for piece in pieces if len(piece) == array.nbytes]
    assert len(views) == 1
    assert np.shares_memory(views[0], array)
    found, body = framed({"data": array})
    assert isinstance(found, dict)
    assert np.shares_memory(found["data"], np.frombuffer(body, np.uint8))


def test_small_messages_are_one_piece() -> None:
    call = ipc.Call(7, ipc.Forward(unit(op(0, datum(512, 50, 0)))))
    assert len(ipc.encode(call)) == 1


def test_errors_keep_their_fields() -> None:
    found, _ = framed(ipc.Reply(3, error=UserError("not finite", op_index=4)))
    assert isinstance(found, ipc.Reply)
    assert isinstance(found.error, UserError)
    assert found.error.op_index == 4
    assert str(found.error) == "not finite"


async def test_frames_cross_a_socket_both_ways_in_order() -> None:
    """A blocking echo on the other end; many frames, larger than the socket's buffer."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def echo() -> None:
        while (message := ipc.receive(theirs)) is not None:
            ipc.send(theirs, message)
        theirs.close()

    thread = threading.Thread(target=echo)
    thread.start()
    loop = asyncio.get_running_loop()
    for number, size in enumerate(SIZES):
        sent = ipc.Reply(number, np.full(size, number, np.float64))
        await ipc.send_async(loop, ours, sent)
        found = await ipc.receive_async(loop, ours)
        assert isinstance(found, ipc.Reply)
        assert found.call_id == number
        assert isinstance(found.value, np.ndarray)
        np.testing.assert_array_equal(found.value, sent.value)
    ours.close()
    thread.join()


@pytest.mark.parametrize("num_bytes", [0, 5, ipc.HEAD.size, 100])
def test_a_stream_that_ends_early_gives_none(num_bytes: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frame = b"".join(bytes(piece) for piece in ipc.encode(list(range(100))))
        ours.sendall(frame[:num_bytes])
        ours.close()
        assert ipc.receive(theirs) is None

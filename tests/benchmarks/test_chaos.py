"""The kill test's own eyes: what is not the same is seen, and moments are where they should be."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.chaos_audit import Kept, Run, differing_lines, differing_runs
from benchmarks.chaos_relay import Relay, Stage

LINES = [{"what": "a", "loss": (0.1).hex()}, {"what": "b", "loss": (0.2).hex()}]
RUN = Run("sft", "train:0")
KEPT = Kept({"weights/final": {"adapter": "1234"}}, ["0 CreateModel", "1 OptimStep"])


def test_the_same_is_no_difference() -> None:
    assert differing_lines(LINES, LINES, "sft") == []
    assert differing_runs({RUN: [KEPT]}, {RUN: [KEPT, KEPT]}) == []


def test_one_bit_of_a_loss_is_a_difference() -> None:
    other = [LINES[0], LINES[1] | {"loss": (0.2 + 2**-54).hex()}]
    (problem,) = differing_lines(LINES, other, "sft")
    assert "line 2" in problem


def test_a_missing_line_is_a_difference() -> None:
    (problem,) = differing_lines(LINES, LINES[:1], "sft")
    assert "1 lines instead of 2" in problem


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (KEPT._replace(operations=[*KEPT.operations, "2 OptimStep"]), "3 instead of 2"),
        (KEPT._replace(operations=["0 CreateModel", "2 OptimStep"]), "2 OptimStep instead of 1"),
        (KEPT._replace(checkpoints={}), "other checkpoints"),
        (KEPT._replace(checkpoints={"weights/final": {"adapter": "4321"}}), "other bytes"),
    ],
)
def test_other_operations_and_files_are_differences(found: Kept, told: str) -> None:
    (problem,) = differing_runs({RUN: [KEPT]}, {RUN: [found]})
    assert told in problem


# --------------------------------------------------------------------------- the relay

HEAD = b"POST /api/v1/retrieve_future HTTP/1.1\r\nhost: here\r\ncontent-length: 22\r\n\r\n"
BODY = b'{"request_id": "abc"} '
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Peer:
    """A server that keeps what it gets and answers a whole request."""

    def __init__(self) -> None:
        self.got = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            self.got += chunk
            if self.got.endswith(BODY):
                writer.write(ANSWER)
                await writer.drain()
        writer.close()


async def relayed(stage: Stage | None, drop: bool) -> tuple[bytes, bytes, int]:
    """What the server had at the moment of the trap, what the client got, results counted."""
    peer = Peer()
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    relay = Relay(server.sockets[0].getsockname()[1])
    async with server, relay.listening():
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        if stage is None:
            writer.write(HEAD + BODY)
            answer, at_trap = await reader.readexactly(len(ANSWER)), b""
        else:
            with relay.trap(stage, "/retrieve_future") as caught:
                writer.write(HEAD + BODY)
                held = await caught
                await asyncio.sleep(0.05)  # whatever is on its way arrives
                at_trap = peer.got
                held.let_go(drop)
                answer = await reader.read(1000)
        writer.close()
        await writer.wait_closed()
    return at_trap, answer, relay.outcomes


async def test_the_relay_passes_on_what_it_gets() -> None:
    assert await relayed(None, drop=False) == (b"", ANSWER, 1)


async def test_half_of_a_body_is_there_in_the_middle_of_it() -> None:
    at_trap, answer, outcomes = await relayed(Stage.BODY, drop=False)
    assert at_trap == HEAD + BODY[:11]
    assert (answer, outcomes) == (ANSWER, 1)


async def test_an_answer_can_be_lost_on_its_way() -> None:
    at_trap, answer, outcomes = await relayed(Stage.ANSWER, drop=True)
    assert at_trap == HEAD + BODY, "the server is done with the request"
    assert (answer, outcomes) == (b"", 0)

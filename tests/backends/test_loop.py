"""The engine's loop over the fake's real numpy trainer and sampler: no torch, no sockets."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.backends.harness import datum, op, request, spec, unit
from training.backends import ipc
from training.backends.base import (
    AdamParams,
    LoraSpec,
    OptimOutput,
    SampleRequest,
    SampleResult,
    TrainOutput,
    TrainUnit,
)
from training.backends.fake import sampler as fake_sampler
from training.backends.fake import trainer as fake_trainer
from training.backends.fake.model import BaseWeights, HeadView
from training.core.errors import StorageError, UnitError, UserError
from training.engine.loop import EngineLoop, Inbox, Pauses, TimeShare, Turn

VOCAB_SIZE = 64
CONTEXT_LENGTH = 4096


@dataclass(frozen=True, eq=False)
class NumpyCapture:
    slot: fake_trainer.Slot
    write_files: Callable[[fake_trainer.Slot, Path, str], None]
    trainer: NumpyTrainer

    def write(self, directory: Path) -> None:
        self.trainer.disk_answers.wait()
        self.write_files(self.slot, directory, "tests/loop")


class NumpyTrainer:
    """One operation is one micro-batch; ``log`` shares the order of turns with the sampler."""

    def __init__(self, log: list[str]) -> None:
        self.base = BaseWeights(VOCAB_SIZE)
        self.slots: dict[int, fake_trainer.Slot] = {}
        self.log = log
        self.tidied: list[bool] = []
        self.chores = 0
        self.disk_answers = threading.Event()
        self.disk_answers.set()

    def load_slot(
        self, slot: int, spec: LoraSpec, state_dir: Path | None, with_optimizer: bool
    ) -> None:
        if state_dir is None:
            self.slots[slot] = fake_trainer.new_slot(self.base, spec)
        else:
            self.slots[slot] = fake_trainer.read_slot(self.base, spec, state_dir, with_optimizer)

    def unload_slot(self, slot: int) -> None:
        del self.slots[slot]

    def forward_backward(self, unit: TrainUnit) -> Generator[None, None, list[TrainOutput]]:
        results = []
        for operation in unit.ops:
            self.log.append("train")
            slot = self.slots[operation.slot]
            results.append(fake_trainer.compute_op(slot, operation, CONTEXT_LENGTH))
            yield
        for operation, result in zip(unit.ops, results, strict=True):
            fake_trainer.add_gradient(self.slots[operation.slot], result.gradient_VD)
        return [result.output for result in results]

    def forward(self, unit: TrainUnit) -> Generator[None, None, list[TrainOutput]]:
        outputs = []
        for operation in unit.ops:
            slot = self.slots[operation.slot]
            outputs.append(fake_trainer.compute_op(slot, operation, CONTEXT_LENGTH).output)
            yield
        return outputs

    def optim_step(self, params: Mapping[int, AdamParams]) -> dict[int, OptimOutput]:
        return {slot: fake_trainer.adamw_step(self.slots[slot], p) for slot, p in params.items()}

    def discard_grads(self, slot: int) -> None:
        self.slots[slot].gradients = {}

    def capture_state(self, slot: int) -> NumpyCapture:
        return NumpyCapture(fake_trainer.captured(self.slots[slot]), fake_trainer.write_state, self)

    def tidy(self, busy: bool) -> float | None:
        """As often as asked, and there is more to do for ``chores`` times."""
        self.tidied.append(busy)
        if not self.chores:
            return None
        self.chores -= 1
        return 0.0

    def capture_adapter(self, slot: int) -> NumpyCapture:
        held = fake_trainer.captured(self.slots[slot])
        return NumpyCapture(held, fake_trainer.write_adapter, self)


class NumpySampler:
    """A step is ``TOKENS_PER_TURN`` tokens of the oldest request."""

    def __init__(self, log: list[str]) -> None:
        self.base = BaseWeights(VOCAB_SIZE)
        self.views: dict[str | None, HeadView] = {None: HeadView(self.base, None, {})}
        self.running: dict[str, Iterator[SampleResult | None]] = {}
        self.cancelled: list[str] = []
        self.log = log

    def publish(self, snapshot_id: str, directory: Path) -> None:
        self.views[snapshot_id] = fake_trainer.read_view(self.base, directory)

    def retire(self, snapshot_id: str) -> None:
        self.views.pop(snapshot_id, None)

    def submit(self, request: SampleRequest) -> None:
        if request.snapshot_id not in self.views:
            raise UserError("unknown snapshot")
        texts = fake_sampler.texts(None, VOCAB_SIZE)
        view = self.views[request.snapshot_id]
        self.running[request.request_id] = fake_sampler.run_request(
            view, request, CONTEXT_LENGTH, texts
        )

    def cancel(self, request_id: str) -> None:
        if self.running.pop(request_id, None) is not None:
            self.cancelled.append(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.cancelled)

    def step(self, begin: Callable[[set[str]], None]) -> list[tuple[str, SampleResult | Exception]]:
        self.log.append("sample")
        ended: list[tuple[str, SampleResult | Exception]] = [
            (request_id, UserError("cancelled")) for request_id in self.cancelled
        ]
        self.cancelled = []
        for request_id, work in list(self.running.items())[:1]:
            begin({request_id})
            result = next(work)
            if result is not None:
                del self.running[request_id]
                ended.append((request_id, result))
        return ended


class Bench:
    """A loop, its inbox, the replies by call id in the order they came, and the turns taken."""

    def __init__(self, fatal: tuple[type[BaseException], ...] = ()) -> None:
        self.log: list[str] = []
        self.trainer = NumpyTrainer(self.log)
        self.sampler = NumpySampler(self.log)
        self.inbox: Inbox = queue.SimpleQueue()
        self.replies: dict[int, ipc.Reply] = {}
        self.answered = threading.Event()
        self.written: queue.SimpleQueue[ipc.Written] = queue.SimpleQueue()
        self.time = 0.0
        self.noted: list[tuple[int, ...]] = []
        self.loop = EngineLoop(
            self.trainer,
            self.sampler,
            self.inbox,
            self.reply,
            sampling_share=0.5,
            at_work=lambda calls: self.noted.append(tuple(calls)),
            fatal=fatal,
            clock=self.tick,
        )
        self.trainer.load_slot(0, spec(), None, True)

    def tick(self) -> float:
        """A clock on which every turn takes a second."""
        self.time += 1.0
        return self.time

    def reply(self, reply: ipc.Reply | ipc.Written) -> None:
        if isinstance(reply, ipc.Written):
            self.written.put(reply)
            return
        self.replies[reply.call_id] = reply
        self.answered.set()

    def run(self, *commands: ipc.Command) -> None:
        """Puts the commands, numbered from 1, and runs the loop until all are answered."""
        for number, command in enumerate(commands, 1):
            self.inbox.put(ipc.Call(number, command))
        while len(self.replies) < len(commands):
            self.loop.turn(wait=False)

    def value(self, number: int) -> object:
        assert self.replies[number].error is None
        return self.replies[number].value

    def error(self, number: int) -> Exception | None:
        return self.replies[number].error


def small(slot: int = 0, seed: int = 0) -> TrainUnit:
    return unit(*(op(slot, datum(VOCAB_SIZE, 9, seed + i)) for i in range(4)))


def bad_unit() -> TrainUnit:
    return unit(op(0, datum(VOCAB_SIZE, 9, 0)), op(0, datum(VOCAB_SIZE, 9, 0), loss="none"))


def test_training_commands_are_answered_in_their_order(tmp_path: Path) -> None:
    bench = Bench()
    bench.trainer.capture_state(0).write(tmp_path / "state")
    bench.run(
        ipc.LoadSlot(1, spec(), None, True),
        ipc.ForwardBackward(small(1)),
        ipc.Forward(small(1)),
        ipc.OptimStep({1: AdamParams()}),
        ipc.SaveState(1, tmp_path / "saved"),
        ipc.ExportAdapter(1, tmp_path / "adapter"),
        ipc.LoadSlot(2, spec(), tmp_path / "state", True),
        ipc.ForwardBackward(small(2)),
        ipc.DiscardGrads(2),
        ipc.OptimStep({2: AdamParams()}),
        ipc.UnloadSlot(1),
    )
    assert list(bench.replies) == list(range(1, 12))
    trained, only = bench.value(2), bench.value(3)
    assert isinstance(trained, list)
    assert isinstance(only, list)
    assert [each.metrics for each in trained] == [each.metrics for each in only]
    first, second = bench.value(4), bench.value(10)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first[1].metrics["grad_norm"] > 0
    assert second[2].metrics["grad_norm"] == 0
    assert [bench.written.get().call_id for _ in range(2)] == [5, 6]
    assert (tmp_path / "saved" / "optimizer.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert set(bench.trainer.slots) == {0, 2}


def test_a_failed_unit_fails_alone() -> None:
    bench = Bench()
    bench.run(
        ipc.ForwardBackward(bad_unit()),
        ipc.OptimStep({0: AdamParams()}),
        ipc.ForwardBackward(small()),
        ipc.ForwardBackward(unit(op(9, datum(VOCAB_SIZE, 4, 0)))),
        ipc.Forward(small()),
    )
    assert isinstance(bench.error(1), UserError)
    step = bench.value(2)
    assert isinstance(step, dict)
    assert step[0].metrics["grad_norm"] == 0
    assert bench.error(3) is None
    assert isinstance(bench.error(4), UnitError)
    assert str(bench.error(4)) == "ForwardBackward failed: KeyError: 9"
    assert bench.error(5) is None


def test_disk_errors_are_storage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    bench = Bench()
    bench.run(ipc.SaveState(0, tmp_path / "file" / "state"))
    assert bench.error(1) is None  # the state was captured
    written = bench.written.get()
    assert written.call_id == 1
    assert isinstance(written.error, StorageError)
    assert str(tmp_path) not in str(written.error)


def test_training_goes_on_while_states_are_written(tmp_path: Path) -> None:
    """A third state is not captured before one of two is written: that command and those behind it
    wait, samples do not."""
    bench = Bench()
    bench.trainer.disk_answers.clear()
    bench.run(
        ipc.SaveState(0, tmp_path / "1"),
        ipc.OptimStep({0: AdamParams()}),
        ipc.ExportAdapter(0, tmp_path / "3"),
        ipc.OptimStep({0: AdamParams()}),
    )
    bench.inbox.put(ipc.Call(5, ipc.SaveState(0, tmp_path / "5")))
    bench.inbox.put(ipc.Call(6, ipc.OptimStep({0: AdamParams()})))
    bench.inbox.put(ipc.Call(7, ipc.Sample(request((1, 2), max_tokens=100))))
    while 7 not in bench.replies:
        assert bench.loop.turn(wait=False) is Turn.SAMPLE
    assert bench.loop.turn(wait=False) is Turn.WAIT
    assert list(bench.replies) == [1, 2, 3, 4, 7]
    assert bench.written.empty()
    assert not list(tmp_path.iterdir())
    bench.trainer.disk_answers.set()
    turn = Turn.WAIT
    while 6 not in bench.replies:
        turn = bench.loop.turn(wait=turn is Turn.WAIT)  # woken by what was written
    assert [bench.written.get().call_id for _ in range(3)] == [1, 3, 5]
    base = bench.trainer.base
    steps = [
        fake_trainer.read_slot(base, spec(), tmp_path / name, with_optimizer=True).step
        for name in ("1", "5")
    ]
    assert steps == [0, 2]


def test_what_was_captured_is_written_before_the_loop_ends(tmp_path: Path) -> None:
    bench = Bench()
    bench.inbox.put(ipc.Call(1, ipc.SaveState(0, tmp_path / "state")))
    bench.inbox.put(ipc.Call(0, ipc.ExportAdapter(0, tmp_path / "adapter")))
    for _ in range(2):
        bench.loop.turn(wait=False)
    bench.inbox.put(None)
    bench.loop.run()
    assert (tmp_path / "state" / "state.json").is_file()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_fatal_errors_end_the_loop() -> None:
    bench = Bench(fatal=(KeyError,))
    with pytest.raises(KeyError):
        bench.run(ipc.UnloadSlot(9))


def test_each_piece_of_work_is_noted_before_it_begins_and_after_it_ended(tmp_path: Path) -> None:
    """None of them for a call that waits."""
    bench = Bench()
    tokens = fake_sampler.TOKENS_PER_TURN
    bench.run(
        ipc.ForwardBackward(small()),
        ipc.OptimStep({0: AdamParams()}),
        ipc.Sample(request((1, 2), max_tokens=2 * tokens)),
        ipc.Sample(request((1, 2), max_tokens=tokens)),
        ipc.Publish("missing", tmp_path / "missing"),
    )
    commands = [(3,), (), (4,), (), (5,), ()]
    assert bench.noted[: len(commands)] == commands
    turns = bench.noted[len(commands) :]
    assert set(turns[1::2]) == {()}
    assert turns[::2].count((1,)) == 5  # four micro-batches and the unit's end
    assert turns[::2].count((2,)) == 1
    samples = [calls for calls in turns[::2] if calls not in ((1,), (2,))]
    assert set(samples) == {(3,), (4,)}
    assert samples == sorted(samples)


def breaking_sample(bench: Bench, number: int) -> None:
    """A request that is being sampled and whose next step raises ``StopIteration``."""
    bench.inbox.put(ipc.Call(number, ipc.Sample(request((1, 2), max_tokens=1000, request_id="b"))))
    bench.loop.turn(wait=False)
    bench.sampler.running["b"] = iter(())
    bench.noted.clear()


def test_what_was_worked_on_stays_noted_when_the_loop_breaks() -> None:
    bench = Bench()
    breaking_sample(bench, 1)
    with pytest.raises(StopIteration):
        bench.loop.turn(wait=False)
    assert bench.noted == [(1,)]


def test_a_device_that_fails_late_is_also_held_against_the_last_training_turn() -> None:
    bench = Bench(fatal=(StopIteration,))
    bench.run(ipc.OptimStep({0: AdamParams()}))
    breaking_sample(bench, 2)
    bench.inbox.put(ipc.Call(3, ipc.Retire("unknown")))
    with pytest.raises(StopIteration):
        bench.loop.run()
    assert bench.noted == [(3,), (), (2,), (2, 1)]


def test_samples_are_answered_when_they_end(tmp_path: Path) -> None:
    bench = Bench()
    bench.run(
        ipc.ExportAdapter(0, tmp_path / "adapter"),
        ipc.Sample(request((1, 2), max_tokens=100)),
        ipc.Sample(request((1, 2), snapshot_id="unknown")),
        ipc.Sample(request((1, 2), max_tokens=1000, request_id="cancelled")),
        ipc.Cancel("cancelled"),
        ipc.Cancel("never known"),
    )
    result = bench.value(2)
    assert isinstance(result, SampleResult)
    assert len(result.sequences[0].tokens) == 100
    assert isinstance(bench.error(3), UserError)
    assert isinstance(bench.error(4), UserError)
    assert bench.error(5) is bench.error(6) is None


def test_snapshots_come_and_go_in_the_order_of_commands(tmp_path: Path) -> None:
    bench = Bench()
    bench.trainer.capture_adapter(0).write(tmp_path)
    bench.run(
        ipc.Publish("one", tmp_path),
        ipc.Sample(request((1, 2), snapshot_id="one")),
        ipc.Retire("one"),
        ipc.Sample(request((1, 2), snapshot_id="one")),
        ipc.Publish("two", tmp_path / "missing"),
    )
    assert isinstance(bench.value(2), SampleResult)
    assert isinstance(bench.error(4), UserError)
    assert isinstance(bench.error(5), UserError)


def test_training_and_sampling_take_turns() -> None:
    """With equal shares and equal turns they alternate, from the first turn on; alone, each side
    runs without pause."""
    bench = Bench()
    bench.run(
        ipc.ForwardBackward(unit(*(op(0, datum(VOCAB_SIZE, 9, i)) for i in range(20)))),
        ipc.Sample(request((1, 2), max_tokens=10 * fake_sampler.TOKENS_PER_TURN)),
    )
    mixed = bench.log[:20]
    assert mixed.count("train") == mixed.count("sample") == 10
    assert set(itertools.pairwise(mixed)) == {("train", "sample"), ("sample", "train")}
    assert set(bench.log[24:]) == {"train"}


def test_a_sample_stands_still_for_one_micro_batch_at_most() -> None:
    """Of units of 20 micro-batches each, which take a second; so does a decode step."""
    bench = Bench()
    twenty = unit(*(op(0, datum(VOCAB_SIZE, 9, i)) for i in range(20)))
    bench.run(
        ipc.ForwardBackward(twenty),
        ipc.ForwardBackward(twenty),
        ipc.Sample(request((1, 2), max_tokens=10 * fake_sampler.TOKENS_PER_TURN)),
    )
    pauses = bench.loop.pauses
    assert pauses.longest_s == 1.0
    assert pauses.num == pauses.total_s
    assert 9 <= pauses.num <= 10


def test_pauses_in_a_row_are_one() -> None:
    pauses = Pauses()
    for turn, seconds, waits in (
        (Turn.TRAIN, 9.0, False),
        (Turn.TRAIN, 1.0, True),
        (Turn.TRAIN, 2.0, True),
        (Turn.SAMPLE, 5.0, True),
        (Turn.TRAIN, 0.5, True),
        (Turn.WAIT, 7.0, False),
    ):
        pauses.note(turn, seconds, waits)
    assert (pauses.num, pauses.total_s, pauses.longest_s) == (2, 3.5, 3.0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_shares_are_of_measured_time(share: float) -> None:
    """Long micro-batches, short decode steps: the time is shared, not the turns."""
    time_share = TimeShare(share)
    spent = {Turn.TRAIN: 0.0, Turn.SAMPLE: 0.0}
    seconds = {Turn.TRAIN: 1.0, Turn.SAMPLE: 0.02}
    for _ in range(20_000):
        turn = time_share.plan(training_waits=True, sampling_waits=True)
        time_share.spend(turn, seconds[turn])
        spent[turn] += seconds[turn]
    assert spent[Turn.SAMPLE] / sum(spent.values()) == pytest.approx(share, abs=0.02)


def test_nobody_saves_up_turns() -> None:
    """An hour of training alone does not give sampling an hour alone afterwards."""
    time_share = TimeShare(0.5)
    for _ in range(3600):
        assert time_share.plan(training_waits=True, sampling_waits=False) is Turn.TRAIN
        time_share.spend(Turn.TRAIN, 1.0)
    turns = []
    for _ in range(10):
        turns.append(time_share.plan(training_waits=True, sampling_waits=True))
        time_share.spend(turns[-1], 1.0)
    assert turns.count(Turn.TRAIN) in (4, 5)  # the last turn alone may count, the others do not
    assert time_share.plan(training_waits=False, sampling_waits=False) is Turn.WAIT


def test_an_idle_loop_sleeps_and_wakes() -> None:
    """It takes no turn while there is nothing to do, and answers what comes later."""
    bench = Bench()
    thread = threading.Thread(target=bench.loop.run)
    thread.start()
    assert not bench.answered.wait(0.1)
    # Two readings of the clock a turn: the first turn, and none after it.
    assert bench.time <= 2.0
    bench.inbox.put(ipc.Call(1, ipc.Forward(small())))
    bench.answered.wait()
    outputs = bench.value(1)
    assert isinstance(outputs, list)
    assert np.isfinite(outputs[0].logprobs[0]).all()
    bench.inbox.put(ipc.Call(0, ipc.Stop()))
    thread.join()


def test_the_inbox_end_stops_the_loop() -> None:
    bench = Bench()
    bench.inbox.put(None)
    bench.loop.run()
    assert bench.replies == {}


# --------------------------------------------------------------------------- housekeeping


def test_the_loop_tidies_after_work_and_while_it_waits() -> None:
    bench = Bench()
    bench.trainer.chores = 3
    bench.run(ipc.Forward(small()), ipc.Sample(request([1, 2], max_tokens=2)))
    assert bench.trainer.tidied
    assert all(bench.trainer.tidied)
    bench.trainer.tidied.clear()
    bench.trainer.chores = 3
    assert bench.loop.turn(wait=False) is Turn.WAIT
    for _ in range(3):  # would sleep for ever if it did not know of more to do
        assert bench.loop.turn(wait=True) is Turn.WAIT
    assert bench.trainer.tidied == [False] * 4


def test_a_command_comes_before_housekeeping() -> None:
    bench = Bench()
    bench.trainer.chores = 1000
    bench.loop.turn(wait=False)
    bench.inbox.put(ipc.Call(1, ipc.OptimStep({0: AdamParams()})))
    assert bench.loop.turn(wait=True) is Turn.TRAIN
    assert 1 in bench.replies

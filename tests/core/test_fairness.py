"""Shares of owners: equal tokens, whatever they have queued, and in how many models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tests.core.builders import operation, optim_work, train_work
from training.core.fairness import ACTIVE_S, MIN_TURN_TOKENS, FairShares
from training.core.model_queue import ModelQueue
from training.core.operations import CallWork, Finish, Operation, Work
from training.core.planner import Plan, cost_tokens, plan_next
from training.core.records import FutureKind

UNIT_TOKENS, TURN_TOKENS = 400, 100
LARGEST = 60
"""Tokens of one operation, in these tests."""


async def _nothing() -> Finish:
    raise AssertionError("a plan runs nothing")


def _operation(owner: str, model: int, seq: int, letter: str, tokens: int) -> Operation:
    kinds: dict[str, tuple[FutureKind, Work]] = {
        "t": (FutureKind.FORWARD_BACKWARD, train_work(tokens)),
        "f": (FutureKind.FORWARD, train_work(tokens)),
        "o": (FutureKind.OPTIM_STEP, optim_work()),
        "c": (FutureKind.SAVE_WEIGHTS, CallWork(_nothing)),
    }
    kind, work = kinds[letter]
    return operation(f"{owner}{model}", seq, kind, work, float(seq), owner)


class Trainer:
    """The loop of the task manager without its backend: every unit takes a second."""

    def __init__(self) -> None:
        self.queues: dict[str, ModelQueue] = {}
        self.shares = FairShares(TURN_TOKENS)
        self.now_s = 0.0
        self.tokens: Counter[str] = Counter()
        self.ran: list[Operation] = []

    def push(self, *operations: Operation) -> None:
        for item in operations:
            self.queues.setdefault(item.model_id, ModelQueue(item.model_id, lambda: 0, 1)).push(
                item
            )

    def turn(self) -> Plan | None:
        ready = [run for queue in self.queues.values() if (run := queue.run_of_ready())]
        standing = self.shares.standing(ready, self.now_s)
        plan = plan_next(ready, UNIT_TOKENS, standing)
        if plan is None:
            return None
        for item in plan.operations:
            self.queues[item.model_id].pop(item)
            self.tokens[item.owner] += cost_tokens(item)
        self.ran += plan.operations
        self.shares.took(plan.operations)
        self.now_s += 1.0
        return plan


LETTERS = st.tuples(st.sampled_from("tfoc"), st.integers(1, LARGEST))
MODELS = st.lists(st.lists(LETTERS, min_size=1, max_size=8), min_size=1, max_size=5)


@given(st.dictionaries(st.sampled_from("abc"), MODELS, min_size=1))
def test_everything_runs_once_and_in_the_order_of_its_model(
    owners: dict[str, Sequence[Sequence[tuple[str, int]]]],
) -> None:
    trainer = Trainer()
    given_: list[Operation] = []
    for owner, models in owners.items():
        for model, letters in enumerate(models):
            for seq, (letter, tokens) in enumerate(letters, 1):
                given_.append(_operation(owner, model, seq, letter, tokens))
    trainer.push(*given_)
    for _ in given_:
        if trainer.turn() is None:
            break
    assert trainer.turn() is None
    assert len(trainer.ran) == len(given_)
    for model_id in trainer.queues:
        seqs = [item.seq for item in trainer.ran if item.model_id == model_id]
        assert seqs == list(range(1, len(seqs) + 1))


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.lists(st.integers(1, LARGEST), min_size=1, max_size=10),
    st.lists(st.integers(1, LARGEST), min_size=1, max_size=10),
)
def test_two_owners_with_full_queues_get_the_same(
    many: int, few: int, sizes_a: Sequence[int], sizes_b: Sequence[int]
) -> None:
    """Within what one may get ahead in a unit, at every moment."""
    trainer = Trainer()
    for owner, models, sizes in (("a", many, sizes_a), ("b", few, sizes_b)):
        for model in range(models):
            trainer.push(
                *(
                    _operation(owner, model, seq, "t", sizes[(seq + model) % len(sizes)])
                    for seq in range(1, 30)
                )
            )
    while all(any(len(q) for name, q in trainer.queues.items() if name[0] == o) for o in "ab"):
        trainer.turn()
        assert abs(trainer.tokens["a"] - trainer.tokens["b"]) <= TURN_TOKENS + LARGEST


def test_of_many_models_one_owner_has_one_share() -> None:
    trainer = Trainer()
    for model in range(100):
        trainer.push(*(_operation("greedy", model, seq, "t", 50) for seq in range(1, 9)))
    for seq in range(1, 9):
        trainer.push(_operation("small", 0, seq, "t", 50))
    while len(trainer.queues["small0"]):
        plan = trainer.turn()
        assert plan is not None
        assert "small" in {item.owner for item in plan.operations}
        assert sum(item.num_tokens for item in plan.operations) <= 2 * TURN_TOKENS
    assert trainer.tokens["greedy"] == trainer.tokens["small"]


def test_who_was_away_has_no_credit_and_no_debt() -> None:
    trainer = Trainer()
    trainer.push(_operation("late", 0, 1, "t", 50))
    trainer.push(*(_operation("busy", 0, seq, "t", 50) for seq in range(1, 60)))
    for _ in range(6):
        trainer.turn()
    had = dict(trainer.tokens)
    trainer.push(*(_operation("late", 0, seq, "t", 50) for seq in range(2, 60)))
    trainer.push(*(_operation("new", 0, seq, "t", 50) for seq in range(1, 60)))
    for _ in range(8):
        trainer.turn()
    got = {owner: trainer.tokens[owner] - had.get(owner, 0) for owner in ("busy", "late", "new")}
    assert max(got.values()) - min(got.values()) <= TURN_TOKENS


def test_an_owner_alone_fills_units_and_small_ones_beside_somebody_who_comes_back() -> None:
    trainer = Trainer()
    trainer.push(*(_operation("busy", 0, seq, "t", 50) for seq in range(1, 60)))
    plan = trainer.turn()
    assert plan is not None
    assert len(plan.operations) == UNIT_TOKENS // 50
    trainer.push(_operation("small", 0, 1, "t", 10))
    trainer.turn()
    plan = trainer.turn()
    assert plan is not None
    assert {item.owner for item in plan.operations} == {"busy"}
    assert len(plan.operations) == TURN_TOKENS // 50
    trainer.now_s += ACTIVE_S
    plan = trainer.turn()
    assert plan is not None
    assert len(plan.operations) == UNIT_TOKENS // 50


def test_steps_of_all_owners_go_together() -> None:
    trainer = Trainer()
    for owner in "abc":
        trainer.push(_operation(owner, 0, 1, "o", 0))
    plan = trainer.turn()
    assert plan is not None
    assert [item.owner for item in plan.operations] == ["a", "b", "c"]


def test_calls_count_too() -> None:
    """Who saves without end cannot keep another from training."""
    trainer = Trainer()
    trainer.push(*(_operation("saver", 0, seq, "c", 0) for seq in range(1, 50)))
    trainer.push(*(_operation("trains", 0, seq, "t", 50) for seq in range(50, 99)))
    trainer.queues["trains0"].next_seq = 50
    for _ in range(8):
        trainer.turn()
    assert abs(trainer.tokens["saver"] - trainer.tokens["trains"]) <= 1024


def test_a_small_batch_waits_for_a_small_one_and_a_large_one_for_a_large_one() -> None:
    shares = FairShares(2000)
    greedy = [operation("g", seq, work=train_work(400), owner="greedy") for seq in range(1, 20)]

    def turn_beside(tokens: int) -> float:
        small = [operation("s", work=train_work(tokens), owner="small")]
        turn_tokens = shares.standing([greedy, small], 0.0).turn_tokens
        # As long as it may come back, and does not, nothing changes; nor for its steps.
        assert shares.standing([greedy], ACTIVE_S / 2).turn_tokens == turn_tokens
        step = [operation("s", kind=FutureKind.OPTIM_STEP, work=optim_work(), owner="small")]
        assert shares.standing([greedy, step], ACTIVE_S / 2).turn_tokens == turn_tokens
        return turn_tokens

    assert turn_beside(1500) == 1500
    assert turn_beside(10) == MIN_TURN_TOKENS
    assert turn_beside(600) == 600
    assert turn_beside(5000) == 2000
    assert shares.standing([greedy], 2 * ACTIVE_S).turn_tokens == math.inf


def test_owners_that_are_gone_are_forgotten() -> None:
    shares = FairShares(TURN_TOKENS)
    for number in range(1000):
        item = operation(owner=f"o{number}", work=train_work(50))
        standing = shares.standing([[item]], number * ACTIVE_S)
        assert standing.turn_tokens == math.inf
        assert len(standing.clocks) == 1
        shares.took([item])

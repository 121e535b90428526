"""What every backend's sampling half keeps, whatever computes behind it."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.backends.harness import Harness, as_datum, datum, op, request, same_sample, spec, unit
from tests.backends.steps import written
from training.backends.base import (
    AdamParams,
    Float32Array,
    SampledSequence,
    SampleRequest,
    StopReason,
)
from training.core.errors import UserError

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = (5, 17, 3, 99, 42)


async def one(harness: Harness, sample_request: SampleRequest) -> SampledSequence:
    return (await harness.backend.sample(sample_request)).sequences[0]


async def trained_snapshot(
    harness: Harness, directory: Path, snapshot_id: str, slot: int = 0, seed: int = 1
) -> None:
    """A visibly trained adapter in ``slot``, published."""
    await harness.backend.load_slot(slot, spec(rank=4, seed=seed))
    for _ in range(3):
        data = [datum(harness.vocab_size, 30, seed)]
        await harness.backend.forward_backward(unit(op(slot, *data)))
        await harness.backend.optim_step({slot: AdamParams(learning_rate=2e-2)})
    await written(harness.backend.export_adapter(slot, directory))
    await harness.backend.publish(snapshot_id, directory)


async def trainer_logprobs(
    harness: Harness, slot: int, prompt: tuple[int, ...], tokens: list[int]
) -> Float32Array:
    """The trainer's logprobs of every token but the first of ``prompt`` + ``tokens``."""
    outputs = await harness.backend.forward(unit(op(slot, as_datum(prompt, tokens))))
    return outputs[0].logprobs[0]


# --------------------------------------------------------------------------- drawing


async def test_a_seed_fixes_the_sample(harness: Harness) -> None:
    """Sample i depends on (seed, i) alone, not on how many are drawn; negative seeds too."""
    for seed in (0, -5, 2**63 - 1):
        three = await harness.backend.sample(request(PROMPT, num_samples=3, seed=seed))
        two = await harness.backend.sample(request(PROMPT, num_samples=2, seed=seed))
        assert len(three.sequences) == 3
        for again, first in zip(two.sequences, three.sequences, strict=False):
            same_sample(harness, again, first)
        texts = {tuple(each.tokens.tolist()) for each in three.sequences}
        assert len(texts) == 3
    other = await one(harness, request(PROMPT, seed=1))
    assert other.tokens.tolist() != three.sequences[0].tokens.tolist()


async def test_shapes_and_reasons(harness: Harness) -> None:
    result = await harness.backend.sample(request(PROMPT, num_samples=2, max_tokens=6))
    for sequence in result.sequences:
        assert sequence.tokens.dtype == np.int32
        assert sequence.logprobs.dtype == np.float32
        assert sequence.tokens.shape == sequence.logprobs.shape == (6,)
        assert sequence.stop_reason is StopReason.LENGTH
        assert (sequence.logprobs <= 0).all()
        assert sequence.topk is None
    assert result.prompt_logprobs is None
    assert result.topk_prompt is None
    assert result.target_prompt_logprobs is None
    assert result.prompt_alt is None


async def test_greedy_takes_the_most_probable_token(harness: Harness) -> None:
    """Whatever the seed; the logprobs are of the unscaled distribution."""
    first = await one(harness, request(PROMPT, temperature=0.0, seed=1, topk_sample_logprobs=2))
    again = await one(harness, request(PROMPT, temperature=0.0, seed=2))
    same_sample(harness, first, again)
    assert first.topk is not None
    np.testing.assert_array_equal(first.topk.token_ids[:, 0], first.tokens)
    np.testing.assert_array_equal(first.topk.logprobs[:, 0], first.logprobs)


async def test_top_k_of_one_is_greedy(harness: Harness) -> None:
    greedy = await one(harness, request(PROMPT, temperature=0.0))
    cut = await one(harness, request(PROMPT, top_k=1, seed=3))
    tiny = await one(harness, request(PROMPT, top_p=1e-6, seed=4))
    same_sample(harness, greedy, cut)
    same_sample(harness, greedy, tiny)


async def test_draws_follow_the_distribution_and_its_cuts(harness: Harness) -> None:
    """First tokens of many samples: frequencies match probabilities, cuts exclude the rest, and
    the logprob told is that of the uncut distribution."""
    num_samples, k = 2000, 5
    top = await harness.backend.sample(request(PROMPT, max_tokens=1, topk_sample_logprobs=k))
    assert top.sequences[0].topk is not None
    best_ids = top.sequences[0].topk.token_ids[0].tolist()
    best = np.exp(top.sequences[0].topk.logprobs[0].astype(np.float64))
    drawn = await harness.backend.sample(
        request(PROMPT, max_tokens=1, num_samples=num_samples, top_k=k, seed=11)
    )
    counts = Counter(int(each.tokens[0]) for each in drawn.sequences)
    assert set(counts) <= set(best_ids)
    expected = best / best.sum()
    for token, probability in zip(best_ids, expected, strict=True):
        spread = np.sqrt(probability * (1 - probability) / num_samples)
        assert abs(counts[token] / num_samples - probability) < 5 * spread + 1e-3
    for each in drawn.sequences[:20]:
        place = best_ids.index(int(each.tokens[0]))
        assert each.logprobs[0] == pytest.approx(np.log(best[place]), abs=harness.sampler + 1e-5)
    kept = int(np.searchsorted(np.cumsum(best), 0.5 * best.sum())) + 1
    nucleus = await harness.backend.sample(
        request(PROMPT, max_tokens=1, num_samples=300, top_k=k, top_p=0.5, seed=12)
    )
    assert {int(each.tokens[0]) for each in nucleus.sequences} <= set(best_ids[:kept])


async def test_temperature_scales_the_logprobs(harness: Harness) -> None:
    """Differences of logprobs at temperature t are 1 / t times those at 1."""
    k = 4
    tops = {}
    for temperature in (1.0, 2.0):
        sequence = await one(
            harness,
            request(PROMPT, max_tokens=1, temperature=temperature, topk_sample_logprobs=k),
        )
        assert sequence.topk is not None
        tops[temperature] = sequence.topk
    np.testing.assert_array_equal(tops[1.0].token_ids, tops[2.0].token_ids)
    plain, halved = np.diff(tops[1.0].logprobs[0]), np.diff(tops[2.0].logprobs[0])
    np.testing.assert_allclose(halved, plain / 2, atol=1e-4)


# --------------------------------------------------------------------------- stopping


async def test_stop_tokens_end_a_sequence_and_stay_in_it(harness: Harness) -> None:
    free = await one(harness, request(PROMPT, max_tokens=12, seed=5))
    stop = int(free.tokens[4])
    first = free.tokens.tolist().index(stop)
    stopped = await one(
        harness, request(PROMPT, max_tokens=12, seed=5, stop_token_ids=(stop, 10**6))
    )
    assert stopped.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert stopped.stop_reason is StopReason.STOP


async def test_stop_strings_are_found_across_tokens(harness: Harness) -> None:
    """The token that completes the string is the last one."""
    free = await one(harness, request(PROMPT, max_tokens=12, seed=6))
    tokens = free.tokens.tolist()
    stop = harness.text(tokens[3:5])
    expected = next(count for count in range(1, 13) if stop in harness.text(tokens[:count]))
    stopped = await one(
        harness, request(PROMPT, max_tokens=12, seed=6, stop_strings=("never this", stop))
    )
    assert stopped.tokens.tolist() == tokens[:expected]
    assert stopped.stop_reason is StopReason.STOP
    np.testing.assert_allclose(stopped.logprobs, free.logprobs[:expected], atol=harness.sampler)


async def test_a_stop_on_the_last_token_is_a_stop(harness: Harness) -> None:
    free = await one(harness, request(PROMPT, max_tokens=1, seed=5))
    stop = (int(free.tokens[0]),)
    stopped = await one(harness, request(PROMPT, max_tokens=1, seed=5, stop_token_ids=stop))
    assert stopped.stop_reason is StopReason.STOP


async def test_the_context_length_ends_a_sequence(harness: Harness) -> None:
    context_length = harness.backend.capabilities().context_length
    prompt = [7] * (context_length - 3)
    sequence = await one(harness, request(prompt, max_tokens=50))
    assert len(sequence.tokens) == 3
    assert sequence.stop_reason is StopReason.LENGTH
    with pytest.raises(UserError):
        await harness.backend.sample(request([7] * (context_length + 1), max_tokens=1))


# --------------------------------------------------------------------------- scores


async def test_prompt_scores_alone(harness: Harness) -> None:
    """``max_tokens`` 0 draws nothing."""
    result = await harness.backend.sample(
        request(PROMPT, num_samples=2, max_tokens=0, prompt_logprobs=True, topk_prompt_logprobs=3)
    )
    assert [len(each.tokens) for each in result.sequences] == [0, 0]
    assert all(each.stop_reason is StopReason.LENGTH for each in result.sequences)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs.shape == (len(PROMPT),)
    assert np.isnan(result.prompt_logprobs[0])
    assert np.isfinite(result.prompt_logprobs[1:]).all()
    assert result.topk_prompt is not None
    assert result.topk_prompt.token_ids.shape == result.topk_prompt.logprobs.shape == (5, 3)
    assert np.isnan(result.topk_prompt.logprobs[0]).all()
    assert (result.topk_prompt.token_ids[0] == 0).all()
    assert (np.diff(result.topk_prompt.logprobs[1:]) <= 0).all()


async def test_prompt_scores_equal_the_trainers(harness: Harness, tmp_path: Path) -> None:
    """Long enough to be prefilled in several pieces; temperature does not touch them."""
    await trained_snapshot(harness, tmp_path / "adapter", "scores")
    prompt = tuple(int(t) for t in datum(harness.vocab_size, 100, 4).tokens)
    expected = await trainer_logprobs(harness, 0, prompt[:-1], [prompt[-1]])
    for temperature in (1.0, 0.5):
        result = await harness.backend.sample(
            request(
                prompt,
                snapshot_id="scores",
                max_tokens=1,
                temperature=temperature,
                prompt_logprobs=True,
            )
        )
        assert result.prompt_logprobs is not None
        np.testing.assert_allclose(result.prompt_logprobs[1:], expected, atol=harness.sampler)


async def test_the_last_n_scores_alone(harness: Harness) -> None:
    full = await harness.backend.sample(request(PROMPT, prompt_logprobs=True))
    last = await harness.backend.sample(
        request(PROMPT, prompt_logprobs=True, prompt_logprobs_last_n=2)
    )
    assert full.prompt_logprobs is not None
    assert last.prompt_logprobs is not None
    assert np.isnan(last.prompt_logprobs[:3]).all()
    np.testing.assert_allclose(
        last.prompt_logprobs[3:], full.prompt_logprobs[3:], atol=harness.sampler
    )


async def test_other_tokens_are_scored_in_the_prompts_place(harness: Harness) -> None:
    """The prompt's own tokens as targets give the prompt's logprobs; -1 gives 0."""
    targets = [[PROMPT[i + 1], -1, (PROMPT[i + 1] + 1) % 100] for i in range(len(PROMPT) - 1)]
    result = await harness.backend.sample(
        request(PROMPT, prompt_logprobs=True, target_prompt_tokens=targets)
    )
    found = result.target_prompt_logprobs
    assert found is not None
    assert result.prompt_logprobs is not None
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found[:, 0], result.prompt_logprobs[1:], atol=harness.sampler)
    assert (found[:, 1] == 0.0).all()
    assert (found[:, 2] < 0.0).all()


async def test_alternatives_are_drawn_for_each_prompt_position(harness: Harness) -> None:
    draw = request(PROMPT, prompt_alt_tokens_k=6, seed=3)
    result = await harness.backend.sample(draw)
    assert result.prompt_alt is not None
    tokens, logprobs = result.prompt_alt
    assert tokens.shape == logprobs.shape == (4, 6)
    scored = await harness.backend.sample(
        request(PROMPT, target_prompt_tokens=tokens.tolist(), prompt_alt_tokens_k=6, seed=3)
    )
    assert scored.prompt_alt is not None
    np.testing.assert_array_equal(scored.prompt_alt.token_ids, tokens)
    assert scored.target_prompt_logprobs is not None
    np.testing.assert_allclose(scored.target_prompt_logprobs, logprobs, atol=harness.sampler)


async def test_top_k_sample_logprobs_lead_the_distribution(harness: Harness) -> None:
    sequence = await one(harness, request(PROMPT, max_tokens=5, topk_sample_logprobs=3))
    assert sequence.topk is not None
    assert sequence.topk.token_ids.shape == sequence.topk.logprobs.shape == (5, 3)
    for row, token in enumerate(sequence.tokens):
        ids = sequence.topk.token_ids[row].tolist()
        if int(token) in ids:
            assert sequence.topk.logprobs[row][ids.index(int(token))] == sequence.logprobs[row]
        else:
            assert sequence.logprobs[row] <= sequence.topk.logprobs[row].min()


# --------------------------------------------------------------------------- snapshots


async def test_sampled_logprobs_equal_the_trainers(harness: Harness, tmp_path: Path) -> None:
    """Exact with our kernels, within 1e-4 in float32, within 0.3 in bfloat16."""
    await trained_snapshot(harness, tmp_path / "adapter", "policy")
    result = await harness.backend.sample(
        request(PROMPT, snapshot_id="policy", num_samples=3, max_tokens=40, seed=8)
    )
    for sequence in result.sequences:
        expected = await trainer_logprobs(harness, 0, PROMPT, sequence.tokens.tolist())
        np.testing.assert_allclose(
            sequence.logprobs, expected[len(PROMPT) - 1 :], atol=harness.sampler
        )


async def test_a_snapshot_is_not_the_base_and_does_not_move(
    harness: Harness, tmp_path: Path
) -> None:
    await trained_snapshot(harness, tmp_path / "adapter", "fixed")

    async def scores(snapshot_id: str | None) -> Float32Array:
        result = await harness.backend.sample(
            request(PROMPT, snapshot_id=snapshot_id, prompt_logprobs=True)
        )
        assert result.prompt_logprobs is not None
        return result.prompt_logprobs[1:]

    base, before = await scores(None), await scores("fixed")
    assert np.abs(base - before).max() > 4 * harness.sampler
    assert np.abs(base - before).max() > 0.1
    await harness.backend.forward_backward(unit(op(0, datum(harness.vocab_size, 30, 2))))
    await harness.backend.optim_step({0: AdamParams(learning_rate=0.1)})
    np.testing.assert_allclose(await scores("fixed"), before, atol=harness.sampler)
    await written(harness.backend.export_adapter(0, tmp_path / "newer"))
    await harness.backend.publish("fixed", tmp_path / "newer")
    after = await scores("fixed")
    assert np.abs(after - before).max() > 4 * harness.sampler
    await harness.backend.load_slot(1, spec())
    expected = await trainer_logprobs(harness, 0, PROMPT[:-1], [PROMPT[-1]])
    np.testing.assert_allclose(after, expected, atol=harness.sampler)


async def test_a_training_state_can_be_published(harness: Harness, tmp_path: Path) -> None:
    await trained_snapshot(harness, tmp_path / "adapter", "exported")
    await written(harness.backend.save_state(0, tmp_path / "state"))
    await harness.backend.publish("state", tmp_path / "state")
    sequences = [
        await one(harness, request(PROMPT, snapshot_id=snapshot_id, seed=4))
        for snapshot_id in ("exported", "state")
    ]
    same_sample(harness, sequences[0], sequences[1])


async def test_unknown_and_retired_snapshots_are_refused(harness: Harness, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        await harness.backend.sample(request(PROMPT, snapshot_id="never-published"))
    await trained_snapshot(harness, tmp_path / "adapter", "short-lived")
    running = asyncio.create_task(
        harness.backend.sample(request(PROMPT, snapshot_id="short-lived", max_tokens=200))
    )
    await asyncio.sleep(0)  # it is submitted before the snapshot is retired
    await harness.backend.retire("short-lived")
    assert len((await running).sequences[0].tokens) == 200
    with pytest.raises(UserError):
        await harness.backend.sample(request(PROMPT, snapshot_id="short-lived"))
    await harness.backend.retire("short-lived")


async def test_wrong_requests_are_refused(harness: Harness) -> None:
    for wrong in (
        request(()),
        request((harness.vocab_size,)),
        request((-1,)),
        request(PROMPT, target_prompt_tokens=[[1]]),
    ):
        with pytest.raises(UserError):
            await harness.backend.sample(wrong)


# --------------------------------------------------------------------------- company


async def test_sixteen_requests_at_once_equal_each_alone(harness: Harness, tmp_path: Path) -> None:
    """Different prompts, snapshots, lengths and settings; also while the trainer works."""
    for slot in range(2):
        await trained_snapshot(harness, tmp_path / str(slot), f"many-{slot}", slot, seed=slot)

    def numbered(index: int) -> SampleRequest:
        tokens = datum(harness.vocab_size, 3 + 5 * index, index).tokens
        return request(
            [int(t) for t in tokens],
            snapshot_id=(None, "many-0", "many-1")[index % 3],
            num_samples=1 + index % 2,
            max_tokens=4 + index,
            seed=index,
            temperature=0.7,
            prompt_logprobs=index % 4 == 0,
        )

    alone = [await harness.backend.sample(numbered(index)) for index in range(16)]
    training = unit(op(0, *(datum(harness.vocab_size, 60, seed) for seed in range(8))))
    in_training = asyncio.create_task(harness.backend.forward_backward(training))
    together = await asyncio.gather(
        *(harness.backend.sample(numbered(index)) for index in range(16))
    )
    assert len(await in_training) == 1
    await harness.backend.discard_grads(0)
    for first, second in zip(alone, together, strict=True):
        for one_sequence, other in zip(first.sequences, second.sequences, strict=True):
            assert len(one_sequence.tokens) == len(other.tokens)
            same_sample(harness, one_sequence, other)


async def test_a_cancelled_request_ends_with_a_user_error(harness: Harness) -> None:
    long = request(PROMPT, num_samples=64, max_tokens=400, request_id="to-cancel")
    running = asyncio.create_task(harness.backend.sample(long))
    await asyncio.sleep(0)  # it is submitted first
    await harness.backend.cancel("to-cancel")
    with pytest.raises(UserError):
        await running
    await harness.backend.cancel("to-cancel")
    await harness.backend.cancel("never-known")
    assert len((await one(harness, request(PROMPT))).tokens) == 8

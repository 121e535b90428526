"""Drawing tokens: against slow references, and by the statistics of many draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from training.engine.prompt_scores import uniform_stream
from training.engine.sampling import Cut, Cuts
from training.engine.torch_vocabulary import TorchVocabulary, inverse_cdf, scaled_logprobs

Array = np.ndarray[Any, np.dtype[Any]]
NUM_DRAWS = 20000
VOCABULARY = TorchVocabulary()


def logprobs_at(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return scaled_logprobs(logits, np.full(len(logits), temperature, np.float32))


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def slow_kept(logprobs_V: torch.Tensor, cut: Cut) -> dict[int, float]:
    """Probability by token after top-k, then top-p of the rest; ties go to the lower id."""
    order = sorted(range(len(logprobs_V)), key=lambda token: (-float(logprobs_V[token]), token))
    if cut.top_k > 0:
        order = order[: cut.top_k]
    weights = np.exp(logprobs_V[order].double().numpy())
    weights /= weights.sum()
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    num_kept = int((before < cut.top_p).sum())
    kept = weights[:num_kept] / weights[:num_kept].sum()
    return dict(zip(order, kept.tolist(), strict=False))


def chi_square(counts: Array, probabilities: Array) -> float:
    """Normalised: about N(0, 1) under the hypothesis; cells of few expected draws are pooled."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    counts = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    keep = expected > 0
    assert counts[~keep].sum() == 0
    statistic = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = keep.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * max(freedom, 1)))


@pytest.mark.parametrize("vocab", [5, 256, 300, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_distribution(vocab: int, temperature: float) -> None:
    logits = random_logits(1, vocab)
    uniforms = uniform_stream(3, 1).random((1, NUM_DRAWS))
    tokens, logprobs = VOCABULARY.draw(logits, temperature, uniforms)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(logprobs[0], logprobs_at(logits, temperature)[0, tokens[0]])
    tokens = tokens[0]
    counts = np.bincount(tokens, minlength=vocab)
    expected = torch.softmax(logits[0].double() / temperature, -1).numpy()
    assert abs(chi_square(counts, expected)) < 4


@pytest.mark.parametrize(
    "cut",
    [
        Cut(1.0, 10, 1.0),
        Cut(0.7, -1, 0.8),
        Cut(1.3, 40, 0.6),
        Cut(1.0, 1, 1.0),
        Cut(1.0, -1, 1e-6),
        Cut(2.0, 1500, 0.999),
        Cut(2.0, 1500, 0.3),
        Cut(3.0, -1, 0.99),
    ],
)
@pytest.mark.parametrize("vocab", [50, 3000])
def test_cut_draws_follow_the_cut_distribution(cut: Cut, vocab: int) -> None:
    logits = random_logits(1, vocab)
    num_draws = NUM_DRAWS // 10
    uniforms = uniform_stream(5, 0).random(num_draws)
    cuts = Cuts.of([cut] * num_draws)
    tokens, logprobs = VOCABULARY.sample(logits.expand(num_draws, -1), cuts, uniforms)
    whole = logprobs_at(logits, cut.temperature)[0]
    np.testing.assert_array_equal(logprobs, whole[tokens])
    kept = slow_kept(whole, cut)
    assert set(tokens.tolist()) <= set(kept)
    counts = np.bincount(tokens, minlength=vocab)
    expected = np.zeros(vocab)
    expected[list(kept)] = list(kept.values())
    assert abs(chi_square(counts, expected)) < 4


@pytest.mark.parametrize("cut", [Cut(1.0, 100, 1.0), Cut(1.0, 1100, 1.0), Cut(1.0, -1, 0.5)])
def test_ties_are_cut_by_token_id(cut: Cut) -> None:
    """With equal logits exactly the lowest ids are kept, at every edge of the range."""
    logits = torch.zeros(1, 2000)
    num_kept = len(slow_kept(logprobs_at(logits, 1.0)[0], cut))
    for uniform, expected in ((0.0, 0), (1 - 2**-53, num_kept - 1)):
        token = int(VOCABULARY.sample(logits, Cuts.of([cut]), np.array([uniform])).tokens[0])
        assert abs(token - expected) <= (1 if cut.top_p < 1 else 0)


def test_rows_do_not_see_each_other() -> None:
    vocab = 2000
    logits = random_logits(12, vocab)
    cuts = [Cut(0.0, -1, 1.0), Cut(1.0, -1, 1.0), Cut(0.5, 3, 1.0), Cut(2.0, 1200, 0.99)] * 3
    uniforms = uniform_stream(1, 1).random(12)
    together = VOCABULARY.sample(logits, Cuts.of(cuts), uniforms)
    for row in range(12):
        one = slice(row, row + 1)
        alone = VOCABULARY.sample(logits[one], Cuts.of(cuts[one]), uniforms[one])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]


def test_edges_of_the_uniform_range() -> None:
    weights = torch.zeros(1, 700)
    weights[0, [3, 255, 256, 600]] = torch.tensor([0.1, 1e-30, 0.7, 0.2])
    uniforms = torch.tensor([[0.0, 0.0999, 0.1001, 0.5, 0.79, 0.81, 1 - 2**-53]])
    tokens = inverse_cdf(weights, uniforms.double())[0].tolist()
    assert tokens == [3, 3, 256, 256, 256, 600, 600]


def test_never_draws_what_has_no_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 1111, generator=generator)
    weights *= torch.rand(200, 1111, generator=generator) < 0.01
    weights[:, 0] += 1e-12
    uniforms = torch.rand(200, 50, generator=generator, dtype=torch.float64)
    uniforms[:, :2] = torch.tensor([0.0, 1 - 2**-53])
    tokens = inverse_cdf(weights, uniforms)
    assert bool((weights.gather(1, tokens) > 0).all())


def test_greedy_is_the_maximum_of_the_unscaled_distribution() -> None:
    logits = random_logits(4, 1000)
    greedy = Cuts.of([Cut(0.0, 5, 0.1)] * 4)
    tokens, logprobs = VOCABULARY.sample(logits, greedy, np.full(4, 0.9))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(logprobs, torch.log_softmax(logits, -1).max(-1).values)
    many, _ = VOCABULARY.draw(logits, 0.0, np.full((4, 3), 0.9))
    np.testing.assert_array_equal(many, np.repeat(tokens[:, None], 3, 1))


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    logits = random_logits(3, 1500)
    logits[1] = float("nan")
    for cut in (Cut(1.0, -1, 1.0), Cut(1.0, 5, 0.9), Cut(0.0, -1, 1.0)):
        tokens, logprobs = VOCABULARY.sample(logits, Cuts.of([cut] * 3), np.full(3, 0.3))
        alone, _ = VOCABULARY.sample(logits[[0, 2]], Cuts.of([cut] * 2), np.full(2, 0.3))
        np.testing.assert_array_equal(tokens[[0, 2]], alone)
        assert 0 <= tokens[1] < 1500
        assert np.isnan(logprobs).tolist() == [False, True, False]


def test_top_logprobs_are_sorted() -> None:
    logits = random_logits(3, 500)
    best = VOCABULARY.top(logits, np.array([1.0, 0.5, 0.0], np.float32), 7)
    for row, temperature in enumerate((1.0, 0.5, 1.0)):
        logprobs = logprobs_at(logits, temperature)[row].numpy()
        expected = np.sort(logprobs)[::-1][:7]
        np.testing.assert_array_equal(best.logprobs[row], expected)
        np.testing.assert_array_equal(logprobs[best.token_ids[row]], expected)
    assert best.token_ids.dtype == np.int32


@pytest.mark.parametrize("k", [1, 2, 3, 250, 251, 300])
def test_equal_logprobs_are_ordered_by_token_id(k: int) -> None:
    """As greedy takes the first of them: in the middle, and where the last one cuts them."""
    logits = torch.zeros(3, 300)
    logits[0, 200:] = 1.0
    logits[1, ::2] = -1.0
    logits[2, [3, 250]] = 2.0
    top = VOCABULARY.top(logits, np.ones(3, np.float32), k)
    order = [np.lexsort((np.arange(300), -row))[:k] for row in logits.numpy()]
    np.testing.assert_array_equal(top.token_ids, order)
    expected = torch.log_softmax(logits, -1).sort(descending=True).values[:, :k]
    np.testing.assert_array_equal(top.logprobs, expected.numpy())


def test_logprobs_of_targets_are_unscaled() -> None:
    logits = random_logits(3, 500)
    targets = np.array([[0, 499], [7, 7], [250, 1]])
    expected = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(targets))
    np.testing.assert_array_equal(VOCABULARY.logprobs(logits, targets), expected)


def test_streams_are_apart_and_repeatable() -> None:
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (-1, 0, 0), (2**63, 0, 0)]
    draws = {key: tuple(uniform_stream(*key).random(4)) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert draws[(0, 1, 0)] == tuple(uniform_stream(0, 1, 0).random(4))

"""Sampling kernels against slow references that sort the whole vocabulary, in double."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from training.engine.native.vocabulary import NativeVocabulary
from training.engine.sampling import Cut, Cuts
from training.engine.torch_vocabulary import TorchVocabulary

Array = np.ndarray[Any, np.dtype[Any]]
NAN, INFINITY = float("nan"), float("inf")
ALL = Cut(1.0, -1, 1.0)
CUTS = [
    ALL,
    Cut(0.3, -1, 1.0),
    Cut(1.0, 1, 1.0),
    Cut(0.7, 10, 1.0),
    Cut(1.0, 700, 1.0),
    Cut(1.0, 10**6, 1.0),
    Cut(0.7, -1, 0.8),
    Cut(3.0, -1, 0.99),
    Cut(1.0, -1, 1e-6),
    Cut(1.3, 40, 0.6),
    Cut(2.0, 1500, 0.9),
    Cut(1e-4, -1, 0.5),
    Cut(1e4, 300, 0.5),
]


@pytest.fixture
def vocabulary(kernels: ctypes.CDLL) -> NativeVocabulary:
    return NativeVocabulary()


class Kept(NamedTuple):
    """Tokens that a cut keeps, by ascending id, with the cumulative probabilities before and after
    each."""

    ids: Array
    starts: Array
    ends: Array


def random_logits(vocab: int, rows: int = 1, seed: int = 0, scale: float = 2.5) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale + 7


def slow_kept(logits_V: torch.Tensor, cut: Cut) -> Kept:
    values = logits_V.double().numpy()
    order = np.lexsort((np.arange(len(values)), -values))
    if cut.top_k > 0:
        order = order[: cut.top_k]
    weights = np.exp((values[order] - values.max()) / np.float32(cut.temperature))
    before = np.cumsum(weights) - weights
    if cut.top_p < 1:
        order = order[before < np.float32(cut.top_p) * weights.sum()]
    ids = np.sort(order)
    weights = np.exp((values[ids] - values.max()) / np.float32(cut.temperature))
    ends = np.cumsum(weights / weights.sum())
    return Kept(ids, np.concatenate([[0.0], ends[:-1]]), ends)


def sample(
    vocabulary: NativeVocabulary, logits_V: torch.Tensor, cut: Cut, uniforms: Array
) -> tuple[Array, Array]:
    """One token of the same row for each uniform."""
    num = len(uniforms)
    return vocabulary.sample(logits_V.expand(num, -1), Cuts.of([cut] * num), uniforms)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("vocab", [1, 5, 16, 300, 3000])
def test_the_token_whose_interval_holds_the_uniform(
    vocabulary: NativeVocabulary, vocab: int, cut: Cut
) -> None:
    """In the middle of an interval rounding decides nothing: the token is exactly that one. So
    every token that a cut keeps is drawn, and no other has room."""
    for seed in range(3):
        logits = random_logits(vocab, seed=seed)[0]
        kept = slow_kept(logits, cut)
        wide = kept.ends - kept.starts > 3e-6
        uniforms = ((kept.starts + kept.ends) / 2)[wide]
        tokens, logprobs = sample(vocabulary, logits, cut, uniforms)
        np.testing.assert_array_equal(tokens, kept.ids[wide])
        scaled = torch.log_softmax(logits.double() / float(np.float32(cut.temperature)), -1)
        np.testing.assert_allclose(logprobs, scaled[tokens], rtol=2e-7, atol=1e-6)
        (first, last), _ = sample(vocabulary, logits, cut, np.array([0.0, 1 - 2**-53]))
        assert first == kept.ids[0]
        assert kept.ends[kept.ids == last] > 1 - 1e-12


def chi_square(counts: Array, probabilities: Array) -> float:
    """Normalised: about N(0, 1) under the hypothesis."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    counts = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], max(expected[~big].sum(), 1e-9))
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - big.sum()) / np.sqrt(2 * big.sum()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("vocab", [5, 300, 49155])
def test_draws_follow_the_distribution(
    vocabulary: NativeVocabulary, vocab: int, temperature: float
) -> None:
    logits = random_logits(vocab)
    uniforms = np.random.default_rng(4).random((1, 30_000))
    tokens, logprobs = vocabulary.draw(logits, temperature, uniforms)
    expected = torch.softmax(logits[0].double() / temperature, -1).numpy()
    assert abs(chi_square(np.bincount(tokens[0], minlength=vocab), expected)) < 4
    np.testing.assert_allclose(logprobs[0], np.log(expected)[tokens[0]], atol=2e-6)
    one_by_one, again = sample(vocabulary, logits[0], Cut(temperature, -1, 1.0), uniforms[0, :50])
    np.testing.assert_array_equal(one_by_one, tokens[0, :50])
    np.testing.assert_array_equal(again, logprobs[0, :50])


@pytest.mark.parametrize("cut", CUTS)
def test_draws_are_those_of_torch(vocabulary: NativeVocabulary, cut: Cut) -> None:
    """By set: what torch draws is sorted by probability, here by id."""
    logits = random_logits(3000)[0]
    uniforms = np.random.default_rng(5).random(400)
    found, _ = sample(vocabulary, logits, cut, uniforms)
    expected, _ = TorchVocabulary().sample(logits.expand(400, -1), Cuts.of([cut] * 400), uniforms)
    ids = set(slow_kept(logits, cut).ids.tolist())
    assert set(found.tolist()) <= ids
    assert set(expected.tolist()) <= ids


@pytest.mark.parametrize("top_k", [1, 2, 3, 256, 257, 999])
def test_equal_logits_are_kept_by_id(vocabulary: NativeVocabulary, top_k: int) -> None:
    """Tokens 7, 8, ... are equal; a better one lies in front and one behind."""
    logits = torch.full((1000,), 3.0)
    logits[:7] = -1.0
    logits[[2, 990]] = 5.0
    cut = Cut(1.0, top_k, 1.0)
    kept = slow_kept(logits, cut)
    assert len(kept.ids) == top_k
    tokens, _ = sample(vocabulary, logits, cut, (kept.starts + kept.ends) / 2)
    np.testing.assert_array_equal(tokens, kept.ids)


def test_top_p_of_equal_logits(vocabulary: NativeVocabulary) -> None:
    """A quarter of 1,024 tokens, of which none is better: the first 256."""
    logits = torch.full((1024,), -2.0)
    uniforms = (np.arange(256) + 0.5) / 256
    tokens, _ = sample(vocabulary, logits, Cut(1.0, -1, 0.25), uniforms)
    np.testing.assert_array_equal(tokens, np.arange(256))


def test_a_cut_between_two_crowds(vocabulary: NativeVocabulary) -> None:
    """The first halving finds as many tokens above as top-k keeps."""
    logits = torch.cat((torch.linspace(8, 9, 300), torch.linspace(10, 11, 300)))
    tokens, _ = sample(vocabulary, logits, Cut(1.0, 300, 1.0), np.array([0.0]))
    assert tokens[0] == 300


def test_neighbouring_numbers_have_no_middle(vocabulary: NativeVocabulary) -> None:
    low = float(np.nextafter(np.float32(1), np.float32(0)))
    logits = torch.tensor([low] * 400 + [1.0] * 300)
    kept = slow_kept(logits, Cut(1.0, 500, 1.0))
    tokens, _ = sample(vocabulary, logits, Cut(1.0, 500, 1.0), (kept.starts + kept.ends) / 2)
    np.testing.assert_array_equal(tokens, [*range(200), *range(400, 700)])


@pytest.mark.parametrize("top_k", [10, 60, 100, 400])
def test_a_cut_far_behind_the_best_token(vocabulary: NativeVocabulary, top_k: int) -> None:
    """The worst token kept, down to a probability of e^-80, is the first by id."""
    logits = torch.arange(600) * 0.2
    tokens, logprobs = sample(vocabulary, logits, Cut(1.0, top_k, 1.0), np.array([0.0]))
    assert tokens[0] == 600 - top_k
    assert logprobs[0] == pytest.approx(-0.2 * (top_k - 1) + np.log(1 - np.exp(-0.2)), abs=1e-4)


def test_top_p_near_one_stays_inside_top_k(vocabulary: NativeVocabulary) -> None:
    """Summed lane by lane in fp32, each of the 15 is rounded up to twice its weight: the mass of
    what top-k keeps is more than its tokens have, yet no worse token may fill the gap."""
    logits = torch.full((512,), -16.62)
    logits[256::16] = -16.6
    logits[256] = 0.0
    cut = Cut(1.0, 16, float(np.nextafter(np.float32(1), np.float32(0))))
    tokens, _ = sample(vocabulary, logits, cut, np.array([0.0]))
    assert tokens[0] == 256


def test_greedy_takes_the_lowest_of_the_best(vocabulary: NativeVocabulary) -> None:
    logits = random_logits(500, rows=2)
    logits[0, [77, 300, 499]] = 50.0
    logits[1] = 0.0
    logits[1, 0] = -0.0
    cuts = Cuts.of([Cut(0.0, 5, 0.5)] * 2)
    tokens, logprobs = vocabulary.sample(logits, cuts, np.array([0.9, 0.9]))
    assert tokens.tolist() == [77, 0]
    np.testing.assert_allclose(logprobs, np.log([1 / 3, 1 / 500]), rtol=1e-6)
    drawn = vocabulary.draw(logits, 0.0, np.full((2, 3), 0.9))
    assert drawn.tokens.tolist() == [[77] * 3, [0] * 3]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("masked", [-INFINITY, torch.finfo(torch.float32).min])
def test_impossible_tokens_are_never_drawn(
    vocabulary: NativeVocabulary, masked: float, cut: Cut
) -> None:
    logits = random_logits(600)[0]
    possible = [300, 301, 590]
    only = torch.full_like(logits, masked)
    only[possible] = logits[possible]
    uniforms = np.append(np.linspace(0, 1, 100, endpoint=False), 1 - 2**-53)
    tokens, logprobs = sample(vocabulary, only, cut, uniforms)
    assert set(tokens.tolist()) <= set(possible)
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("cut", [*CUTS, Cut(0.0, -1, 1.0)])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_damaged_rows_show(vocabulary: NativeVocabulary, value: float, cut: Cut) -> None:
    logits = random_logits(600, rows=3)
    logits[1, 310] = value
    tokens, logprobs = vocabulary.sample(logits, Cuts.of([cut] * 3), np.full(3, 0.5))
    assert np.isnan(logprobs[1])
    assert np.isfinite(logprobs[[0, 2]]).all()
    assert 0 <= tokens[1] < 600
    drawn = vocabulary.draw(logits, cut.temperature, np.full((3, 2), 0.5))
    best = vocabulary.top(logits, np.full(3, cut.temperature, np.float32), 5)
    for ids, values in (drawn, best):
        assert np.isnan(values[1]).all()
        assert np.isfinite(values[[0, 2]]).all()
        assert ((ids >= 0) & (ids < 600)).all()


@pytest.mark.parametrize("k", [1, 5, 20, 3000])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_top(vocabulary: NativeVocabulary, temperature: float, k: int) -> None:
    """Logits rounded to halves have many equals."""
    logits = (random_logits(1000, rows=4) * 2).round() / 2
    logits[3, 10:] = -INFINITY
    best = vocabulary.top(logits, np.full(4, temperature, np.float32), k)
    assert best.token_ids.shape == (4, min(k, 1000))
    scaled = torch.log_softmax(logits.double() / (temperature or 1.0), -1).numpy()
    for row in range(4):
        order = np.lexsort((np.arange(1000), -logits[row].numpy()))[:k]
        np.testing.assert_array_equal(best.token_ids[row], order)
        np.testing.assert_allclose(best.logprobs[row], scaled[row, order], rtol=2e-7, atol=1e-6)


def test_logprobs_are_those_of_the_head(vocabulary: NativeVocabulary) -> None:
    """To the bit, where the temperature is 1 or 0."""
    logits = random_logits(5000, rows=6)
    for temperature in (1.0, 0.0):
        cuts = Cuts.of([Cut(temperature, 50, 0.9)] * 6)
        tokens, sampled = vocabulary.sample(logits, cuts, np.random.default_rng(0).random(6))
        scored = vocabulary.logprobs(logits, tokens[:, None].astype(np.int64))
        np.testing.assert_array_equal(sampled, scored[:, 0])
        best = vocabulary.top(logits, np.full(6, temperature, np.float32), 20)
        scored = vocabulary.logprobs(logits, best.token_ids.astype(np.int64))
        np.testing.assert_array_equal(best.logprobs, scored)


def test_a_row_depends_on_itself_alone(threads: ctypes.CDLL) -> None:
    """Rows of all kinds at once, with two threads and padding, and one by one with one."""
    vocabulary = NativeVocabulary()
    cuts = [*CUTS, Cut(0.0, -1, 1.0)]
    num = len(cuts)
    logits = random_logits(3000, rows=num)
    padded = torch.full((num, 3008), NAN)
    padded[:, :3000] = logits
    uniforms = np.random.default_rng(0).random(num)
    threads.tc_set_num_threads(2)
    together = vocabulary.sample(padded[:, :3000], Cuts.of(cuts), uniforms)
    threads.tc_set_num_threads(1)
    for row in range(num):
        one = slice(row, row + 1)
        alone = vocabulary.sample(logits[one], Cuts.of(cuts[one]), uniforms[one])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]


def test_what_the_kernels_cannot_read_is_refused(vocabulary: NativeVocabulary) -> None:
    logits = random_logits(100, rows=4)
    with pytest.raises(TypeError, match="fp32"):
        vocabulary.draw(logits.bfloat16(), 1.0, np.zeros((4, 1)))
    with pytest.raises(TypeError, match="side by side"):
        vocabulary.draw(logits.t(), 1.0, np.zeros((100, 1)))
    with pytest.raises(ValueError, match="shape"):
        vocabulary.sample(logits, Cuts.of([ALL] * 3), np.zeros(4))
    with pytest.raises(IndexError, match="targets"):
        vocabulary.logprobs(logits, np.full((4, 1), 100))

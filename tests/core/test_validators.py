from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.wire.strategies import CAPABILITIES, CONTEXT_LENGTH, VOCAB_SIZE
from training.backends.base import Capabilities
from training.core.errors import InvalidRequest, RequestError, TooLarge, Unsupported
from training.core.validators import (
    check_token_ids,
    checked_float,
    checked_int,
    complete_config,
    dense_tensor,
    known_loss,
    prompt_tokens,
)
from training.losses import LOSSES, REFUSED
from training.wire.records import OtherChunk, TextChunk, WireTensor


def text(*token_ids: int) -> TextChunk:
    return TextChunk(np.array(token_ids, np.int32))


# --------------------------------------------------------------------------- scalars


def test_integers() -> None:
    assert checked_int(1, "rank", 1, 8) == 1
    assert checked_int(8, "rank", 1, 8) == 8
    for bad in (0, 9, 10**400):
        with pytest.raises(InvalidRequest, match="rank must be 1 to 8, not"):
            checked_int(bad, "rank", 1, 8)
    with pytest.raises(InvalidRequest, match="top_k must be at least 1, not -2"):
        checked_int(-2, "top_k", 1)


def test_floats() -> None:
    assert checked_float(0.0, "beta1", 0, below=1) == 0.0
    for bad in (-0.1, 1.0, math.nan, math.inf, -math.inf):
        with pytest.raises(
            InvalidRequest, match="beta1 must be a finite number, at least 0, less than 1, not"
        ):
            checked_float(bad, "beta1", 0, below=1)


# --------------------------------------------------------------------------- losses


def test_every_loss_is_found() -> None:
    for name, spec in LOSSES.items():
        assert known_loss(name, CAPABILITIES) is spec


def test_a_typo_lists_the_known_losses() -> None:
    with pytest.raises(InvalidRequest, match="'crossentropy' is not known; known: cross_entropy, "):
        known_loss("crossentropy", CAPABILITIES)


def test_refused_losses_say_why() -> None:
    for name, reason in REFUSED.items():
        with pytest.raises(Unsupported) as caught:
            known_loss(name, CAPABILITIES)
        assert str(caught.value) == reason


def test_a_backend_may_offer_fewer_losses() -> None:
    fewer = Capabilities("a/b", 10, 10, (), 1, 8, losses=frozenset({"cross_entropy"}))
    with pytest.raises(Unsupported, match=r"'ppo' is not offered .* offered: cross_entropy$"):
        known_loss("ppo", fewer)


def test_config_is_completed() -> None:
    ppo = LOSSES["ppo"]
    assert complete_config(ppo, {}) == ppo.config
    config = complete_config(ppo, {"clip_low_threshold": 0.5})
    assert config == {**ppo.config, "clip_low_threshold": 0.5}


@pytest.mark.parametrize(
    ("given_config", "message"),
    [
        ({"clip": 0.1}, r"\['clip'\] is not known to ppo; allowed: clip_low_threshold, clip_high"),
        ({"clip_low_threshold": "0.5"}, "must be a number, not text"),
        ({"clip_low_threshold": math.nan}, "must be a finite number, not nan"),
        ({"clip_low_threshold": 1.5}, "clip_low_threshold 1.5 is above clip_high_threshold 1.2"),
    ],
)
def test_bad_config(given_config: dict[str, float | str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        complete_config(LOSSES["ppo"], given_config)


# --------------------------------------------------------------------------- tokens


def test_chunks_are_joined() -> None:
    tokens = prompt_tokens([text(1, 2), text(), text(3)], CAPABILITIES, "prompt")
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [1, 2, 3]


def test_one_chunk_is_not_copied() -> None:
    chunk = text(1, 2)
    assert prompt_tokens([chunk], CAPABILITIES, "prompt") is chunk.tokens


@pytest.mark.parametrize("chunks", [[], [text()], [text(), text()]])
def test_no_tokens(chunks: list[TextChunk]) -> None:
    with pytest.raises(InvalidRequest, match="prompt has no tokens"):
        prompt_tokens(chunks, CAPABILITIES, "prompt")


@pytest.mark.parametrize("kind", ["image", "dmel", "image_asset_pointer"])
def test_only_text(kind: str) -> None:
    with pytest.raises(Unsupported, match=rf"prompt\[1\] is a chunk of type '{kind}'"):
        prompt_tokens([text(1), OtherChunk(kind)], CAPABILITIES, "prompt")


def test_context_length() -> None:
    prompt_tokens([text(*[1] * CONTEXT_LENGTH)], CAPABILITIES, "prompt")
    with pytest.raises(InvalidRequest, match=r"prompt has 65 tokens; .* is 64"):
        prompt_tokens([text(*[1] * (CONTEXT_LENGTH + 1))], CAPABILITIES, "prompt")


@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE, 2**31 - 1, 2**62])
def test_ids_beyond_the_vocabulary(bad: int) -> None:
    chunk = TextChunk(np.array([1, bad], np.int64))
    with pytest.raises(InvalidRequest, match=rf"token id {bad} at position \[1\] is outside \[0,"):
        prompt_tokens([chunk], CAPABILITIES, "prompt")


def test_ids_of_a_matrix() -> None:
    check_token_ids(np.array([[0, -1]]), 10, "t", lowest=-1)
    with pytest.raises(InvalidRequest, match=r"token id 10 at position \[1, 0\]"):
        check_token_ids(np.array([[1, 2], [10, 3]]), 10, "t")


# --------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), r"has the shape \[4\] but 6 numbers"),
        ((2, 4), r"has the shape \[2, 4\] but 6 numbers"),
        ((-2, -3), r"has the shape \[-2, -3\]; expected"),
        ((1, 2, 3), r"has the shape \[1, 2, 3\]; expected"),
        ((2**32, 2**32), "has the shape"),
    ],
)
def test_shapes_that_lie(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        dense_tensor(WireTensor(np.zeros(6), shape), "t", 100)


def test_no_shape_is_one_dimension() -> None:
    assert dense_tensor(WireTensor(np.zeros(6)), "t", 6).shape == (6,)
    with pytest.raises(TooLarge, match="t has 6 elements; limit 5"):
        dense_tensor(WireTensor(np.zeros(6)), "t", 5)


def test_a_sparse_tensor_may_not_claim_more_than_the_limit() -> None:
    tensor = WireTensor(np.zeros(0), (2, 2**60), np.zeros(3, np.int64), np.zeros(0, np.int64))
    with pytest.raises(TooLarge, match="limit 1000"):
        dense_tensor(tensor, "t", 1000)


def test_a_sparse_tensor_needs_two_dimensions() -> None:
    tensor = WireTensor(np.zeros(0), (), np.zeros(1, np.int64), np.zeros(0, np.int64))
    with pytest.raises(InvalidRequest, match=r"is sparse and needs a shape \[N, K\], not \[\]"):
        dense_tensor(tensor, "t", 1000)


def torch_dense(tensor: WireTensor) -> Any:
    """torch's own reading, or None where its invariants do not hold."""
    crow, col = tensor.crow, tensor.col
    assert crow is not None
    assert col is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sparse = torch.sparse_csr_tensor(
                torch.tensor(crow.tolist(), dtype=torch.int64),
                torch.tensor(col.tolist(), dtype=torch.int64),
                torch.tensor(tensor.values),
                tensor.shape,
                check_invariants=True,
            )
        except RuntimeError:
            return None
        return sparse.to_dense().numpy()


@st.composite
def csr_tensors(draw: st.DrawFn) -> WireTensor:
    """Right, nearly right and wrong ones."""
    num_rows, num_cols = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dense = draw(hnp.arrays(np.float32, (num_rows, num_cols), elements=st.sampled_from([0, 1, 2])))
    rows, col = np.nonzero(dense)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]).astype(np.int64)
    values = dense[rows, col]
    if draw(st.booleans()):
        index = st.integers(-1, 5) | st.sampled_from([2**62, -(2**63), 2**63 - 1])
        changed = draw(st.sampled_from([crow, col]))
        if len(changed):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(index)
    if draw(st.booleans()):
        col = col[: draw(st.integers(0, len(col)))]
    return WireTensor(values, (num_rows, num_cols), crow, col)


@given(csr_tensors())
def test_sparse_tensors_are_judged_as_torch_judges_them(tensor: WireTensor) -> None:
    expected = torch_dense(tensor)
    try:
        ours = dense_tensor(tensor, "t", 100)
    except RequestError:
        assert expected is None
    else:
        assert expected is not None
        np.testing.assert_array_equal(ours, expected)

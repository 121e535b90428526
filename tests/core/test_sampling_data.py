from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker.proto.response_conv import deserialize_sample_response

from tests.wire.strategies import CAPABILITIES, CONTEXT_LENGTH, VOCAB_SIZE
from training.backends.base import SampleRequest, SampleResult
from training.core.errors import InvalidRequest, RequestError, TooLarge, Unsupported
from training.core.sampling_data import (
    NO_TARGET,
    SampleLimits,
    fold_seed,
    target_layout,
    to_sample_request,
)
from training.wire.json_base import parse_json
from training.wire.protobuf import encode_sample_response
from training.wire.requests import SampleJsonRequest


def parsed(body: dict[str, Any]) -> SampleJsonRequest:
    return parse_json(SampleJsonRequest, json.dumps(body).encode())


def converted(
    params: dict[str, Any] | None = None, num_prompt: int = 3, **fields: Any
) -> SampleRequest:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": list(range(num_prompt))}]}
    body = {"prompt": prompt, "sampling_params": params or {}, **fields}
    return to_sample_request(parsed(body), "req", "snap", CAPABILITIES, seed=5)


def test_defaults() -> None:
    request = converted()
    assert (request.request_id, request.snapshot_id, request.seed) == ("req", "snap", 5)
    assert request.prompt.tolist() == [0, 1, 2]
    assert request.max_tokens == CONTEXT_LENGTH - 3
    assert request.stop_token_ids == CAPABILITIES.eos_token_ids
    assert (request.stop_strings, request.num_samples, request.top_k) == ((), 1, -1)
    assert not request.prompt_logprobs
    assert request.target_prompt_tokens is None


@pytest.mark.parametrize(
    ("stop", "token_ids", "strings"),
    [
        ([], (), ()),
        ("x", (), ("x",)),
        (["x", "yz"], (), ("x", "yz")),
        ([0, 999], (0, 999), ()),
    ],
)
def test_stops_replace_the_end_tokens(
    stop: Any, token_ids: tuple[int, ...], strings: tuple[str, ...]
) -> None:
    request = converted({"stop": stop})
    assert (request.stop_token_ids, request.stop_strings) == (token_ids, strings)


@given(st.integers())
def test_any_seed_is_folded(seed: int) -> None:
    assert 0 <= fold_seed(seed) < 2**63 - 1
    assert converted({"seed": seed}).seed == fold_seed(seed)


def test_seeds_in_range_stay() -> None:
    assert [fold_seed(seed) for seed in (0, 1, 2**63 - 2)] == [0, 1, 2**63 - 2]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop": ""}, "a stop string has 0 characters"),
        ({"stop": ["x" * 1001]}, "a stop string has 1001 characters"),
        ({"stop": ["a", "b\ufffd"]}, r"a stop string ends in U\+FFFD"),
        ({"stop": [VOCAB_SIZE]}, "a stop token id must be 0 to 999, not 1000"),
        ({"stop": [-1]}, "a stop token id must be 0 to 999, not -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": 62}, "the prompt of 3 tokens and max_tokens 62 exceed .* of 64"),
        ({"temperature": -0.5}, "temperature must be a finite number, at least 0"),
        ({"top_k": 0}, r"top_k \(-1 for no limit\) must be at least 1, not 0"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.01}, "top_p"),
    ],
)
def test_sampling_parameters_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples must be 1 to 1024, not 0"),
        ({"num_samples": 1025}, "num_samples must be 1 to 1024"),
        ({"topk_prompt_logprobs": 21}, "topk_prompt_logprobs must be 0 to 20, not 21"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs must be 0 to 20, not -1"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
        ({"prompt_alt_tokens_k": 21}, "prompt_alt_tokens_k must be 0 to 20, not 21"),
        ({"prompt_logprobs_last_n": 1}, "needs prompt_logprobs"),
        ({"prompt_logprobs_last_n": 0, "prompt_logprobs": True}, r"must be 1 to 2 .* not 0"),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, r"must be 1 to 2 .* not 3"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        converted(**fields)


def test_limits_are_included() -> None:
    request = converted(
        {"max_tokens": 61, "top_p": 1, "top_k": 10**18, "temperature": 0},
        prompt_logprobs=True,
        prompt_logprobs_last_n=2,
        topk_prompt_logprobs=20,
        record_stability_info=True,
    )
    assert (request.max_tokens, request.top_k, request.temperature) == (61, VOCAB_SIZE, 0)
    assert (request.prompt_logprobs, request.prompt_logprobs_last_n) == (True, 2)


def test_prompts() -> None:
    with pytest.raises(InvalidRequest, match="prompt has no tokens"):
        converted(num_prompt=0)
    with pytest.raises(InvalidRequest, match="prompt of 64 tokens and max_tokens 1 exceed"):
        converted(num_prompt=CONTEXT_LENGTH)
    with pytest.raises(InvalidRequest, match="prompt has 65 tokens"):
        converted(num_prompt=CONTEXT_LENGTH + 1)
    body = {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}
    with pytest.raises(Unsupported, match=r"prompt\[0\] is a chunk of type 'image'"):
        to_sample_request(parsed(body), "req", None, CAPABILITIES, 0)


def test_too_many_stops() -> None:
    with pytest.raises(TooLarge, match="257 stop sequences"):
        converted({"stop": ["x"] * 257})


# --------------------------------------------------------------------------- target logprobs


def tensor(dense: Any, sparse: bool) -> dict[str, Any]:
    """As the SDK writes it; sparse cells are those that are not -1."""
    body = {"dtype": "int64", "shape": list(dense.shape)}
    if not sparse:
        return body | {"data": dense.ravel().tolist()}
    rows, cols = np.nonzero(dense != NO_TARGET)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return body | {
        "data": dense[rows, cols].tolist(),
        "sparse_crow_indices": crow.tolist(),
        "sparse_col_indices": cols.tolist(),
    }


@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(0, 4), st.integers(1, 4)), elements=st.integers(-1, 9)
    ),
    st.booleans(),
)
def test_targets_come_back_in_the_layout_requested(dense: Any, sparse: bool) -> None:
    """A scorer that answers -(token id) - 1 for each packed cell gives each token its own cell."""
    wire = parsed(
        {
            "prompt": {"chunks": [{"tokens": [1] * (len(dense) + 1)}]},
            "target_prompt_logprobs": tensor(dense, sparse),
        }
    )
    request = to_sample_request(wire, "req", None, CAPABILITIES, 0)
    assert request.target_prompt_tokens is not None
    cells = request.target_prompt_tokens
    scored = np.where(cells == NO_TARGET, 0, -cells - 1).astype(np.float32)
    body = encode_sample_response(
        SampleResult([], target_prompt_logprobs=scored), target_layout(wire)
    )
    answer = deserialize_sample_response(body).target_prompt_logprobs
    assert answer is not None
    assert (answer.sparse_crow_indices is not None) == sparse
    np.testing.assert_array_equal(
        answer.to_numpy(), np.where(dense == NO_TARGET, 0, -dense - 1).astype(np.float32)
    )


def test_a_wide_sparse_request_stays_small() -> None:
    targets = {
        "data": [7, 8],
        "dtype": "int64",
        "shape": [2, 2**50],
        "sparse_crow_indices": [0, 1, 2],
        "sparse_col_indices": [2**49, 3],
    }
    request = converted(target_prompt_logprobs=targets)
    assert request.target_prompt_tokens is not None
    assert request.target_prompt_tokens.tolist() == [[7], [8]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 1], "data": [1, 2, 3]}, r"has the shape \[3, 1\]; expected \[2, K\]"),
        ({"shape": [2, 0], "data": []}, r"has the shape \[2, 0\]; expected"),
        ({"shape": None}, r"has the shape \[2\]; expected \[2, K\]"),
        ({"dtype": "float32"}, "must be int64, not float32"),
        ({"data": [1, VOCAB_SIZE]}, r"token id 1000 at position \[1\] is outside \[-1, 1000\)"),
        ({"data": [1, -2]}, "token id -2"),
        ({"sparse_crow_indices": [0, 2, 1], "sparse_col_indices": [0, 0]}, "row pointers"),
    ],
)
def test_bad_targets(change: dict[str, Any], message: str) -> None:
    targets = {"data": [1, 2], "dtype": "int64", "shape": [2, 1], **change}
    with pytest.raises(InvalidRequest, match=f"target_prompt_logprobs.*{message}"):
        converted(target_prompt_logprobs=targets)


@pytest.mark.parametrize("sparse", [False, True])
def test_too_many_targets(sparse: bool) -> None:
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2]}]},
        "target_prompt_logprobs": tensor(np.ones((1, 5), np.int64), sparse),
    }
    limits = SampleLimits(max_target_elements=4)
    with pytest.raises(TooLarge, match="target_prompt_logprobs"):
        to_sample_request(parsed(body), "req", None, CAPABILITIES, 0, limits)


INTEGERS = st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1)
NUMBERS = INTEGERS | st.floats(allow_nan=False, allow_infinity=False)
TENSORS = st.fixed_dictionaries(
    {"data": st.lists(INTEGERS, max_size=4), "dtype": st.sampled_from(["int64", "float32"])},
    optional={
        "shape": st.lists(INTEGERS, max_size=3),
        "sparse_crow_indices": st.lists(INTEGERS, max_size=4),
        "sparse_col_indices": st.lists(INTEGERS, max_size=4),
    },
)


@given(
    st.fixed_dictionaries(
        {"prompt": st.fixed_dictionaries({"chunks": st.just([{"tokens": [1, 2, 3]}])})},
        optional={
            "num_samples": INTEGERS,
            "target_prompt_logprobs": TENSORS,
            "prompt_logprobs_last_n": INTEGERS,
            "prompt_logprobs": st.booleans(),
            "topk_prompt_logprobs": INTEGERS,
            "sampling_params": st.fixed_dictionaries(
                {},
                optional={
                    "max_tokens": INTEGERS,
                    "top_k": INTEGERS,
                    "top_p": NUMBERS,
                    "temperature": NUMBERS,
                    "stop": st.text() | st.lists(st.text() | INTEGERS),
                },
            ),
        },
    )
)
def test_garbage_raises_request_errors_alone(body: dict[str, Any]) -> None:
    with suppress(RequestError):
        request = to_sample_request(parsed(body), "req", None, CAPABILITIES, 0)
        assert 1 <= request.max_tokens <= CONTEXT_LENGTH - 3
        assert request.target_prompt_tokens is None or len(request.target_prompt_tokens) == 2

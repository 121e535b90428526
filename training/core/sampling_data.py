"""A decoded asample request into a ``SampleRequest``. Shape legend: P prompt tokens, K targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.backends.base import REPLACEMENT, Capabilities, Int64Array, SampleRequest
from training.core.errors import InvalidRequest, TooLarge
from training.core.validators import (
    check_csr,
    check_token_ids,
    checked_float,
    checked_int,
    prompt_tokens,
    tensor_shape,
)
from training.wire.json_base import MAX_CHUNKS
from training.wire.records import WireTensor, csr_cells
from training.wire.requests import SampleJsonRequest, SamplingParamsJson

TARGETS = "target_prompt_logprobs"
NO_TARGET = -1
SEED_MODULUS = 2**63 - 1
_NUMBER_CHARS = 12
"""Of a token, row or column below 2**32, with what separates it from the next."""
_CHUNK_CHARS = 64
_CHUNK_VALUES = 6
_ESCAPED = 12
"""Bytes of one character as a pair of escapes."""
_OTHER_CHARS = 64 * 2**10


@dataclass(frozen=True)
class SampleLimits:
    max_num_samples: int = 1024
    max_target_elements: int = 2**20
    """128 for each of 8192 positions. Each comes as a number in JSON, and takes 40 bytes until the
    request is done."""
    max_stops: int = 256
    max_stop_length: int = 1000


class JsonLimits(NamedTuple):
    """Of a body of JSON; see ``parse_json``."""

    num_bytes: int
    num_values: int


def json_limits(capabilities: Capabilities, limits: SampleLimits = SampleLimits()) -> JsonLimits:
    """What no request needs more of that ``to_sample_request`` takes, however it is written.

    A sparse tensor says for each target its token and column, and the row pointers.
    """
    context = capabilities.context_length
    num_targets = min(limits.max_target_elements, context * capabilities.vocab_size)
    num_numbers = 2 * context + 2 * num_targets
    stop_chars = limits.max_stops * limits.max_stop_length
    num_bytes = _NUMBER_CHARS * num_numbers + _CHUNK_CHARS * MAX_CHUNKS + _ESCAPED * stop_chars
    num_values = num_numbers + _CHUNK_VALUES * MAX_CHUNKS + stop_chars
    return JsonLimits(num_bytes + _OTHER_CHARS, num_values + _OTHER_CHARS)


class Stops(NamedTuple):
    token_ids: tuple[int, ...]
    strings: tuple[str, ...]


def fold_seed(seed: int) -> int:
    """Any integer into [0, 2^63 - 1), as the schema of the SDK describes it."""
    return seed % SEED_MODULUS


def to_sample_request(
    request: SampleJsonRequest,
    request_id: str,
    snapshot_id: str | None,
    capabilities: Capabilities,
    seed: int,
    limits: SampleLimits = SampleLimits(),
) -> SampleRequest:
    """``seed`` serves where the client gave none.

    ``record_stability_info`` is accepted and ignored: it only prepares training with
    stable_reinforce, which is refused when it comes.
    Raises ``InvalidRequest``, ``Unsupported`` or ``TooLarge``.
    """
    params = request.sampling_params
    prompt = prompt_tokens(request.prompt.to_wire("prompt"), capabilities, "prompt")
    stops = _to_stops(params, capabilities, limits)
    vocab_size, max_topk = capabilities.vocab_size, capabilities.max_topk
    if params.top_k != -1:
        checked_int(params.top_k, "top_k (-1 for no limit)", 1)
    if not 0 < params.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {params.top_p!r}")
    return SampleRequest(
        request_id=request_id,
        snapshot_id=snapshot_id,
        prompt=prompt,
        num_samples=checked_int(request.num_samples, "num_samples", 1, limits.max_num_samples),
        max_tokens=_to_max_tokens(params.max_tokens, len(prompt), capabilities),
        seed=fold_seed(seed if params.seed is None else params.seed),
        temperature=checked_float(params.temperature, "temperature", 0),
        top_k=min(params.top_k, vocab_size),
        top_p=params.top_p,
        stop_token_ids=stops.token_ids,
        stop_strings=stops.strings,
        prompt_logprobs=bool(request.prompt_logprobs),
        prompt_logprobs_last_n=_to_last_n(request, len(prompt)),
        topk_prompt_logprobs=checked_int(
            request.topk_prompt_logprobs, "topk_prompt_logprobs", 0, max_topk
        ),
        topk_sample_logprobs=checked_int(
            request.topk_sample_logprobs, "topk_sample_logprobs", 0, max_topk
        ),
        target_prompt_tokens=_to_targets(request, len(prompt), vocab_size, limits),
        prompt_alt_tokens_k=checked_int(
            request.prompt_alt_tokens_k, "prompt_alt_tokens_k", 0, max_topk
        ),
    )


def target_layout(request: SampleJsonRequest) -> WireTensor | None:
    """The layout that the answer's ``target_prompt_logprobs`` must have."""
    if request.target_prompt_logprobs is None:
        return None
    return request.target_prompt_logprobs.to_wire(TARGETS)


def _to_max_tokens(max_tokens: int | None, num_prompt: int, capabilities: Capabilities) -> int:
    """Absent: what the context leaves."""
    room = capabilities.context_length - num_prompt
    wanted = max(room, 1) if max_tokens is None else checked_int(max_tokens, "max_tokens", 1)
    if wanted > room:
        raise InvalidRequest(
            f"the prompt of {num_prompt} tokens and max_tokens {wanted} exceed the context "
            f"length of {capabilities.context_length}"
        )
    return wanted


def _to_stops(
    params: SamplingParamsJson, capabilities: Capabilities, limits: SampleLimits
) -> Stops:
    """What is given replaces the end tokens, as [] (stop at nothing) does."""
    stop = params.stop
    if stop is None:
        return Stops(capabilities.eos_token_ids, ())
    if isinstance(stop, str):
        stop = [stop]
    if len(stop) > limits.max_stops:
        raise TooLarge(f"{len(stop)} stop sequences; limit {limits.max_stops}")
    strings = tuple(item for item in stop if isinstance(item, str))
    token_ids = tuple(item for item in stop if isinstance(item, int))
    for string in strings:
        if not 0 < len(string) <= limits.max_stop_length:
            raise InvalidRequest(
                f"a stop string has {len(string)} characters; 1 to {limits.max_stop_length} allowed"
            )
        if string.endswith(REPLACEMENT):
            raise InvalidRequest(
                "a stop string ends in U+FFFD, the replacement character: in sampled text it "
                "cannot be told from a character of which only the first bytes have come"
            )
    for token_id in token_ids:
        checked_int(token_id, "a stop token id", 0, capabilities.vocab_size - 1)
    return Stops(token_ids, strings)


def _to_last_n(request: SampleJsonRequest, num_prompt: int) -> int | None:
    last_n = request.prompt_logprobs_last_n
    if last_n is None:
        return None
    if not request.prompt_logprobs:
        raise InvalidRequest("prompt_logprobs_last_n needs prompt_logprobs")
    if not 1 <= last_n <= num_prompt - 1:
        raise InvalidRequest(
            f"prompt_logprobs_last_n must be 1 to {num_prompt - 1} "
            f"(prompt length less one), not {last_n}"
        )
    return last_n


def _to_targets(
    request: SampleJsonRequest, num_prompt: int, vocab_size: int, limits: SampleLimits
) -> Int64Array | None:
    """[P-1, K]. The listed cells of a sparse request are packed to the left of their row: K is the
    longest row's count, however wide the tensor claims to be."""
    tensor = target_layout(request)
    if tensor is None:
        return None
    shape = tensor_shape(tensor, TARGETS)
    if tensor.values.dtype.kind != "i":
        raise InvalidRequest(f"{TARGETS} must be int64, not {tensor.values.dtype.name}")
    if len(shape) != 2 or shape[0] != num_prompt - 1 or shape[1] < 1:
        raise InvalidRequest(
            f"{TARGETS} has the shape {list(shape)}; expected [{num_prompt - 1}, K], "
            "a row for each prompt position after the first"
        )
    if tensor.values.size:
        check_token_ids(tensor.values, vocab_size, TARGETS, lowest=NO_TARGET)
    if tensor.crow is not None:
        return _packed(tensor, limits)
    if tensor.values.size > limits.max_target_elements:
        raise TooLarge(
            f"{TARGETS} has {tensor.values.size} elements; limit {limits.max_target_elements}"
        )
    return tensor.values.reshape(shape)


def _packed(tensor: WireTensor, limits: SampleLimits) -> Int64Array:
    check_csr(tensor, TARGETS)
    assert tensor.crow is not None
    rows, columns = csr_cells(tensor.crow)
    num_rows = len(tensor.crow) - 1
    width = int(columns.max()) + 1 if len(columns) else 1
    if num_rows * width > limits.max_target_elements:
        raise TooLarge(
            f"{TARGETS} needs {num_rows * width} cells; limit {limits.max_target_elements}"
        )
    packed = np.full((num_rows, width), NO_TARGET, np.int64)
    packed[rows, columns] = tensor.values
    return packed

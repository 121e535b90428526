"""Times the codecs: python -m benchmarks.wire

Requests as the SDK sizes them (up to 5 MB), of few long datums or many short ones; one far larger;
and sampling answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import zstandard

from training.backends.base import Capabilities, SampledSequence, SampleResult, StopReason, TopK
from training.backends.base import TrainOutput as Output
from training.core.training_data import to_train_op_data
from training.losses import LOSSES
from training.wire import tinkercloud_pb2 as pb
from training.wire.compression import decompress
from training.wire.json_results import forward_backward_output_json
from training.wire.protobuf import (
    decode_forward_backward,
    encode_forward_backward_output,
    encode_sample_response,
    open_forward_backward,
)

BYTES_PER_TOKEN = 4 + 8 + 4 + 4  # token, target, logprob, advantage
CAPABILITIES = Capabilities(
    base_model="benchmark/model",
    vocab_size=150_000,
    context_length=2**17,
    eos_token_ids=(0,),
    max_slots=1,
    max_lora_rank=64,
    losses=frozenset(LOSSES),
)


def train_body(num_bytes: int, num_datums: int) -> bytes:
    rng = np.random.default_rng(0)
    num_tokens = num_bytes // BYTES_PER_TOKEN // num_datums
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="importance_sampling")
    for _ in range(num_datums):
        datum = message.data.add()
        tokens = rng.integers(0, CAPABILITIES.vocab_size, num_tokens)
        datum.model_input.add().encoded_text.tokens = tokens.astype("<i4").tobytes()
        targets = datum.loss_fn_inputs["target_tokens"]
        targets.dtype, targets.dense = pb.DTYPE_INT64, tokens.astype("<i8").tobytes()
        for name in ("logprobs", "advantages"):
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype = pb.DTYPE_FLOAT32
            tensor.dense = rng.standard_normal(num_tokens).astype("<f4").tobytes()
        for tensor in datum.loss_fn_inputs.values():
            tensor.shape.append(num_tokens)
    return message.SerializeToString()


def milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """CPU time, median of ``repeats``: the server decodes in threads beside busy engines."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * float(np.median(times))


def time_training(num_bytes: int, num_datums: int) -> None:
    body = train_body(num_bytes, num_datums)
    frame = zstandard.ZstdCompressor().compress(body)
    request = decode_forward_backward(body)
    data = to_train_op_data(request, CAPABILITIES).data
    output = Output([datum.inputs["logprobs"] for datum in data], {"loss:sum": 1.0})
    answer = encode_forward_backward_output(output)
    columns = {
        "unzstd": lambda: decompress(frame, "zstd", 2**28, 200),
        "header": lambda: open_forward_backward(body),
        "decode": lambda: decode_forward_backward(body),
        "validate": lambda: to_train_op_data(request, CAPABILITIES),
        "encode": lambda: encode_forward_backward_output(output),
        "as JSON": lambda: forward_backward_output_json(answer),
    }
    figures = "  ".join(f"{name} {milliseconds(run):6.2f}" for name, run in columns.items())
    print(f"{len(body) / 1e6:6.2f} MB {num_datums:5d} datums [ms]: {figures}")


def time_sampling(num_samples: int, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    logprobs = rng.standard_normal(num_tokens).astype(np.float32)
    tokens = np.arange(num_tokens, dtype=np.int32)
    topk = TopK(np.zeros((num_tokens, 20), np.int32), np.zeros((num_tokens, 20), np.float32))
    for name, row in (("plain", None), ("top 20", topk)):
        sequence = SampledSequence(tokens, logprobs, StopReason.LENGTH, row)
        result = SampleResult([sequence] * num_samples, prompt_logprobs=logprobs, topk_prompt=row)
        took = milliseconds(lambda result=result: encode_sample_response(result))  # type: ignore[misc]
        size = len(encode_sample_response(result)) / 1e6
        print(f"{num_samples} samples of {num_tokens}, {name}: {took:.2f} ms, {size:.2f} MB")


def main() -> None:
    for num_bytes in (1_000_000, 5_000_000):
        for num_datums in (4, 128, 1024):
            time_training(num_bytes, num_datums)
    time_training(100_000_000, 1024)
    time_sampling(16, 4096)


if __name__ == "__main__":
    main()

"""Causal attention over packed sequences, for training.

Shape legend: T rows of the batch, B sequences of one length L, N heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from training.engine.packing import equal_length_runs


class PackedAttention:
    """Each sequence sees itself alone. ``lengths`` are those of the sequences in packed order.

    Neighbours of one length are computed as one batch; no sequence is padded. ``windows`` are the
    model's sliding windows by layer.
    """

    def __init__(self, lengths: Sequence[int], windows: Sequence[int | None]) -> None:
        self.runs = equal_length_runs(lengths)
        self.windows = windows

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        outputs = []
        row = 0
        for length, count in self.runs:
            stop = row + length * count
            q, k, v = (
                packed[row:stop].view(count, length, *packed.shape[1:]).transpose(1, 2)
                for packed in (q_TND, k_TKD, v_TKD)
            )
            o_BNLD = causal_attention(q, k, v, self.windows[layer])
            outputs.append(o_BNLD.transpose(1, 2).flatten(0, 1))
            row = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def causal_attention(
    q_BNLD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, window: int | None
) -> torch.Tensor:
    """``window``: how many positions a query sees, itself included; None sees all before it."""
    length = q_BNLD.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(
            q_BNLD, k_BKLD, v_BKLD, is_causal=True, enable_gqa=True
        )
    mask_LL = window_mask(length, window, q_BNLD.device)
    return F.scaled_dot_product_attention(
        q_BNLD, k_BKLD, v_BKLD, attn_mask=mask_LL, enable_gqa=True
    )


def window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [L, L]: which keys (columns) each query (row) sees."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)

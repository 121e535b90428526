"""Drawing tokens from logits: temperature, top-k, top-p, inverse CDF. Rows are independent.

Shape legend: B rows, V vocab, U draws per row, M candidates kept of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from training.backends.base import TopK

BLOCK = 256
"""Tokens per block of the two-level cumulative sum."""
NUM_CANDIDATES = 1024
"""Most probable tokens looked at first for top-k and top-p; a row that needs more is sorted."""


class Cut(NamedTuple):
    """How one row's distribution is cut: ``temperature`` 0 takes the most probable token,
    ``top_k`` -1 and ``top_p`` 1.0 keep everything. top_p applies to what top_k kept."""

    temperature: float
    top_k: int
    top_p: float

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def cuts(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1)


def scaled_logprobs(logits_BV: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """float32 [B, V] log softmax(logits / temperature); of the logits themselves where it is 0."""
    scaled_BV = logits_BV.float()
    scales = [1 / each if each else 1.0 for each in temperatures]
    if any(each != 1 for each in scales):
        scaled_BV = scaled_BV * torch.tensor(scales, device=logits_BV.device)[:, None]
    return torch.log_softmax(scaled_BV, -1)


def draw(logprobs_BV: torch.Tensor, cuts: Sequence[Cut], uniforms: Sequence[float]) -> torch.Tensor:
    """int64 [B] token ids; row i uses ``cuts[i]`` and ``uniforms[i]`` in [0, 1).

    A row with NaN gets some valid id.
    """
    device = logprobs_BV.device
    greedy = [row for row, cut in enumerate(cuts) if cut.is_greedy]
    cut_rows = [row for row, cut in enumerate(cuts) if cut.cuts]
    free = [row for row, cut in enumerate(cuts) if not cut.is_greedy and not cut.cuts]
    tokens_B = torch.zeros(len(cuts), dtype=torch.int64, device=device)
    if greedy:
        rows = torch.tensor(greedy, device=device)
        tokens_B[rows] = _rows(logprobs_BV, greedy, rows).argmax(-1)
    if free:
        rows = torch.tensor(free, device=device)
        u_B1 = torch.tensor([[uniforms[row]] for row in free], dtype=torch.float64, device=device)
        tokens_B[rows] = inverse_cdf(_rows(logprobs_BV, free, rows).exp(), u_B1)[:, 0]
    if cut_rows:
        rows = torch.tensor(cut_rows, device=device)
        tokens_B[rows] = _draw_cut(
            logprobs_BV[rows], [cuts[row] for row in cut_rows], [uniforms[row] for row in cut_rows]
        )
    return tokens_B


def inverse_cdf(weights_BV: torch.Tensor, uniforms_BU: torch.Tensor) -> torch.Tensor:
    """int64 [B, U]: ids drawn in proportion to ``weights_BV`` (fp32, not negative).

    First a block is found in the cumulative sum of block sums, then the token inside that block:
    one pass over the weights instead of a cumulative sum over V. Never returns a token of weight
    zero. Measured for 32 x 49,152: 2 ms, where torch.multinomial takes 33.
    """
    num_rows, vocab_size = weights_BV.shape
    whole = vocab_size // BLOCK * BLOCK
    sums = [weights_BV[:, :whole].view(num_rows, -1, BLOCK).sum(-1)] if whole else []
    if whole < vocab_size:
        sums.append(weights_BV[:, whole:].sum(-1, keepdim=True))
    ends_BS = torch.cat(sums, 1).double().cumsum(1)
    blocks_BU, fraction_BU = _locate(ends_BS, uniforms_BU)
    ids = blocks_BU[:, :, None] * BLOCK + torch.arange(BLOCK, device=weights_BV.device)
    inside = ids < vocab_size
    ids.clamp_(max=vocab_size - 1)
    picked = weights_BV.gather(1, ids.view(num_rows, -1)).view(ids.shape).double()
    ends = (picked * inside).cumsum(2)
    offsets, _ = _locate(ends.flatten(0, 1), fraction_BU.reshape(-1, 1))
    return (blocks_BU * BLOCK + offsets.view(blocks_BU.shape)).clamp_(max=vocab_size - 1)


def _locate(ends_BS: torch.Tensor, uniforms_BU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which interval of the cumulative sums ``ends_BS`` each ``uniforms * total`` falls into, and
    how far into it, as a fraction in [0, 1]."""
    totals_B1 = ends_BS[:, -1:]
    # Rounding may carry u * total up to the total itself, where no interval is left.
    below_B1 = torch.nextafter(totals_B1, torch.zeros_like(totals_B1))
    targets_BU = torch.minimum(uniforms_BU * totals_B1, below_B1)
    index_BU = torch.searchsorted(ends_BS, targets_BU, right=True)
    index_BU.clamp_(max=ends_BS.shape[1] - 1)  # a row of NaN finds no interval
    upper_BU = ends_BS.gather(1, index_BU)
    lower_BU = ends_BS.gather(1, (index_BU - 1).clamp(min=0)).masked_fill(index_BU == 0, 0.0)
    return index_BU, ((targets_BU - lower_BU) / (upper_BU - lower_BU)).clamp(0, 1)


def top_logprobs(logprobs_BV: torch.Tensor, k: int) -> TopK:
    """The ``k`` most probable tokens of each row, best first."""
    values, ids = torch.topk(logprobs_BV, min(k, logprobs_BV.shape[1]))
    return TopK(ids.cpu().numpy().astype(np.int32), values.cpu().numpy())


def _draw_cut(
    logprobs_BV: torch.Tensor, cuts: Sequence[Cut], uniforms: Sequence[float]
) -> torch.Tensor:
    """Draws among the most probable tokens. Equal logprobs are ordered by token id, so that what
    is kept depends on the row alone."""
    vocab_size = logprobs_BV.shape[1]
    candidates = torch.topk(logprobs_BV, min(NUM_CANDIDATES, vocab_size))
    by_id = candidates.indices.sort(-1)
    ordered = candidates.values.gather(1, by_id.indices).sort(dim=-1, descending=True, stable=True)
    ids_BM = by_id.values.gather(1, ordered.indices)
    tokens_B, is_complete = _draw_sorted(ordered.values, ids_BM, cuts, uniforms, vocab_size)
    for row, complete in enumerate(is_complete):
        if complete:
            continue
        full = logprobs_BV[row : row + 1].sort(dim=-1, descending=True, stable=True)
        token, _ = _draw_sorted(
            full.values, full.indices, cuts[row : row + 1], uniforms[row : row + 1], vocab_size
        )
        tokens_B[row] = token[0]
    return tokens_B


def _draw_sorted(
    logprobs_BM: torch.Tensor,
    ids_BM: torch.Tensor,
    cuts: Sequence[Cut],
    uniforms: Sequence[float],
    vocab_size: int,
) -> tuple[torch.Tensor, list[bool]]:
    """Drawn ids [B], and whether the M candidates held all that the row's cut keeps."""
    device, num_candidates = logprobs_BM.device, logprobs_BM.shape[1]
    ends_BM = logprobs_BM.double().exp().cumsum(1)
    limits = [min(cut.top_k, vocab_size) if cut.top_k > 0 else vocab_size for cut in cuts]
    last_B1 = torch.tensor(limits, device=device)[:, None].clamp(max=num_candidates) - 1
    top_p_B1 = torch.tensor([cut.top_p for cut in cuts], dtype=torch.float64, device=device)[
        :, None
    ]
    has_k_B1 = torch.tensor([cut.top_k > 0 for cut in cuts], device=device)[:, None]
    mass_B1 = torch.where(has_k_B1, ends_BM.gather(1, last_B1), 1.0)
    # A token is kept while the mass before it is below top_p; that after the last kept is not.
    last_B1 = torch.minimum(last_B1, torch.searchsorted(ends_BM, top_p_B1 * mass_B1))
    kept_mass_B1 = ends_BM.gather(1, last_B1)
    u_B1 = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None] * kept_mass_B1
    u_B1 = torch.minimum(u_B1, torch.nextafter(kept_mass_B1, torch.zeros_like(kept_mass_B1)))
    place_B1 = torch.searchsorted(ends_BM, u_B1, right=True).clamp_(max=num_candidates - 1)
    worst_kept_B1 = logprobs_BM.gather(1, last_B1)
    enough_B1 = torch.tensor([k <= num_candidates for k in limits], device=device)[:, None]
    enough_B1 |= ~has_k_B1
    is_complete = enough_B1 & (worst_kept_B1 > logprobs_BM[:, -1:])
    is_complete |= num_candidates == vocab_size
    return ids_BM.gather(1, place_B1)[:, 0], is_complete[:, 0].tolist()


def _rows(values_BV: torch.Tensor, rows: list[int], index: torch.Tensor) -> torch.Tensor:
    """The rows, without a copy where they are all of them."""
    return values_BV if len(rows) == len(values_BV) else values_BV[index]

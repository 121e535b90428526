"""``sampling.Vocabulary`` of torch operations, for every device.

Shape legend: R rows, V vocab, U draws per row, K targets of a row, M candidates kept of a row,
S blocks of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from training.backends.base import Float32Array, Int64Array, TopK
from training.engine.sampling import Cuts, Drawn, Float64Array

BLOCK = 256
"""Tokens per block of the two-level cumulative sum."""
NUM_CANDIDATES = 1024
"""Most probable tokens looked at first for top-k and top-p; a row that needs more is sorted."""


class TorchVocabulary:
    """Top-k and top-p cost the rows that ask for them, and those alone."""

    def sample(self, logits_RV: torch.Tensor, cuts: Cuts, uniforms_R: Float64Array) -> Drawn:
        logprobs_RV = scaled_logprobs(logits_RV, cuts.temperatures)
        device = logits_RV.device
        greedy_R = cuts.temperatures == 0
        cut_R = ~greedy_R & ((cuts.top_ks > 0) | (cuts.top_ps < 1))
        tokens_R = torch.zeros(len(logits_RV), dtype=torch.int64, device=device)
        for rows_R, pick in ((greedy_R, _pick_best), (cut_R, _pick_cut)):
            if rows_R.any():
                index = torch.from_numpy(np.flatnonzero(rows_R)).to(device)
                mine = cuts.rows(rows_R)
                tokens_R[index] = pick(logprobs_RV[index], mine, uniforms_R[rows_R])
        free_R = ~(greedy_R | cut_R)
        if free_R.all():
            tokens_R = _pick_any(logprobs_RV, cuts, uniforms_R)
        elif free_R.any():
            index = torch.from_numpy(np.flatnonzero(free_R)).to(device)
            tokens_R[index] = _pick_any(logprobs_RV[index], cuts, uniforms_R[free_R])
        drawn = _drawn(logprobs_RV, tokens_R[:, None])
        return Drawn(drawn.tokens[:, 0], drawn.logprobs[:, 0])

    def draw(self, logits_RV: torch.Tensor, temperature: float, uniforms_RU: Float64Array) -> Drawn:
        num_rows, num_draws = uniforms_RU.shape
        logprobs_RV = scaled_logprobs(logits_RV, np.full(num_rows, temperature, np.float32))
        if temperature == 0:
            ids_RU = logprobs_RV.argmax(-1, keepdim=True).expand(-1, num_draws)
        else:
            uniforms = torch.from_numpy(uniforms_RU).to(logits_RV.device)
            ids_RU = inverse_cdf(logprobs_RV.exp(), uniforms)
        return _drawn(logprobs_RV, ids_RU)

    def top(self, logits_RV: torch.Tensor, temperatures_R: Float32Array, k: int) -> TopK:
        logprobs_RV = scaled_logprobs(logits_RV, temperatures_R)
        k = min(k, logprobs_RV.shape[1])
        best, ids = _most_probable(logprobs_RV, k)
        # Of tokens as probable as the last of them, torch.topk takes any.
        tied_R = (logprobs_RV >= best[:, -1:]).sum(-1) > k
        for row in torch.nonzero(tied_R)[:, 0].tolist():
            full = logprobs_RV[row].sort(descending=True, stable=True)
            best[row], ids[row] = full.values[:k], full.indices[:k]
        return TopK(ids.cpu().numpy().astype(np.int32), best.cpu().numpy())

    def logprobs(self, logits_RV: torch.Tensor, targets_RK: Int64Array) -> Float32Array:
        targets = torch.from_numpy(targets_RK).to(logits_RV.device)
        logprobs: Float32Array = torch.log_softmax(logits_RV, -1).gather(1, targets).cpu().numpy()
        return logprobs


def scaled_logprobs(logits_RV: torch.Tensor, temperatures_R: Float32Array) -> torch.Tensor:
    """float32 [R, V] log softmax(logits / temperature); of the logits themselves where it is 0."""
    if not np.isin(temperatures_R, (0, 1)).all():
        scales = 1 / np.where(temperatures_R == 0, np.float32(1), temperatures_R)
        logits_RV = logits_RV * torch.from_numpy(scales).to(logits_RV.device)[:, None]
    return torch.log_softmax(logits_RV, -1)


def _drawn(logprobs_RV: torch.Tensor, ids_RU: torch.Tensor) -> Drawn:
    logprobs_RU = logprobs_RV.gather(1, ids_RU).cpu().numpy()
    return Drawn(ids_RU.cpu().numpy().astype(np.int32), logprobs_RU)


def _pick_best(logprobs_RV: torch.Tensor, cuts: Cuts, uniforms_R: Float64Array) -> torch.Tensor:
    return logprobs_RV.argmax(-1)


def _pick_any(logprobs_RV: torch.Tensor, cuts: Cuts, uniforms_R: Float64Array) -> torch.Tensor:
    uniforms = torch.from_numpy(uniforms_R).to(logprobs_RV.device)
    return inverse_cdf(logprobs_RV.exp(), uniforms[:, None])[:, 0]


def inverse_cdf(weights_RV: torch.Tensor, uniforms_RU: torch.Tensor) -> torch.Tensor:
    """int64 [R, U]: ids drawn in proportion to ``weights_RV`` (fp32, not negative).

    First a block is found in the cumulative sum of block sums, then the token inside that block:
    one pass over the weights instead of a cumulative sum over V. Never returns a token of weight
    zero. Measured for 32 x 49,152: 2 ms, where torch.multinomial takes 33.
    """
    num_rows, vocab_size = weights_RV.shape
    whole = vocab_size // BLOCK * BLOCK
    sums = [weights_RV[:, :whole].view(num_rows, -1, BLOCK).sum(-1)] if whole else []
    if whole < vocab_size:
        sums.append(weights_RV[:, whole:].sum(-1, keepdim=True))
    ends_RS = torch.cat(sums, 1).double().cumsum(1)
    blocks_RU, fraction_RU = _locate(ends_RS, uniforms_RU)
    ids = blocks_RU[:, :, None] * BLOCK + torch.arange(BLOCK, device=weights_RV.device)
    inside = ids < vocab_size
    ids.clamp_(max=vocab_size - 1)
    picked = weights_RV.gather(1, ids.view(num_rows, -1)).view(ids.shape).double()
    ends = (picked * inside).cumsum(2)
    offsets, _ = _locate(ends.flatten(0, 1), fraction_RU.reshape(-1, 1))
    return (blocks_RU * BLOCK + offsets.view(blocks_RU.shape)).clamp_(max=vocab_size - 1)


def _locate(ends_RS: torch.Tensor, uniforms_RU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which interval of the cumulative sums ``ends_RS`` each ``uniforms * total`` falls into, and
    how far into it, as a fraction in [0, 1]."""
    totals_R1 = ends_RS[:, -1:]
    # Rounding may carry u * total up to the total itself, where no interval is left.
    below_R1 = torch.nextafter(totals_R1, torch.zeros_like(totals_R1))
    targets_RU = torch.minimum(uniforms_RU * totals_R1, below_R1)
    index_RU = torch.searchsorted(ends_RS, targets_RU, right=True)
    index_RU.clamp_(max=ends_RS.shape[1] - 1)  # a row of NaN finds no interval
    upper_RU = ends_RS.gather(1, index_RU)
    lower_RU = ends_RS.gather(1, (index_RU - 1).clamp(min=0)).masked_fill(index_RU == 0, 0.0)
    return index_RU, ((targets_RU - lower_RU) / (upper_RU - lower_RU)).clamp(0, 1)


def _pick_cut(logprobs_RV: torch.Tensor, cuts: Cuts, uniforms_R: Float64Array) -> torch.Tensor:
    """Draws among the most probable tokens. Equal logprobs are ordered by token id, so that what
    is kept depends on the row alone."""
    vocab_size = logprobs_RV.shape[1]
    best_RM, ids_RM = _most_probable(logprobs_RV, min(NUM_CANDIDATES, vocab_size))
    tokens_R, is_complete = _draw_sorted(best_RM, ids_RM, cuts, uniforms_R, vocab_size)
    for row in np.flatnonzero(~is_complete):
        one = slice(row, row + 1)
        full = logprobs_RV[one].sort(dim=-1, descending=True, stable=True)
        cut = cuts.rows(one)
        token, _ = _draw_sorted(full.values, full.indices, cut, uniforms_R[one], vocab_size)
        tokens_R[row] = token[0]
    return tokens_R


def _most_probable(logprobs_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest of each row in order and their ids, equal ones ordered by id. Which of
    those that equal the smallest are among them, is open."""
    best = torch.topk(logprobs_RV, k)
    by_id = best.indices.sort(-1)
    ordered = best.values.gather(1, by_id.indices).sort(dim=-1, descending=True, stable=True)
    return ordered.values, by_id.values.gather(1, ordered.indices)


def _draw_sorted(
    logprobs_RM: torch.Tensor,
    ids_RM: torch.Tensor,
    cuts: Cuts,
    uniforms_R: Float64Array,
    vocab_size: int,
) -> tuple[torch.Tensor, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Drawn ids [R], and whether the M candidates held all that the row's cut keeps."""
    device, num_candidates = logprobs_RM.device, logprobs_RM.shape[1]
    ends_RM = logprobs_RM.double().exp().cumsum(1)
    limits_R = np.where(cuts.top_ks > 0, np.minimum(cuts.top_ks, vocab_size), vocab_size)
    last_R1 = torch.from_numpy(np.minimum(limits_R, num_candidates) - 1).to(device)[:, None]
    last_R1 = last_R1.long()
    top_p_R1 = torch.from_numpy(cuts.top_ps.astype(np.float64)).to(device)[:, None]
    has_k_R1 = torch.from_numpy(cuts.top_ks > 0).to(device)[:, None]
    mass_R1 = torch.where(has_k_R1, ends_RM.gather(1, last_R1), 1.0)
    # A token is kept while the mass before it is below top_p; that after the last kept is not.
    last_R1 = torch.minimum(last_R1, torch.searchsorted(ends_RM, top_p_R1 * mass_R1))
    kept_mass_R1 = ends_RM.gather(1, last_R1)
    u_R1 = torch.from_numpy(uniforms_R).to(device)[:, None] * kept_mass_R1
    u_R1 = torch.minimum(u_R1, torch.nextafter(kept_mass_R1, torch.zeros_like(kept_mass_R1)))
    place_R1 = torch.searchsorted(ends_RM, u_R1, right=True).clamp_(max=num_candidates - 1)
    worst_kept_R1 = logprobs_RM.gather(1, last_R1)
    enough_R1 = torch.from_numpy(limits_R <= num_candidates).to(device)[:, None] | ~has_k_R1
    is_complete = enough_R1 & (worst_kept_R1 > logprobs_RM[:, -1:])
    is_complete |= num_candidates == vocab_size
    return ids_RM.gather(1, place_R1)[:, 0], is_complete[:, 0].cpu().numpy()

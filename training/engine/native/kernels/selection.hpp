// Where top-k and top-p cut a row, found by halving instead of sorting.
#pragma once

#include "softmax.hpp"

namespace kernels::softmax {

enum class Measure { kCount, kMass };

// The first tokens inside ``inside``, by descending logit and ascending id, before each of which the
// measure of the better ones (their number, or their weight) is below ``amount``; at least one.
// Tokens whose weight underflows count for nothing. All logits are below infinity, none is NaN.
Bound select(const Logits& row, const Bound& inside, Measure measure, double amount);

}  // namespace kernels::softmax

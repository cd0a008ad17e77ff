// What a row's elements are multiplied by: 1 / sqrt(mean square + eps), of norms and in their gradients.
#pragma once

#include <jitk/arch.cuh>  // JITK_DEVICE

namespace jitk::norm {

JITK_DEVICE float scale_of(float squares, float inverse_width, float eps) { return rsqrtf(squares * inverse_width + eps); }

// A sum of squares that overflows tells nothing of the deviation. NaN instead, as in PyTorch: infinity would make the norm zero.
JITK_DEVICE bool tells_deviation(float squares) { return squares < __builtin_inff(); }

}  // namespace jitk::norm

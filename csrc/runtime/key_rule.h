// Rules of derived keys: what `{x.shape[0]:pow2}` makes of a size, so that many sizes share a kernel.
//
//   pow2     the next power of two          div16    1 if it is divisible by 16, else 0
//   min4     4 at least                     max256   256 at most
//
// Neighbours in torch_jit_ops: variant.py computes the same, and a test holds the two together.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

struct KeyRule {
  enum What { kPow2, kDiv, kMin, kMax } what;
  int64_t number;

  int64_t operator()(int64_t value) const {
    switch (what) {
      case kPow2: return next_power_of_two(value);
      case kDiv: return value % number == 0 ? 1 : 0;
      case kMin: return value < number ? number : value;
      default: return value > number ? number : value;
    }
  }

  // Above the largest that there is, the largest.
  static int64_t next_power_of_two(int64_t value) {
    const int64_t largest = int64_t{1} << 62;
    if (value <= 1) return 1;
    return value > largest ? largest : int64_t{1} << (64 - __builtin_clzll(static_cast<uint64_t>(value - 1)));
  }

  // From the plan, in which variant.py has checked it.
  static KeyRule of(const std::string& text) {
    if (text == "pow2") return {kPow2, 0};
    const std::string name = text.substr(0, 3);
    const What what = name == "div" ? kDiv : name == "min" ? kMin : kMax;
    if (text.size() < 4 || (what == kMax && name != "max")) throw std::runtime_error("no rule of a key: " + text);
    const int64_t number = std::stoll(text.substr(3));
    if (what == kDiv && number < 1) throw std::runtime_error("no rule of a key: " + text);
    return {what, number};
  }
};

}  // namespace

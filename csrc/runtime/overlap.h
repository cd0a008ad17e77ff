// Whether two views of memory share a byte, told exactly: q and k that alternate in one buffer do not, though their ranges do.
//
//   shares_memory(q, k)      any strides and dtypes; without elements a view shares nothing
//   overlaps_itself(view)    two elements in one place: an expanded tensor, rows that are closer than they are long
//   alternate(k, v)          no, and told sooner, of equal rows that pass each other
//   takes_the_place(out, x)  out is x, or one of equal parts of its rows: what a kernel may write that reads a row first
//
// Neighbours in torch_jit_ops: overlap.py tells the same of tensors, for calls that run no kernel.
#pragma once

#include <jitk/abi.h>  // TensorView

#include <algorithm>  // sort
#include <cstdint>
#include <numeric>  // gcd
#include <vector>

namespace overlap {

using jitk::TensorView;

inline int64_t item_size(const TensorView& view) {
  const int64_t widest = 16;  // of a dtype that is not known here
  return view.dtype_.bits == 0 ? widest : (view.dtype_.bits + 7) / 8;
}

// The bytes from the first element to the last.
struct Range {
  uintptr_t begin, end;
  bool nested;  // each stride passes over all smaller ones, so that no two elements meet

  explicit Range(const TensorView& view) : begin(reinterpret_cast<uintptr_t>(view.data_)), end(begin), nested(true) {
    int64_t last = 0;
    for (int32_t i = view.ndim_ - 1; i >= 0; --i) {
      if (view.sizes_[i] == 0) {
        nested = true;
        return;
      }
      if (view.sizes_[i] == 1) continue;
      nested = nested && view.strides_[i] > last;
      last += (view.sizes_[i] - 1) * view.strides_[i];
    }
    end = begin + static_cast<uintptr_t>((last + 1) * item_size(view));
  }

  bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};

// The numbers that a sum of multiples can be: each step times a whole number between two limits.
class Sums {
 public:
  // How many bytes an element lies behind (`to`) or before (`from`) the first one, or behind another one (both).
  void add(const TensorView& view, bool from, bool to) {
    for (int32_t i = 0; i < view.ndim_; ++i) {
      const int64_t most = view.sizes_[i] - 1;
      if (most > 0) terms_.push_back({view.strides_[i] * item_size(view), from ? -most : 0, to ? most : 0, 0, 0, 0});
    }
  }

  // Whether one of them lies in [low, high]; `moved`: and is made of other numbers than zeros. Yes too if that takes long to tell.
  bool meet(int64_t low, int64_t high, bool moved) {
    std::sort(terms_.begin(), terms_.end(), [](const Term& a, const Term& b) { return a.step > b.step; });
    if (!moved) merge();
    int64_t least = 0, most = 0, divisor = 0;
    for (auto term = terms_.rbegin(); term != terms_.rend(); ++term) {
      divisor = std::gcd(divisor, term->step);
      term->divisor = divisor;
      term->rest_least = least;
      term->rest_most = most;
      least += term->step * term->least;
      most += term->step * term->most;
    }
    patience_ = 10000;
    return meet(0, low, high, moved);
  }

 private:
  struct Term {
    int64_t step, least, most;
    int64_t divisor;                // of this step and those behind
    int64_t rest_least, rest_most;  // sums of the terms behind
  };

  // One term for each step: fewer to try, but whether both are zeros cannot be seen any more.
  void merge() {
    size_t kept = 0;
    for (size_t i = 1; i < terms_.size(); ++i) {
      if (terms_[i].step == terms_[kept].step) {
        terms_[kept].least += terms_[i].least;
        terms_[kept].most += terms_[i].most;
      } else {
        terms_[++kept] = terms_[i];
      }
    }
    if (!terms_.empty()) terms_.erase(terms_.begin() + static_cast<std::ptrdiff_t>(kept) + 1, terms_.end());
  }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

  bool meet(size_t at, int64_t low, int64_t high, bool moved) {
    if (at == terms_.size()) return !moved && low <= 0 && high >= 0;
    const Term& term = terms_[at];
    if (term.step == 0) return low <= 0 && high >= 0;
    if (floor_div(high, term.divisor) * term.divisor < low) return false;
    const int64_t first = std::max(term.least, -floor_div(term.rest_most - low, term.step));
    const int64_t last = std::min(term.most, floor_div(high - term.rest_least, term.step));
    for (int64_t x = first; x <= last; ++x) {
      if (--patience_ < 0) return true;
      if (meet(at + 1, low - term.step * x, high - term.step * x, moved && x == 0)) return true;
    }
    return false;
  }

  std::vector<Term> terms_;
  int64_t patience_ = 0;
};

inline bool shares_memory(const TensorView& a, const TensorView& b) {
  if (!Range(a).meets(Range(b))) return false;
  Sums sums;  // how far an element of a lies behind one of b
  sums.add(a, false, true);
  sums.add(b, true, false);
  const int64_t distance = static_cast<const char*>(a.data_) - static_cast<const char*>(b.data_);
  return sums.meet(1 - item_size(a) - distance, item_size(b) - 1 - distance, false);
}

// Equal rows in equal steps that pass each other, as the layers of one buffer do: told without a search. False says nothing.
inline bool alternate(const TensorView& a, const TensorView& b) {
  if (a.ndim_ != b.ndim_ || item_size(a) != item_size(b)) return false;
  int64_t row = item_size(a), step = 0, count = 1;  // bytes of a row, and from row to row; rows in these steps
  for (int32_t i = a.ndim_ - 1; i >= 0; --i) {
    if (a.sizes_[i] != b.sizes_[i]) return false;
    if (a.sizes_[i] == 1) continue;
    if (a.strides_[i] != b.strides_[i]) return false;
    const int64_t stride = a.strides_[i] * item_size(a);
    if (step == 0 && stride == row) {
      row *= a.sizes_[i];
    } else if (step == 0 || stride == step * count) {
      if (step == 0) step = stride;
      count *= a.sizes_[i];
    } else {
      return false;
    }
  }
  if (step < row) return false;
  const int64_t distance = static_cast<const char*>(a.data_) - static_cast<const char*>(b.data_);
  const int64_t behind = (distance < 0 ? -distance : distance) % step;
  return behind >= row && step - behind >= row;
}

inline bool overlaps_itself(const TensorView& view) {
  if (Range(view).nested) return false;
  Sums sums;
  sums.add(view, true, true);
  return sums.meet(1 - item_size(view), item_size(view) - 1, true);
}

inline bool takes_the_place(const TensorView& out, const TensorView& x) {
  if (!(out.dtype_ == x.dtype_) || out.ndim_ != x.ndim_) return false;
  const int64_t distance = static_cast<const char*>(out.data_) - static_cast<const char*>(x.data_);
  const int32_t last = x.ndim_ - 1;
  for (int32_t i = 0; i < last; ++i) {
    if (out.sizes_[i] != x.sizes_[i] || (x.sizes_[i] > 1 && out.strides_[i] != x.strides_[i])) return false;
  }
  if (last < 0) return distance == 0;
  if (x.sizes_[last] % out.sizes_[last] != 0 || (out.sizes_[last] > 1 && out.strides_[last] != x.strides_[last])) return false;
  const int64_t part = out.sizes_[last] * (x.sizes_[last] > 1 ? x.strides_[last] : 1) * item_size(x);
  return distance >= 0 && part > 0 && distance % part == 0 && distance / part < x.sizes_[last] / out.sizes_[last];
}

}  // namespace overlap

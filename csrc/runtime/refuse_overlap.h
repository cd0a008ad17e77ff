// Refuses calls that write one place of memory through two elements or two arguments. overlap.h tells whether they do.
#pragma once

#include <jitk/abi.h>  // TensorView

#include "overlap.h"
#include "slot.h"

#include <algorithm>  // sort
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// "[4, 64]"
std::string text_of(const int64_t* numbers, int32_t count) {
  std::string text = "[";
  for (int32_t i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
  return text + "]";
}

// "'out' [4, 32] with strides [64, 1]"
std::string text_of(const jitk::TensorView& view) {
  return std::string("'") + view.name_ + "' " + text_of(view.sizes_, view.ndim_) + " with strides " +
         text_of(view.strides_, view.ndim_);
}

[[gnu::cold]] std::string why_it_overlaps(const jitk::TensorView& view) {
  for (int32_t i = 0; i < view.ndim_; ++i) {
    if (view.strides_[i] == 0 && view.sizes_[i] > 1)
      return "dimension " + std::to_string(i) + " has size " + std::to_string(view.sizes_[i]) + " and stride 0";
  }
  return text_of(view);
}

[[noreturn, gnu::cold]] void refuse_shared(const std::string& who, const jitk::TensorView& out, const jitk::TensorView& other,
                                           bool reusable) {
  const int64_t behind = static_cast<const char*>(out.data_) - static_cast<const char*>(other.data_);
  const std::string bytes = std::to_string(behind < 0 ? -behind : behind) + " bytes ";
  throw std::runtime_error(
      who + ": argument '" + out.name_ + "' is written, but shares memory with argument '" + other.name_ + "'\n  " +
      text_of(out) + " begins " +
      (behind == 0  ? "where"
       : behind < 0 ? bytes + "before"
                    : bytes + "behind") +
      "\n  " + text_of(other) + (behind == 0 ? " does" : "") + "\n  remedy: memory of its own for one of them" +
      (reusable ? std::string(", or '") + out.name_ + "' exactly in the place of '" + other.name_ + "'" : ""));
}

[[noreturn, gnu::cold]] void refuse_own(const std::string& who, const jitk::TensorView& out) {
  throw std::runtime_error(who + ": argument '" + out.name_ + "' is written, but its elements overlap\n  " +
                           why_it_overlaps(out));
}

// The same of an op with lists, whose many tensors are put in the order of their places: only neighbours can meet.
template <typename Tensors>
void refuse_overlap_in_lists(const Slot& slot, const Tensors& tensors) {
  struct Part {
    overlap::Range range;
    const jitk::TensorView* view;
    const Argument* argument;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < slot.arguments.size(); ++i) {
    for (const jitk::TensorView& view : tensors(i)) {
      parts.push_back({overlap::Range(view), &view, &slot.arguments[i]});
      if (slot.arguments[i].written && !parts.back().range.nested && overlap::overlaps_itself(view))
        refuse_own(slot.name, view);
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.range.begin < b.range.begin; });
  for (size_t i = 0; i < parts.size(); ++i) {
    for (size_t j = i + 1; j < parts.size() && parts[j].range.begin < parts[i].range.end; ++j) {
      const bool first = parts[i].argument->written && (!parts[j].argument->written || parts[i].argument <= parts[j].argument);
      const Part& out = first ? parts[i] : parts[j];
      const Part& other = first ? parts[j] : parts[i];
      if (!out.argument->written || !out.range.meets(other.range) || overlap::alternate(*out.view, *other.view)) continue;
      const bool reusable = other.argument->reusable;
      if ((reusable && overlap::takes_the_place(*out.view, *other.view)) || !overlap::shares_memory(*out.view, *other.view))
        continue;
      refuse_shared(slot.name, *out.view, *other.view, reusable);
    }
  }
}

// `tensors(i)`: those that argument i gives, none, one, or a list. What a kernel writes belongs to one element of one argument;
// else the result is whatever its threads make of it.
template <typename Tensors>
void refuse_overlap(const Slot& slot, const Tensors& tensors) {
  if (slot.writes_lists) return refuse_overlap_in_lists(slot, tensors);
  const size_t count = slot.arguments.size();
  for (size_t i = 0; i < count; ++i) {
    if (!slot.arguments[i].written) continue;
    for (const jitk::TensorView& out : tensors(i)) {
      const overlap::Range range(out);
      if (!range.nested && overlap::overlaps_itself(out)) refuse_own(slot.name, out);
      for (size_t j = 0; j < count; ++j) {
        if (j == i || (j < i && slot.arguments[j].written)) continue;
        const bool reusable = slot.arguments[j].reusable;
        for (const jitk::TensorView& other : tensors(j)) {
          if (!range.meets(overlap::Range(other))) continue;
          if ((reusable && overlap::takes_the_place(out, other)) || !overlap::shares_memory(out, other)) continue;
          refuse_shared(slot.name, out, other, reusable);
        }
      }
    }
  }
}

}  // namespace

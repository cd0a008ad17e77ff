// How values go into a KV cache and come out of it: as they are, or as 8-bit floats with one scale for a tensor.
//
//   const Stored stored = stored_as(k, k_cache);             kCopy, kE4m3 or kE5m2
//   const float* step = scale_of(k_scale, device);           null without one
//   only_fp8_has(k_scale, k_cache);
//
// Left out: the conversions (dtype.h, fp8.cuh).
#pragma once

#include <jitk/tensor.h>  // TensorView, TensorMatcher

#include <optional>  // a scale, a dtype

namespace jitk {

enum class Stored : uint8_t { kCopy, kE4m3, kE5m2 };

namespace host {

inline constexpr DLDataType kE4m3{kDLFloat8_e4m3fn, 8, 1};
inline constexpr DLDataType kE5m2{kDLFloat8_e5m2, 8, 1};

inline bool is_fp8(DLDataType dtype) { return dtype == kE4m3 || dtype == kE5m2; }
// Of a cache of bytes, those of e4m3.
inline DLDataType fp8_of(DLDataType dtype) { return dtype == kE5m2 ? kE5m2 : kE4m3; }
// What is cast to 8-bit floats and back.
inline bool is_wide(DLDataType dtype) {
  return dtype == dtype_of<fp16_t>() || dtype == dtype_of<bf16_t>() || dtype == dtype_of<fp32_t>();
}

// Elements that a copy moves by their bytes.
inline int64_t bytes_of(const TensorView& x, DebugInfo where = {}) {
  const int64_t bits = int64_t{x.dtype().bits} * x.dtype().lanes;
  RuntimeCheck(where, bits == 8 || bits == 16 || bits == 32 || bits == 64, "argument '", x.name(),
               "' must have elements of 1, 2, 4 or 8 bytes, got ", x.dtype());
  return bits / 8;
}

// How elements of `x` become those of the cache.
inline Stored stored_as(const TensorView& x, const TensorView& cache, DebugInfo where = {}) {
  if (x.dtype() == cache.dtype()) {
    bytes_of(x, where);
    return Stored::kCopy;
  }
  const bool narrows = is_wide(x.dtype());
  if (narrows && is_fp8(cache.dtype())) return cache.dtype() == kE4m3 ? Stored::kE4m3 : Stored::kE5m2;
  const bool of_bytes = narrows && cache.dtype() == dtype_of<uint8_t>();
  panic(where, "argument '", cache.name(), "' cannot hold what '", x.name(), "' has\n  expected  ", x.dtype(),
        narrows ? ", float8_e4m3fn or float8_e5m2" : "", "\n  got       ", cache.dtype(),
        of_bytes ? "\n  remedy: if its bytes are 8-bit floats, pass " : "", of_bytes ? cache.name() : "",
        of_bytes ? ".view(torch.float8_e4m3fn)" : "");
}

// The dtype of what is gathered: one that is given, else that of the cache, or bf16 where a scale is undone.
inline DLDataType gathered_as(const TensorView& cache, bool scaled, std::optional<DLDataType> given, DebugInfo where = {}) {
  const DLDataType to = given ? *given : scaled ? dtype_of<bf16_t>() : cache.dtype();
  if (!scaled && to == cache.dtype()) {
    bytes_of(cache, where);
    return to;
  }
  RuntimeCheck(where, is_fp8(cache.dtype()) && is_wide(to), "dtype of what is gathered from '", cache.name(), "'\n  expected  ",
               scaled ? DLDataType{kDLBfloat, 16, 1} : cache.dtype(),
               is_fp8(cache.dtype()) ? (scaled ? ", float16 or float32" : ", bfloat16, float16 or float32") : "",
               "\n  got       ", to);
  return to;
}

// Where a scale is; null if none was given.
inline const float* scale_of(const std::optional<TensorView>& scale, SymbolicDevice& device, DebugInfo where = {}) {
  if (!scale) return nullptr;
  SymbolicDims shape{"scale_shape"};
  TensorMatcher({shape}).with_dtype<fp32_t>().with_device(device).verify(*scale, where);
  RuntimeCheck(where, scale->numel() == 1, "argument '", scale->name(), "' must hold one number, got ", scale->shape());
  return static_cast<const float*>(scale->data_ptr());
}

inline void only_fp8_has(const std::optional<TensorView>& scale, const TensorView& cache, DebugInfo where = {}) {
  RuntimeCheck(where, !scale || is_fp8(cache.dtype()), "argument '", scale ? scale->name() : "",
               "' is for caches of 8-bit floats, but '", cache.name(), "' is ", cache.dtype());
}

}  // namespace host
}  // namespace jitk

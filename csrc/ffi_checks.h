// Checks that memory safety needs, shared by every handler. Shapes that a user can get wrong
// are checked in Python at trace time, with better words.
#pragma once
#include <cstdint>
#include <string>

#include "bitmap.h"
#include "delta_csr.h"
#include "xla/ffi/api/ffi.h"

#if XLA_FFI_API_MINOR > 3
#error "Build against XLA FFI API 0.3 (jaxlib 0.10.2): newer handlers are refused by older jaxlib"
#endif

namespace flashllm {

namespace ffi = xla::ffi;

inline bool IsHalf(ffi::DataType t) { return t == ffi::DataType::F16 || t == ffi::DataType::BF16; }

inline ffi::Error Bad(const std::string& what) {
  return ffi::Error::InvalidArgument("jax_flashllm: " + what);
}

// Row blocks of an encoded weight: S shards of R = ceil(M / S) rows.
struct Shards {
  int64_t count, rows, capacity;
};

constexpr int64_t kMaxSide = INT32_MAX;  // of W, so that no size below overflows

template <typename Values>
ffi::ErrorOr<Shards> CheckValues(const Values& values, int64_t m, int64_t k) {
  const auto dims = values.dimensions();
  if (dims.size() != 2 || !IsHalf(values.element_type()))
    return ffi::Unexpected(Bad("values must be float16 or bfloat16 [shards, capacity]"));
  if (m < 1 || m > kMaxSide || k < 1 || k > kMaxSide || dims[0] < 1 || dims[0] > m)
    return ffi::Unexpected(Bad("W must be [M, K], each from 1 to 2^31 - 1, in 1 to M shards"));
  return Shards{dims[0], bitmap::CeilDiv(m, dims[0]), dims[1]};
}

inline ffi::Error CheckBitmap(const Shards& s, int64_t k, size_t masks, size_t offsets) {
  const bitmap::Dims d(s.rows, k);
  if (static_cast<int64_t>(masks) != s.count * d.masks() ||
      static_cast<int64_t>(offsets) != s.count * d.offsets())
    return Bad("bitmap masks or offsets do not fit the shape");
  return ffi::Error::Success();
}

inline ffi::Error CheckDeltaCsr(const Shards& s, int64_t k, size_t index, size_t offsets) {
  const delta_csr::Dims d(s.rows, k);
  if (index % s.count || static_cast<int64_t>(offsets) != s.count * d.offsets() ||
      static_cast<int64_t>(index) / s.count < delta_csr::IndexStart(d.items, 0, 8))
    return Bad("Delta-CSR index or offsets do not fit the shape");
  if (s.capacity % delta_csr::kGroupValues)
    return Bad("Delta-CSR values must have room for whole groups");
  return ffi::Error::Success();
}

}  // namespace flashllm

// What csrc/cuda offers to the bindings.
#pragma once
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace flashllm::cuda {

struct Target {
  const char* name;
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
};

std::vector<Target> Targets();

}  // namespace flashllm::cuda

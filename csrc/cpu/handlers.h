// What csrc/cpu offers to the bindings.
#pragma once
#include <string>

#include "xla/ffi/api/ffi.h"

// The macro that defines handlers gives them C linkage, where namespaces do not count.
extern "C" {
XLA_FFI_Error* kSpmmBitmapCpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* kSpmmDeltaCsrCpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* kDecodeBitmapCpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* kDecodeDeltaCsrCpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* kSampleBitmapCpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* kSampleDeltaCsrCpu(XLA_FFI_CallFrame*);
}

namespace flashllm {

const char* ActiveKernels();                  // "avx512", "avx2" or "portable"
bool SelectKernels(const std::string& name);  // false where this CPU cannot run them

}  // namespace flashllm

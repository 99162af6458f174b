// The Python module _flashllm: registrations and the encoders. Nothing is computed here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <stdexcept>

#include "bitmap.h"
#include "cpu/encode.h"
#include "cpu/handlers.h"
#include "delta_csr.h"
#ifdef FLASHLLM_CUDA
#include "cuda/handlers.h"
#endif

namespace nb = nanobind;

namespace flashllm {
namespace {

using Dense = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T>
using Out = nb::ndarray<nb::numpy, T>;

constexpr size_t kHugePage = 2 << 20;

// A NumPy array that owns its memory; 64-byte aligned, so that XLA can adopt it as it is. What is
// large asks for huge pages: with a fault for every 4 KB, half of the time went to the kernel.
template <typename T>
Out<T> Allocate(std::initializer_list<size_t> shape) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  const size_t bytes = n * sizeof(T);
  if (bytes < kHugePage) {
    void* data = ::operator new[](bytes, std::align_val_t(64));
    nb::capsule owner(data, [](void* p) noexcept { ::operator delete[](p, std::align_val_t(64)); });
    return Out<T>(data, shape, owner);
  }
  void* data = ::operator new[](bytes, std::align_val_t(kHugePage));
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  nb::capsule owner(data,
                    [](void* p) noexcept { ::operator delete[](p, std::align_val_t(kHugePage)); });
  return Out<T>(data, shape, owner);
}

DenseView View(const Dense& w, int64_t shards) {
  if (w.size() == 0 || shards < 1 || shards > static_cast<int64_t>(w.shape(0)))
    throw std::invalid_argument("encode: W is [M, K], each 1 at least, in 1 to M shards");
  return {w.data(), static_cast<int64_t>(w.shape(0)), static_cast<int64_t>(w.shape(1)), shards};
}

template <typename AnyView>
nb::tuple Bitmap(const AnyView& v) {
  const int64_t shards = v.shards;
  const bitmap::Dims d(bitmap::CeilDiv(v.rows, shards), v.cols);
  auto masks = Allocate<uint32_t>({size_t(shards), size_t(d.bands), size_t(d.tiles), 32});
  auto offsets = Allocate<uint32_t>({size_t(shards), size_t(d.offsets())});
  int64_t capacity;
  {
    nb::gil_scoped_release release;
    capacity = CountBitmap(v, masks.data(), offsets.data());
  }
  auto values = Allocate<uint16_t>({size_t(shards), size_t(capacity)});
  {
    nb::gil_scoped_release release;
    FillBitmap(v, masks.data(), offsets.data(), capacity, values.data());
  }
  return nb::make_tuple(masks, offsets, values);
}

nb::tuple EncodeBitmap(Dense w, int64_t shards) { return Bitmap(View(w, shards)); }

nb::tuple BitmapOfPacked(
    nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> bits,
    nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> starts,
    nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> values, int64_t cols) {
  const int64_t rows = static_cast<int64_t>(bits.shape(0));
  if (rows < 1 || cols < 1 || static_cast<int64_t>(bits.shape(1)) != bitmap::CeilDiv(cols, 8) ||
      static_cast<int64_t>(starts.shape(0)) != rows)
    throw std::invalid_argument("bitmap_of_packed: bits are [M, ceil(K / 8)], starts [M]");
  return Bitmap(CheckPacked(bits.data(), starts.data(), values.data(), rows, cols,
                            static_cast<int64_t>(values.shape(0))));
}

nb::tuple EncodeDeltaCsr(Dense w, int64_t shards) {
  const DenseView v = View(w, shards);
  const delta_csr::Dims d(bitmap::CeilDiv(v.rows, shards), v.cols);
  auto offsets = Allocate<uint32_t>({size_t(shards), size_t(d.offsets())});
  DeltaCsrCapacity capacity;
  {
    nb::gil_scoped_release release;
    capacity = CountDeltaCsr(v, offsets.data());
  }
  auto index = Allocate<uint32_t>({size_t(shards), size_t(capacity.index)});
  auto values = Allocate<uint16_t>({size_t(shards), size_t(capacity.values)});
  {
    nb::gil_scoped_release release;
    FillDeltaCsr(v, offsets.data(), capacity, index.data(), values.data());
  }
  return nb::make_tuple(index, offsets, values);
}

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict CpuTargets() {
  nb::dict t;
  t["flashllm_spmm_bitmap_v1"] = Capsule(kSpmmBitmapCpu);
  t["flashllm_spmm_delta_csr_v1"] = Capsule(kSpmmDeltaCsrCpu);
  t["flashllm_decode_bitmap_v1"] = Capsule(kDecodeBitmapCpu);
  t["flashllm_decode_delta_csr_v1"] = Capsule(kDecodeDeltaCsrCpu);
  t["flashllm_sample_bitmap_v1"] = Capsule(kSampleBitmapCpu);
  t["flashllm_sample_delta_csr_v1"] = Capsule(kSampleDeltaCsrCpu);
  return t;
}

}  // namespace

NB_MODULE(_flashllm, m) {
  m.def("encode_bitmap", &EncodeBitmap, nb::arg("dense"), nb::arg("shards"));
  m.def("bitmap_of_packed", &BitmapOfPacked, nb::arg("bits"), nb::arg("starts"), nb::arg("values"),
        nb::arg("cols"));
  m.def("encode_delta_csr", &EncodeDeltaCsr, nb::arg("dense"), nb::arg("shards"));
  m.def("cpu_targets", &CpuTargets);
  m.def("cpu_kernels", &ActiveKernels);
  m.def("select_cpu_kernels", &SelectKernels, nb::arg("name"));
#ifdef FLASHLLM_CUDA
  m.def("cuda_targets", [] {
    nb::dict targets;
    for (const auto& t : cuda::Targets()) {
      nb::dict stages;
      stages["initialize"] = Capsule(t.initialize);
      stages["execute"] = Capsule(t.execute);
      targets[t.name] = stages;
    }
    return targets;
  });
#endif
}

}  // namespace flashllm

// Encoders and CPU handlers under AddressSanitizer and UBSan, on random and on broken buffers.
// fuzz_kernels.py compiles and runs it:
//
//   encode    a random matrix of random shape, bits and shards, decoded again: every bit is back;
//             so packed as checkpoints are, but for -0.0, which packed is a zero
//   products  with every instruction set, dtype of x, bias and activation
//   garbage   offsets, masks, bases and codes changed at random: an error or any numbers
//   sizes     a buffer's shape or dtype, M or K other than the rest say: an error or any numbers
//
// The handlers are called as XLA calls them, through a call frame, on a small thread pool. Every
// buffer is an allocation of its own exact size, so that one byte read or written beside it ends
// the program. One number, printed every thousand rounds, repeats a round. With
// -DFLASHLLM_LIBFUZZER the choices are libFuzzer's, which looks for those that reach new code.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/bitmap.h"
#include "../../csrc/cpu/encode.h"
#include "../../csrc/cpu/handlers.h"
#include "../../csrc/delta_csr.h"

struct XLA_FFI_Error {
  std::string message;
};

namespace flashllm {
namespace {

using Generator = std::mt19937_64;

#ifdef FLASHLLM_LIBFUZZER
constexpr int kSmaller = 3;  // and more of them
#else
constexpr int kSmaller = 1;
#endif

// A fuzzer's bytes, four a number, as long as they last; then a generator's numbers.
class Rng {
 public:
  explicit Rng(uint64_t seed) : more_(seed) {}
  Rng(const uint8_t* data, size_t size) : data_(data), left_(size), more_(size) {}
  uint64_t operator()() {
    if (left_ < 4) return more_();
    uint32_t v;
    std::memcpy(&v, data_, 4);
    data_ += 4, left_ -= 4;
    return v;
  }

 private:
  const uint8_t* data_ = nullptr;
  size_t left_ = 0;
  Generator more_;
};

int64_t Below(Rng& rng, int64_t n) {
  return static_cast<int64_t>(rng() % static_cast<uint64_t>(n));
}

template <typename T, size_t N>
T Pick(Rng& rng, const T (&of)[N]) {
  return of[rng() % N];
}

// ---- what XLA would provide ----

std::vector<std::thread> g_threads;  // of the call at hand

XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
    return new XLA_FFI_Error{args->message};
  };
  api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
    args->message = args->error->message.c_str();
  };
  api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) {
    g_threads.emplace_back(args->task, args->data);
    return static_cast<XLA_FFI_Error*>(nullptr);
  };
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) {
    *args->num_threads = 3;
    return static_cast<XLA_FFI_Error*>(nullptr);
  };
  return api;
}

struct Buffer {
  XLA_FFI_DataType dtype = XLA_FFI_DataType_F16;
  std::vector<int64_t> dims;
  std::shared_ptr<uint8_t> data;  // 64-byte aligned, as XLA's; not one byte more than it needs
  size_t bytes = 0;

  template <typename T>
  T* As() const {
    return reinterpret_cast<T*>(data.get());
  }
};

size_t Bytes(XLA_FFI_DataType t) {
  switch (t) {
    case XLA_FFI_DataType_U8:
      return 1;
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
      return 2;
    default:
      return 4;
  }
}

Buffer Make(XLA_FFI_DataType dtype, std::vector<int64_t> dims) {
  Buffer b;
  b.dtype = dtype, b.dims = std::move(dims);
  b.bytes = Bytes(dtype);
  for (int64_t d : b.dims) b.bytes *= d;
  void* p = nullptr;
  if (posix_memalign(&p, 64, b.bytes)) std::abort();
  b.data.reset(static_cast<uint8_t*>(p), std::free);
  return b;
}

Buffer Copy(const Buffer& of) {
  Buffer b = Make(of.dtype, of.dims);
  std::memcpy(b.data.get(), of.data.get(), of.bytes);
  return b;
}

struct Attribute {
  const char* name;
  int64_t value;
};

int64_t g_calls = 0, g_refused = 0;

// Whether the handler succeeds. Attributes are in the order of their names.
bool Call(XLA_FFI_Handler* handler, std::vector<Buffer> args, Buffer ret,
          std::vector<Attribute> attributes) {
  static const XLA_FFI_Api api = MakeApi();
  const auto view = [](Buffer& b) {
    XLA_FFI_Buffer v = {};
    v.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    v.dtype = b.dtype, v.data = b.data.get();
    v.rank = static_cast<int64_t>(b.dims.size()), v.dims = b.dims.data();
    return v;
  };
  std::vector<XLA_FFI_Buffer> views;
  for (Buffer& b : args) views.push_back(view(b));
  XLA_FFI_Buffer result = view(ret);
  std::vector<void*> arg_pointers, attr_pointers;
  for (auto& v : views) arg_pointers.push_back(&v);
  void* ret_pointer = &result;
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  XLA_FFI_RetType ret_type = XLA_FFI_RetType_BUFFER;
  std::vector<XLA_FFI_AttrType> attr_types(attributes.size(), XLA_FFI_AttrType_SCALAR);
  std::vector<XLA_FFI_ByteSpan> names;
  std::vector<XLA_FFI_Scalar> scalars;
  for (Attribute& a : attributes) {
    names.push_back({a.name, std::strlen(a.name)});
    scalars.push_back({XLA_FFI_DataType_S64, &a.value});
  }
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  for (size_t i = 0; i < names.size(); ++i) {
    name_pointers.push_back(&names[i]);
    attr_pointers.push_back(&scalars[i]);
  }
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()),
                arg_types.data(), arg_pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, 1, &ret_type, &ret_pointer};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                 nullptr,
                 static_cast<int64_t>(attributes.size()),
                 attr_types.data(),
                 name_pointers.data(),
                 attr_pointers.data()};
  XLA_FFI_Error* error = handler(&frame);
  for (auto& t : g_threads) t.join();  // tasks may start after the handler has returned
  g_threads.clear();
  ++g_calls, g_refused += error != nullptr;
  const bool ok = error == nullptr;
  delete error;
  return ok;
}

// ---- weights ----

struct Weight {
  bool bitmap;
  int64_t m, k, shards;
  Buffer index, offsets, values;
  int64_t rows() const { return shards * bitmap::CeilDiv(m, shards); }  // with padding
};

Buffer RandomMatrix(Rng& rng, int64_t m, int64_t k, XLA_FFI_DataType dtype) {
  Buffer dense = Make(dtype, {m, k});
  const double kDensities[] = {0, 0.002, 0.05, 0.07, 0.3, 0.6, 0.95, 1};
  const double density = Pick(rng, kDensities);
  const uint64_t threshold = density >= 1 ? ~0ull : static_cast<uint64_t>(density * 0x1p64);
  const int64_t row0 = Below(rng, m), col0 = Below(rng, k);  // at times of one tile alone
  const bool patch = rng() % 3 == 0;
  Generator bits(rng());
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < k; ++c) {
      const bool inside = !patch || (r >= row0 && r < row0 + 64 && c >= col0 && c < col0 + 128);
      const bool stored = inside && bits() <= threshold && density > 0;
      dense.As<uint16_t>()[r * k + c] = stored ? static_cast<uint16_t>(bits()) : 0;
    }
  return dense;
}

Weight Encode(const Buffer& dense, int64_t shards, bool as_bitmap) {
  Weight w = {as_bitmap, dense.dims[0], dense.dims[1], shards, {}, {}, {}};
  const DenseView view = {dense.As<uint16_t>(), w.m, w.k, shards};
  const int64_t rows = bitmap::CeilDiv(w.m, shards);
  if (as_bitmap) {
    const bitmap::Dims d(rows, w.k);
    w.index = Make(XLA_FFI_DataType_U32, {shards, d.bands, d.tiles, 32});
    w.offsets = Make(XLA_FFI_DataType_U32, {shards, d.offsets()});
    const int64_t capacity = CountBitmap(view, w.index.As<uint32_t>(), w.offsets.As<uint32_t>());
    w.values = Make(dense.dtype, {shards, capacity});
    FillBitmap(view, w.index.As<uint32_t>(), w.offsets.As<uint32_t>(), capacity,
               w.values.As<uint16_t>());
  } else {
    const delta_csr::Dims d(rows, w.k);
    w.offsets = Make(XLA_FFI_DataType_U32, {shards, d.offsets()});
    const DeltaCsrCapacity capacity = CountDeltaCsr(view, w.offsets.As<uint32_t>());
    w.index = Make(XLA_FFI_DataType_U32, {shards, capacity.index});
    w.values = Make(dense.dtype, {shards, capacity.values});
    FillDeltaCsr(view, w.offsets.As<uint32_t>(), capacity, w.index.As<uint32_t>(),
                 w.values.As<uint16_t>());
  }
  return w;
}

// From bits and values row by row, as csrc/bindings.cc calls it.
Weight EncodePacked(Rng& rng, const Buffer& dense) {
  const int64_t m = dense.dims[0], k = dense.dims[1], row_bytes = bitmap::CeilDiv(k, 8);
  Weight w = {true, m, k, 1, {}, {}, {}};
  const Buffer bits = Make(XLA_FFI_DataType_U8, {m, row_bytes});
  const Buffer starts = Make(XLA_FFI_DataType_F32, {m, 2});  // int64
  std::memset(bits.data.get(), 0, bits.bytes);
  std::vector<uint16_t> stored;
  bool plain = true;
  const bool zeros = rng() % 4 == 0;  // at times zeros have a bit too
  Generator which(rng());
  for (int64_t r = 0; r < m; ++r) {
    starts.As<int64_t>()[r] = static_cast<int64_t>(stored.size());
    for (int64_t c = 0; c < k; ++c) {
      const uint16_t v = dense.As<uint16_t>()[r * k + c];
      if (!v && !(zeros && which() % 8 == 0)) continue;
      bits.As<uint8_t>()[r * row_bytes + c / 8] |= 1 << (c % 8);
      stored.push_back(v);
      plain &= v != 0x8000;
    }
  }
  const Buffer values = Make(dense.dtype, {static_cast<int64_t>(stored.size())});
  if (values.bytes) std::memcpy(values.data.get(), stored.data(), values.bytes);
  const PackedView view = {
      bits.As<uint8_t>(), starts.As<int64_t>(), values.As<uint16_t>(), m, k, 1, plain};
  const bitmap::Dims d(m, k);
  w.index = Make(XLA_FFI_DataType_U32, {1, d.bands, d.tiles, 32});
  w.offsets = Make(XLA_FFI_DataType_U32, {1, d.offsets()});
  const int64_t capacity = CountBitmap(view, w.index.As<uint32_t>(), w.offsets.As<uint32_t>());
  w.values = Make(dense.dtype, {1, capacity});
  FillBitmap(view, w.index.As<uint32_t>(), w.offsets.As<uint32_t>(), capacity,
             w.values.As<uint16_t>());
  return w;
}

bool Decode(const Weight& w, const Buffer& out) {
  return Call(w.bitmap ? kDecodeBitmapCpu : kDecodeDeltaCsrCpu, {w.index, w.offsets, w.values}, out,
              {{"k", w.k}, {"m", w.m}});
}

bool Sample(const Weight& w, const Buffer& dense, const Buffer& out) {
  return Call(w.bitmap ? kSampleBitmapCpu : kSampleDeltaCsrCpu, {w.index, w.offsets, dense}, out,
              {{"k", w.k}, {"m", w.m}});
}

bool Spmm(const Weight& w, const Buffer& x, const Buffer& bias, const Buffer& y,
          int64_t activation) {
  return Call(w.bitmap ? kSpmmBitmapCpu : kSpmmDeltaCsrCpu, {w.index, w.offsets, w.values, x, bias},
              y, {{"activation", activation}, {"k", w.k}, {"m", w.m}});
}

constexpr XLA_FFI_DataType kFloats[] = {XLA_FFI_DataType_F16, XLA_FFI_DataType_BF16,
                                        XLA_FFI_DataType_F32};

void FillRandom(Rng& rng, const Buffer& b) {
  Generator bits(rng());
  for (size_t i = 0; i < b.bytes; ++i) b.data.get()[i] = static_cast<uint8_t>(bits());
}

// A product with random x (Inf and NaN among it), bias and activation.
bool RandomProduct(Rng& rng, const Weight& w) {
  static const char* kSets[] = {"portable", "avx2", "avx512"};
  SelectKernels(Pick(rng, kSets));  // the one before stays where this CPU has not got it
  const int64_t kTokens[] = {0, 1, 1, 2, 5, 8, 31, 32, 33, 40};
  const int64_t n = Pick(rng, kTokens);
  const XLA_FFI_DataType type = Pick(rng, kFloats);
  const Buffer x = Make(type, {n, w.k}), y = Make(type, {n, w.rows()});
  if (rng() % 4 == 0)
    FillRandom(rng, x);
  else
    std::memset(x.data.get(), 0x3c, x.bytes);
  const Buffer bias = Make(Pick(rng, kFloats), {rng() % 2 ? w.rows() : 0});
  FillRandom(rng, bias);
  return Spmm(w, x, bias, y, Below(rng, 3));
}

// ---- damage ----

void DamageWords(Rng& rng, const Buffer& b) {
  const int64_t n = static_cast<int64_t>(b.bytes / 4);
  if (!n) return;
  uint32_t* words = b.As<uint32_t>();
  const int64_t at = Below(rng, n);
  const int64_t count = rng() % 2 ? 1 + Below(rng, 4) : n;
  const int kind = static_cast<int>(Below(rng, 7));
  const uint32_t kEdges[] = {0u, 1u, 0x7fffffffu, 0x80000000u, ~0u, 0xffff0000u, 0x0fffffffu};
  const uint32_t edge = Pick(rng, kEdges);
  const uint32_t step = static_cast<uint32_t>(Below(rng, 3000));
  for (int64_t i = at; i < std::min(n, at + count); ++i) switch (kind) {
      case 0:
        words[i] = static_cast<uint32_t>(rng());
        break;
      case 1:
        words[i] = edge;
        break;
      case 2:
        words[i] ^= 1u << (rng() % 32);
        break;
      case 3:
        words[i] += step;
        break;
      case 4:
        words[i] -= step;
        break;
      case 5:
        words[i] |= static_cast<uint32_t>(rng());
        break;
      default:
        std::swap(words[i], words[Below(rng, n)]);
    }
}

// The same with a buffer cut or grown to other dims; what is new is random.
Buffer Resized(Rng& rng, const Buffer& of) {
  std::vector<int64_t> dims = of.dims;
  const int64_t axis = Below(rng, static_cast<int64_t>(dims.size()));
  const int64_t kSteps[] = {-8, -1, 1, 8, 100};
  dims[axis] =
      rng() % 4 ? std::max<int64_t>(0, dims[axis] + Pick(rng, kSteps)) : Below(rng, dims[axis] + 1);
  if (rng() % 8 == 0) dims.pop_back();
  Buffer b = Make(of.dtype, dims);
  FillRandom(rng, b);
  std::memcpy(b.data.get(), of.data.get(), std::min(b.bytes, of.bytes));
  return b;
}

void Damage(Rng& rng, Weight& w) {
  w.index = Copy(w.index), w.offsets = Copy(w.offsets);
  const int kind = static_cast<int>(Below(rng, 8));
  if (kind < 3 || kind == 6) DamageWords(rng, w.offsets);
  if (kind >= 3 && kind < 7) DamageWords(rng, w.index);
  if (kind == 7) {  // offsets that point outside of fewer values, or of less index
    Buffer& b = w.bitmap || rng() % 2 ? w.values : w.index;
    const int64_t capacity = Below(rng, b.dims[1] + 1);
    Buffer fewer = Make(b.dtype, {b.dims[0], capacity});
    FillRandom(rng, fewer);
    b = fewer;
  }
}

void DamageSizes(Rng& rng, Weight w) {
  const int64_t kExtents[] = {INT64_MIN,
                              -1,
                              0,
                              1,
                              w.m - 1,
                              w.m + 1,
                              w.k - 1,
                              w.k + 1,
                              2 * w.m,
                              int64_t{1} << 31,
                              int64_t{1} << 32,
                              int64_t{1} << 62,
                              INT64_MAX};
  Buffer x = Make(Pick(rng, kFloats), {3, w.k}), y = Make(x.dtype, {3, w.rows()});
  Buffer bias = Make(Pick(rng, kFloats), {rng() % 2 ? w.rows() : 0});
  FillRandom(rng, x), FillRandom(rng, bias);
  Buffer dense = Make(w.values.dtype, {w.rows(), w.k}), sampled = Copy(w.values);
  Buffer* const kBuffers[] = {&w.index, &w.offsets, &w.values, &x, &y, &bias, &dense, &sampled};
  for (int64_t i = 1 + Below(rng, 2); i > 0; --i) switch (Below(rng, 4)) {
      case 0: {
        Buffer* b = Pick(rng, kBuffers);
        if (!b->dims.empty()) *b = Resized(rng, *b);
        break;
      }
      case 1: {
        Buffer* b = Pick(rng, kBuffers);
        const XLA_FFI_DataType kTypes[] = {XLA_FFI_DataType_F16, XLA_FFI_DataType_BF16,
                                           XLA_FFI_DataType_F32, XLA_FFI_DataType_U32,
                                           XLA_FFI_DataType_U8};
        *b = Make(Pick(rng, kTypes), b->dims);
        FillRandom(rng, *b);
        break;
      }
      case 2:
        w.m = Pick(rng, kExtents);
        break;
      default:
        w.k = Pick(rng, kExtents);
    }
  const int64_t kActivations[] = {0, 1, 2, 3, -1, INT64_MAX};
  Spmm(w, x, bias, y, Pick(rng, kActivations));
  Decode(w, dense);
  Sample(w, dense, sampled);
}

void Expect(bool ok, const char* what, uint64_t round) {
  if (ok) return;
  std::fprintf(stderr, "round %llu: %s\n", static_cast<unsigned long long>(round), what);
  std::abort();
}

void Round(Rng rng, uint64_t seed) {
  const bool wide = rng() % 32 == 0;  // blocks of columns of Delta-CSR
  const int64_t m = 1 + Below(rng, wide ? 3 : (rng() % 8 ? 150 : 900) / kSmaller),
                k = 1 + Below(rng, wide ? 30000 : (rng() % 8 ? 300 : 2500) / kSmaller);
  const int64_t shards = rng() % 2 ? 1 : 1 + Below(rng, std::min<int64_t>(m, 9));
  const XLA_FFI_DataType dtype = rng() % 2 ? XLA_FFI_DataType_F16 : XLA_FFI_DataType_BF16;
  const Buffer dense = RandomMatrix(rng, m, k, dtype);
  const Weight w = Encode(dense, shards, rng() % 2);

  const Buffer decoded = Make(dtype, {w.rows(), k});
  Expect(Decode(w, decoded), "decode refuses what encode wrote", seed);
  Expect(!std::memcmp(decoded.data.get(), dense.data.get(), dense.bytes), "a bit is lost", seed);
  const Buffer unpacked = Make(dtype, {m, k});
  Expect(Decode(EncodePacked(rng, dense), unpacked), "decode refuses what was packed", seed);
  bool same = true;
  for (int64_t i = 0; i < m * k; ++i) {
    const uint16_t v = dense.As<uint16_t>()[i];
    same &= unpacked.As<uint16_t>()[i] == (v == 0x8000 ? 0 : v);
  }
  Expect(same, "a packed bit is lost", seed);
  const Buffer sampled = Make(dtype, w.values.dims);
  Expect(Sample(w, decoded, sampled), "sample refuses what encode wrote", seed);
  Expect(!std::memcmp(sampled.data.get(), w.values.data.get(), sampled.bytes),
         "sampling the decoded matrix gives other values", seed);
  Expect(RandomProduct(rng, w), "spmm refuses what encode wrote", seed);

  for (int i = 0; i < 4; ++i) {
    Weight broken = w;
    for (int64_t n = 1 + Below(rng, 3); n > 0; --n) Damage(rng, broken);
    RandomProduct(rng, broken);
    Decode(broken, decoded);
    Sample(broken, decoded, Make(dtype, broken.values.dims));
  }
  DamageSizes(rng, w);
}

}  // namespace
}  // namespace flashllm

#ifdef FLASHLLM_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  flashllm::Round(flashllm::Rng(data, size), 0);
  return 0;
}
#else
int main(int argc, char** argv) {
  const uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1000;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  for (uint64_t i = first; i < first + count; ++i) {
    if (i % 1000 == 0) std::fprintf(stderr, "round %llu\n", static_cast<unsigned long long>(i));
    flashllm::Round(flashllm::Rng(i), i);
  }
  std::printf("%llu matrices, %lld handler calls, %lld of them refused\n",
              static_cast<unsigned long long>(count), static_cast<long long>(flashllm::g_calls),
              static_cast<long long>(flashllm::g_refused));
}
#endif

// FFI handlers on CUDA. Each does the same device work on every call, so XLA may record it
// into a command buffer; what CUDA forbids there happens in `initialize`.
#include "handlers.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "../ffi_checks.h"
#include "attention.h"
#include "spmm.h"

namespace flashllm::cuda {
namespace {

using ffi::AnyBuffer;
using ffi::DataType;
using Words = ffi::Buffer<DataType::U32>;
using WordsResult = ffi::Result<Words>;
using Stream = ffi::PlatformStream<cudaStream_t>;

// ---- devices ----

constexpr int kMaxDevices = 64;
enum : int { kUnknown = 0, kReady = 1, kOverlap = 2 };
std::atomic<int> g_devices[kMaxDevices];

ffi::Error Check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_flashllm: ") + what + ": " + cudaGetErrorString(e));
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  int device, major;
  if (auto e = Check(cudaGetDevice(&device), "cudaGetDevice"); e.failure()) return e;
  if (device >= kMaxDevices) return Bad("more than 64 devices in one process");
  if (g_devices[device].load(std::memory_order_acquire) != kUnknown) return ffi::Error::Success();
  if (auto e = Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                     "cudaDeviceGetAttribute");
      e.failure())
    return e;
  if (major < 8)
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "jax_flashllm: the CUDA kernels need an Ampere GPU (compute capability 8.0) "
                      "or newer, this one is " +
                          std::to_string(major) + ".x; run on CPU instead");
  bool overlap = false;
  if (auto e = Check(InitializeBitmap(&overlap), "loading the kernels"); e.failure()) return e;
  if (auto e = Check(InitializeBitmapWide(), "loading the kernels"); e.failure()) return e;
  if (auto e = Check(InitializeBitmapGemm(), "loading the kernels"); e.failure()) return e;
  if (auto e = Check(InitializeDeltaCsr(), "loading the kernels"); e.failure()) return e;
  g_devices[device].store(overlap ? kOverlap : kReady, std::memory_order_release);
  return ffi::Error::Success();
}

// Whether the code loaded for this device knows programmatic launches, and with them clusters.
ffi::Error Overlaps(bool* overlap) {
  int device;
  const auto e = Check(cudaGetDevice(&device), "cudaGetDevice");
  if (e.success()) *overlap = g_devices[device].load() == kOverlap;
  return e;
}

// ---- operands ----

Type TypeOf(DataType t) {
  return t == DataType::F16 ? Type::kF16 : t == DataType::BF16 ? Type::kBF16 : Type::kF32;
}

bool IsFloat(DataType t) { return IsHalf(t) || t == DataType::F32; }

// W's part of a Problem. `values` and `index` may be results: the output of sample and encode.
template <typename V>
ffi::Error SetWeight(Format format, const Words& index, const Words& offsets, const V& values,
                     int64_t m, int64_t k, Problem* p) {
  auto shards = CheckValues(values, m, k);
  if (shards.has_error()) return shards.error();
  p->format = format;
  p->index = index.typed_data();
  p->offsets = offsets.typed_data();
  p->shards = shards->count, p->rows = shards->rows, p->capacity = shards->capacity, p->k = k;
  p->index_capacity = static_cast<int64_t>(index.element_count()) / shards->count;
  p->weight = TypeOf(values.element_type());
  p->values = static_cast<const uint16_t*>(values.untyped_data());
  const auto check = format == Format::kBitmap ? CheckBitmap : CheckDeltaCsr;
  return check(*shards, k, index.element_count(), offsets.element_count());
}

// Whole blocks of rows, as decode writes them and sample reads them.
bool IsDense(const Problem& p, const AnyBuffer& dense) {
  return IsHalf(dense.element_type()) &&
         static_cast<int64_t>(dense.element_count()) == p.shards * p.rows * p.k;
}

Dense WholeBlocks(const Problem& p, void* data) {
  return {static_cast<uint16_t*>(data), p.shards * p.rows, p.k, p.shards, p.rows, p.k};
}

// What an encoder reads: any [M, K], in row_blocks x column_blocks shards.
struct Blocks {
  Dense dense;
  int64_t shards;
};

ffi::ErrorOr<Blocks> BlocksOf(const AnyBuffer& dense, int64_t row_blocks, int64_t column_blocks) {
  const auto dims = dense.dimensions();
  if (dims.size() != 2 || !IsHalf(dense.element_type()) || dims[0] < 1 || dims[1] < 1)
    return ffi::Unexpected(Bad("encode: weights must be float16 or bfloat16 [M, K]"));
  if (dims[0] > kMaxSide || dims[1] > kMaxSide || row_blocks < 1 || row_blocks > dims[0] ||
      column_blocks < 1 || column_blocks > dims[1])
    return ffi::Unexpected(Bad("encode: no such blocks"));
  const Dense d = {static_cast<uint16_t*>(dense.untyped_data()),
                   dims[0],
                   dims[1],
                   row_blocks,
                   CeilDiv(dims[0], row_blocks),
                   CeilDiv(dims[1], column_blocks)};
  return Blocks{d, row_blocks * column_blocks};
}

// The results of an encoder's second call.
template <typename V>
ffi::Error SetResult(Format format, const Words& index, const Words& offsets, const V& values,
                     const Blocks& b, Problem* p) {
  if (auto e = SetWeight(format, index, offsets, values, b.shards * b.dense.shard_rows,
                         b.dense.shard_cols, p);
      e.failure())
    return e;
  return p->shards == b.shards ? ffi::Error::Success()
                               : Bad("encode: values do not fit the shards");
}

// ---- handlers ----

template <Format kFormat>
ffi::Error SpmmHandler(cudaStream_t stream, Words index, Words offsets, AnyBuffer values,
                       AnyBuffer x, AnyBuffer bias, ffi::Result<AnyBuffer> y,
                       ffi::Result<AnyBuffer> workspace, int64_t m, int64_t k, int64_t activation,
                       int64_t ctas, int64_t warps, int64_t group, int64_t chunk, int64_t wide) {
  Problem p = {};
  if (auto e = SetWeight(kFormat, index, offsets, values, m, k, &p); e.failure()) return e;
  const int64_t rows = p.shards * p.rows, size = static_cast<int64_t>(x.element_count());
  if (!IsFloat(x.element_type()) || y->element_type() != x.element_type())
    return Bad("x and y must both be float16, bfloat16 or float32");
  if (size % k || static_cast<int64_t>(y->element_count()) != size / k * rows)
    return Bad("x or y does not fit the weight's shape");
  if (bias.element_count() &&
      (static_cast<int64_t>(bias.element_count()) != rows || !IsFloat(bias.element_type())))
    return Bad("bias does not fit the weight's rows");
  p.x = x.untyped_data();
  p.token = TypeOf(x.element_type());
  p.n = size / k;
  p.bias = bias.element_count() ? bias.untyped_data() : nullptr;
  p.bias_type = TypeOf(bias.element_type());
  p.y = y->untyped_data();
  p.activation = static_cast<int>(activation);
  if (rows > INT32_MAX || k > INT32_MAX / 2) return Bad("the weight is too large");
  const Plan plan = {
      static_cast<int>(ctas),    static_cast<int>(warps), static_cast<int>(group), chunk, wide != 0,
      workspace->untyped_data(), workspace->size_bytes()};
  bool overlap;
  if (auto e = Overlaps(&overlap); e.failure()) return e;
  const char* why;
  const cudaError_t e = Spmm(stream, p, plan, overlap, false, &why);
  return why ? Bad(why) : Check(e, "spmm");
}

// ---- attention ----

using Mask = ffi::Buffer<DataType::PRED>;
using Length = ffi::Buffer<DataType::S32>;

ffi::ErrorOr<Kind> KindOf(DataType t) {
  switch (t) {
    case DataType::F16:
      return Kind::kF16;
    case DataType::BF16:
      return Kind::kBF16;
    case DataType::F32:
      return Kind::kF32;
    case DataType::F8E4M3FN:
      return Kind::kF8;
    default:
      return ffi::Unexpected(
          Bad("attention takes float16, bfloat16 and float32, and a cache of float8_e4m3fn"));
  }
}

// All but qkv and y, which are [rows, 3, width] and [rows, width] of type `type`.
ffi::ErrorOr<Attention> AttentionOf(DataType type, int64_t rows, int64_t width,
                                    const AnyBuffer& keys, const AnyBuffer& values,
                                    const Mask& open, const Length& length,
                                    const AnyBuffer& new_keys, const AnyBuffer& new_values) {
  const auto dims = keys.dimensions();
  if (rows < 1 || dims.size() != 3 || dims[0] % rows || dims[0] / rows * dims[2] != width ||
      keys.element_count() != values.element_count() ||
      keys.element_type() != values.element_type())
    return ffi::Unexpected(
        Bad("attention: keys and values must be [rows * heads, slots, d], q [rows, heads, d]"));
  const auto token = KindOf(type), cache = KindOf(keys.element_type());
  if (token.has_error()) return ffi::Unexpected(token.error());
  if (cache.has_error()) return ffi::Unexpected(cache.error());
  const Attention a = {nullptr,
                       keys.untyped_data(),
                       values.untyped_data(),
                       open.typed_data(),
                       length.typed_data(),
                       nullptr,
                       *token,
                       *cache,
                       rows,
                       dims[0] / rows,
                       dims[1],
                       dims[2]};
  if (static_cast<int64_t>(open.element_count()) != a.rows * a.slots || length.element_count() != 1)
    return ffi::Unexpected(Bad("attention: the mask or the length does not fit the cache"));
  if (new_keys.untyped_data() != a.keys || new_values.untyped_data() != a.values)
    return ffi::Unexpected(Bad("attention: the cache must be aliased to the result"));
  if (!SupportsAttention(a))
    return ffi::Unexpected(Bad("attention: this head size is not supported"));
  return a;
}

// ---- chains ----

// Operands of a product: index, offsets, values, bias, scale, shift. Of attention, whose format is
// kAttends: keys, values, mask, length.
constexpr size_t kProductOperands = 6, kAttentionOperands = 4;
constexpr int64_t kAttends = 2;

using Integers = ffi::Span<const int64_t>;

// A vector [count], or a placeholder of one number, which stands for none.
ffi::ErrorOr<const void*> Vector(const AnyBuffer& b, int64_t count, Type* type) {
  if (b.dimensions().size() == 2) return nullptr;
  if (static_cast<int64_t>(b.element_count()) != count || !IsFloat(b.element_type()))
    return ffi::Unexpected(Bad("chain: a bias, scale or shift does not fit its weight's rows"));
  *type = TypeOf(b.element_type());
  return static_cast<const void*>(b.untyped_data());
}

// Products in a row, attention between them (chain.py): operands x, h, then each stage's; results
// h, x, a workspace, then keys and values of each attention, in place. Attributes have an entry a
// stage: attention takes k features, q, k and v, and gives m.
ffi::Error ChainHandler(cudaStream_t stream, ffi::RemainingArgs operands,
                        ffi::Result<AnyBuffer> h_out, ffi::Result<AnyBuffer> x_out,
                        ffi::Result<AnyBuffer> workspace, ffi::RemainingRets caches, Integers m,
                        Integers k, Integers format, Integers activation, Integers ctas,
                        Integers warps, Integers group, Integers add, float epsilon) {
  const size_t stages = m.size();
  if (stages < 1) return Bad("chain: no stages");
  for (const Integers& each : {k, format, activation, ctas, warps, group, add})
    if (each.size() != stages) return Bad("chain: attributes of different lengths");
  size_t count = 2, attentions = 0;
  for (const int64_t f : format) {
    if (f < 0 || f > kAttends) return Bad("chain: no such format");
    count += f == kAttends ? kAttentionOperands : kProductOperands;
    attentions += f == kAttends;
  }
  if (operands.size() != count || caches.size() != 2 * attentions)
    return Bad("chain: operands and attributes do not fit");
  auto x = operands.get<AnyBuffer>(0), h = operands.get<AnyBuffer>(1);
  if (!x || !h) return Bad("chain: operands do not fit");
  const DataType type = x->element_type();
  const int64_t size = static_cast<int64_t>(x->element_count());
  if (k[0] < 1 || size % k[0]) return Bad("chain: x does not fit the first stage");
  const int64_t n = size / k[0];
  for (const DataType t : {h->element_type(), h_out->element_type(), x_out->element_type()})
    if (t != type || !IsHalf(t)) return Bad("chain: activations must all be float16 or bfloat16");
  if (n < 1 || h->element_count() != h_out->element_count())
    return Bad("chain: the residual does not fit x");
  const int64_t hidden = static_cast<int64_t>(h->element_count()) / n;
  int64_t widest = 0;
  for (size_t s = 0; s < stages; ++s) {
    if (s && k[s] != m[s - 1]) return Bad("chain: a stage does not fit the one before it");
    widest = std::max(widest, m[s]);
  }
  if (static_cast<int64_t>(h->element_count()) != n * hidden ||
      static_cast<int64_t>(x_out->element_count()) != n * m[stages - 1] || widest > kMaxSide / n)
    return Bad("chain: the results do not fit");
  bool overlap;
  if (auto e = Overlaps(&overlap); e.failure()) return e;

  // The workspace: x between two stages, twice, and a product's own.
  char* room = static_cast<char*>(workspace->untyped_data());
  const char* const end = room + workspace->size_bytes();
  const size_t between = Align(static_cast<size_t>(n * widest) * 2);
  char* const xs[2] = {room, room + between};
  room += 2 * between;
  if (room > end) return Bad("chain: the workspace is too small");
  // Operands are checked before anything is launched; plans as each product is.
  struct Stage {
    Problem product;
    Plan plan;
    Norm norm;
    Attention attention;  // if there is no product
  };
  std::vector<Stage> all(stages);
  const void* from = x->untyped_data();
  const void* residual = h->untyped_data();
  size_t at = 2, of_cache = 0;
  for (size_t s = 0; s < stages; ++s) {
    void* const y = s + 1 == stages ? x_out->untyped_data() : xs[s % 2];
    if (format[s] == kAttends) {
      auto keys = operands.get<AnyBuffer>(at), values = operands.get<AnyBuffer>(at + 1);
      auto open = operands.get<Mask>(at + 2);
      auto length = operands.get<Length>(at + 3);
      auto new_keys = caches.get<AnyBuffer>(of_cache),
           new_values = caches.get<AnyBuffer>(of_cache + 1);
      if (!keys || !values || !open || !length || !new_keys || !new_values || k[s] != 3 * m[s])
        return Bad("chain: attention's operands do not fit");
      const auto a =
          AttentionOf(type, n, m[s], *keys, *values, *open, *length, **new_keys, **new_values);
      if (a.has_error()) return a.error();
      all[s].attention = *a;
      all[s].attention.qkv = from, all[s].attention.y = y;
      at += kAttentionOperands, of_cache += 2, from = y;
      continue;
    }
    auto index = operands.get<Words>(at), offsets = operands.get<Words>(at + 1);
    auto values = operands.get<AnyBuffer>(at + 2), bias = operands.get<AnyBuffer>(at + 3);
    auto scale = operands.get<AnyBuffer>(at + 4), shift = operands.get<AnyBuffer>(at + 5);
    if (!index || !offsets || !values || !bias || !scale || !shift)
      return Bad("chain: operands do not fit");
    Problem& p = all[s].product;
    if (auto e =
            SetWeight(static_cast<Format>(format[s]), *index, *offsets, *values, m[s], k[s], &p);
        e.failure())
      return e;
    if (p.shards != 1 || k[s] % 64 || values->element_type() != type || m[s] > kMaxSide / 64)
      return Bad("chain: weights must be of x's type, in one shard, with K a multiple of 64");
    const auto of_bias = Vector(*bias, m[s], &p.bias_type);
    if (of_bias.has_error()) return of_bias.error();
    p.x = from, p.token = p.weight, p.n = n;
    p.bias = *of_bias;
    p.activation = static_cast<int>(activation[s]);
    p.y = y;
    if (add[s]) {
      if (m[s] != hidden || p.activation) return Bad("chain: a residual does not fit its product");
      p.residual = residual;
      residual = p.y = h_out->untyped_data();
      Norm& norm = all[s].norm;
      const auto of_scale = Vector(*scale, m[s], &norm.scale_type);
      if (of_scale.has_error()) return of_scale.error();
      const auto of_shift = Vector(*shift, m[s], &norm.shift_type);
      if (of_shift.has_error()) return of_shift.error();
      norm.h = p.y, norm.y = y, norm.type = p.weight, norm.tokens = n, norm.width = hidden;
      norm.scale = *of_scale, norm.shift = *of_shift, norm.epsilon = epsilon;
    }
    Plan& plan = all[s].plan;
    plan = {static_cast<int>(ctas[s]), static_cast<int>(warps[s]), static_cast<int>(group[s]), n};
    plan.workspace = room, plan.workspace_bytes = static_cast<size_t>(end - room);
    at += kProductOperands, from = y;
  }
  if (residual == h->untyped_data()) {
    if (auto e = Check(cudaMemcpyAsync(h_out->untyped_data(), residual, h->size_bytes(),
                                       cudaMemcpyDeviceToDevice, stream),
                       "chain");
        e.failure())
      return e;
  }
  // The first kernel waits for all before it, and with it W and caches: the others may start when
  // they can.
  for (size_t s = 0; s < stages; ++s) {
    if (format[s] == kAttends) {
      const cudaError_t e = DecodeAttention(stream, all[s].attention, overlap, s > 0);
      if (e) return Check(e, "chain");
      continue;
    }
    const char* why;
    const cudaError_t e = Spmm(stream, all[s].product, all[s].plan, overlap, s > 0, &why);
    if (why) return Bad(why);
    if (e) return Check(e, "chain");
    if (!all[s].norm.y) continue;
    if (auto e = Check(LayerNorm(stream, all[s].norm, overlap), "chain"); e.failure()) return e;
  }
  return ffi::Error::Success();
}

template <Format kFormat>
ffi::Error DecodeHandler(cudaStream_t stream, Words index, Words offsets, AnyBuffer values,
                         ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  Problem p = {};
  if (auto e = SetWeight(kFormat, index, offsets, values, m, k, &p); e.failure()) return e;
  if (!IsDense(p, *out)) return Bad("decode: the output does not fit the weight's shape");
  return Check(Decode(stream, p, WholeBlocks(p, out->untyped_data())), "decode");
}

template <Format kFormat>
ffi::Error SampleHandler(cudaStream_t stream, Words index, Words offsets, AnyBuffer dense,
                         ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  Problem p = {};
  if (auto e = SetWeight(kFormat, index, offsets, *out, m, k, &p); e.failure()) return e;
  if (!IsDense(p, dense)) return Bad("sample: the dense matrix does not fit the weight's shape");
  return Check(Sample(stream, p, WholeBlocks(p, dense.untyped_data()),
                      static_cast<uint16_t*>(out->untyped_data())),
               "sample");
}

ffi::Error CountBitmapHandler(cudaStream_t stream, AnyBuffer dense, WordsResult masks,
                              WordsResult offsets, int64_t row_blocks, int64_t column_blocks) {
  auto b = BlocksOf(dense, row_blocks, column_blocks);
  if (b.has_error()) return b.error();
  if (auto e = CheckBitmap({b->shards, b->dense.shard_rows, 0}, b->dense.shard_cols,
                           masks->element_count(), offsets->element_count());
      e.failure())
    return e;
  return Check(CountBitmap(stream, b->dense, b->shards, masks->typed_data(), offsets->typed_data()),
               "encode");
}

ffi::Error CountDeltaCsrHandler(cudaStream_t stream, AnyBuffer dense, WordsResult offsets,
                                int64_t row_blocks, int64_t column_blocks) {
  auto b = BlocksOf(dense, row_blocks, column_blocks);
  if (b.has_error()) return b.error();
  const delta_csr::Dims d(b->dense.shard_rows, b->dense.shard_cols);
  if (static_cast<int64_t>(offsets->element_count()) != b->shards * d.offsets())
    return Bad("encode: offsets do not fit the shape");
  return Check(CountDeltaCsr(stream, b->dense, b->shards, offsets->typed_data()), "encode");
}

ffi::Error FillBitmapHandler(cudaStream_t stream, Words masks, Words offsets, AnyBuffer dense,
                             ffi::Result<AnyBuffer> values, int64_t row_blocks,
                             int64_t column_blocks) {
  auto b = BlocksOf(dense, row_blocks, column_blocks);
  if (b.has_error()) return b.error();
  Problem p = {};
  if (auto e = SetResult(Format::kBitmap, masks, offsets, *values, *b, &p); e.failure()) return e;
  return Check(Sample(stream, p, b->dense, static_cast<uint16_t*>(values->untyped_data())),
               "encode");
}

ffi::Error FillDeltaCsrHandler(cudaStream_t stream, Words offsets, AnyBuffer dense,
                               WordsResult index, ffi::Result<AnyBuffer> values, int64_t row_blocks,
                               int64_t column_blocks) {
  auto b = BlocksOf(dense, row_blocks, column_blocks);
  if (b.has_error()) return b.error();
  Problem p = {};
  if (auto e = SetResult(Format::kDeltaCsr, *index, offsets, *values, *b, &p); e.failure())
    return e;
  return Check(FillDeltaCsr(stream, p, b->dense, index->typed_data(),
                            static_cast<uint16_t*>(values->untyped_data())),
               "encode");
}

// keys and values are updated in place: they are operands and results at once.
ffi::Error AttentionHandler(cudaStream_t stream, AnyBuffer qkv, AnyBuffer keys, AnyBuffer values,
                            Mask open, Length length, ffi::Result<AnyBuffer> y,
                            ffi::Result<AnyBuffer> new_keys, ffi::Result<AnyBuffer> new_values) {
  const auto dims = qkv.dimensions();
  if (dims.size() != 4 || dims[1] != 3 || y->element_type() != qkv.element_type() ||
      static_cast<int64_t>(y->element_count()) != dims[0] * dims[2] * dims[3])
    return Bad("attention: qkv must be [rows, 3, heads, d], and y [rows, heads, d]");
  const auto a = AttentionOf(qkv.element_type(), dims[0], dims[2] * dims[3], keys, values, open,
                             length, *new_keys, *new_values);
  if (a.has_error()) return a.error();
  Attention call = *a;
  call.qkv = qkv.untyped_data(), call.y = y->untyped_data();
  bool overlap;
  if (auto e = Overlaps(&overlap); e.failure()) return e;
  return Check(DecodeAttention(stream, call, overlap, false), "attention");
}

auto BindSpmm() {
  return ffi::Ffi::Bind()
      .Ctx<Stream>()
      .Arg<Words>()
      .Arg<Words>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Ret<AnyBuffer>()
      .Ret<AnyBuffer>()
      .Attr<int64_t>("m")
      .Attr<int64_t>("k")
      .Attr<int64_t>("activation")
      .Attr<int64_t>("ctas")
      .Attr<int64_t>("warps")
      .Attr<int64_t>("group")
      .Attr<int64_t>("chunk")
      .Attr<int64_t>("wide");
}

auto BindUnary() {
  return ffi::Ffi::Bind()
      .Ctx<Stream>()
      .Arg<Words>()
      .Arg<Words>()
      .Arg<AnyBuffer>()
      .Ret<AnyBuffer>()
      .Attr<int64_t>("m")
      .Attr<int64_t>("k");
}

// Both attributes of an encoder: into how many blocks W is cut.
template <typename Binding>
auto WithBlocks(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("row_blocks")
      .template Attr<int64_t>("column_blocks");
}

constexpr auto kCapturable = ffi::Traits::kCmdBufferCompatible;

XLA_FFI_DEFINE_HANDLER(
    kInitialize, Initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER(kSpmmBitmap, SpmmHandler<Format::kBitmap>, BindSpmm(), {kCapturable});
XLA_FFI_DEFINE_HANDLER(kSpmmDeltaCsr, SpmmHandler<Format::kDeltaCsr>, BindSpmm(), {kCapturable});
XLA_FFI_DEFINE_HANDLER(kChain, ChainHandler,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .RemainingRets()
                           .Attr<Integers>("m")
                           .Attr<Integers>("k")
                           .Attr<Integers>("format")
                           .Attr<Integers>("activation")
                           .Attr<Integers>("ctas")
                           .Attr<Integers>("warps")
                           .Attr<Integers>("group")
                           .Attr<Integers>("add")
                           .Attr<float>("epsilon"),
                       {kCapturable});
XLA_FFI_DEFINE_HANDLER(kAttention, AttentionHandler,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<Mask>()
                           .Arg<Length>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>(),
                       {kCapturable});
XLA_FFI_DEFINE_HANDLER(kDecodeBitmap, DecodeHandler<Format::kBitmap>, BindUnary(), {kCapturable});
XLA_FFI_DEFINE_HANDLER(kDecodeDeltaCsr, DecodeHandler<Format::kDeltaCsr>, BindUnary(),
                       {kCapturable});
XLA_FFI_DEFINE_HANDLER(kSampleBitmap, SampleHandler<Format::kBitmap>, BindUnary(), {kCapturable});
XLA_FFI_DEFINE_HANDLER(kSampleDeltaCsr, SampleHandler<Format::kDeltaCsr>, BindUnary(),
                       {kCapturable});
XLA_FFI_DEFINE_HANDLER(
    kCountBitmap, CountBitmapHandler,
    WithBlocks(ffi::Ffi::Bind().Ctx<Stream>().Arg<AnyBuffer>().Ret<Words>().Ret<Words>()),
    {kCapturable});
XLA_FFI_DEFINE_HANDLER(kCountDeltaCsr, CountDeltaCsrHandler,
                       WithBlocks(ffi::Ffi::Bind().Ctx<Stream>().Arg<AnyBuffer>().Ret<Words>()),
                       {kCapturable});
XLA_FFI_DEFINE_HANDLER(
    kFillBitmap, FillBitmapHandler,
    WithBlocks(
        ffi::Ffi::Bind().Ctx<Stream>().Arg<Words>().Arg<Words>().Arg<AnyBuffer>().Ret<AnyBuffer>()),
    {kCapturable});
XLA_FFI_DEFINE_HANDLER(
    kFillDeltaCsr, FillDeltaCsrHandler,
    WithBlocks(
        ffi::Ffi::Bind().Ctx<Stream>().Arg<Words>().Arg<AnyBuffer>().Ret<Words>().Ret<AnyBuffer>()),
    {kCapturable});

}  // namespace

std::vector<Target> Targets() {
  return {
      {"flashllm_spmm_bitmap_v1", kInitialize, kSpmmBitmap},
      {"flashllm_spmm_delta_csr_v1", kInitialize, kSpmmDeltaCsr},
      {"flashllm_chain_v1", kInitialize, kChain},
      {"flashllm_decode_bitmap_v1", kInitialize, kDecodeBitmap},
      {"flashllm_decode_delta_csr_v1", kInitialize, kDecodeDeltaCsr},
      {"flashllm_sample_bitmap_v1", kInitialize, kSampleBitmap},
      {"flashllm_sample_delta_csr_v1", kInitialize, kSampleDeltaCsr},
      {"flashllm_count_bitmap_v1", kInitialize, kCountBitmap},
      {"flashllm_count_delta_csr_v1", kInitialize, kCountDeltaCsr},
      {"flashllm_fill_bitmap_v1", kInitialize, kFillBitmap},
      {"flashllm_fill_delta_csr_v1", kInitialize, kFillDeltaCsr},
      {"flashllm_decode_attention_v1", kInitialize, kAttention},
  };
}

}  // namespace flashllm::cuda

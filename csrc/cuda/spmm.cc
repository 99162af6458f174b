// From a Problem and a Plan to launches.
#include "spmm.h"

#include <algorithm>

#include "../bitmap.h"
#include "../delta_csr.h"

namespace flashllm::cuda {
namespace {

size_t TypeBytes(Type t) { return t == Type::kF32 ? 4 : 2; }

}  // namespace

Args MakeArgs(const Problem& p, const Plan& plan, int64_t n) {
  Args a = {};
  a.index = p.index;
  a.offsets = p.offsets;
  a.values = p.values;
  a.terms = Terms(p.weight, p.token);
  a.tokens_a_term = static_cast<int>(n);
  a.term_step = p.weight == Type::kF16 ? 0x1p-11f : 1.0f;
  a.tokens = static_cast<int>(n) * a.terms;
  a.x_stride = PaddedK(p.k);
  a.out = {p.y, p.bias, p.token, p.bias_type, p.activation, p.shards * p.rows, p.residual};
  a.capacity = p.capacity / 8;
  a.index_capacity = p.index_capacity / 4;
  a.shard_rows = static_cast<int>(p.rows);
  a.warps = plan.warps;
  a.ctas = plan.ctas;
  a.group = plan.group;
  const int groups = static_cast<int>(CeilDiv(a.tokens, plan.group));
  if (p.format == Format::kDeltaCsr) {
    const delta_csr::Dims d(p.rows, p.k);
    a.block_cols = static_cast<int>(d.block_cols);
    a.blocks = static_cast<int>(d.blocks);
    a.shard_offsets = static_cast<int>(d.offsets());
    a.block_ctas = a.ctas / a.blocks;
    a.strips = static_cast<int>(p.shards * p.rows);
    const int64_t runs = int64_t(a.block_ctas) * a.warps;
    a.share = static_cast<int>(a.strips / runs);
    a.longer = static_cast<int>(a.strips % runs);
    a.groups = groups;
    a.slots = a.blocks > 1 || a.terms > 1;
    return a;
  }
  const bitmap::Dims d(p.rows, p.k);
  a.shard_bands = static_cast<int>(d.bands);
  a.tiles = static_cast<int>(d.tiles);
  a.blocks = static_cast<int>(d.blocks);
  a.shard_offsets = static_cast<int>(d.offsets());
  a.bands = static_cast<int>(p.shards) * a.shard_bands;
  a.wide = plan.wide;
  a.gemm = plan.wide && plan.group == 256;
  a.groups = a.wide ? 1 : groups;
  a.strip_groups = a.wide ? groups : 1;
  a.strips = static_cast<int>(CeilDiv(a.bands, a.warps)) * a.strip_groups;
  a.units = a.strips * a.blocks;
  a.share = a.units / a.ctas;
  a.longer = a.units % a.ctas;
  a.keep_all = a.terms > 1;
  // A CTA's range touches at most this many strips; without terms it leaves sums of its first
  // and of its last only, where other CTAs have parts of them.
  const int64_t touched = CeilDiv(CeilDiv(a.units, a.ctas), a.blocks) + 1;
  if (a.gemm && p.k % 8 == 0) a.x_stride = p.k;  // as a tensor map takes it
  a.slots = static_cast<int>(a.keep_all ? touched : a.gemm ? 1 : a.strips % a.ctas == 0 ? 0 : 2);
  return a;
}

Sizes WorkspaceSizes(const Problem& p, const Args& a) {
  Sizes s = {};
  if (a.gemm)
    s.tokens = p.k % 8 ? Align(size_t(a.tokens) * a.x_stride * 2) : 0;
  else if (a.wide)
    s.tokens = size_t(a.strip_groups) * a.group * a.blocks * bitmap::kBlockCols * 2;
  else if (NeedsPrepare(p))
    s.tokens = Align(size_t(a.tokens) * a.x_stride * 2);
  if (a.terms > 1) s.unscale = Align(size_t(a.tokens_a_term) * 4);
  s.partial = p.format == Format::kDeltaCsr
                  ? size_t(a.slots) * a.blocks * a.tokens * a.strips * 4
                  : size_t(a.groups) * a.ctas * a.slots * a.warps * 16 * a.group * 4;
  if (a.gemm) s.flags = size_t(a.ctas) * a.warps * 4;
  return s;
}

cudaError_t Spmm(cudaStream_t stream, const Problem& p, Plan plan, bool overlap, bool follows,
                 const char** why) {
  *why = nullptr;
  const auto refuse = [&](const char* text) {
    *why = text;
    return cudaErrorInvalidValue;
  };
  const bool delta = p.format == Format::kDeltaCsr;
  if (plan.ctas < 1 || plan.warps < 1 || plan.chunk < 1 || plan.group < (delta ? 1 : 8))
    return refuse("the plan's attributes must be positive");
  if (p.capacity % 8 || p.index_capacity % 4)
    return refuse("the capacities of values and index must be multiples of 16 bytes");
  if (plan.wide && (delta || p.weight != p.token))
    return refuse("only a bitmap times tokens of its own type can be wide");
  if (plan.wide && p.residual) return refuse("a wide product adds no residual");
  if (delta) {
    const delta_csr::Dims d(p.rows, p.k);
    if (p.shards * d.items > INT32_MAX) return refuse("the weight is too large");
    if (plan.ctas % d.blocks) return refuse("the plan's CTAs do not fit the blocks of columns");
  }
  const size_t x_row = p.k * TypeBytes(p.token), y_row = p.shards * p.rows * TypeBytes(p.token);
  for (int64_t n0 = 0; n0 < p.n; n0 += plan.chunk) {
    const int64_t n = std::min(plan.chunk, p.n - n0);
    // Code for sm_80 has no wgmma, wherever it runs: whole strips instead, 64 tokens a pass.
    if (plan.wide && !overlap) {
      plan.wide = false;
      if (plan.group > 64) {
        plan.group = 64;
        plan.ctas = MakeArgs(p, plan, n).strips;
      }
    }
    Args a = MakeArgs(p, plan, n);
    if (int64_t(a.strips) * a.blocks > INT32_MAX) return refuse("the weight is too large");
    if (!delta && a.ctas > a.units) return refuse("the plan has more CTAs than units of work");
    if ((delta ? a.tokens : a.groups) > 65535) return refuse("the plan's chunk is too long");
    const Sizes sizes = WorkspaceSizes(p, a);
    if (sizes.total() > plan.workspace_bytes) return refuse("the workspace is too small");
    char* workspace = static_cast<char*>(plan.workspace);
    const char* x = static_cast<const char*>(p.x) + n0 * x_row;
    a.out.y = static_cast<char*>(p.y) + n0 * y_row;
    a.unscale = reinterpret_cast<float*>(workspace + sizes.tokens);
    a.partial = reinterpret_cast<float*>(workspace + sizes.tokens + sizes.unscale);
    const bool bf16 = p.weight == Type::kBF16;
    uint16_t* tokens = reinterpret_cast<uint16_t*>(workspace);
    if (a.wide && !a.gemm) {
      a.x = tokens;
      if (cudaError_t e =
              PrepareWide(stream, reinterpret_cast<const uint16_t*>(x), n, p.k, tokens, a))
        return e;
      if (cudaError_t e = BitmapWide(stream, a, bf16)) return e;
      if (a.slots)
        if (cudaError_t e = Combine(stream, a, overlap)) return e;
      continue;
    }
    if (a.gemm ? p.k % 8 != 0 : NeedsPrepare(p)) {
      a.x = tokens;
      if (cudaError_t e = PrepareTokens(stream, x, p.token, p.weight, n, p.k, a.x_stride, a.terms,
                                        tokens, reinterpret_cast<float*>(workspace + sizes.tokens)))
        return e;
    } else {
      a.x = reinterpret_cast<const uint16_t*>(x);
      if (reinterpret_cast<uintptr_t>(x) % 16) return refuse("x must be 16-byte aligned");
    }
    if (a.gemm) {
      a.flags = reinterpret_cast<uint32_t*>(workspace + sizes.total() - sizes.flags);
      if (cudaError_t e = BitmapGemm(stream, a, bf16)) return e;
      continue;
    }
    // The main loop may start before its predecessor ends only if that is ours: it reads W first.
    const auto main_loop = delta ? DeltaCsrSpmm : BitmapSpmm;
    if (cudaError_t e = main_loop(stream, a, bf16, overlap && (follows || NeedsPrepare(p))))
      return e;
    if (!a.slots) continue;
    const auto combine = delta ? CombineDeltaCsr : a.keep_all ? CombineTerms : Combine;
    if (cudaError_t e = combine(stream, a, overlap)) return e;
  }
  return cudaSuccess;
}

}  // namespace flashllm::cuda

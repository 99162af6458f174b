// Delta-CSR main loop: a warp a row, whose lanes gather x from shared memory.
//
//   x                  L2  --> shared memory, [column][tokens]      once, by all warps
//   values and codes   HBM --> registers, 3 or 4 groups ahead       one run of bytes a warp
//
//   group   | load, 3 or 4 further | a dp4a an entry: its address | gather x | FMA, a token each |
//   row     | its groups | sums over the lanes | kept by one of 32 / tokens lanes |
//   rows    | 32 / tokens of them | to y, or to `partial` |
//
// A CTA has one block of columns, and each of its warps a run of rows that lie side by side, so
// that loads go on from a row to the next one. A pass over W is for kT tokens: one as floats, or 2,
// 4 or 8 as halves, and more by more passes. With several blocks of columns, or x in terms, sums go
// to `partial`, and CombineDeltaCsr adds them up.
//
// A sum's order is a lane's entries in turn, lanes 16 apart, 8, 4, 2, 1, and blocks: the same for
// any number of tokens, and on every GPU.
#include <type_traits>

#include "delta_csr_item.cuh"
#include "strips.cuh"

namespace flashllm::cuda {
namespace {

using delta_csr::kBaseWords;
using delta_csr::kGroupValues;
using delta_csr::kSteps;

// Codes of 8 bits take a lane at most so many columns back in a group, or on. What is read there is
// garbage, for codes that lie.
constexpr int kReach = kSteps * 128;
constexpr int kCombineThreads = 128;

template <int kT>
struct Shape {
  // As many registers as the sums of kT tokens take, and groups that a lane has in flight: of a
  // warp 320 or 384 bytes each.
  static constexpr int kWarps = kT == 8 ? 20 : 32;
  static constexpr int kAhead = kT == 2 || kT == 4 ? 3 : 4;
  static constexpr int kColumnBytes = kT == 1 ? 4 : 2 * kT;
  static constexpr int kStageColumns = kT <= 2 ? 8 : 16 / kT;  // of a thread at a time
  static constexpr int kStageAhead = kT == 8 ? 3 : 2;
  static constexpr int kRows = 32 / kT;  // that a warp's lanes keep
};

// The columns of a block, with kReach and column -1, a zero, before them, and kReach behind.
template <int kT>
__host__ __device__ constexpr uint32_t WindowBytes(int block_cols) {
  return (kReach + 16 + block_cols + kReach) * Shape<kT>::kColumnBytes;
}

// ---- arithmetic ----

// Two halves of W's type, as floats.
template <bool kBf16>
__device__ __forceinline__ float2 ToFloats(uint32_t v) {
  if constexpr (kBf16)
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
}

// Of each half 0 times v, and sum: zeros until a v is not finite.
template <bool kBf16>
__device__ __forceinline__ uint32_t Poison(uint32_t v, uint32_t sum) {
  using Two = std::conditional_t<kBf16, __nv_bfloat162, __half2>;
  const Two s = __hfma2(*reinterpret_cast<const Two*>(&v), Two{}, *reinterpret_cast<Two*>(&sum));
  return *reinterpret_cast<const uint32_t*>(&s);
}

// ---- x ----

// x of kT tokens from this column on, `columns` of them, to shared memory; the last token's where
// there are fewer. Whether something of it is not finite.
template <bool kBf16, int kT>
__device__ __forceinline__ bool StageX(const Args& a, int token0, int column0, int columns,
                                       uint32_t to) {
  using S = Shape<kT>;
  constexpr int kWords = S::kStageColumns / 2, kUnroll = S::kStageAhead;  // words a token
  using Words =
      std::conditional_t<kWords == 4, uint4, std::conditional_t<kWords == 2, uint2, uint32_t>>;
  const int pieces = columns / S::kStageColumns;
  const Words* const x = reinterpret_cast<const Words*>(a.x + token0 * a.x_stride + column0);
  const int64_t stride = a.x_stride / S::kStageColumns;
  uint32_t poison = 0;
  for (int first = threadIdx.x; first < pieces; first += kUnroll * blockDim.x) {
    // Behind the last piece that once more: without branches all loads are on their way at once.
    const auto piece = [&](int u) {
      return min(first + u * static_cast<int>(blockDim.x), pieces - 1);
    };
    Words loaded[kUnroll][kT];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Words* from = x + piece(u);
#pragma unroll
      for (int t = 0; t < kT; ++t) {
        loaded[u][t] = __ldcg(from);
        if (token0 + t + 1 < a.tokens) from += stride;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      uint32_t words[8];
      const auto from = [&](int t, int i) {
        return reinterpret_cast<const uint32_t*>(&loaded[u][t])[i];
      };
#pragma unroll
      for (int t = 0; t < kT; ++t)
#pragma unroll
        for (int i = 0; i < kWords; ++i) poison = Poison<kBf16>(from(t, i), poison);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (kT == 1) {
          const float2 two = ToFloats<kBf16>(from(0, i / 2));
          words[i] = __float_as_uint(i % 2 ? two.y : two.x);
        } else {
          const int column = i / (kT / 2), t = i % (kT / 2) * 2;
          words[i] = ptx::Permute(from(t, column / 2), from(t + 1, column / 2),
                                  column % 2 ? 0x7632 : 0x5410);
        }
      }
      const uint32_t at = to + piece(u) * 32;
      ptx::StoreShared128(at, words[0], words[1], words[2], words[3]);
      ptx::StoreShared128(at + 16, words[4], words[5], words[6], words[7]);
    }
  }
  return (poison & 0x7fff7fffu) != 0;
}

// x of one column.
template <bool kBf16, int kT>
__device__ __forceinline__ void LoadX(uint32_t at, float (&x)[kT]) {
  if constexpr (kT == 1) {
    x[0] = __uint_as_float(ptx::LoadShared32(at));
  } else {
    uint32_t words[kT / 2];
    if constexpr (kT == 2) {
      words[0] = ptx::LoadShared32(at);
    } else if constexpr (kT == 4) {
      const uint2 v = ptx::LoadShared64(at);
      words[0] = v.x, words[1] = v.y;
    } else {
      const uint4 v = ptx::LoadShared128(at);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < kT / 2; ++i) {
      const float2 two = ToFloats<kBf16>(words[i]);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  }
}

// How many numbers of each token are not finite, to `totals`.
template <bool kBf16, int kT>
__device__ __forceinline__ void CountNotFinite(uint32_t x, int columns, int* totals) {
  if (threadIdx.x < kT) totals[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < columns * kT; i += blockDim.x) {
    const uint32_t v = kT == 1 ? ptx::LoadShared32(x + i * 4) : ptx::LoadShared16(x + i * 2);
    constexpr uint32_t kExponent = kT == 1 ? 0x7f800000u : kBf16 ? 0x7f80u : 0x7c00u;
    if ((v & kExponent) == kExponent) atomicAdd(totals + i % kT, 1);
  }
  __syncthreads();
}

// ---- W ----

// Four entries of a lane.
struct Group {
  uint2 values;
  uint32_t codes;
};

template <int kBits>
constexpr int kCodeBytes = delta_csr::GroupWords(kBits) * 4;  // of all lanes
constexpr int kValueBytes = kGroupValues * 2;

// Group i of those from `values` and `codes` on, if it is there.
template <int kBits>
__device__ __forceinline__ void Load(bool there, const uint8_t* values, const uint8_t* codes, int i,
                                     Group& g) {
  if (!there) return;
  g.values = ptx::LoadOnce64(values + i * kValueBytes);
  codes += i * kCodeBytes<kBits>;
  g.codes = kBits == 4 ? ptx::LoadOnce16(codes) : ptx::LoadOnce32(codes);
}

// Rows of a shard that a warp has, and where it stands in them. Pointers are the lane's own.
struct Run {
  const uint8_t *values, *codes;  // of the row's first group
  const uint32_t* ends;           // of rows, from the lane's on
  uint32_t lane_end;              // of 32 rows the lane's
  uint32_t groups, end;           // of the row: how many, and behind its last
  uint32_t limit;                 // of the buffers, in groups
  uint32_t base;
  int bits, row, rows;
};

// Where 32 rows from the run's row i on end, but within the buffers: offsets may lie.
__device__ __forceinline__ uint32_t LaneEnd(const Run& r, int i, int lane) {
  return i + lane < r.rows ? min(__ldg(r.ends + i), r.limit) : 0;
}

template <int kBits, int kAhead>
__device__ __forceinline__ void LoadFirst(const Run& r, Group (&ahead)[kAhead]) {
#pragma unroll
  for (int s = 0; s < kAhead; ++s) Load<kBits>(s < r.groups, r.values, r.codes, s, ahead[s]);
}

// The lane's base is so many bytes from its codes.
__device__ __forceinline__ int FromCodes(int lane, int bits) {
  return lane * 2 - lane * bits / 2 - kBaseWords * 4;
}

// Rows from `row` up to `last`, counted over all shards: those that lie in its shard. The first
// groups are on their way then.
template <int kAhead>
__device__ __forceinline__ Run Open(const Args& a, int block, int row, int last, int lane,
                                    Group (&ahead)[kAhead]) {
  Run r;
  const int shard = a.strips == a.shard_rows ? 0 : row / a.shard_rows;
  const int in_shard = row - shard * a.shard_rows;
  r.row = row, r.rows = min(last - row, a.shard_rows - in_shard);
  const uint32_t* const offsets = a.offsets + int64_t(shard) * a.shard_offsets;
  const int64_t items = a.shard_offsets - 2, item = int64_t(block) * a.shard_rows + in_shard;
  r.ends = offsets + item + 1 + lane;
  const uint32_t first = __ldg(offsets + item), end = lane < r.rows ? __ldg(r.ends) : 0;
  r.bits = LoadBits(offsets, items);
  const int64_t words = a.index_capacity * 4 - items * kBaseWords;
  const int64_t room =
      min(r.bits == 4 ? words / delta_csr::GroupWords(4) : words / delta_csr::GroupWords(8),
          a.capacity * 8 / kGroupValues);
  r.limit = static_cast<uint32_t>(min(max(room, int64_t(0)), int64_t(UINT32_MAX)));
  r.lane_end = min(end, r.limit);
  const uint32_t at = min(first, r.limit);
  r.end = max(__shfl_sync(~0u, r.lane_end, 0), at);
  r.groups = r.end - at;
  r.values = reinterpret_cast<const uint8_t*>(a.values + shard * a.capacity * 8) +
             uint64_t(at) * kValueBytes + lane * 8;
  const uint32_t* const index = a.index + shard * a.index_capacity * 4;
  r.codes = reinterpret_cast<const uint8_t*>(index + delta_csr::IndexStart(item, at, r.bits) +
                                             kBaseWords) +
            lane * r.bits / 2;
  r.base = ptx::LoadOnce16(r.codes + FromCodes(lane, r.bits));
  if (r.bits == 4)
    LoadFirst<4>(r, ahead);
  else
    LoadFirst<8>(r, ahead);
  return r;
}

// ---- sums ----

// Over the lanes, of token lane / (32 / kT), in each lane.
template <int kT>
__device__ __forceinline__ float SumOverLanes(float (&sums)[kT], int lane) {
  int apart = 16;
#pragma unroll
  for (int half = kT / 2; half; half /= 2, apart /= 2) {
    const bool upper = lane & apart;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float give = upper ? sums[i] : sums[i + half], keep = upper ? sums[i + half] : sums[i];
      sums[i] = keep + __shfl_xor_sync(~0u, give, apart);
    }
  }
#pragma unroll
  for (; apart; apart /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], apart);
  return sums[0];
}

// The run's rows. kChecked: x of some token is not all finite, `totals` numbers of it. A weight
// that is not stored must meet them too: where fewer than these have been met, the sum is NaN.
template <bool kBf16, int kT, int kBits, bool kChecked, int kAhead>
__device__ __forceinline__ void Walk(const Args& a, Run& r, int block, int token0, uint32_t x,
                                     int lane, const int* totals, Group (&ahead)[kAhead]) {
  using S = Shape<kT>;
  constexpr uint32_t kColumn = S::kColumnBytes;
  const uint32_t lowest = x - kColumn, highest = lowest + a.block_cols * kColumn;
  // Of kRows rows the lane keeps the sum of one, for one token.
  const int kept_row = lane % S::kRows, token = token0 + lane / S::kRows;
  float kept = 0.0f;
  uint32_t bias = 0, residual = 0;  // as they lie in memory
  for (int i = 0; i < r.rows; ++i) {
    if (i % S::kRows == 0 && !a.slots && token < a.tokens && i + kept_row < r.rows) {
      const int64_t row = r.row + i + kept_row;
      if (a.out.bias) bias = LoadRaw(a.out.bias, a.out.bias_type, row);
      if (a.out.residual) residual = LoadRaw(a.out.residual, a.out.type, token * a.out.rows + row);
    }

    float sums[kT] = {}, met[kT] = {};
    uint32_t at = lowest + r.base * kColumn;
    const auto add = [&](const Group& g) {
      at = min(at, highest);
      uint32_t to[kSteps];
      if constexpr (kBits == 4) {
        const uint32_t steps = (g.codes | g.codes << 12) & 0x0f0f0f0fu;  // of entries 0, 2, 1, 3
        to[0] = ptx::DotBytes(steps, kColumn, at);
        to[1] = ptx::DotBytes(steps, kColumn * 0x10001, at);
        to[2] = ptx::DotBytes(steps, kColumn * 0x10101, at);
        to[3] = ptx::DotBytes(steps, kColumn * 0x1010101, at);
      } else {
        at = max(at, lowest);
        to[0] = ptx::DotSignedBytes(g.codes, kColumn, at);
        to[1] = ptx::DotSignedBytes(g.codes, kColumn * 0x101, at);
        to[2] = ptx::DotSignedBytes(g.codes, kColumn * 0x10101, at);
        to[3] = ptx::DotSignedBytes(g.codes, kColumn * 0x1010101, at);
      }
      at = to[3];
      const float2 low = ToFloats<kBf16>(g.values.x), high = ToFloats<kBf16>(g.values.y);
      const float w[kSteps] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int e = 0; e < kSteps; ++e) {
        float v[kT];
        LoadX<kBf16, kT>(to[e], v);
        if constexpr (kChecked) {
          if (__float_as_uint(w[e]) == 0) continue;  // dead, or +0
#pragma unroll
          for (int t = 0; t < kT; ++t) met[t] += isfinite(v[t]) ? 0.0f : 1.0f;
        }
#pragma unroll
        for (int t = 0; t < kT; ++t) sums[t] = fmaf(w[e], v[t], sums[t]);
      }
    };
    uint32_t left = r.groups;
    if constexpr (kChecked) {
#pragma unroll 1
      for (uint32_t s = 0; s < left; ++s) {  // as many as offsets say, which may lie
        Group g = {};
        Load<kBits>(true, r.values + uint64_t(s) * kValueBytes,
                    r.codes + uint64_t(s) * kCodeBytes<kBits>, 0, g);
        add(g);
      }
    } else {
#pragma unroll 1
      for (; left > kAhead; left -= kAhead) {
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
          const Group g = ahead[s];
          Load<kBits>(kAhead + s < left, r.values, r.codes, kAhead + s, ahead[s]);
          add(g);
        }
        r.values += kAhead * kValueBytes, r.codes += kAhead * kCodeBytes<kBits>;
      }
    }
    Run next = r;
    next.values += uint64_t(left) * kValueBytes;
    next.codes += uint64_t(left) * kCodeBytes<kBits> + kBaseWords * 4;
    next.groups = 0;
    if (i + 1 < r.rows) {
      if (i % 32 == 31) next.lane_end = LaneEnd(r, i + 1, lane);
      next.end = max(__shfl_sync(~0u, next.lane_end, (i + 1) % 32), r.end);
      next.groups = next.end - r.end;
      next.base = ptx::LoadOnce16(next.codes + FromCodes(lane, kBits));
    }
    if constexpr (!kChecked) {
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const Group g = ahead[s];
        Load<kBits>(s < next.groups, next.values, next.codes, s, ahead[s]);
        if (s < left) add(g);
      }
    }
    r = next;

    float sum = SumOverLanes<kT>(sums, lane);
    if constexpr (kChecked) {
      const float seen = SumOverLanes<kT>(met, lane);
      if (seen < static_cast<float>(totals[lane / S::kRows])) sum = __uint_as_float(0x7fffffffu);
    }
    const int in_rows = i % S::kRows;
    if (kept_row == in_rows) kept = sum;
    if ((in_rows == S::kRows - 1 || i + 1 == r.rows) && kept_row <= in_rows && token < a.tokens) {
      const int64_t to = token * a.out.rows + r.row + i - in_rows + kept_row;
      if (a.slots)
        a.partial[int64_t(block) * a.tokens * a.out.rows + to] = kept;
      else
        Store(a.out, to, FloatOf(bias, a.out.bias_type), FloatOf(residual, a.out.type), kept);
    }
  }
}

template <bool kBf16, int kT>
__global__ void __launch_bounds__(Shape<kT>::kWarps * 32, 1)
    DeltaCsrKernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ int totals[kT];
  constexpr uint32_t kColumn = Shape<kT>::kColumnBytes;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int block = a.blocks == 1 ? 0 : static_cast<int>(blockIdx.x) / a.block_ctas;
  const int token0 = blockIdx.y * kT;
  ptx::LaunchDependents();
  // Runs that are a row longer go to a warp of each CTA first.
  const int run_index = warp * a.block_ctas + static_cast<int>(blockIdx.x) - block * a.block_ctas;
  const int row = FirstUnit(a, run_index), last = FirstUnit(a, run_index + 1);

  // W depends on nothing before this kernel; x may.
  Group ahead[Shape<kT>::kAhead] = {};
  Run run;
  if (row < last) run = Open(a, block, row, last, lane, ahead);
  const uint32_t x = ptx::SharedAddress(shared) + (kReach + 16) * kColumn;
  const int column0 = block * a.block_cols;
  const int columns = static_cast<int>(min(int64_t(a.block_cols), a.x_stride - column0));
  if (threadIdx.x < kColumn / 4) ptx::StoreShared32(x - kColumn + threadIdx.x * 4, 0);
  ptx::WaitForPrevious();
  const bool checked = __syncthreads_or(StageX<kBf16, kT>(a, token0, column0, columns, x));
  if (checked) CountNotFinite<kBf16, kT>(x, columns, totals);

  if (row == last) return;
  while (true) {
    if (checked) {
      if (run.bits == 4)
        Walk<kBf16, kT, 4, true>(a, run, block, token0, x, lane, totals, ahead);
      else
        Walk<kBf16, kT, 8, true>(a, run, block, token0, x, lane, totals, ahead);
    } else {
      if (run.bits == 4)
        Walk<kBf16, kT, 4, false>(a, run, block, token0, x, lane, totals, ahead);
      else
        Walk<kBf16, kT, 8, false>(a, run, block, token0, x, lane, totals, ahead);
    }
    const int next = run.row + run.rows;
    if (next == last) break;
    run = Open(a, block, next, last, lane, ahead);  // in another shard
  }
}

// Sums over the blocks of columns in turn, and over terms as CombineTerms has them: a thread a
// number of y.
__global__ void __launch_bounds__(kCombineThreads)
    CombineDeltaCsrKernel(const __grid_constant__ Args a) {
  const int64_t row = int64_t(blockIdx.x) * kCombineThreads + threadIdx.x;
  const int64_t token = blockIdx.y, stride = a.tokens * a.out.rows;
  const bool there = row < a.out.rows;
  ptx::LaunchDependents();
  const float bias = there ? LoadBias(a.out, row) : 0.0f;
  // All threads wait: a grid that ended before its predecessor would set the next one free.
  ptx::WaitForPrevious();
  if (!there) return;
  const int64_t i = token * a.out.rows + row;
  const float residual = LoadResidual(a.out, i);
  float total = 0.0f, weight = 1.0f;
  for (int term = 0; term < a.terms; ++term, weight *= a.term_step) {
    const float* const from = a.partial + term * a.tokens_a_term * a.out.rows + i;
    float sum = __ldcg(from);
#pragma unroll 4
    for (int block = 1; block < a.blocks; ++block) sum += __ldcg(from + block * stride);
    // Inf in W meets the zeros of the smaller terms: what term 0 says then stands.
    if (term == 0) {
      total = sum;
      if (!isfinite(sum)) break;
    } else {
      total += sum * weight;
    }
  }
  if (a.terms > 1) total *= a.unscale[token];
  Store(a.out, i, bias, residual, total);
}

template <bool kBf16, typename F>
cudaError_t ForEachKernel(F f) {
  if (cudaError_t e = f(DeltaCsrKernel<kBf16, 1>)) return e;
  if (cudaError_t e = f(DeltaCsrKernel<kBf16, 2>)) return e;
  if (cudaError_t e = f(DeltaCsrKernel<kBf16, 4>)) return e;
  return f(DeltaCsrKernel<kBf16, 8>);
}

template <int kT>
cudaError_t LaunchDeltaCsr(cudaStream_t stream, const Args& a, bool bf16, bool overlap) {
  if (a.warps > Shape<kT>::kWarps) return cudaErrorInvalidValue;
  return Launch(stream, bf16 ? DeltaCsrKernel<true, kT> : DeltaCsrKernel<false, kT>,
                dim3(a.ctas, a.groups), a.warps * 32, WindowBytes<kT>(a.block_cols), overlap, a);
}

}  // namespace

cudaError_t InitializeDeltaCsr() {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  const auto raise = [&](auto kernel) {
    cudaFuncAttributes attributes;
    if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel)) return e;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                shared - static_cast<int>(attributes.sharedSizeBytes));
  };
  if (cudaError_t e = ForEachKernel<false>(raise)) return e;
  return ForEachKernel<true>(raise);
}

cudaError_t DeltaCsrSpmm(cudaStream_t stream, const Args& a, bool bf16, bool overlap) {
  switch (a.group) {
    case 1:
      return LaunchDeltaCsr<1>(stream, a, bf16, overlap);
    case 2:
      return LaunchDeltaCsr<2>(stream, a, bf16, overlap);
    case 4:
      return LaunchDeltaCsr<4>(stream, a, bf16, overlap);
    case 8:
      return LaunchDeltaCsr<8>(stream, a, bf16, overlap);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t CombineDeltaCsr(cudaStream_t stream, const Args& a, bool overlap) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.out.rows, kCombineThreads)),
                  static_cast<unsigned>(a.tokens_a_term));
  return Launch(stream, CombineDeltaCsrKernel, grid, kCombineThreads, 0, overlap, a);
}

}  // namespace flashllm::cuda

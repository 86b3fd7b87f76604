// The copying side of shrink_wgmma.cuh: how its work is cut, the ring of stages, and the warp that
// fills it with x and A.
#pragma once

#include "common/ptx.cuh"
#include "kernels/prefill_heuristics.h"
#include "kernels/tensor_map.h"

namespace lora_ext::cuda {

constexpr int kWarpgroup = 128;                 // threads that multiply
constexpr int kWgmmaThreads = kWarpgroup + 32;  // and a warp that copies

// x as [T, K] and A as [L, rows of a slot, K], for copies of boxes. Of x: of a whole tile, of half
// of one, of a quarter. Of A: of kBoxRowsA rows, for slots of any rank, and of more (ShrinkWork),
// for those of the highest.
constexpr int kBoxesOfX = 3;
struct ShrinkMaps {
  CUtensorMap x[kBoxesOfX], a[kMaxSlices], large_a[kMaxSlices];
};

// How the work is cut. Beside the other parameters, before the maps: what a CTA needs first is
// brought to the constant cache together.
struct ShrinkWork {
  ShrinkParams p;
  int large_rows;    // of the larger boxes of A
  int cluster;       // CTAs of each
  int num_clusters;  // in the grid
  int places;        // for CTAs of clusters at once
};

// What a kernel serves: any launch without parts; an apply's by clusters; an apply's by parts. One
// for all would hold a third to two thirds more code, which too comes from memory while somebody
// waits for it.
enum class ShrinkWay { kAny, kClusters, kParts };

constexpr int kBoxK = kBoxColumns;
constexpr int kBoxRowsX = kWideTileTokens, kBoxRowsA = 16;

// kRows: columns of xa (rows of A) that a CTA computes. kKilobytes: for its stages.
template <int kRows_, int kKilobytes>
struct WgmmaTraits {
  static constexpr int kRows = kRows_, kBlocks = kKilobytes <= kShrinkHalf ? 2 : 1;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Bounds registers to 128, or 168, so that a CTA of the expand finds room beside one. Each of a
  // multiprocessor's four schedulers has 512 registers a lane; one of them has two of this CTA's
  // five warps, and two of the expand's with 128 registers, or one with 168 above rank 64.
  static constexpr int kBound = kRows <= 96 ? 256 : kRows == 128 ? 192 : kWgmmaThreads;
#else
  static constexpr int kBound = 32;  // tells the launcher that the kernel is empty here
#endif
  static constexpr int kBoundBlocks = kRows <= 128 ? 2 : 1;
  static constexpr int kStageBytes = (kWideTileTokens + kRows) * kBoxK * 2;
  static constexpr int kStages = kKilobytes * 1024 / kStageBytes;
  static constexpr int kSumStride = kRows + 8;  // floats between tokens of the sums
  static constexpr int kBarriersAt = kStages * kStageBytes;
  static constexpr int kAlignment = 1024;  // of a stage, for the swizzle
  static constexpr int kSharedBytes = kBarriersAt + 8 * (2 * kStages + 1) + kAlignment;
  static_assert(kWideTileTokens * kSumStride * 4 <= kBarriersAt);
};

// A place in the ring of stages, with the barriers in shared memory.
template <typename Traits>
struct StageRing {
  unsigned char* shared;
  int stage = 0;
  uint32_t turn = 0;  // times that the ring has been passed, mod 2

  __device__ __forceinline__ explicit StageRing(unsigned char* shared_) : shared(shared_) {}
  // All copies of a step are there; all products of a step are done; all members' sums are there.
  __device__ __forceinline__ uint64_t* full() const {
    return reinterpret_cast<uint64_t*>(shared + Traits::kBarriersAt) + stage;
  }
  __device__ __forceinline__ uint64_t* empty() const { return full() + Traits::kStages; }
  __device__ __forceinline__ uint64_t* sums() const {
    return reinterpret_cast<uint64_t*>(shared + Traits::kBarriersAt) + 2 * Traits::kStages;
  }
  __device__ __forceinline__ unsigned char* data() const {
    return shared + stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ void advance() {
    if (++stage == Traits::kStages) {
      stage = 0, turn ^= 1;
    }
  }
};

// What a CTA does at a time: a tile, and a share of K.
struct ShrinkPiece {
  Tile tile;
  int id[2];           // of the tokens lane and lane + 32; -1: none
  bool neighbours;     // all tokens, in memory
  int rank, columns;   // of xa in use, from the CTA's first
  int first_k, steps;  // the CTA's share
  int64_t first_row;   // of the sums, where xa lies by tiles
};

// The CTAs of a cluster that serve one tile: all, or half of them, or a quarter and so on, where
// tiles are more than whole clusters find places for.
struct ShrinkGroup {
  int size, index, member;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void find_tokens(const ShrinkParams& p, ShrinkPiece& piece) {
  const int lane = threadIdx.x % 32, count = piece.tile.count;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = lane + 32 * i;
    const int id = token < count ? p.plan.permutation[piece.tile.start + token] : -1;
    piece.id[i] = id < p.num_tokens ? id : -1;  // a plan may be for more tokens than this call has
  }
  const int first = __shfl_sync(0xffffffffu, piece.id[0], 0);
  piece.neighbours =
      __all_sync(0xffffffffu, first >= 0 && (lane >= count || piece.id[0] == first + lane) &&
                                  (lane + 32 >= count || piece.id[1] == first + lane + 32));
}

// Brings x to L2 before the plan is known, where it is little: by the time that copies ask for it,
// most is there. Of more than 8 MB they would wait for what comes for others.
template <typename T>
__device__ __forceinline__ void prefetch_tokens(const ShrinkParams& p) {
  constexpr int64_t kMostElements = 4 << 20;
  constexpr unsigned kLine = 64;  // elements
  if (p.num_tokens * p.in_features > kMostElements) {
    return;
  }
  const unsigned lines = (static_cast<unsigned>(p.in_features) + kLine - 1) / kLine;
  const unsigned all = static_cast<unsigned>(p.num_tokens) * lines;
  const unsigned first = (blockIdx.y * gridDim.x + blockIdx.x) * kWgmmaThreads + threadIdx.x;
  for (unsigned i = first; i < all; i += gridDim.x * gridDim.y * kWgmmaThreads) {
    const unsigned row = i / lines;
    device::prefetch_line(static_cast<const T*>(p.x) + row * p.x_stride +
                          (i - row * lines) * kLine);
  }
}

// What one warp copies of each step. Slices start at columns that are multiples of 16, so that
// boxes do not overlap: what boxes have behind a slice's rank reaches only sums that nobody reads.
// The same holds for rows of x behind the last token.
struct PieceCopies {
  const CUtensorMap *x_map, *a_map;
  uint64_t x_policy, a_policy;
  int k, steps;  // the CTA's share
  int bytes;     // that the boxes of a step bring
  int first_token, slot;
  int a_row, a_at;  // of a lane's box of A, and where in a stage it goes; 0: it has none
};

// The boxes of a step: of A, and of tokens that are neighbours in memory.
template <typename Traits, ShrinkWay kWay, bool kNeighbours>
__device__ __forceinline__ void copy_boxes(const PieceCopies& copies, int k,
                                           const StageRing<Traits>& ring) {
  const bool leads = threadIdx.x % 32 == 0;
  if (leads) {
    device::barrier_arrive_expecting(ring.full(), copies.bytes);
  }
  __syncwarp();
  unsigned char* a_to = ring.data() + copies.a_at;
  if constexpr (kWay == ShrinkWay::kParts) {
    if (kNeighbours && leads) {
      device::copy_box(ring.data(), copies.x_map, k, copies.first_token, ring.full(),
                       copies.x_policy);
    }
    if (copies.a_at > 0) {
      device::copy_box(a_to, copies.a_map, k, copies.a_row, copies.slot, ring.full(),
                       copies.a_policy);
    }
  } else {
    if (kNeighbours && leads) {
      device::copy_box(ring.data(), copies.x_map, k, copies.first_token, ring.full());
    }
    if (copies.a_at > 0) {
      device::copy_box(a_to, copies.a_map, k, copies.a_row, copies.slot, ring.full());
    }
  }
}

// All steps of tokens that lie anywhere. Eight lanes copy a token's row, each lane chunks of
// sixteen rows. Where those lie, counted in chunks, is found out once, for one warp issues all
// copies.
template <typename T, typename Traits, ShrinkWay kWay>
__device__ __forceinline__ void copy_rows(const ShrinkParams& p, const PieceCopies& copies, int id0,
                                          int id1, StageRing<Traits>& ring) {
  const int lane = threadIdx.x % 32, chunk = lane % 8;
  const int ids[2] = {id0, id1};
  uint32_t chunks[kWideTileTokens / 4], exists = 0;
#pragma unroll
  for (int i = 0; i < kWideTileTokens / 4; ++i) {
    const int id = __shfl_sync(0xffffffffu, ids[i / 8], (4 * i + lane / 8) % 32);
    exists |= id >= 0 ? 1u << i : 0;
    chunks[i] = static_cast<uint32_t>(max(id, 0) * (p.x_stride / 8)) + chunk;
  }
  int k = copies.k;
#pragma unroll 1
  for (int step = 0; step < copies.steps; ++step) {
    device::barrier_wait(ring.empty(), ring.turn ^ 1);
    unsigned char* to = ring.data();
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + k);
    const int inside = k + 8 * chunk < p.in_features ? 16 : 0;  // 0 reads none, writes zeros
#pragma unroll
    for (int i = 0; i < kWideTileTokens / 4; ++i) {
      const int row = 4 * i + lane / 8;
      asm volatile("" : "+r"(chunks[i]));  // else all pointers stay in registers, twice as many
      if (exists >> i & 1) {
        device::copy_async_16(to + (row * 8 + (chunk ^ row % 8)) * 16, from + chunks[i], inside);
      }
    }
    device::barrier_expect_copies(ring.full());
    __syncwarp();  // before the arrival that the barrier knows of
    copy_boxes<Traits, kWay, false>(copies, k, ring);
    if (step == 0) {
      device::grid_dependency_launch();
    }
    k += kBoxK;
    ring.advance();
  }
}

// The same out of the way of the code that others wait for, since all of it comes from memory.
template <typename T, typename Traits, ShrinkWay kWay>
__device__ __noinline__ StageRing<Traits> copy_rows_aside(const ShrinkParams& p,
                                                          const PieceCopies copies, int id0,
                                                          int id1, StageRing<Traits> ring) {
  copy_rows<T, Traits, kWay>(p, copies, id0, id1, ring);
  return ring;
}

template <typename T, typename Traits, ShrinkWay kWay>
__device__ __forceinline__ void copy_piece(const ShrinkWork& work, const ShrinkMaps& maps,
                                           const ShrinkPiece& piece, int first_column,
                                           StageRing<Traits>& ring) {
  const ShrinkParams& p = work.p;
  const int lane = threadIdx.x % 32;
  const int padded = XaLayout::padded(piece.rank);
  // Each box takes the copy engine 30 ns, whatever its size.
  const bool large = padded == XaLayout::padded(p.max_rank);
  const int box_rows = large ? work.large_rows : kBoxRowsA;
  const int a_boxes = small_quotient(piece.columns, box_rows);
  const int column = first_column + lane * box_rows;
  const int slice = min(small_quotient(column, padded), p.num_slices - 1);
  // As few as there are tokens for: the rest are other tiles' rows, or none.
  int x_rows = piece.neighbours ? kBoxRowsX : 0;
  const CUtensorMap* x_map = maps.x;
  for (; x_rows >= 2 * piece.tile.count && x_map < maps.x + kBoxesOfX - 1; x_rows /= 2) {
    ++x_map;
  }
  // Where tiles are many, A is for all of them, and x, like y, passes through L2 once (8192 tokens
  // of rank 64: qkv 92.9 -> 88.1 us, `down` in 16 segments 123.4 -> 119.6).
  const bool many = kWay == ShrinkWay::kParts && !p.layout.summed;
  PieceCopies copies;
  copies.x_map = x_map;
  copies.a_map = (large ? maps.large_a : maps.a) + slice;
  copies.x_policy = many ? device::kEvictFirst : device::kEvictNormal;
  copies.a_policy = many ? device::kEvictLast : device::kEvictNormal;
  copies.k = piece.first_k, copies.steps = piece.steps;
  copies.bytes = (x_rows + piece.columns) * kBoxK * 2;
  copies.first_token = piece.id[0], copies.slot = piece.tile.slot;
  copies.a_row = static_cast<int>(p.a.first_row[slice]) +
                 (p.a.rows_by_rank ? slice * piece.rank : 0) + column - slice * padded;
  copies.a_at = lane < a_boxes ? (kBoxRowsX + lane * box_rows) * 128 : 0;
  if (!piece.neighbours) {
    if constexpr (Traits::kRows == 96) {  // has no registers for a call
      copy_rows<T, Traits, kWay>(p, copies, piece.id[0], piece.id[1], ring);
    } else {
      ring = copy_rows_aside<T, Traits, kWay>(p, copies, piece.id[0], piece.id[1], ring);
    }
    return;
  }
#pragma unroll 1
  for (int step = 0; step < copies.steps; ++step) {
    device::barrier_wait(ring.empty(), ring.turn ^ 1);
    copy_boxes<Traits, kWay, true>(copies, copies.k, ring);
    if (step == 0) {
      device::grid_dependency_launch();  // whose first copies come behind these
    }
    copies.k += kBoxK;
    ring.advance();
  }
}
#endif

}  // namespace lora_ext::cuda

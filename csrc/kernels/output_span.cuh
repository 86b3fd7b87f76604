// How the expands by mma.sync end: the sums of four products whose 16 rows stand for columns of y
// such that a lane has eight neighbours of a token, and y in shared memory for whole lines.
#pragma once

#include "common/vec.cuh"

namespace lora_ext::cuda {

// What a lane adds to its output o: token 8 * (o / 2) + 2 q + o % 2 of 16, columns 8 g and
// following of 64. fp16: scaled.
template <typename T>
__device__ __forceinline__ void lane_delta(const float (&acc)[4][2][4], int o, float scale,
                                           float (&delta)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    delta[i] = acc[i / 2][o / 2][i % 2 * 2 + o % 2];
    if constexpr (device::kNeedsScale<T>) {
      delta[i] *= scale;
    }
  }
}

// 64 columns of 16 tokens of y, a warp's, in shared memory.
template <typename Y>
struct OutputSpan {
  static constexpr int kRowBytes = 64 * sizeof(Y);
  static constexpr int kSpanBytes = 16 * kRowBytes;
  // Copies of 16 bytes: a warp's copy i is of rows kCopyRows * i and following.
  static constexpr int kPerChunk = 16 / sizeof(Y);
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kCopyRows = 32 / kRowChunks;
  static constexpr int kCopies = 16 / kCopyRows;

  // Where a chunk lies: neither whole rows nor fragments meet in a bank.
  __device__ static int at(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row & 6)) * 16;
  }

  // Adds a lane's four outputs.
  template <typename T>
  __device__ __forceinline__ static void add(unsigned char* span, const float (&acc)[4][2][4],
                                             const float (&scales)[4]) {
    constexpr int kParts = 8 / kPerChunk;  // chunks of eight outputs
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      const int row = 8 * (o / 2) + 2 * q + o % 2;
      float delta[8];
      lane_delta<T>(acc, o, scales[o], delta);
      device::Outputs<Y> outputs;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const uint4 raw = *reinterpret_cast<const uint4*>(span + at(row, g * kParts + i));
        outputs.words[4 * i] = raw.x, outputs.words[4 * i + 1] = raw.y;
        outputs.words[4 * i + 2] = raw.z, outputs.words[4 * i + 3] = raw.w;
      }
      outputs.add(delta);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        *reinterpret_cast<uint4*>(span + at(row, g * kParts + i)) =
            make_uint4(outputs.words[4 * i], outputs.words[4 * i + 1], outputs.words[4 * i + 2],
                       outputs.words[4 * i + 3]);
      }
    }
  }
};

}  // namespace lora_ext::cuda

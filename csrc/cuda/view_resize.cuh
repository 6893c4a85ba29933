// Resizes a tile of a view with one block, as Pillow does. Weights are computed in double precision and rounded to 22
// fractional bits. Two passes add up integers, shift the sums and clip them to 0..255. The result of the first pass
// stays in shared memory.
//
// The compiler must not fuse anything: every product and sum of weights is written as an instruction that rounds once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "multi_view_crops.h"

namespace rada_fast {

struct Frames {
  ViewFrame frame[kMostFrames];
};
static_assert(sizeof(Frames) + 64 <= 4096, "a kernel's arguments");

struct Channels {
  float mean[3], std[3];
};

__device__ inline void put(float* out, float value) { *out = value; }
__device__ inline void put(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }
__device__ inline void put(__half* out, float value) { *out = __float2half_rn(value); }

// Returns (value / 255 - mean) / std, each step rounded as in PyTorch.
__device__ inline float normalised_value(int value, const Channels& channels, int channel) {
  const float share = __fdiv_rn(static_cast<float>(value), 255.0f);
  return __fdiv_rn(__fsub_rn(share, channels.mean[channel]), channels.std[channel]);
}

// A block computes kTile x kTile pixels with kThreads threads. A thread has kRows of them, in one column, three
// channels each.
constexpr int kTile = 32, kThreads = 256, kGroups = kThreads / kTile, kRows = kTile / kGroups;
constexpr int kWeightBits = 22, kHalfWeight = 1 << (kWeightBits - 1);

// The outputs of one axis of a tile: output i depends on the inputs first[i] .. first[i] + taps[i] - 1.
struct AxisTile {
  double centre[kTile], total[kTile];
  double inverse;
  int32_t first[kTile], taps[kTile];
  int32_t begin, end, most;  // the range of all inputs of the tile; the most taps of an output
  bool bicubic;
};

__device__ inline double filter(bool bicubic, double x) {
  x = fabs(x);
  if (!bicubic) return x < 1.0 ? __dsub_rn(1.0, x) : 0.0;
  if (x < 1.0) {
    const double inner = __dsub_rn(__dmul_rn(1.5, x), 2.5);
    return __dadd_rn(__dmul_rn(__dmul_rn(inner, x), x), 1.0);
  }
  if (x >= 2.0) return 0.0;
  const double inner = __dadd_rn(__dmul_rn(__dsub_rn(x, 5.0), x), 8.0);
  return __dmul_rn(__dsub_rn(__dmul_rn(inner, x), 4.0), -0.5);
}

__device__ inline double unscaled_weight(const AxisTile& axis, int output, int32_t place) {
  const double distance = __dadd_rn(__dsub_rn(static_cast<double>(place), axis.centre[output]), 0.5);
  return filter(axis.bicubic, __dmul_rn(distance, axis.inverse));
}

// Called by the threads of one warp, each for one output. Threads past the end of the axis repeat its last output.
__device__ inline void start_axis(AxisTile& axis, int lane, int32_t in_size, int32_t out_size, int32_t window,
                                  int32_t count, int32_t from, bool reversed, bool bicubic) {
  const double scale = __ddiv_rn(static_cast<double>(static_cast<float>(in_size)), static_cast<double>(out_size));
  const double filter_scale = scale < 1.0 ? 1.0 : scale;
  const double support = __dmul_rn(bicubic ? 2.0 : 1.0, filter_scale);
  if (lane == 0) {
    axis.inverse = __ddiv_rn(1.0, filter_scale);
    axis.bicubic = bicubic;
  }
  const int32_t at = min(from + lane, count - 1);
  const double centre =
      __dmul_rn(__dadd_rn(static_cast<double>(window + (reversed ? count - 1 - at : at)), 0.5), scale);
  axis.centre[lane] = centre;
  const int32_t low = max(static_cast<int32_t>(__dadd_rn(__dsub_rn(centre, support), 0.5)), 0);
  const int32_t high = min(static_cast<int32_t>(__dadd_rn(__dadd_rn(centre, support), 0.5)), in_size);
  const int32_t taps = high - low;
  axis.first[lane] = low;
  axis.taps[lane] = taps;
  const int32_t begin = __reduce_min_sync(~0u, low), end = __reduce_max_sync(~0u, high);
  const int32_t most = __reduce_max_sync(~0u, taps);
  if (lane == 0) {
    axis.begin = begin;
    axis.end = end;
    axis.most = most;
  }
  __syncwarp();
  double total = 0.0;
  for (int32_t tap = 0; tap < taps; ++tap) total = __dadd_rn(total, unscaled_weight(axis, lane, low + tap));
  axis.total[lane] = total;
}

__device__ inline int32_t weight_of(const AxisTile& axis, int output, int32_t place) {
  if (place < axis.first[output] || place >= axis.first[output] + axis.taps[output]) return 0;
  double weight = unscaled_weight(axis, output, place);
  if (axis.total[output] != 0.0) weight = __ddiv_rn(weight, axis.total[output]);
  weight = __dmul_rn(weight, static_cast<double>(1 << kWeightBits));
  return static_cast<int32_t>(__dadd_rn(weight, weight < 0.0 ? -0.5 : 0.5));
}

// Fills table[i][output] with the weight of the input `from + i`, counted from the output's first input where by_tap is
// true, otherwise from the start of the axis.
__device__ inline void fill(const AxisTile& axis, bool by_tap, int32_t from, int32_t (*table)[kTile]) {
  const int output = threadIdx.x % kTile;
  for (int i = threadIdx.x / kTile; i < kTile; i += kGroups)
    table[i][output] = weight_of(axis, output, from + i + (by_tap ? axis.first[output] : 0));
}

__device__ inline uint8_t clipped(int32_t sum) {
  return static_cast<uint8_t>(min(max(sum >> kWeightBits, 0), 255));
}

struct ResizeTile {
  AxisTile rows, columns;
  // The weights of the first pass are indexed by tap, those of the second by input.
  int32_t first[kTile][kTile], second[kTile][kTile];
  // The result of the first pass: [row of the picture][channel][column of the tile], or, where the vertical pass comes
  // first, [row of the tile][channel][column of the picture].
  uint8_t strip[kTile][3][kTile];
};

// Every sum starts with one half, so that the shift at the end of the pass rounds to nearest.
__device__ inline void start_sums(int (&sums)[kRows][3]) {
  for (auto& row : sums)
    for (int& sum : row) sum = kHalfWeight;
}

// Stores this thread's results of the first pass for all threads of the block.
__device__ inline void store_strip(ResizeTile& tile, const int (&sums)[kRows][3]) {
  const int column = threadIdx.x % kTile, group = threadIdx.x / kTile;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int channel = 0; channel < 3; ++channel)
      tile.strip[group * kRows + i][channel][column] = clipped(sums[i][channel]);
  __syncthreads();
}

// Makes the horizontal pass first. sums[i][channel] belongs to the tile's row group * kRows + i and column `column`.
__device__ inline void across_then_down(const ViewFrame& frame, ResizeTile& tile, int (&sums)[kRows][3]) {
  const int column = threadIdx.x % kTile, group = threadIdx.x / kTile;
  const AxisTile &rows = tile.rows, &columns = tile.columns;
  const bool whole = columns.most <= kTile;
  if (whole) fill(columns, true, 0, tile.first);
  for (int32_t begin = rows.begin; begin < rows.end; begin += kTile) {
    fill(rows, false, begin, tile.second);
    int parts[kRows][3];
    start_sums(parts);
    for (int32_t from = 0; from < columns.most; from += kTile) {
      if (!whole) {
        __syncthreads();
        fill(columns, true, from, tile.first);
      }
      __syncthreads();
      const int32_t end = min(from + kTile, columns.taps[column]);
      for (int32_t tap = from; tap < end; ++tap) {
        const int32_t weight = tile.first[tap - from][column];
        const uint8_t* pixel = frame.pixels + (columns.first[column] + tap) * frame.column_stride;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int32_t row = begin + group * kRows + i;
          if (row < rows.end) {
            const uint8_t* at = pixel + row * frame.row_stride;
#pragma unroll
            for (int channel = 0; channel < 3; ++channel)
              parts[i][channel] += weight * __ldg(at + channel * frame.channel_stride);
          }
        }
      }
    }
    store_strip(tile, parts);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = group * kRows + i;
      const int32_t from = max(rows.first[row], begin), end = min(rows.first[row] + rows.taps[row], begin + kTile);
      for (int32_t place = from; place < end; ++place)
#pragma unroll
        for (int channel = 0; channel < 3; ++channel)
          sums[i][channel] += tile.second[place - begin][row] * tile.strip[place - begin][channel][column];
    }
    __syncthreads();
  }
}

// Makes the vertical pass first.
__device__ inline void down_then_across(const ViewFrame& frame, ResizeTile& tile, int (&sums)[kRows][3]) {
  const int column = threadIdx.x % kTile, group = threadIdx.x / kTile;
  const AxisTile &rows = tile.rows, &columns = tile.columns;
  const bool whole = rows.most <= kTile;
  if (whole) fill(rows, true, 0, tile.first);
  for (int32_t begin = columns.begin; begin < columns.end; begin += kTile) {
    fill(columns, false, begin, tile.second);
    int parts[kRows][3];
    start_sums(parts);
    const bool inside = begin + column < columns.end;
    for (int32_t from = 0; from < rows.most; from += kTile) {
      if (!whole) {
        __syncthreads();
        fill(rows, true, from, tile.first);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = group * kRows + i;
        const int32_t end = inside ? min(from + kTile, rows.taps[row]) : from;
        const uint8_t* pixel =
            frame.pixels + (begin + column) * frame.column_stride + rows.first[row] * frame.row_stride;
        for (int32_t tap = from; tap < end; ++tap) {
          const int32_t weight = tile.first[tap - from][row];
#pragma unroll
          for (int channel = 0; channel < 3; ++channel)
            parts[i][channel] += weight * __ldg(pixel + tap * frame.row_stride + channel * frame.channel_stride);
        }
      }
    }
    store_strip(tile, parts);
    const int32_t from = max(columns.first[column], begin);
    const int32_t end = min(columns.first[column] + columns.taps[column], begin + kTile);
    for (int32_t place = from; place < end; ++place) {
      const int32_t weight = tile.second[place - begin][column];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int channel = 0; channel < 3; ++channel)
          sums[i][channel] += weight * tile.strip[group * kRows + i][channel][place - begin];
    }
    __syncthreads();
  }
}

// Where the block's tile starts in the view: blockIdx.x counts tiles across, blockIdx.y down, blockIdx.z views.
__device__ inline int32_t tile_top() { return blockIdx.y * kTile; }
__device__ inline int32_t tile_left() { return blockIdx.x * kTile; }
// This thread's pixels: kRows of them in one column.
__device__ inline int32_t thread_column() { return tile_left() + threadIdx.x % kTile; }
__device__ inline int32_t thread_row() { return tile_top() + threadIdx.x / kTile * kRows; }

// Resizes the block's tile of a view of size x size pixels; values[i][channel] receives this thread's pixels.
__device__ inline void resize_tile(const ViewFrame& frame, int32_t size, ResizeTile& tile,
                                   uint8_t (&values)[kRows][3]) {
  const int lane = threadIdx.x % kTile, warp = threadIdx.x / kTile;
  const bool bicubic = frame.flags & kBicubic;
  if (warp == 0)
    start_axis(tile.rows, lane, frame.height, frame.resized_height, frame.window_top, size, tile_top(), false,
               bicubic);
  if (warp == 1)
    start_axis(tile.columns, lane, frame.width, frame.resized_width, frame.window_left, size, tile_left(),
               frame.flags & kFlip, bicubic);
  __syncthreads();
  int sums[kRows][3];
  start_sums(sums);
  if (frame.flags & kVerticalFirst)
    down_then_across(frame, tile, sums);
  else
    across_then_down(frame, tile, sums);
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) values[i][channel] = clipped(sums[i][channel]);
}

// Calls launch(grid, frames, first) for parts of the frames: as few as a kernel's arguments allow, of equal length. A part
// starts at frame `first`, and its grid has a block for each tile of its views. Returns the first error.
template <typename Launch>
cudaError_t launch_by_frames(const ViewFrame* frames, int64_t count, int32_t size, const Launch& launch) {
  const unsigned tiles = static_cast<unsigned>((size + kTile - 1) / kTile);
  const int64_t launches = (count + kMostFrames - 1) / kMostFrames;
  for (int64_t part = 0; part < launches; ++part) {
    const int64_t begin = count * part / launches, end = count * (part + 1) / launches;
    Frames table{};
    std::copy(frames + begin, frames + end, table.frame);
    launch(dim3(tiles, tiles, static_cast<unsigned>(end - begin)), table, begin);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace rada_fast

// AugMix's loops over pixels: tables of values, affine transforms, the mix. They round as Pillow and PyTorch do. See
// instruction_set.h for why they are compiled several times.
//
// An image is size x size pixels of four bytes (red, green, blue, 0) with a border of one pixel on every side: `image`
// points to the first pixel inside it, rows are `stride` pixels apart, and eight bytes may be read at any pixel.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace rada_fast {

static inline int64_t bordered_stride(int64_t size) { return size + 2; }
static inline int64_t bordered_pixels(int64_t size) { return bordered_stride(size) * (size + 2) + 2; }

// One term of a mix, a chain of operations or the plain view: a pixel's byte adds values[channel * 256 + byte].
struct MixTerm {
  const uint32_t* image;
  const float* values;
};

struct AugmixLoops {
  // Joins rows of three channels in 16-bit words into pixels.
  void (*join)(const uint16_t* const* rows, int64_t count, uint32_t* out);
  // Counts how often each value occurs: counts[channel * 256 + value].
  void (*histogram)(const uint32_t* image, int64_t size, int64_t stride, uint32_t* counts);
  // out = table[channel * 256 + value]
  void (*look_up)(const uint32_t* image, int64_t size, int64_t stride, const uint8_t* table, uint32_t* out);
  // Writes the border, which repeats the image's edge.
  void (*repeat_edge)(uint32_t* image, int64_t size, int64_t stride);
  // out(x, y) = the image at matrix * (x + 0.5, y + 0.5, 1), interpolated bilinearly, or zero where that is outside of the
  // image. The border is read. scratch has 5 * size doubles.
  void (*transform)(const uint32_t* image, int64_t size, int64_t stride, const double* matrix, double* scratch,
                    uint32_t* out);
  // Mixes one row of one channel: out = plain + rest * (0 + term 0 + term 1 + ...).
  void (*mix)(const MixTerm& plain, const MixTerm* terms, int64_t count, float rest, int64_t channel, int64_t row,
              int64_t size, int64_t stride, float* out);
  // Writes the matrix of Pillow's rotate about the centre of a size x size image, counterclockwise.
  void (*rotation)(double degrees, int64_t size, double* matrix);
};

RADA_LOOPS(AugmixLoops)

}  // namespace rada_fast

// Loops over the pixels of views: resampling weights, the two passes of a resize, normalisation. See instruction_set.h for
// the copies.
//
// The arithmetic is Pillow's: weights in double precision, rounded to 22 fractional bits; each pass sums integers, adds a
// half, shifts and clips to 0..255, so that the first pass is rounded before the second one.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace rada_fast {

constexpr int kWeightBits = 22;
// Rows of outputs are padded to this many, so that no vector loop needs a tail of its own.
constexpr int64_t kOutputPadding = 64;
// Bytes that a window of a row of pixels may be read past its last weight.
constexpr int64_t kRowSlack = 64;

static inline int64_t padded_outputs(int64_t count) { return (count + kOutputPadding - 1) / kOutputPadding * kOutputPadding; }

// One axis of a resize from in_size to out_size, for `count` outputs from `window` on; reversed: from the last to the
// first, which is how a flip is done.
struct Axis {
  int64_t in_size, out_size, window, count;
  bool reversed, bicubic;
};

// Which inputs an output sees and with which weights: first[i], taps[i], weights[tap * padded + i] (0 past its taps).
struct AxisWeights {
  int64_t most_taps, padded;
  int32_t *first, *taps, *weights;
};

// The horizontal pass's tables besides the weights: filled by `pack_columns`, in the instruction set's own order.
struct Columns {
  AxisWeights axis;
  int64_t groups;       // of four taps
  bool wide;            // four neighbours do not fit into one window of 16 pixels
  int32_t* offsets;     // [padded]
  uint8_t* shuffles;    // [padded * 8]
  int16_t* products;    // [groups * padded * 8]
};

// (value / 255 - mean) / std in float32, each step rounded as PyTorch rounds it: table[value]. `direct` is set by
// `prepare` where vector arithmetic gives these 256 numbers bit for bit.
struct Normalisation {
  float mean, std, inverse;
  bool direct;
  const float* table;
};

struct ViewLoops {
  // Scratch: 64 doubles per tap.
  void (*axis_weights)(const Axis& axis, double* scratch, const AxisWeights& out);
  void (*pack_columns)(Columns& columns);
  // Interleaved pixels to three planes.
  void (*split)(const uint8_t* pixels, int64_t count, uint8_t* red, uint8_t* green, uint8_t* blue);
  // out[plane][i] = clipped sum of planes[plane][first[i] + tap] * weight, as 16-bit words.
  void (*horizontal)(const Columns& columns, const uint8_t* const* planes, uint16_t* const* out);
  // out[i] = clipped sum of rows[tap][i] * weights[tap]; `padded` words.
  void (*vertical)(const uint16_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded, uint16_t* out);
  // The same of rows of pixels, where this pass comes first.
  void (*vertical_pixels)(const uint8_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded,
                          uint8_t* out);
  void (*prepare)(Normalisation& normalisation);
  void (*normalise)(const uint16_t* values, int64_t count, const Normalisation& normalisation, float* out);
};

RADA_LOOPS(ViewLoops)

// Taps that an output of a resize may have: Pillow's ksize.
int64_t most_taps(int64_t in_size, int64_t out_size, bool bicubic);

}  // namespace rada_fast

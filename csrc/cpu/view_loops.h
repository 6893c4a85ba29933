// Loops over the pixels of views: resampling weights, the two passes of a resize, normalisation. instruction_set.h
// explains why they are compiled several times.
//
// The arithmetic is Pillow's. Weights are computed in double precision and rounded to 22 fractional bits. Each pass
// adds up integers and a half, shifts the sum and clips it to 0..255, so that the first pass is rounded before the
// second one.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace rada_fast {

constexpr int kWeightBits = 22;
// Rows of outputs are padded to a multiple of this number, so a vector loop needs no code for a remainder.
constexpr int64_t kOutputPadding = 64;
// The number of bytes past its last weight that a window of a row of pixels may read.
constexpr int64_t kRowSlack = 64;

static inline int64_t padded_outputs(int64_t count) { return (count + kOutputPadding - 1) / kOutputPadding * kOutputPadding; }

// One axis of a resize from in_size to out_size, for `count` outputs from `window` on. reversed: the outputs run from
// the last to the first, which mirrors the view.
struct Axis {
  int64_t in_size, out_size, window, count;
  bool reversed, bicubic;
};

// Output i depends on the inputs first[i] .. first[i] + taps[i] - 1 with the weights weights[tap * padded + i]; past
// its taps the weights are 0.
struct AxisWeights {
  int64_t most_taps, padded;
  int32_t *first, *taps, *weights;
};

// The tables of the horizontal pass. pack_columns fills all but the axis, in the order that the instruction set needs.
struct Columns {
  AxisWeights axis;
  int64_t groups;       // the number of groups of four taps
  bool wide;            // whether four neighbours do not fit into one window of 16 pixels
  int32_t* offsets;     // [padded]
  uint8_t* shuffles;    // [padded * 8]
  int16_t* products;    // [groups * padded * 8]
};

// table[value] is (value / 255 - mean) / std in float32, each step rounded as PyTorch rounds it. `prepare` sets `direct`
// where vector arithmetic gives these 256 numbers bit for bit.
struct Normalisation {
  float mean, std, inverse;
  bool direct;
  const float* table;
};

struct ViewLoops {
  // Scratch: 64 doubles per tap.
  void (*axis_weights)(const Axis& axis, double* scratch, const AxisWeights& out);
  void (*pack_columns)(Columns& columns);
  // Splits interleaved pixels into three planes.
  void (*split)(const uint8_t* pixels, int64_t count, uint8_t* red, uint8_t* green, uint8_t* blue);
  // out[plane][i] = the clipped sum of planes[plane][first[i] + tap] * weight over the taps, as 16-bit words.
  void (*horizontal)(const Columns& columns, const uint8_t* const* planes, uint16_t* const* out);
  // out[i] = the clipped sum of rows[tap][i] * weights[tap] over the taps, for `padded` words.
  void (*vertical)(const uint16_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded, uint16_t* out);
  // Does the same for rows of 8-bit pixels, where the vertical pass comes first.
  void (*vertical_pixels)(const uint8_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded,
                          uint8_t* out);
  void (*prepare)(Normalisation& normalisation);
  void (*normalise)(const uint16_t* values, int64_t count, const Normalisation& normalisation, float* out);
};

RADA_LOOPS(ViewLoops)

// Returns the number of taps that an output of a resize may have: Pillow's ksize.
int64_t most_taps(int64_t in_size, int64_t out_size, bool bicubic);

}  // namespace rada_fast

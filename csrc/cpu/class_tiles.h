// Tiles of classes that go on from one image of a chunk to the next: tiles are then full even where an image has few
// classes, and products of many columns are faster than products of few.
#pragma once

#include "problem.h"

namespace rada_fast {

// The leading dimension for rows of `columns` values that a product reads block by block: an odd number of cache lines,
// so that a column of values does not fall into a few sets of the first-level cache.
inline int64_t spread(int64_t columns) {
  const int64_t lines = divide_up(columns, 16);
  return 16 * (lines + (lines % 2 == 0));
}

// A part of a tile: `columns` classes of one image, which take the tile's columns from `at` on.
struct TilePart {
  int64_t image, first_class, columns, at;

  // The columns to store: those of the part, and an image's padding after its last class.
  int64_t stored(const Problem& p) const {
    return first_class + columns == p.classes ? p.padded - first_class : columns;
  }
};

class ClassTiles {
 public:
  // An image takes `pitch` columns: its classes and, where they must be an even number, one column without a meaning.
  ClassTiles(const Problem& p, int64_t images, int64_t width, int64_t pitch)
      : classes_(p.classes), pitch_(pitch), width_(width), total_(images * pitch) {}

  int64_t width() const { return width_; }
  int64_t count() const { return divide_up(total_, width_); }
  int64_t columns(int64_t tile) const { return std::min(width_, total_ - tile * width_); }

  // Calls body(part) for every part of a tile.
  template <typename Body>
  void parts(int64_t tile, const Body& body) const {
    const int64_t first = tile * width_, end = first + columns(tile);
    for (int64_t column = first; column < end;) {
      const int64_t image = column / pitch_, k0 = column % pitch_, run = std::min(end - column, pitch_ - k0);
      body(TilePart{image, k0, std::min(run, classes_ - k0), column - first});
      column += run;
    }
  }

  // Rows of an array (images, D, padded) for the columns of a tile, as the left factor of a product: the array itself
  // where the tile lies in one image, else a copy in `memory`.
  template <typename T>
  const T* left_rows(const Problem& p, int64_t tile, const T* array, int64_t r0, int64_t rows, T* memory,
                     int64_t& ld) const {
    const int64_t first = tile * width_, image = first / pitch_, k0 = first % pitch_;
    if (k0 + columns(tile) <= pitch_) {
      ld = p.padded;
      return array + image * p.image_size() + r0 * p.padded + k0;
    }
    ld = columns(tile);
    parts(tile, [&](const TilePart& part) {
      const int64_t run = std::min(columns(tile) - part.at, pitch_ - part.first_class);
      for (int64_t r = 0; r < rows; ++r) {
        const T* from = array + part.image * p.image_size() + (r0 + r) * p.padded + part.first_class;
        std::copy(from, from + run, memory + r * ld + part.at);
      }
    });
    return memory;
  }

 private:
  int64_t classes_, pitch_, width_, total_;
};

// Sets columns of an operand to zero: unset memory may hold numbers that slow a product down.
template <typename T>
void clear_columns(T* operand, int64_t ld, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < rows; r += even<T>(1))
    std::fill(operand + r * ld + begin * even<T>(1), operand + r * ld + end * even<T>(1), T());
}

}  // namespace rada_fast

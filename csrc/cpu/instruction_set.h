// Vector loops are compiled once per instruction set, and each processor runs the copy that suits it.
//
// A file called *_loops.cpp is such a set of loops. It is compiled three times (once where the processor is no x86-64),
// each time with other compiler flags and into another namespace, RADA_CAPABILITY: baseline, avx2 or avx512. Its header,
// *_loops.h, declares a struct of function pointers, the table, and ends with RADA_LOOPS(Table). Everything else calls
// chosen_loops<Table>().
//
// The copies use raw pointers and no library templates, and their helpers have internal linkage. An inline function or a
// template of a shared header has one name in all copies: the linker could keep the one that was compiled for AVX-512,
// and an older processor would stop there.
#pragma once

namespace rada_fast {

enum class Level { baseline, avx2, avx512 };

// The best level for this processor, but no better than the one that PyTorch uses (ATEN_CPU_CAPABILITY).
Level level();
const char* level_name();

// A copy's table of loops. Each copy defines its own.
namespace baseline {
template <typename Table>
const Table& loops();
}
namespace avx2 {
template <typename Table>
const Table& loops();
}
namespace avx512 {
template <typename Table>
const Table& loops();
}

// Declares the three copies of one table; use it in namespace rada_fast.
#define RADA_LOOPS(Table)           \
  namespace baseline {              \
  template <>                       \
  const Table& loops<Table>();      \
  }                                 \
  namespace avx2 {                  \
  template <>                       \
  const Table& loops<Table>();      \
  }                                 \
  namespace avx512 {                \
  template <>                       \
  const Table& loops<Table>();      \
  }

#ifndef RADA_CAPABILITY  // The copies must not contain this template, which has one name in all of them.
// Returns the copy of a table that this processor runs.
template <typename Table>
const Table& chosen_loops() {
#if defined(__x86_64__)
  if (level() == Level::avx512) return avx512::loops<Table>();
  if (level() == Level::avx2) return avx2::loops<Table>();
#endif
  return baseline::loops<Table>();
}
#endif

}  // namespace rada_fast

// Which copy of the vector loops (vector_math.cpp, *_loops.cpp) this processor runs.
#pragma once

namespace rada_fast {

enum class Level { baseline, avx2, avx512 };

// The best for this processor, no better than PyTorch's own choice (ATEN_CPU_CAPABILITY).
Level level();

}  // namespace rada_fast

// The types of logits by number, for launchers that take untyped pointers.
#pragma once

namespace rada_fast {

enum PredictionType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace rada_fast

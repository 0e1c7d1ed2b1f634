// How fast this CPU multiplies and adds in registers: the ceiling that the benchmarks compare with.
#pragma once

#include "core.h"

namespace hdit {

// FLOP/s (a multiply-add is two) in float32 of `threads` threads at once, measured for `seconds`. An instruction set without
// a fused multiply-add multiplies, then adds.
template <class InstructionSet>
double peak_float32(int threads, double seconds);

// The same of dot products of pairs in bfloat16, added to float32 (AVX512_BF16, which the CPU must have); 0 where this
// instruction set has none.
template <class InstructionSet>
double peak_bfloat16(int threads, double seconds);

}  // namespace hdit

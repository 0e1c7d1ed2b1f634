// Chains of multiply-adds, each waiting only for itself. A core starts two a cycle and finishes each four or five cycles
// later: twelve chains keep it busy, and with their two factors fit in 16 registers.
#include "peak.h"

#include <time.h>

namespace hdit {
namespace {

constexpr int kChains = 12;
constexpr int64_t kSteps = 20000;  // of every chain between two looks at the clock: about 40 µs

inline double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The compiler must take x for changed: no step is left out or computed ahead.
template <class V>
inline void touch(V& x) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

// x ← x/2 + 1 comes to rest at 2, far from overflow and from subnormal numbers. Returns the FLOP of it all.
double float32_chains() {
  FloatVector x[kChains] = {}, half = FloatVector{} + 0.5f, one = FloatVector{} + 1.0f;
  touch(half);
  touch(one);
  for (int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      x[i] = x[i] * half + one;
      touch(x[i]);
    }
  return 2.0 * kSteps * kChains * kLanes<float>;
}

#if defined(__AVX512F__)
__attribute__((target("avx512bf16"))) double bfloat16_chains() {
  FloatVector x[kChains] = {};
  IntVector ones = IntVector{} + 0x3f803f80;  // two bfloat16 a lane
  touch(ones);
  for (int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      x[i] = (FloatVector)_mm512_dpbf16_ps((__m512)x[i], (__m512bh)ones, (__m512bh)ones);
      touch(x[i]);
    }
  return 4.0 * kSteps * kChains * kLanes<float>;
}
#endif

// FLOP/s of each thread at its best, added up: what interrupts a thread for a moment does not count.
template <class Chains>
double peak(int threads, double seconds, Chains chains) {
  Scratch<double> best(threads);
  for (int i = 0; i < threads; ++i) best.get()[i] = 0;
  parallel_for(threads, threads, [&](int64_t thread, int64_t) {
    const double end = now() + seconds;
    for (double start = now(), stop; start < end; start = stop) {
      const double flops = chains();
      stop = now();
      if (flops > best.get()[thread] * (stop - start)) best.get()[thread] = flops / (stop - start);
    }
  });
  double sum = 0;
  for (int i = 0; i < threads; ++i) sum += best.get()[i];
  return sum;
}

}  // namespace

template <>
double peak_float32<Native>(int threads, double seconds) {
  return peak(threads, seconds, float32_chains);
}

template <>
double peak_bfloat16<Native>(int threads, double seconds) {
#if defined(__AVX512F__)
  return peak(threads, seconds, bfloat16_chains);
#else
  return (void)threads, (void)seconds, 0.0;
#endif
}

}  // namespace hdit

// The device primitives of core.cuh as emulation.h executes them.
#pragma once

#include "emulation.h"

namespace hdit {
namespace core {

using emulation::Place;
using emulation::self;
#define HDIT_PLACE Place place = Place::here()

enum Operation : int { op_sync_warp = 1, op_uniform, op_any, op_max, op_shuffle, op_mma_bf16, op_mma_f16, op_mma_tf32, op_ldmatrix, op_ldmatrix_trans };

// An instruction that a warp executes together.
inline void count_of_warp(emulation::Kind kind, Place place) {
  if (emulation::settings.count) self->block->counts.lines[{place.text(), kind}].requests++;
}

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float as_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t as_bits(float x) { return bits_as<uint32_t>(x); }
inline float opaque(float x) { return x; }
inline uint32_t opaque(uint32_t x) { return x; }

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
// Results are off by as much as the PTX manual allows, up or down by a hash of the argument: relative · |y|, or absolute.
inline float special(float x, double y, double relative, double absolute, Place place) {
  self->block->counts.special++;
  emulation::count(emulation::special_function, 0, 4, place);
  const bool up = (as_bits(x) * 2654435761u) >> 31;
  const double error = std::max(std::fabs(y) * relative, absolute);
  return flushed(float(std::isfinite(y) && error < 1 ? y + (up ? error : -error) : y));
}
inline float exp2(float x, HDIT_PLACE) { return special(x, std::exp2(double(flushed(x))), 1.69e-7, 0, place); }
inline float log2(float x, HDIT_PLACE) { return special(x, std::log2(double(flushed(x))), 1.57e-7, x > 0.5f && x < 2.0f ? 1.57e-7 : 0, place); }
inline float rsqrt(float x, HDIT_PLACE) { return special(x, 1 / std::sqrt(double(flushed(x))), 1.28e-7, 0, place); }
inline float reciprocal(float x, HDIT_PLACE) { return special(x, 1 / double(flushed(x)), 0x1p-23, 0, place); }
inline float sin_fast(float x, HDIT_PLACE) { return special(x, std::sin(double(flushed(x))), 0, 5.11e-7, place); }
inline float cos_fast(float x, HDIT_PLACE) { return special(x, std::cos(double(flushed(x))), 0, 5.11e-7, place); }

inline uint32_t f16_bits(float x) { return bits_as<uint16_t>(static_cast<_Float16>(x)); }
inline uint32_t bf16_bits(float x) {
  const uint32_t bits = as_bits(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float f16_low(uint32_t pair) { return static_cast<float>(bits_as<_Float16>(uint16_t(pair))); }
inline float f16_high(uint32_t pair) { return static_cast<float>(bits_as<_Float16>(uint16_t(pair >> 16))); }

inline uint32_t max_magnitude_f16(uint32_t a, uint32_t b) {
  return pack_f16(std::fmax(f16_low(a), std::fabs(f16_low(b))), std::fmax(f16_high(a), std::fabs(f16_high(b))));
}
inline uint32_t max_magnitude_bf16(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t x, uint32_t y) { return std::fmax(as_float(x), std::fabs(as_float(y))); };
  return pack_bf16(larger(a << 16, b << 16), larger(a & 0xffff0000u, b & 0xffff0000u));
}

inline void sync_block(HDIT_PLACE) {
  self->place = place;
  self->state = emulation::State::at_barrier;
  emulation::give_way();
}
inline void sync_warp(HDIT_PLACE) {
  emulation::meet(op_sync_warp, place, nullptr, [](void**) {
    self->warp->epoch++;
    if (emulation::settings.count) emulation::close_sites(*self->block, *self->warp);
  });
}
inline int uniform(int x, HDIT_PLACE) {
  emulation::meet(op_uniform, place, &x, [](void** all) {
    for (int lane = 1; lane < 32; ++lane)
      if (*static_cast<int*>(all[lane]) != *static_cast<int*>(all[0])) emulation::fail("uniform() of different values");
  });
  return x;
}
inline bool any(bool x, HDIT_PLACE) {
  struct Arguments {
    bool in, out;
  } arguments{x, x};
  emulation::meet(op_any, place, &arguments, [](void** all) {
    bool found = false;
    for (int lane = 0; lane < 32; ++lane) found = found || static_cast<Arguments*>(all[lane])->in;
    for (int lane = 0; lane < 32; ++lane) static_cast<Arguments*>(all[lane])->out = found;
  });
  return arguments.out;
}
inline uint32_t max_of_warp(uint32_t x, HDIT_PLACE) {
  struct Arguments {
    uint32_t in, out;
  } arguments{x, 0};
  emulation::meet(op_max, place, &arguments, [](void** all) {
    uint32_t most = 0;
    for (int lane = 0; lane < 32; ++lane) most = std::max(most, static_cast<Arguments*>(all[lane])->in);
    for (int lane = 0; lane < 32; ++lane) static_cast<Arguments*>(all[lane])->out = most;
  });
  return arguments.out;
}
template <class T>
inline T shuffle_xor(T x, int mask, HDIT_PLACE) {
  static_assert(sizeof(T) == 4);
  struct Arguments {
    T in, out;
    int mask;
  } arguments{x, x, mask};
  emulation::meet(op_shuffle, place, &arguments, [place](void** all) {
    self->block->counts.shuffles++;
    count_of_warp(emulation::shuffle, place);
    for (int lane = 0; lane < 32; ++lane) {
      auto* me = static_cast<Arguments*>(all[lane]);
      me->out = static_cast<Arguments*>(all[(lane ^ me->mask) & 31])->in;
    }
  });
  return arguments.out;
}

// d += a·b of a warp. kDepth: 16 with pairs of 16-bit elements in a register, 8 with one tf32 each. `read(register, i)`.
struct MmaArguments {
  float* d;
  uint32_t a[4], b[2];
};
template <int kDepth, class Read>
inline void multiply(void** all, Read read, Place place) {
  constexpr int kPer = kDepth / 8;  // elements in a register
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<MmaArguments*>(all[lane]);
    const int row = lane >> 2, t = lane & 3;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < kPer; ++e) a[row + 8 * (i & 1)][kPer * (t + 4 * (i >> 1)) + e] = read(x.a[i], e);
      d[row + 8 * (i >> 1)][2 * t + (i & 1)] = x.d[i];
    }
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < kPer; ++e) b[kPer * (t + 4 * i) + e][row] = read(x.b[i], e);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<MmaArguments*>(all[lane]);
    for (int i = 0; i < 4; ++i) x.d[i] = d[(lane >> 2) + 8 * (i >> 1)][2 * (lane & 3) + (i & 1)];
  }
  self->block->counts.mma++;
  count_of_warp(emulation::product, place);
  self->block->counts.mma_fma += 2048;  // tf32 has half the rate: its 1024 products cost as much
}
inline float read_bf16(uint32_t bits, int i) { return as_float(i ? bits & 0xffff0000u : bits << 16); }
inline float read_f16(uint32_t bits, int i) { return i ? f16_high(bits) : f16_low(bits); }
inline float read_tf32(uint32_t bits, int) { return as_float(bits & 0xffffe000u); }

#define HDIT_MMA(name, kDepth, read)                                                                                    \
  inline void name(float(&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,          \
                   HDIT_PLACE) {                                                                                        \
    MmaArguments arguments{d, {a0, a1, a2, a3}, {b0, b1}};                                                              \
    emulation::meet(op_##name, place, &arguments, [place](void** all) { multiply<kDepth>(all, read, place); }); \
  }                                                                                                                     \
  inline void name(float(&d)[4], const float(&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,   \
                   uint32_t b1, HDIT_PLACE) {                                                                           \
    for (int i = 0; i < 4; ++i) d[i] = c[i];                                                                            \
    name(d, a0, a1, a2, a3, b0, b1, place);                                                                             \
  }
HDIT_MMA(mma_bf16, 16, read_bf16)
HDIT_MMA(mma_f16, 16, read_f16)
HDIT_MMA(mma_tf32, 8, read_tf32)
#undef HDIT_MMA

template <bool kTransposed>
inline void ldmatrix(uint32_t (&r)[4], uint32_t at, Place place) {
  struct Arguments {
    uint32_t* r;
    const unsigned char* row;
  } arguments{r, emulation::touch_shared(false, at, 16, place)};
  emulation::count(emulation::shared_read, at, 16, place);
  emulation::meet(kTransposed ? op_ldmatrix_trans : op_ldmatrix, place, &arguments, [](void** all) {
    self->block->counts.ldmatrix++;
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], static_cast<Arguments*>(all[8 * m + i])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane >> 2, j = 2 * (lane & 3);
        const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
        const uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
        static_cast<Arguments*>(all[lane])->r[m] = low | high << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, HDIT_PLACE) { ldmatrix<false>(r, row, place); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, HDIT_PLACE) { ldmatrix<true>(r, row, place); }

inline uint32_t dynamic_shared() { return 1024; }  // as on sm_90, where the first KiB is the system's
template <class T>
inline T load_shared(uint32_t at, HDIT_PLACE) {
  T x;
  std::memcpy(&x, emulation::touch_shared(false, at, sizeof(T), place), sizeof(T));
  emulation::count(emulation::shared_read, at, sizeof(T), place);
  return x;
}
template <class T>
inline void store_shared(uint32_t at, T x, HDIT_PLACE) {
  std::memcpy(emulation::touch_shared(true, at, sizeof(T), place), &x, sizeof(T));
  emulation::count(emulation::shared_write, at, sizeof(T), place);
}
template <class T>
inline T load_global(const void* p, HDIT_PLACE) {
  T x;
  emulation::touch_global(false, p, sizeof(T), sizeof(T), place);
  std::memcpy(&x, p, sizeof(T));
  emulation::count(emulation::global_read, reinterpret_cast<uintptr_t>(p), sizeof(T), place);
  return x;
}
template <class T>
inline T load_own(const T* p, HDIT_PLACE) {
  return load_global<T>(p, place);
}
template <class T>
inline void store_global(void* p, T x, HDIT_PLACE) {
  emulation::touch_global(true, p, sizeof(T), sizeof(T), place);
  std::memcpy(p, &x, sizeof(T));
  emulation::count(emulation::global_write, reinterpret_cast<uintptr_t>(p), sizeof(T), place);
}

template <int kBytes>
inline void copy_async(uint32_t at, const void* p, Place place) {
  unsigned char* const to = emulation::touch_shared(true, at, kBytes, place);
  emulation::touch_global(false, p, kBytes, kBytes, place);
  emulation::count(emulation::global_read, reinterpret_cast<uintptr_t>(p), kBytes, place);
  emulation::count(emulation::shared_write, at, kBytes, place);
  std::memset(to, 0xff, kBytes);
  self->copies.push_back({to, p, self->groups, kBytes});
}
inline void copy_async_16(uint32_t at, const void* p, HDIT_PLACE) { copy_async<16>(at, p, place); }
inline void copy_async_4(uint32_t at, const void* p, HDIT_PLACE) { copy_async<4>(at, p, place); }
inline void copy_async_commit() { self->groups++; }
template <int left>
inline void copy_async_wait(HDIT_PLACE) {
  size_t kept = 0;
  for (const emulation::Copy& copy : self->copies) {
    if (copy.group >= self->groups - left) {
      self->copies[kept++] = copy;
      continue;
    }
    emulation::touch_shared(true, uint32_t(copy.to - self->block->shared) + 1024, copy.bytes, place);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  self->copies.resize(kept);
}
#undef HDIT_PLACE

}  // namespace core
}  // namespace hdit

// What tests/test_emulation.py compiles for the CPU: each warp primitive once, and kernels with a mistake each, planted to see
// that the emulation finds it. Each function returns an error's text, or null.
#include "core.cuh"

using namespace hdit;

namespace {

thread_local std::string message;

template <class Run>
const char* caught(Run run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

int lane() { return threadIdx.x & 31; }

// ---- primitives ------------------------------------------------------------------------------------------------------------
// d = a·b from fragments as the PTX manual has them: a (16, depth), b (depth, 8), d (16, 8); 16-bit elements, or float32.
void product_kernel(int kind, const uint16_t* a, const uint16_t* b, const float* a32, const float* b32, float* d) {
  const int row = lane() >> 2, t = lane() & 3;
  float c[4] = {1, 1, 1, 1}, result[4];
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i) {
    const int at_row = row + 8 * (i & 1), at = t + 4 * (i >> 1);
    x[i] = kind == 2 ? core::as_bits(a32[at_row * 8 + at]) : a[at_row * 16 + 2 * at] | uint32_t(a[at_row * 16 + 2 * at + 1]) << 16;
  }
  for (int i = 0; i < 2; ++i) {
    const int at = t + 4 * i;
    y[i] = kind == 2 ? core::as_bits(b32[at * 8 + row]) : b[2 * at * 8 + row] | uint32_t(b[(2 * at + 1) * 8 + row]) << 16;
  }
  if (kind == 0) core::mma_bf16(result, c, x[0], x[1], x[2], x[3], y[0], y[1]);
  if (kind == 1) core::mma_f16(result, c, x[0], x[1], x[2], x[3], y[0], y[1]);
  if (kind == 2) core::mma_tf32(result, c, x[0], x[1], x[2], x[3], y[0], y[1]);
  for (int i = 0; i < 4; ++i) d[(row + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = result[i];
}

// Four 8×8 matrices through shared memory: r (32 lanes, 4) as ldmatrix gives them.
void matrices_kernel(bool transposed, const uint16_t* matrices, uint32_t* r) {
  const uint32_t row = core::dynamic_shared() + 16 * lane();
  core::store_shared(row, core::load_global<uint4>(matrices + 8 * lane()));
  core::sync_warp();
  uint32_t got[4];
  if (transposed) core::ldmatrix_x4_trans(got, row);
  else core::ldmatrix_x4(got, row);
  for (int i = 0; i < 4; ++i) r[4 * lane() + i] = got[i];
}

void shuffle_kernel(const float* x, int mask, float* y) { y[lane()] = core::shuffle_xor(x[lane()], mask); }

// ---- mistakes: 64 threads, 1 KiB of shared memory; x and y have 64 floats --------------------------------------------------
struct Data {
  const float* x;
  float* y;
};
uint32_t place(int i) { return core::dynamic_shared() + 4 * i; }
const float* from(Data data) { return data.x + threadIdx.x; }
void put(Data data, float value) { core::store_global(data.y + threadIdx.x, value); }

void right(Data data) {
  core::store_shared(place(threadIdx.x), core::load_global<float>(from(data)));
  core::sync_block();
  put(data, core::load_shared<float>(place(63 - threadIdx.x)));
}
void no_barrier(Data data) {
  core::store_shared(place(threadIdx.x), core::load_global<float>(from(data)));
  put(data, core::load_shared<float>(place(63 - threadIdx.x)));
}
void no_warp_barrier(Data data) {
  core::store_shared(place(threadIdx.x), core::load_global<float>(from(data)));
  put(data, core::load_shared<float>(place(threadIdx.x ^ 1)));
}
void early_overwrite(Data data) {  // after a read by the other warp
  core::store_shared(place(threadIdx.x), core::load_global<float>(from(data)));
  core::sync_block();
  put(data, core::load_shared<float>(place(63 - threadIdx.x)));
  core::store_shared(place(threadIdx.x), 0.0f);
}
void no_wait(Data data) {
  core::copy_async_4(place(threadIdx.x), from(data));
  core::copy_async_commit();
  put(data, core::load_shared<float>(place(threadIdx.x)));
  core::copy_async_wait<0>();
}
void short_wait(Data data) {
  core::copy_async_4(place(threadIdx.x), from(data));
  core::copy_async_commit();
  core::copy_async_wait<1>();
  put(data, core::load_shared<float>(place(threadIdx.x)));
  core::copy_async_wait<0>();
}
void never_waits(Data data) {
  core::copy_async_4(place(threadIdx.x), from(data));
  core::copy_async_commit();
  put(data, 0);
}
void unwritten(Data data) { put(data, core::load_shared<float>(place(threadIdx.x))); }
void shared_overrun(Data data) { put(data, core::load_shared<float>(place(threadIdx.x + 193))); }
void shared_misaligned(Data data) { put(data, core::load_shared<uint2>(place(threadIdx.x)).x); }
void global_overrun(Data data) { put(data, core::load_global<float>(from(data) + 1)); }
void global_underrun(Data data) { core::store_global(data.y + int(threadIdx.x) - 1, 0.0f); }
void global_misaligned(Data data) { put(data, core::load_global<float4>(from(data)).x); }
void written_twice(Data data) { core::store_global(data.y + threadIdx.x / 2, 1.0f); }
void written_by_two_blocks(Data data) { put(data, 1.0f); }
void read_of_anothers(Data data) {
  put(data, core::load_global<float>(from(data)));
  core::sync_block();
  put(data, core::load_global<float>(data.y + (63 - threadIdx.x)));
}
void branch(Data data) {
  float x = core::load_global<float>(from(data));
  if (lane() < 7) x = core::shuffle_xor(x, 1);
  else x = core::shuffle_xor(x, 2);
  put(data, x);
}
void returned_lane(Data data) {
  if (lane() == 3) return;
  put(data, core::shuffle_xor(core::load_global<float>(from(data)), 1));
}
void two_barriers(Data data) {
  put(data, core::load_global<float>(from(data)));
  if (threadIdx.x < 32) core::sync_block();
  else core::sync_block();
}
void returned_warp(Data data) {
  put(data, core::load_global<float>(from(data)));
  if (threadIdx.x < 32) core::sync_block();
}
void barrier_against_shuffle(Data data) {
  put(data, core::load_global<float>(from(data)));
  if (lane() == 0) core::sync_block();
  else core::sync_warp();
}
void not_uniform(Data data) { put(data, float(core::uniform(threadIdx.x))); }

const struct {
  const char* name;
  void (*kernel)(Data);
  unsigned blocks;
} kMistakes[] = {
#define HDIT_MISTAKE(name) {#name, name, 1}
    HDIT_MISTAKE(right), HDIT_MISTAKE(no_barrier), HDIT_MISTAKE(no_warp_barrier), HDIT_MISTAKE(early_overwrite),
    HDIT_MISTAKE(no_wait), HDIT_MISTAKE(short_wait), HDIT_MISTAKE(never_waits), HDIT_MISTAKE(unwritten),
    HDIT_MISTAKE(shared_overrun), HDIT_MISTAKE(shared_misaligned), HDIT_MISTAKE(global_overrun),
    HDIT_MISTAKE(global_underrun), HDIT_MISTAKE(global_misaligned), HDIT_MISTAKE(written_twice),
    {"written_by_two_blocks", written_by_two_blocks, 2}, HDIT_MISTAKE(read_of_anothers), HDIT_MISTAKE(branch),
    HDIT_MISTAKE(returned_lane), HDIT_MISTAKE(two_barriers), HDIT_MISTAKE(returned_warp),
    HDIT_MISTAKE(barrier_against_shuffle), HDIT_MISTAKE(not_uniform),
#undef HDIT_MISTAKE
};

template <class T>
std::pair<uintptr_t, size_t> tensor(const T* p, size_t count) {
  return {reinterpret_cast<uintptr_t>(p), count * sizeof(T)};
}

}  // namespace

extern "C" {

const char* product(int kind, const uint16_t* a, const uint16_t* b, const float* a32, const float* b32, float* d) {
  return caught([=] { core::launch("product", product_kernel, 1, 32, 0, nullptr, kind, a, b, a32, b32, d); });
}

const char* matrices(bool transposed, const uint16_t* from, uint32_t* r) {
  emulation::allow({tensor(from, 256)});
  return caught([=] { core::launch("matrices", matrices_kernel, 1, 32, 512, nullptr, transposed, from, r); });
}

const char* shuffle(const float* x, int mask, float* y) {
  return caught([=] { core::launch("shuffle", shuffle_kernel, 1, 32, 0, nullptr, x, mask, y); });
}

// The special functions and the conversions of n numbers: y (9, n).
void functions(const float* x, int n, float* y) {
  emulation::Lane lane;
  emulation::Block block;
  lane.block = &block;
  emulation::self = &lane;
  for (int i = 0; i < n; ++i) {
    float cosine, sine;
    core::sincos(x[i], cosine, sine);
    const uint32_t f16 = core::pack_f16(x[i], -x[i]), bf16 = core::pack_bf16(x[i], -x[i]);
    const float all[] = {core::exp2(x[i]),   core::log2(x[i]),    core::rsqrt(x[i]), core::reciprocal(x[i]), cosine, sine,
                         core::f16_low(f16), core::f16_high(f16), core::bf16_low(bf16), core::bf16_high(bf16)};
    for (int j = 0; j < 10; ++j) y[j * n + i] = all[j];
  }
  emulation::self = nullptr;
}

// Runs the i-th mistake; order 0, 1, 2: forward, reverse, shuffled. Its name is null after the last one.
const char* mistake_name(int i) { return i < int(sizeof kMistakes / sizeof *kMistakes) ? kMistakes[i].name : nullptr; }
const char* mistake(int i, int order, bool races, const float* x, float* y) {
  emulation::settings = {emulation::Order(order), 7, false, races};
  emulation::allow({tensor(x, 64), tensor(y, 64)});
  return caught([=] { core::launch(kMistakes[i].name, kMistakes[i].kernel, kMistakes[i].blocks, 64, 1024, nullptr, Data{x, y}); });
}

// Counts of `right`-like accesses: reads of shared memory with a stride of `words` words by 32 threads, and of global memory.
void stride_kernel(int words, const float* x, float* y) {
  for (int i = 0; i < 32; ++i) core::store_shared(place(i * 32 + threadIdx.x), 1.0f);
  core::sync_warp();
  const float a = core::load_shared<float>(place(threadIdx.x * words));
  core::store_global(y + threadIdx.x, a + core::load_global<float>(x + threadIdx.x * words));
}
const char* count_strides(int words, const float* x, float* y, int64_t* units) {
  emulation::settings = {emulation::Order::forward, 1, true, true};
  emulation::allow({tensor(x, 1024), tensor(y, 32)});
  emulation::launches.clear();
  const char* error = caught([=] { core::launch("strides", stride_kernel, 1, 32, 4096, nullptr, words, x, y); });
  emulation::settings.count = false;
  if (error) return error;
  for (const auto& [key, line] : emulation::launches[0].counts.lines) units[key.second] = line.units;
  units[4] = sectors_once(emulation::launches[0].counts, emulation::global_read);
  return nullptr;
}
}

// CUDA kernels executed on a CPU: the device primitives of core.cuh as what their instructions do, checked and counted.
//
// The threads of a block are fibers. A warp instruction (mma, ldmatrix, shuffle, __syncwarp) is a meeting of 32 fibers, and the
// last to arrive does it for all; a barrier is a meeting of all warps. Everything is as unkind as the programming model allows:
//   * shared memory is NaN until written; a cp.async destination is NaN from the copy's start to its wait, and the copy is
//     made as late as is legal;
//   * threads run in forward, reverse or shuffled order between meetings;
//   * every access is checked for bounds (global memory: against the tensors of the call) and alignment;
//   * a shadow of shared and of global memory records who touched each word since the last barrier: a race is reported also
//     where the result came out right;
//   * threads that meet at different instructions, or wait for one that has returned, are reported with both lines.
// The first mistake ends the launch with an exception that names the kernel, block, thread and line. On request accesses are
// counted as the hardware would serve them: sectors, bank conflicts, products, special functions, per line of the source.
//
// Not modelled: latency, caches, arithmetic instructions (ahead-of-time SASS tells those), mbarriers, TMA, wgmma, clusters.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---- the names of CUDA that kernels use --------------------------------------------------------------------------------
#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
#define threadIdx (hdit::emulation::self->thread)
#define blockIdx (hdit::emulation::self->block->id)
#define blockDim (hdit::emulation::self->block->size)
#define gridDim (hdit::emulation::self->block->grid)

namespace hdit {
namespace emulation {

// ---- settings and results ------------------------------------------------------------------------------------------------
enum class Order { forward, reverse, shuffled };

struct Settings {
  Order order = Order::forward;
  uint64_t seed = 1;
  bool count = false;
  bool races = true;
  int multiprocessors = 2;  // of the device, as launchers are told: few, so that small tests have long marches too
  size_t shared_bytes = 232448;  // that a block can have: of sm_90; 166912 on sm_80
};
inline Settings settings;

// Where in the source a primitive was called.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Place& other) const { return line == other.line && file == other.file; }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  }
};

enum Kind : int { shared_read, shared_write, global_read, global_write, special_function, shuffle, product };

struct LineCounts {
  uint64_t requests = 0, lanes = 0, bytes = 0;
  uint64_t units = 0, ideal = 0;  // wavefronts of shared memory or sectors of 32 bytes: as accessed, and at the least
  std::unordered_set<uintptr_t> sectors;  // of global memory, each once
};

struct Counts {
  uint64_t blocks = 0, barriers = 0, mma = 0, mma_fma = 0, ldmatrix = 0, shuffles = 0, special = 0;
  std::map<std::pair<std::string, int>, LineCounts> lines;      // (place, Kind)

  void add(const Counts& other) {
    blocks += other.blocks, barriers += other.barriers, mma += other.mma, mma_fma += other.mma_fma;
    ldmatrix += other.ldmatrix, shuffles += other.shuffles, special += other.special;
    for (const auto& [key, more] : other.lines) {
      LineCounts& mine = lines[key];
      mine.requests += more.requests, mine.lanes += more.lanes, mine.bytes += more.bytes;
      mine.units += more.units, mine.ideal += more.ideal;
      mine.sectors.insert(more.sectors.begin(), more.sectors.end());
    }
  }
};

// Sectors of global memory that were read, or written, each once.
inline size_t sectors_once(const Counts& counts, Kind kind) {
  std::unordered_set<uintptr_t> once;
  for (const auto& [key, line] : counts.lines)
    if (key.second == kind) once.insert(line.sectors.begin(), line.sectors.end());
  return once.size();
}

struct Launch {
  std::string call;
  uintptr_t kernel = 0;  // where its code begins, from the beginning of this module: what nm tells of
  dim3 grid, block;
  size_t shared_bytes = 0;
  Counts counts;
};
inline std::vector<Launch> launches;  // since the last time that somebody asked

// ---- global memory: the tensors of the call ------------------------------------------------------------------------------
// A shadow for every two bytes: who wrote them in this launch, as block (40 bits) and thread (24); 0: nobody.
struct Range {
  uintptr_t begin, end;
  std::unique_ptr<uint64_t[]> writers;
  bool written = false;
};
inline std::vector<Range> ranges;  // sorted, apart from each other

// The memory that launches may touch from now on, as (address, bytes).
inline void allow(std::vector<std::pair<uintptr_t, size_t>> tensors) {
  std::sort(tensors.begin(), tensors.end());
  ranges.clear();
  for (const auto& [begin, bytes] : tensors) {
    if (bytes == 0) continue;
    if (!ranges.empty() && begin <= ranges.back().end) ranges.back().end = std::max(ranges.back().end, begin + bytes);
    else ranges.push_back({begin, begin + bytes, nullptr});
  }
}

// ---- fibers ----------------------------------------------------------------------------------------------------------------
// hdit_fiber_switch(&mine, other): saves this fiber's registers on its stack and its stack pointer in `mine`, goes on with the
// fiber whose stack pointer is `other`. A symbol of each object file.
#if defined(__x86_64__)
constexpr int kSavedWords = 6;
asm(R"(
.text
.local hdit_fiber_switch
.type hdit_fiber_switch, @function
hdit_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hdit_fiber_switch, .-hdit_fiber_switch
)");
#elif defined(__aarch64__)
constexpr int kSavedWords = 20;  // x19 … x30, d8 … d15; the word of x30 is where a fiber goes on
asm(R"(
.text
.local hdit_fiber_switch
.type hdit_fiber_switch, %function
hdit_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size hdit_fiber_switch, .-hdit_fiber_switch
)");
#else
#error "emulation.h: hdit_fiber_switch is written for x86-64 and aarch64"
#endif
extern "C" __attribute__((visibility("hidden"))) void hdit_fiber_switch(void** mine, void* other);

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Warp;
struct Block;
enum class State : uint8_t { ready, at_warp, at_barrier, done };

struct Copy {
  unsigned char* to;
  const void* from;
  int group, bytes;
};

// One thread of the GPU.
struct Lane {
  dim3 thread;
  int index = 0, lane = 0;
  State state = State::ready;
  Warp* warp = nullptr;
  Block* block = nullptr;
  Place place = {"", 0};
  int groups = 0;            // of cp.async, committed
  std::vector<Copy> copies;  // not yet made
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_fake = nullptr;
};

// What lanes did at one place, the same number of visits in: one request of the warp.
struct Request {
  uintptr_t address[32];
  uint32_t mask = 0;
  int bytes = 0;
};
struct Site {
  Place place;
  Kind kind;
  uint32_t visits[32] = {}, closed = 0;
  std::vector<Request> open;
};

struct Warp {
  Lane* lane[32];
  uint8_t order[32], rank[32];  // in which lanes take turns
  int index = 0, waiting = 0, alive = 32;
  int operation = 0;
  Place place = {"", 0};  // of the instruction that lanes wait at
  uint32_t epoch = 0;     // grows with __syncwarp and barriers
  void* arguments[32];
  std::vector<Site> sites;
};

// Who touched a word of shared memory since the last barrier.
struct Word {
  uint32_t write_epoch = 0, read_epoch = 0, readers = 0, warp_epoch = 0;
  uint16_t writer = 0xffff;
};

struct Block {
  dim3 grid, size, id;
  int64_t number = 0;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Word> words;
  uint32_t epoch = 1;  // grows with barriers
  std::string* error = nullptr;
  bool failed = false;
  uint64_t random = 1;
  const std::function<void()>* body = nullptr;
  Counts counts;
  size_t last_range = 0;
  void* scheduler = nullptr;  // its stack pointer
  void* asan_fake = nullptr;
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
};

inline __thread Lane* self = nullptr;
inline std::mutex error_lock;

// Goes on with `next`, or with the scheduler of the block where that is null.
inline void switch_to(void** save, void** asan_fake, Lane* next, Block* block) {
#if defined(__SANITIZE_ADDRESS__)
  if (next) __sanitizer_start_switch_fiber(asan_fake, next->stack, kStackBytes);
  else __sanitizer_start_switch_fiber(asan_fake, block->asan_bottom, block->asan_size);
#endif
  Lane* const me = self;
  if (next) self = next;
  hdit_fiber_switch(save, next ? next->stack_pointer : block->scheduler);
  self = me;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(*asan_fake, nullptr, nullptr);
#endif
  (void)asan_fake;
}

inline void set_error(Block* block, const std::string& what) {
  const std::lock_guard<std::mutex> hold(error_lock);
  if (block->error->empty()) *block->error = what;
  block->failed = true;
}

// Reports a mistake of this thread, and never goes on with it.
[[noreturn]] inline void fail(const std::string& what) {
  Lane* const me = self;
  const dim3 id = me->block->id;
  set_error(me->block, what + " [block (" + std::to_string(id.x) + ", " + std::to_string(id.y) + ", " + std::to_string(id.z) +
                           "), thread " + std::to_string(me->index) + ", warp " + std::to_string(me->index / 32) + " lane " +
                           std::to_string(me->lane) + ", " + me->place.text() + "]");
  for (;;) switch_to(&me->stack_pointer, &me->asan_fake, nullptr, me->block);
}

inline uint64_t random_next(uint64_t& state) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

// Draws the order of the lanes anew.
inline void set_order(Block& block, Warp& warp) {
  for (int i = 0; i < 32; ++i) warp.order[i] = settings.order == Order::reverse ? 31 - i : i;
  if (settings.order == Order::shuffled)
    for (int i = 31; i > 0; --i) std::swap(warp.order[i], warp.order[random_next(block.random) % (i + 1)]);
  for (int i = 0; i < 32; ++i) warp.rank[warp.order[i]] = i;
}

inline Lane* next_ready(const Warp& warp, int after) {
  for (int i = 1; i <= 32; ++i) {
    Lane* const lane = warp.lane[warp.order[(warp.rank[after] + i) & 31]];
    if (lane->state == State::ready) return lane;
  }
  return nullptr;
}

inline void give_way() {
  Lane* const me = self;
  switch_to(&me->stack_pointer, &me->asan_fake, next_ready(*me->warp, me->lane), me->block);
}

// A warp instruction: all 32 lanes meet, the last one runs act(arguments of all lanes).
template <class Act>
void meet(int operation, Place place, void* arguments, Act act) {
  Lane* const me = self;
  Warp* const warp = me->warp;
  me->place = place;
  if (warp->waiting == 0) warp->operation = operation, warp->place = place;
  else if (warp->operation != operation || !(warp->place == place))
    fail("divergence: lanes of a warp are at different warp instructions, " + warp->place.text() + " and " + place.text());
  if (warp->alive < 32) fail("divergence: a warp instruction after a lane of the warp has returned");
  warp->arguments[me->lane] = arguments;
  if (++warp->waiting < 32) {
    me->state = State::at_warp;
    return give_way();
  }
  warp->waiting = 0;
  for (Lane* lane : warp->lane)
    if (lane->state == State::at_warp) lane->state = State::ready;
  act(warp->arguments);
}

// ---- counting accesses -------------------------------------------------------------------------------------------------
inline int lanes_per_pass(int bytes) { return bytes <= 4 ? 32 : bytes == 8 ? 16 : 8; }

inline int distinct(uintptr_t* values, int n) {
  std::sort(values, values + n);
  return int(std::unique(values, values + n) - values);
}

// Shared memory serves 32 lanes at once, 16 that want 8 bytes, 8 that want 16; each pass takes as long as its fullest bank has
// distinct words.
inline int wavefronts(const Request& request, bool ideal) {
  const int lanes = lanes_per_pass(request.bytes);
  int total = 0;
  for (int first = 0; first < 32; first += lanes) {
    uintptr_t words[32];
    int n = 0, per_bank[32] = {}, most = 0;
    for (int lane = first; lane < first + lanes; ++lane)
      if (request.mask >> lane & 1)
        for (int b = 0; b < std::max(request.bytes, 4); b += 4) words[n++] = (request.address[lane] + b) / 4;
    if (ideal) {
      total += n > 0;
      continue;
    }
    n = distinct(words, n);
    for (int i = 0; i < n; ++i) most = std::max(most, ++per_bank[words[i] & 31]);
    total += most;
  }
  return total;
}

inline void close_request(Block& block, const Site& site, const Request& request) {
  LineCounts& counts = block.counts.lines[{site.place.text(), site.kind}];
  const int lanes = __builtin_popcount(request.mask);
  counts.requests += 1, counts.lanes += lanes, counts.bytes += uint64_t(lanes) * request.bytes;
  if (site.kind > global_write) return;
  if (site.kind <= shared_write) {
    counts.units += wavefronts(request, false), counts.ideal += wavefronts(request, true);
    return;
  }
  uintptr_t sectors[32];
  int n = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (request.mask >> lane & 1) sectors[n++] = request.address[lane] / 32;
  n = distinct(sectors, n);
  counts.sectors.insert(sectors, sectors + n);
  counts.units += n, counts.ideal += (uint64_t(lanes) * request.bytes + 31) / 32;
}

inline void close_sites(Block& block, Warp& warp) {
  for (Site& site : warp.sites) {
    for (const Request& request : site.open)
      if (request.mask) close_request(block, site, request);
    site.open.clear();
    site.closed = 0;
    std::memset(site.visits, 0, sizeof site.visits);
  }
}

inline void count(Kind kind, uintptr_t address, int bytes, Place place) {
  if (!settings.count) return;
  Lane* const me = self;
  Warp& warp = *me->warp;
  Site* site = nullptr;
  for (Site& known : warp.sites)
    if (known.kind == kind && known.place == place) site = &known;
  if (!site) {
    warp.sites.push_back({place, kind, {}, 0, {}});
    site = &warp.sites.back();
  }
  const uint32_t at = site->visits[me->lane]++ - site->closed;
  if (at >= site->open.size()) site->open.resize(at + 1);
  Request& request = site->open[at];
  request.address[me->lane] = address;
  request.mask |= 1u << me->lane;
  request.bytes = bytes;
  if (request.mask == ~0u) {
    close_request(*me->block, *site, request);
    request.mask = 0;
    if (at == 0) site->open.erase(site->open.begin()), ++site->closed;
  }
}

// ---- checking accesses ---------------------------------------------------------------------------------------------------
// Bounds, alignment and races of an access to shared memory.
inline unsigned char* touch_shared(bool write, uint32_t address, int bytes, Place place) {
  Lane* const me = self;
  Block& block = *me->block;
  me->place = place;
  const int64_t at = int64_t(address) - 1024;
  const auto where = [&] { return ", offset " + std::to_string(at) + " of " + std::to_string(block.shared_bytes); };
  if (at < 0 || at + bytes > int64_t(block.shared_bytes)) fail("shared memory overrun" + where());
  if (at % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes to shared memory" + where());
  if (settings.races) {
    const auto race = [&](const char* before, const char* missing) {
      fail(std::string("race: ") + (write ? "write" : "read") + " after " + before + " without " + missing + where());
    };
    const int warp = me->warp->index;
    for (int64_t i = at / 4; i < (at + bytes + 3) / 4; ++i) {
      Word& word = block.words[i];
      if (word.write_epoch == block.epoch && word.writer != me->index) {
        const std::string writer = "a write by thread " + std::to_string(word.writer);
        if (word.writer / 32 != warp) race(writer.c_str(), "a barrier");
        if (word.warp_epoch == me->warp->epoch) race((writer + " of the same warp").c_str(), "__syncwarp");
      }
      if (write) {
        if (word.read_epoch == block.epoch && (word.readers & ~(1u << warp))) race("a read by another warp", "a barrier");
        word.write_epoch = block.epoch, word.writer = me->index, word.warp_epoch = me->warp->epoch;
      } else {
        if (word.read_epoch != block.epoch) word.read_epoch = block.epoch, word.readers = 0;
        word.readers |= 1u << warp;
      }
    }
  }
  return block.shared + at;
}

inline Range& range_of(uintptr_t address, int bytes) {
  Block& block = *self->block;
  const auto holds = [&](const Range& r) { return r.begin <= address && address + bytes <= r.end; };
  if (block.last_range < ranges.size() && holds(ranges[block.last_range])) return ranges[block.last_range];
  for (size_t i = 0; i < ranges.size(); ++i)
    if (holds(ranges[i])) return block.last_range = i, ranges[i];
  fail("global memory overrun: " + std::to_string(bytes) + " bytes outside of every tensor of the call");
}

// The same for global memory. Within one launch nobody reads what another thread wrote, or writes it again.
inline void touch_global(bool write, const void* p, int bytes, int alignment, Place place) {
  Lane* const me = self;
  me->place = place;
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % alignment) fail("misaligned access of " + std::to_string(bytes) + " bytes to global memory");
  Range& range = range_of(address, bytes);
  if (!settings.races || (!write && !__atomic_load_n(&range.written, __ATOMIC_RELAXED))) return;
  const uint64_t writer = uint64_t(me->block->number + 1) << 24 | uint64_t(me->index);
  if (write) __atomic_store_n(&range.written, true, __ATOMIC_RELAXED);
  for (uintptr_t i = (address - range.begin) / 2; i < (address - range.begin + bytes + 1) / 2; ++i) {
    const uint64_t before = write ? __atomic_exchange_n(&range.writers[i], writer, __ATOMIC_RELAXED)
                                  : __atomic_load_n(&range.writers[i], __ATOMIC_RELAXED);
    if (before != 0 && before != writer)
      fail(std::string("race in global memory: ") + (write ? "write" : "read") + " after a write by thread " +
           std::to_string(before & 0xffffff) + " of block " + std::to_string((before >> 24) - 1));
  }
}

// ---- running a grid --------------------------------------------------------------------------------------------------------
inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Lane* const me = self;
  (*me->block->body)();
  if (!me->copies.empty()) fail("a thread returned without waiting for its cp.async");
  me->state = State::done;
  me->warp->alive--;
  if (me->warp->waiting) fail("divergence: a lane returned while others wait at " + me->warp->place.text());
  give_way();
  std::abort();
}

inline void prepare(Lane& lane) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(lane.stack, kStackBytes);  // what the fiber before left
#endif
  const uintptr_t top = (reinterpret_cast<uintptr_t>(lane.stack) + kStackBytes) & ~uintptr_t(15);
  void** words = reinterpret_cast<void**>(top);
  void* const start = reinterpret_cast<void*>(&fiber_main);
#if defined(__x86_64__)
  *--words = nullptr;  // the stack is as after a call
  *--words = start;
  for (int i = 0; i < kSavedWords; ++i) *--words = nullptr;
#else
  for (int i = 0; i < kSavedWords; ++i) *--words = nullptr;
  words[11] = start;
#endif
  lane.stack_pointer = words;
  lane.state = State::ready;
  lane.copies.clear();
  lane.groups = 0;
}

// Every thread that has not returned is at a barrier, or never will be: then says why.
inline bool pass_barrier(Block& block) {
  int at_barrier = 0;
  const Lane *stuck = nullptr, *first = nullptr;
  for (const Lane& lane : block.lanes) {
    if (lane.state == State::at_warp) stuck = &lane;
    if (lane.state != State::at_barrier) continue;
    if (at_barrier++ == 0) first = &lane;
    if (!(lane.place == first->place))
      set_error(&block, "divergence: threads are at the barriers of " + first->place.text() + " and " + lane.place.text());
  }
  if (stuck)
    set_error(&block, "divergence: the warp instruction at " + stuck->place.text() + " waits for lanes at a barrier or gone");
  else if (at_barrier < int(block.lanes.size()))
    set_error(&block, "divergence: " + std::to_string(at_barrier) + " threads wait at the barrier of " + first->place.text() +
                          ", the others have returned");
  if (block.failed) return false;
  block.epoch++, block.counts.barriers++;
  for (Lane& lane : block.lanes) lane.state = State::ready;
  for (Warp& warp : block.warps) {
    warp.epoch++;
    set_order(block, warp);
    if (settings.count) close_sites(block, warp);
  }
  return true;
}

inline void run_block(Block& block) {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &block.asan_size);
  pthread_attr_destroy(&attributes);
  block.asan_bottom = bottom;
#endif
  std::memset(block.shared, 0xff, block.shared_bytes);  // NaN in every format
  std::fill(block.words.begin(), block.words.end(), Word());
  block.epoch = 1;
  for (Lane& lane : block.lanes) prepare(lane);
  for (Warp& warp : block.warps) {
    warp.waiting = 0, warp.alive = 32, warp.epoch = 0;
    set_order(block, warp);
  }
  const int n = int(block.warps.size());
  Lane scheduler;
  while (!block.failed) {
    Lane* next = nullptr;  // its warp runs until it can run no further
    const int start = settings.order == Order::shuffled ? int(random_next(block.random) % n) : 0;
    for (int i = 0; i < n && !next; ++i) {
      const Warp& warp = block.warps[settings.order == Order::reverse ? n - 1 - i : (start + i) % n];
      next = next_ready(warp, warp.order[31]);
    }
    if (next) {
      self = &scheduler;
      switch_to(&block.scheduler, &block.asan_fake, next, &block);
      continue;
    }
    bool done = true;
    for (const Lane& lane : block.lanes) done = done && lane.state == State::done;
    if (done || !pass_barrier(block)) break;
  }
  if (settings.count)
    for (Warp& warp : block.warps) close_sites(block, warp);
  block.counts.blocks++;
}

// The memory of a block, used by one after the other.
struct Arena {
  Block block;
  Arena(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body, std::string& error) {
    const int threads = int(size.x * size.y * size.z);
    block.grid = grid, block.size = size, block.shared_bytes = shared_bytes, block.body = &body, block.error = &error;
    block.words.resize((shared_bytes + 3) / 4);
    block.lanes.resize(threads), block.warps.resize(threads / 32);
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
    block.shared = static_cast<unsigned char*>(shared);
    for (int i = 0; i < threads; ++i) {
      Lane& lane = block.lanes[i];
      lane.index = i, lane.lane = i % 32, lane.block = &block, lane.warp = &block.warps[i / 32];
      lane.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
      lane.stack = static_cast<char*>(std::malloc(kStackBytes));
      lane.warp->lane[i % 32] = &lane, lane.warp->index = i / 32;
    }
  }
  ~Arena() {
    for (const Lane& lane : block.lanes) std::free(lane.stack);
    std::free(block.shared);
  }
  Arena(const Arena&) = delete;
};

inline void launch(const std::string& call, const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const int threads = int(size.x * size.y * size.z);
  if (threads < 1 || threads > 1024 || threads % 32)
    throw std::runtime_error(call + " failed: a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > settings.shared_bytes)
    throw std::runtime_error(call + " failed: " + std::to_string(shared_bytes) + " bytes of shared memory");
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  if (blocks < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(call + " failed: a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                             std::to_string(grid.z) + ") blocks");
  for (Range& range : ranges) {
    range.writers = settings.races ? std::make_unique<uint64_t[]>((range.end - range.begin) / 2 + 1) : nullptr;
    range.written = false;
  }
  Launch record = {call, 0, grid, size, shared_bytes, {}};
  Dl_info module;
  if (dladdr(kernel, &module) != 0)
    record.kernel = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(module.dli_fbase);
  std::string error;
#pragma omp parallel num_threads(blocks < 2 ? 1 : 2)
  {
    Arena arena(grid, size, shared_bytes, body, error);
    Block& block = arena.block;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks; ++i) {
      if (block.failed) continue;
      block.number = i;
      block.id = dim3(i % grid.x, i / grid.x % grid.y, i / (int64_t(grid.x) * grid.y));
      block.random = settings.seed * 0x9e3779b97f4a7c15ull + i + 1;
      run_block(block);
    }
    const std::lock_guard<std::mutex> hold(error_lock);
    record.counts.add(block.counts);
  }
  if (!error.empty()) throw std::runtime_error(call + " failed: " + error);
  if (settings.count) launches.push_back(std::move(record));
}

}  // namespace emulation

}  // namespace hdit

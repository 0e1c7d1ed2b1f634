// hdit_kernels._C: the kernels as Python functions over addresses, sizes and strides.
#include <stdexcept>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.h"
#include "peak.h"

using namespace hdit;

namespace {

// ---- the instruction sets of this module and this CPU ------------------------------------------------------------------
struct InstructionSet {
  const char* name;
  decltype(&geglu_forward<Baseline>) geglu_forward;
  decltype(&geglu_backward<Baseline>) geglu_backward;
  decltype(&ada_rms_norm_forward<Baseline>) ada_rms_norm_forward;
  decltype(&ada_rms_norm_backward<Baseline>) ada_rms_norm_backward;
  decltype(&cosine_rope_forward<Baseline>) cosine_rope_forward;
  decltype(&cosine_rope_backward<Baseline>) cosine_rope_backward;
  decltype(&neighborhood_attention_forward<Baseline>) neighborhood_attention_forward;
  decltype(&neighborhood_attention_backward<Baseline>) neighborhood_attention_backward;
  decltype(&peak_float32<Baseline>) peak_float32, peak_bfloat16;
};

template <class I>
InstructionSet instruction_set(const char* name) {
  return {name,
          geglu_forward<I>,
          geglu_backward<I>,
          ada_rms_norm_forward<I>,
          ada_rms_norm_backward<I>,
          cosine_rope_forward<I>,
          cosine_rope_backward<I>,
          neighborhood_attention_forward<I>,
          neighborhood_attention_backward<I>,
          peak_float32<I>,
          peak_bfloat16<I>};
}

#if defined(HDIT_AVX512_BF16)
// AVX-512, but for what is faster with products of bfloat16.
void neighborhood_attention_forward_bf16(const NeighborhoodAttention& args, int threads) {
  if (!neighborhood_attention_strips_forward<Avx512Bf16>(args, threads))
    neighborhood_attention_forward<Avx512>(args, threads);
}
#endif

#if defined(__x86_64__)
#define CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
std::vector<std::string> cpu_features() {
  const std::vector<std::pair<const char*, bool>> known = {
      {"avx2", CPU_HAS("avx2")},         {"fma", CPU_HAS("fma")},           {"f16c", CPU_HAS("f16c")},
      {"avx512f", CPU_HAS("avx512f")},   {"avx512bw", CPU_HAS("avx512bw")}, {"avx512dq", CPU_HAS("avx512dq")},
      {"avx512vl", CPU_HAS("avx512vl")}, {"avx512cd", CPU_HAS("avx512cd")}, {"avx512_bf16", CPU_HAS("avx512bf16")},
  };
  std::vector<std::string> found;
  for (const auto& [name, present] : known)
    if (present) found.emplace_back(name);
  return found;
}
#else
#define CPU_HAS(feature) false
std::vector<std::string> cpu_features() { return {}; }
#endif

// Worst first.
std::vector<InstructionSet> usable_instruction_sets() {
#if defined(__x86_64__)
  std::vector<InstructionSet> usable = {instruction_set<Baseline>("SSE2")};
  if (CPU_HAS("avx2") && CPU_HAS("fma") && CPU_HAS("f16c") && CPU_HAS("bmi") && CPU_HAS("bmi2")) {
    usable.push_back(instruction_set<Avx2>("AVX2"));
    if (CPU_HAS("avx512f") && CPU_HAS("avx512bw") && CPU_HAS("avx512cd") && CPU_HAS("avx512dq") && CPU_HAS("avx512vl")) {
      usable.push_back(instruction_set<Avx512>("AVX-512"));
#if defined(HDIT_AVX512_BF16)
      if (CPU_HAS("avx512bf16")) {
        usable.push_back(instruction_set<Avx512>("AVX-512 BF16"));
        usable.back().neighborhood_attention_forward = neighborhood_attention_forward_bf16;
      }
#endif
    }
  }
  return usable;
#elif defined(__ARM_NEON)
  return {instruction_set<Baseline>("NEON")};
#else
  return {instruction_set<Baseline>("scalar")};
#endif
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> usable = usable_instruction_sets();
  return usable;
}

const InstructionSet* in_use = &instruction_sets().back();

void set_instruction_set(const std::string& name) {
  std::string names;
  for (const InstructionSet& set : instruction_sets()) {
    if (name == set.name) {
      in_use = &set;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw py::value_error("set_instruction_set: name is '" + name + "', but this CPU and this build have: " + names);
}

// A tensor that is fresh from the system costs a page fault every 4 KiB: at 256²×2×64 these take as long as half a forward pass.
// With 2 MiB pages (where the system leaves the choice to programs, as Linux does) they all but vanish.
void advise_large(Address data, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Address kPage = Address(2) << 20;
  const Address begin = (data + kPage - 1) / kPage * kPage, end = (data + size) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail
#else
  (void)data, (void)size;
#endif
}

void bind_cpu(py::module_ m) {
  using namespace py::literals;
  m.def("features", [] {
    std::vector<std::string> all = cpu_features();
    all.insert(all.begin(), in_use->name);
    return all;
  }, "The instruction set in use, then what this CPU has of the features that kernels may use.");
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets()) names.emplace_back(set.name);
    return names;
  }, "Instruction sets that this build and this CPU have, the best one last.");
  m.def("instruction_set", [] { return std::string(in_use->name); }, "The instruction set in use; the best one at import.");
  m.def("set_instruction_set", &set_instruction_set, "name"_a, "Use another instruction set from now on (for tests).");
  m.def("advise_large", &advise_large, "data"_a, "size"_a, "Ask for large pages under `size` bytes about to be written.");
  m.def("peak_flops", [](const std::string& dtype, int threads, double seconds) {
    check_threads("peak_flops", threads);
    if (dtype == "float32") return in_use->peak_float32(threads, seconds);
    if (dtype == "bfloat16") return CPU_HAS("avx512bf16") ? in_use->peak_bfloat16(threads, seconds) : 0.0;
    throw py::value_error("peak_flops: dtype is '" + dtype + "', but must be 'float32' or 'bfloat16'");
  }, "dtype"_a, "threads"_a, "seconds"_a = 0.05, "FLOP/s of multiply-adds in registers; 0 where there are none.", Unlocked());

  m.def("geglu_forward", [](Address x, Address y, int64_t rows, int64_t n, int64_t x_row_stride, int dtype, int threads) {
    check_threads("geglu_forward", threads);
    in_use->geglu_forward(geglu_forward_args(x, y, rows, n, x_row_stride, dtype), threads);
  }, GEGLU_FORWARD, "threads"_a, Unlocked());
  m.def("geglu_backward", [](Address x, Address dy, Address dx, int64_t rows, int64_t n, int64_t x_row_stride,
                             int64_t dy_row_stride, int dtype, int threads) {
    check_threads("geglu_backward", threads);
    in_use->geglu_backward(geglu_backward_args(x, dy, dx, rows, n, x_row_stride, dy_row_stride, dtype), threads);
  }, GEGLU_BACKWARD, "threads"_a, Unlocked());
  m.def("ada_rms_norm_forward", [](Address x, Address scale, Address y, int64_t batch, int64_t tokens, int64_t channels,
                                   int64_t x_batch_stride, int64_t x_token_stride, int64_t scale_batch_stride, double eps,
                                   int dtype, int threads) {
    check_threads("ada_rms_norm_forward", threads);
    in_use->ada_rms_norm_forward(ada_rms_norm_forward_args(x, scale, y, batch, tokens, channels, x_batch_stride,
                                                           x_token_stride, scale_batch_stride, eps, dtype), threads);
  }, ADA_RMS_NORM_FORWARD, "threads"_a, Unlocked());
  m.def("ada_rms_norm_backward", [](Address x, Address scale, Address dy, Address dx, Address dscale, int64_t batch,
                                    int64_t tokens, int64_t channels, int64_t x_batch_stride, int64_t x_token_stride,
                                    int64_t dy_batch_stride, int64_t dy_token_stride, int64_t scale_batch_stride,
                                    double eps, int dtype, int threads) {
    check_threads("ada_rms_norm_backward", threads);
    in_use->ada_rms_norm_backward(
        ada_rms_norm_backward_args(x, scale, dy, dx, dscale, batch, tokens, channels, x_batch_stride, x_token_stride,
                                   dy_batch_stride, dy_token_stride, scale_batch_stride, eps, dtype), threads);
  }, ADA_RMS_NORM_BACKWARD, "threads"_a, Unlocked());
  // Tokens as [address, batch, height, width, head stride]. pointers: cosine_scale, height_angles, width_angles.
  // sizes: batch, height, width, heads, dim, angles. A gradient whose address is 0 is not wanted.
  m.def("cosine_rope_forward",
        [](const Row& q, const Row& k, const std::array<Address, 3>& pointers, const std::array<int64_t, 6>& sizes,
           int angles_dtype, int dtype, Address q_prepared, Address k_prepared, int threads) {
          check_threads("cosine_rope_forward", threads);
          in_use->cosine_rope_forward(
              cosine_rope_forward_args(q, k, pointers, sizes, angles_dtype, dtype, q_prepared, k_prepared), threads);
        }, COSINE_ROPE_FORWARD, "threads"_a, Unlocked());
  m.def("cosine_rope_backward",
        [](const Row& q, const Row& k, const std::array<Address, 3>& pointers, const std::array<int64_t, 6>& sizes,
           int angles_dtype, int dtype, const Row& dq_prepared, const Row& dk_prepared, Address dq, Address dk,
           Address dcosine_scale, int threads) {
          check_threads("cosine_rope_backward", threads);
          in_use->cosine_rope_backward(cosine_rope_backward_args(q, k, pointers, sizes, angles_dtype, dtype, dq_prepared,
                                                                 dk_prepared, dq, dk, dcosine_scale),
                                       threads);
        }, COSINE_ROPE_BACKWARD, "threads"_a, Unlocked());
  // tokens: q, k, v, extra_k, extra_v. pointers: cosine_scale, height_angles, width_angles, key_mask, out, lse.
  // sizes: batch, heads, dim, v_dim, angles, extra. grad_tokens: dout, dq, dk, dv, dextra_k, dextra_v. 0: absent.
  m.def("neighborhood_attention_forward",
        [](const std::array<Row, 5>& tokens, const std::array<Address, 6>& pointers, const std::array<int64_t, 6>& sizes,
           const std::array<Row, 2>& windows, double scale, int dtype, int threads) {
          check_threads("neighborhood_attention_forward", threads);
          in_use->neighborhood_attention_forward(
              neighborhood_attention_args(tokens, pointers, sizes, windows, scale, dtype), threads);
        }, NEIGHBORHOOD_ATTENTION, "threads"_a, Unlocked());
  m.def("neighborhood_attention_backward",
        [](const std::array<Row, 5>& tokens, const std::array<Address, 6>& pointers, const std::array<int64_t, 6>& sizes,
           const std::array<Row, 2>& windows, double scale, int dtype, const std::array<Row, 6>& grad_tokens, Address dlse,
           Address dcosine_scale, int threads) {
          check_threads("neighborhood_attention_backward", threads);
          in_use->neighborhood_attention_backward(
              neighborhood_attention_backward_args(tokens, pointers, sizes, windows, scale, dtype, grad_tokens, dlse,
                                                   dcosine_scale),
              threads);
        }, NEIGHBORHOOD_ATTENTION_BACKWARD, "threads"_a, Unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels over raw addresses (ints); sizes and strides count elements. See csrc/*.h for shapes.";
  py::dict dtypes, build;
  for (const auto& [name, dtype] : kDtypes) dtypes[name] = int(dtype);
  m.attr("dtypes") = dtypes;
  build["compiler"] = HDIT_COMPILER;
  bind_cpu(m.def_submodule("cpu", "Kernels for CPU tensors; `threads` is at most that many."));
#ifdef HDIT_CUDA_VERSION
  build["cuda"] = HDIT_CUDA_VERSION;
  build["cuda_architectures"] = HDIT_CUDA_ARCHITECTURES;
  bind_cuda(m.def_submodule("cuda", "Kernels for CUDA tensors, enqueued on a cudaStream_t (int) of `device`."));
#else
  build["cuda"] = py::none();
  build["cuda_architectures"] = "";
#endif
  m.attr("build_info") = build;
}

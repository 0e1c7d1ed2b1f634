// The CUDA kernels as Python functions; `stream` is a cudaStream_t of `device`.
#include "bindings.h"
#if defined(HDIT_EMULATION)
#include <map>

#include "emulation.h"
#endif

using namespace hdit;

void hdit::bind_cuda(py::module_ m) {
  using namespace py::literals;
  m.def("geglu_forward", [](Address x, Address y, int64_t rows, int64_t n, int64_t x_row_stride, int dtype, int device,
                            Address stream) {
    geglu_forward_cuda(geglu_forward_args(x, y, rows, n, x_row_stride, dtype), device, (void*)stream);
  }, GEGLU_FORWARD, "device"_a, "stream"_a, Unlocked());
  m.def("geglu_backward", [](Address x, Address dy, Address dx, int64_t rows, int64_t n, int64_t x_row_stride,
                             int64_t dy_row_stride, int dtype, int device, Address stream) {
    geglu_backward_cuda(geglu_backward_args(x, dy, dx, rows, n, x_row_stride, dy_row_stride, dtype), device,
                        (void*)stream);
  }, GEGLU_BACKWARD, "device"_a, "stream"_a, Unlocked());
  m.def("ada_rms_norm_forward", [](Address x, Address scale, Address y, int64_t batch, int64_t tokens, int64_t channels,
                                   int64_t x_batch_stride, int64_t x_token_stride, int64_t scale_batch_stride, double eps,
                                   int dtype, int device, Address stream) {
    ada_rms_norm_forward_cuda(ada_rms_norm_forward_args(x, scale, y, batch, tokens, channels, x_batch_stride,
                                                        x_token_stride, scale_batch_stride, eps, dtype),
                              device, (void*)stream);
  }, ADA_RMS_NORM_FORWARD, "device"_a, "stream"_a, Unlocked());
  m.def("ada_rms_norm_backward", [](Address x, Address scale, Address dy, Address dx, Address dscale, int64_t batch,
                                    int64_t tokens, int64_t channels, int64_t x_batch_stride, int64_t x_token_stride,
                                    int64_t dy_batch_stride, int64_t dy_token_stride, int64_t scale_batch_stride,
                                    double eps, int dtype, Address workspace, int device, Address stream) {
    ada_rms_norm_backward_cuda(
        ada_rms_norm_backward_args(x, scale, dy, dx, dscale, batch, tokens, channels, x_batch_stride, x_token_stride,
                                   dy_batch_stride, dy_token_stride, scale_batch_stride, eps, dtype),
        (void*)workspace, device, (void*)stream);
  }, ADA_RMS_NORM_BACKWARD, "workspace"_a, "device"_a, "stream"_a, Unlocked());
  m.def("ada_rms_norm_backward_workspace", [](Address, Address, Address, Address, Address, int64_t batch, int64_t tokens,
                                              int64_t channels, int64_t, int64_t, int64_t, int64_t, int64_t, double, int) {
    check_not_negative("ada_rms_norm_backward_workspace", {{"batch", batch}, {"tokens", tokens}, {"channels", channels}});
    return ada_rms_norm_backward_workspace_cuda(batch, tokens, channels);
  }, ADA_RMS_NORM_BACKWARD, WORKSPACE);
  m.def("cosine_rope_forward",
        [](const Row& q, const Row& k, const std::array<Address, 3>& pointers, const std::array<int64_t, 6>& sizes,
           int angles_dtype, int dtype, Address q_prepared, Address k_prepared, int device, Address stream) {
          cosine_rope_forward_cuda(
              cosine_rope_forward_args(q, k, pointers, sizes, angles_dtype, dtype, q_prepared, k_prepared), device,
              (void*)stream);
        }, COSINE_ROPE_FORWARD, "device"_a, "stream"_a, Unlocked());
  m.def("cosine_rope_backward",
        [](const Row& q, const Row& k, const std::array<Address, 3>& pointers, const std::array<int64_t, 6>& sizes,
           int angles_dtype, int dtype, const Row& dq_prepared, const Row& dk_prepared, Address dq, Address dk,
           Address dcosine_scale, Address workspace, int device, Address stream) {
          cosine_rope_backward_cuda(cosine_rope_backward_args(q, k, pointers, sizes, angles_dtype, dtype, dq_prepared,
                                                              dk_prepared, dq, dk, dcosine_scale),
                                    (void*)workspace, device, (void*)stream);
        }, COSINE_ROPE_BACKWARD, "workspace"_a, "device"_a, "stream"_a, Unlocked());
  m.def("cosine_rope_backward_workspace",
        [](const Row& q, const Row& k, const std::array<Address, 3>& pointers, const std::array<int64_t, 6>& sizes,
           int angles_dtype, int dtype, const Row&, const Row&, Address, Address, Address) {
          return cosine_rope_backward_workspace_cuda(
              cosine_rope_args("cosine_rope_backward_workspace", q, k, pointers, sizes, angles_dtype, dtype));
        }, COSINE_ROPE_BACKWARD, WORKSPACE);
  m.def("neighborhood_attention_forward",
        [](const std::array<Row, 5>& tokens, const std::array<Address, 6>& pointers, const std::array<int64_t, 6>& sizes,
           const std::array<Row, 2>& windows, double scale, int dtype, int device, Address stream) {
          neighborhood_attention_forward_cuda(neighborhood_attention_args(tokens, pointers, sizes, windows, scale, dtype),
                                              device, (void*)stream);
        }, NEIGHBORHOOD_ATTENTION, "device"_a, "stream"_a, Unlocked());
  m.def("neighborhood_attention_backward",
        [](const std::array<Row, 5>& tokens, const std::array<Address, 6>& pointers, const std::array<int64_t, 6>& sizes,
           const std::array<Row, 2>& windows, double scale, int dtype, const std::array<Row, 6>& grad_tokens, Address dlse,
           Address dcosine_scale, Address workspace, int device, Address stream) {
          neighborhood_attention_backward_cuda(
              neighborhood_attention_backward_args(tokens, pointers, sizes, windows, scale, dtype, grad_tokens, dlse,
                                                   dcosine_scale),
              (void*)workspace, device, (void*)stream);
        }, NEIGHBORHOOD_ATTENTION_BACKWARD, "workspace"_a, "device"_a, "stream"_a, Unlocked());
  m.def("neighborhood_attention_backward_workspace",
        [](const std::array<Row, 5>& tokens, const std::array<Address, 6>& pointers, const std::array<int64_t, 6>& sizes,
           const std::array<Row, 2>& windows, double scale, int dtype, const std::array<Row, 6>& grad_tokens, Address dlse,
           Address dcosine_scale) {
          return neighborhood_attention_workspace_cuda(neighborhood_attention_backward_args(
              tokens, pointers, sizes, windows, scale, dtype, grad_tokens, dlse, dcosine_scale));
        }, NEIGHBORHOOD_ATTENTION_BACKWARD, WORKSPACE);
}

#if defined(HDIT_EMULATION)
namespace {

using Counted = std::map<std::string, int64_t>;

// What the launches since the last call did; see emulation.h. Lines as (place, kind, counts).
py::list take_launches() {
  static const char* const kKindNames[] = {"shared_read", "shared_write", "global_read", "global_write",
                                           "special", "shuffle", "product"};
  py::list result;
  for (const emulation::Launch& launch : emulation::launches) {
    const emulation::Counts& c = launch.counts;
    py::list lines;
    for (const auto& [key, line] : c.lines)
      lines.append(py::make_tuple(key.first, kKindNames[key.second],
                                  Counted{{"requests", line.requests}, {"lanes", line.lanes}, {"bytes", line.bytes},
                                          {"units", line.units}, {"ideal", line.ideal},
                                          {"sectors", line.sectors.size()}}));
    py::dict entry;
    entry["call"] = launch.call;
    entry["kernel"] = launch.kernel;
    entry["threads"] = launch.block.x * launch.block.y * launch.block.z;
    entry["shared_bytes"] = launch.shared_bytes;
    entry["counts"] = Counted{{"blocks", c.blocks}, {"barriers", c.barriers}, {"mma", c.mma}, {"mma_fma", c.mma_fma},
                              {"ldmatrix", c.ldmatrix}, {"shuffles", c.shuffles}, {"special", c.special},
                              {"sectors_read", sectors_once(c, emulation::global_read)},
                              {"sectors_written", sectors_once(c, emulation::global_write)}};
    entry["lines"] = lines;
    result.append(entry);
  }
  emulation::launches.clear();
  return result;
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  using namespace py::literals;
  m.doc() = "The CUDA kernels executed on a CPU, checked and counted: for tests. `device` and `stream` mean nothing.";
  bind_cuda(m);
  m.def("allow", &emulation::allow, "tensors"_a, "What launches may touch from now on, as (address, bytes).");
  m.def("set", [](const std::string& order, uint64_t seed, bool count, bool races, int multiprocessors,
                  size_t shared_bytes) {
    const std::map<std::string, emulation::Order> orders = {{"forward", emulation::Order::forward},
                                                            {"reverse", emulation::Order::reverse},
                                                            {"shuffled", emulation::Order::shuffled}};
    if (orders.count(order) == 0)
      throw py::value_error("set: order is '" + order + "', but must be 'forward', 'reverse' or 'shuffled'");
    emulation::settings = {orders.at(order), seed, count, races, multiprocessors, shared_bytes};
  }, "order"_a = "forward", "seed"_a = 1, "count"_a = false, "races"_a = true, "multiprocessors"_a = 2,
     "shared_bytes"_a = emulation::Settings().shared_bytes,
     "In which order threads run, what shuffles them, whether accesses are counted, whether races are looked for, how many "
     "multiprocessors launchers see, how many bytes of shared memory a block can have.");
  m.def("take_launches", &take_launches, "What the launches since the last call did, if they were counted.");
}
#endif

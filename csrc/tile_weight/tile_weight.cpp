// SPDX-License-Identifier: Apache-2.0
#include "tile_weight/tile_weight.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("tile_weight(Tensor weight, SymInt tiles, str mode) -> Tensor");
  m.def("_tile_weight_backward(Tensor grad_out, SymInt tiles, str mode) -> Tensor");
}
#endif

namespace uhd {
namespace {

#ifndef UHD_CUDA_KERNELS
// Runs kernel(begin, end) over `pieces` that touch so many elements of `like` each.
template <class Kernel>
void run(int64_t pieces, int64_t elements, const Tensor& like, Kernel&& kernel) {
  if (pieces == 0 || elements == 0) return;
  parallel_chunks(pieces, least_per_thread(elements * static_cast<int64_t>(like.element_size())),
                  [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
}
#endif

bool is_vector(const std::string& mode) { return mode == "repeat"; }

// Everything but sizes and pointers; x is the weight or the gradient.
TileWeight arguments(const Tensor& x, const char* name, int64_t tiles, const std::string& mode) {
  STD_TORCH_CHECK(mode == "block_diagonal" || mode == "average" || mode == "repeat",
                  "tile_weight: unknown mode ", mode);
  STD_TORCH_CHECK(x.dim() == (is_vector(mode) ? 1 : 2) && tiles >= 1, "tile_weight: ", name,
                  " must be a matrix, or a vector to repeat, and tiles at least 1");
  TileWeight args{};
  args.dtype = dtype_of(x, name);
  args.tiles = tiles;
  args.down = mode == "average" ? 1 : tiles;
  args.across = is_vector(mode) ? 1 : tiles;
  args.divisor = mode == "average" ? tiles : 1;
  return args;
}

Tensor forward(const Tensor& weight_any, int64_t tiles, std::string mode) {
  TileWeight args = arguments(weight_any, "weight", tiles, mode);
  const Tensor weight = with_contiguous_rows(weight_any);
  const bool vector = is_vector(mode);
  args.rows = vector ? 1 : weight.size(0);
  args.cols = weight.size(weight.dim() - 1);
  args.weight = weight.const_data_ptr();
  args.weight_stride = vector ? args.cols : weight.stride(0);
  const int64_t rows = checked_product(args.down, args.rows);
  const int64_t cols = checked_product(args.across, args.cols);
  Tensor out =
      vector ? new_empty(weight, {checked_product(rows, cols)}) : new_empty(weight, {rows, cols});
  args.out = out.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(weight, cuda::tile_weight_forward, args);
#else
  run(rows, cols, weight,
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(tile_weight_forward, args, begin, end); });
#endif
  return out;
}

Tensor backward(const Tensor& grad_out_any, int64_t tiles, std::string mode) {
  TileWeight args = arguments(grad_out_any, "grad_out", tiles, mode);
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  const int64_t first = grad_out.size(0), last = grad_out.size(grad_out.dim() - 1);
  STD_TORCH_CHECK(first % args.down == 0 && last % args.across == 0,
                  "tile_weight: grad_out must hold whole tiles");
  const bool vector = is_vector(mode);
  args.rows = vector ? 1 : first / args.down;
  args.cols = vector ? first / args.down : last / args.across;
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_stride = vector ? args.cols : grad_out.stride(0);
  Tensor grad_weight =
      vector ? new_empty(grad_out, {args.cols}) : new_empty(grad_out, {args.rows, args.cols});
  args.grad_weight = grad_weight.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(grad_out, cuda::tile_weight_backward, args);
#else
  run(args.rows * args.cols, tiles, grad_out,
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(tile_weight_backward, args, begin, end); });
#endif
  return grad_weight;
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("tile_weight", UHD_BOX(&uhd::forward));
  m.impl("_tile_weight_backward", UHD_BOX(&uhd::backward));
}

// SPDX-License-Identifier: Apache-2.0
#include "tile_average/tile_average.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("tile_average(Tensor weight, SymInt tiles) -> Tensor");
  m.def("_tile_average_backward(Tensor grad_out, SymInt tiles) -> Tensor");
}
#endif

namespace uhd {
namespace {

#ifndef UHD_CUDA_KERNELS
// large: (O, tiles * I)
template <class Kernel>
void run(const Tensor& large, Kernel&& kernel) {
  if (large.size(0) == 0 || large.size(1) == 0) return;
  const int64_t row_bytes = large.size(1) * static_cast<int64_t>(large.element_size());
  parallel_chunks(large.size(0), least_per_thread(row_bytes),
                  [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
}
#endif

Tensor forward(const Tensor& weight_any, int64_t tiles) {
  STD_TORCH_CHECK(weight_any.dim() == 2 && tiles >= 1,
                  "tile_average: weight must be (O, I) and tiles at least 1");
  const Tensor weight = with_contiguous_rows(weight_any);
  TileAverage args{};
  args.dtype = dtype_of(weight, "weight");
  args.tiles = tiles;
  args.rows = weight.size(0);
  args.cols = weight.size(1);
  args.weight = weight.const_data_ptr();
  args.weight_stride = weight.stride(0);
  Tensor out = new_empty(weight, {weight.size(0), checked_product(tiles, args.cols)});
  args.out = out.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(weight, cuda::tile_average_forward, args);
#else
  run(out,
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(tile_average_forward, args, begin, end); });
#endif
  return out;
}

Tensor backward(const Tensor& grad_out_any, int64_t tiles) {
  STD_TORCH_CHECK(tiles >= 1 && grad_out_any.dim() == 2 && grad_out_any.size(1) % tiles == 0,
                  "tile_average: grad_out must be (O, tiles * I)");
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  TileAverage args{};
  args.dtype = dtype_of(grad_out, "grad_out");
  args.tiles = tiles;
  args.rows = grad_out.size(0);
  args.cols = grad_out.size(1) / tiles;
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_stride = grad_out.stride(0);
  Tensor grad_weight = new_empty(grad_out, {grad_out.size(0), args.cols});
  args.grad_weight = grad_weight.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(grad_out, cuda::tile_average_backward, args);
#else
  run(grad_out,
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(tile_average_backward, args, begin, end); });
#endif
  return grad_weight;
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("tile_average", TORCH_BOX(&uhd::forward));
  m.impl("_tile_average_backward", TORCH_BOX(&uhd::backward));
}

// SPDX-License-Identifier: Apache-2.0
#include "tile_block_diagonal/tile_block_diagonal.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("tile_block_diagonal(Tensor weight, SymInt tiles) -> Tensor");
  m.def("_tile_block_diagonal_backward(Tensor grad_out, SymInt tiles) -> Tensor");
}
#endif

namespace uhd {
namespace {

#ifndef UHD_CUDA_KERNELS
// Each of `rows` rows touches `row_elements` elements of `like`.
template <class Kernel>
void run(int64_t rows, int64_t row_elements, const Tensor& like, Kernel&& kernel) {
  if (rows == 0 || row_elements == 0) return;
  parallel_chunks(rows, least_per_thread(row_elements * static_cast<int64_t>(like.element_size())),
                  [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
}
#endif

Tensor forward(const Tensor& weight_any, int64_t tiles) {
  STD_TORCH_CHECK(weight_any.dim() == 2 && tiles >= 1,
                  "tile_block_diagonal: weight must be (O, I) and tiles at least 1");
  const Tensor weight = with_contiguous_rows(weight_any);
  TileBlockDiagonal args{};
  args.dtype = dtype_of(weight, "weight");
  args.tiles = tiles;
  args.rows = weight.size(0);
  args.cols = weight.size(1);
  args.weight = weight.const_data_ptr();
  args.weight_stride = weight.stride(0);
  const int64_t rows = checked_product(tiles, args.rows), cols = checked_product(tiles, args.cols);
  Tensor out = new_empty(weight, {rows, cols});
  args.out = out.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(weight, cuda::tile_block_diagonal_forward, args);
#else
  run(rows, cols, weight, [&](int64_t begin, int64_t end) {
    UHD_CALL_ISA(tile_block_diagonal_forward, args, begin, end);
  });
#endif
  return out;
}

Tensor backward(const Tensor& grad_out_any, int64_t tiles) {
  STD_TORCH_CHECK(tiles >= 1 && grad_out_any.dim() == 2 && grad_out_any.size(0) % tiles == 0 &&
                      grad_out_any.size(1) % tiles == 0,
                  "tile_block_diagonal: grad_out must be (tiles * O, tiles * I)");
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  TileBlockDiagonal args{};
  args.dtype = dtype_of(grad_out, "grad_out");
  args.tiles = tiles;
  args.rows = grad_out.size(0) / tiles;
  args.cols = grad_out.size(1) / tiles;
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_stride = grad_out.stride(0);
  Tensor grad_weight = new_empty(grad_out, {args.rows, args.cols});
  args.grad_weight = grad_weight.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(grad_out, cuda::tile_block_diagonal_backward, args);
#else
  run(args.rows, grad_out.size(1), grad_out, [&](int64_t begin, int64_t end) {
    UHD_CALL_ISA(tile_block_diagonal_backward, args, begin, end);
  });
#endif
  return grad_weight;
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("tile_block_diagonal", TORCH_BOX(&uhd::forward));
  m.impl("_tile_block_diagonal_backward", TORCH_BOX(&uhd::backward));
}

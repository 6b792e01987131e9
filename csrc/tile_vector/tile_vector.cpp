// SPDX-License-Identifier: Apache-2.0
#include "tile_vector/tile_vector.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("tile_vector(Tensor vector, SymInt tiles) -> Tensor");
  m.def("_tile_vector_backward(Tensor grad_out, SymInt tiles) -> Tensor");
}
#endif

namespace uhd {
namespace {

Tensor forward(const Tensor& vector_any, int64_t tiles) {
  STD_TORCH_CHECK(vector_any.dim() == 1 && tiles >= 1,
                  "tile_vector: vector must be (I,) and tiles at least 1");
  const Tensor vector = with_contiguous_rows(vector_any);
  TileVector args{};
  args.dtype = dtype_of(vector, "vector");
  args.tiles = tiles;
  args.size = vector.size(0);
  args.vector = vector.const_data_ptr();
  Tensor out = new_empty(vector, {checked_product(tiles, args.size)});
  args.out = out.mutable_data_ptr();
  if (args.size == 0) return out;
#ifdef UHD_CUDA_KERNELS
  launch_on(vector, cuda::tile_vector_forward, args);
#else
  parallel_chunks(tiles, least_per_thread(args.size * static_cast<int64_t>(vector.element_size())),
                  [&](int64_t, int64_t begin, int64_t end) {
                    UHD_CALL_ISA(tile_vector_forward, args, begin, end);
                  });
#endif
  return out;
}

Tensor backward(const Tensor& grad_out_any, int64_t tiles) {
  STD_TORCH_CHECK(tiles >= 1 && grad_out_any.dim() == 1 && grad_out_any.size(0) % tiles == 0,
                  "tile_vector: grad_out must be (tiles * I,)");
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  TileVector args{};
  args.dtype = dtype_of(grad_out, "grad_out");
  args.tiles = tiles;
  args.size = grad_out.size(0) / tiles;
  args.grad_out = grad_out.const_data_ptr();
  Tensor grad_vector = new_empty(grad_out, {args.size});
  args.grad_vector = grad_vector.mutable_data_ptr();
  if (args.size == 0) return grad_vector;
#ifdef UHD_CUDA_KERNELS
  launch_on(grad_out, cuda::tile_vector_backward, args);
#else
  parallel_chunks(args.size,
                  least_per_thread(tiles * static_cast<int64_t>(grad_out.element_size())),
                  [&](int64_t, int64_t begin, int64_t end) {
                    UHD_CALL_ISA(tile_vector_backward, args, begin, end);
                  });
#endif
  return grad_vector;
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("tile_vector", TORCH_BOX(&uhd::forward));
  m.impl("_tile_vector_backward", TORCH_BOX(&uhd::backward));
}

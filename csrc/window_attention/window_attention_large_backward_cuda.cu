// SPDX-License-Identifier: Apache-2.0
// Backward pass for windows of up to 16 x 16 tokens. One block per window and head, in two phases:
// every warp takes strips of queries over all keys, then strips of keys over all queries.
#include "window_attention/gradients.cuh"
#include "window_attention/large_gradients.cuh"
#include "window_attention/large_windows.h"

namespace uhd {
namespace {

struct Traits {
  // Blocks have at most 256 threads, but fewer registers let three blocks of an 8 x 8 window share
  // an SM: this bound leaves 168 a thread, or 255 where sums and scores alone take more than 128.
  static constexpr int kThreads(int head_dim) { return head_dim <= 80 ? 384 : 256; }
};

// Where a window and head lie in the tensors. Computed anew at every use: kept, the addresses would
// take registers from the products.
template <class T, int kDim>
struct Tensors {
  const WindowAttention& args;
  TokenMap raster, grad_out_order;
  int head;

  UHD_DEVICE HeadRows<const T> q() const {
    return input_rows<T>(args.q, args.q_strides, raster, head);
  }
  UHD_DEVICE HeadRows<const T> k() const {
    return input_rows<T>(args.k, args.k_strides, raster, head);
  }
  UHD_DEVICE HeadRows<const T> v() const {
    return input_rows<T>(args.v, args.v_strides, raster, head);
  }
  UHD_DEVICE HeadRows<const T> grad_out() const {
    return input_rows<T>(args.grad_out, args.grad_out_strides, grad_out_order, head);
  }
  UHD_DEVICE HeadRows<T> grad_q() const {
    return output_rows<T, kDim>(args.grad_q, args.grad_q_stride, raster, head);
  }
  UHD_DEVICE HeadRows<T> grad_k() const {
    return output_rows<T, kDim>(args.grad_k, args.grad_kv_stride, raster, head);
  }
  UHD_DEVICE HeadRows<T> grad_v() const {
    return output_rows<T, kDim>(args.grad_v, args.grad_kv_stride, raster, head);
  }
};

// Two of them in shared memory.
template <class T, int kDim>
struct Pair {
  T *first, *second;

  UHD_DEVICE Pair at(int row) const {
    return {first + row * Row<kDim>::kStride, second + row * Row<kDim>::kStride};
  }
  UHD_DEVICE void load_all(const HeadRows<const T>& a, const HeadRows<const T>& b,
                           const WindowAndHead& work) const {
    load_window<T, kDim>(first, a, work);
    load_window<T, kDim>(second, b, work);
  }
  UHD_DEVICE void load(const HeadRows<const T>& a, const HeadRows<const T>& b, int begin,
                       const WindowAndHead& work) const {
    load_strip<T, kDim>(first, a, begin, work);
    load_strip<T, kDim>(second, b, begin, work);
  }
};

// The shared memory of the block, as seen by one warp (see plan_backward).
template <class T, int kDim>
struct Shared {
  Pair<T, kDim> columns;  // of the block
  Pair<T, kDim> rows;     // of this warp
  T* output;              // of this warp, for a gradient on its way to memory
  QueryStatistics statistics;

  UHD_DEVICE Shared(const LargePlan& plan, int first_strip) {
    constexpr int kStride = Row<kDim>::kStride;
    const int all_columns = plan.padded_tokens * kStride, all_rows = plan.warps * kStrip * kStride;
    T* base = dynamic_shared<T>();
    columns = {base, base + all_columns};
    base += 2 * all_columns;
    rows = Pair<T, kDim>{base, base + all_rows}.at(first_strip);
    output = plan.resident ? rows.second + all_rows : rows.first;
    base += (plan.resident ? 3 : 2) * all_rows;
    statistics.log2_sum = reinterpret_cast<float*>(base);
    statistics.delta = statistics.log2_sum + plan.padded_tokens;
    statistics.magnitude = statistics.delta + plan.padded_tokens;
  }
};

// grad_q and the statistics of all queries; q and grad_out of the first strip are there.
template <class T, int kDim>
UHD_DEVICE void query_phase(const LargePlan& plan, const WindowAndHead& work,
                            const Tensors<T, kDim>& tensors, const Shared<T, kDim>& shared,
                            int begin) {
  while (begin < work.tokens) {
    float grad_q[kDim / 8][4], factor[2];
    const GradientSums sums = query_gradient<T, kDim>(
        shared.rows.first, shared.rows.second, shared.columns.first, shared.columns.second,
        work.tokens, plan.exponent_scale, grad_q, factor);
    sums.store(shared.statistics, begin);
    for (float& x : factor) x *= plan.scale;
    store_strip<T, kDim>(shared.output, grad_q, factor, tensors.grad_q(), begin, work.tokens);
    begin += plan.warps * kStrip;
    if (begin >= work.tokens) break;
    shared.rows.load(tensors.q(), tensors.grad_out(), begin, work);
    wait_for_loads();
    __syncwarp();
  }
}

// grad_k and grad_v; k and v of the first strip are there as rows, q and grad_out as columns.
template <class T, int kDim>
UHD_DEVICE void key_phase(const LargePlan& plan, const WindowAndHead& work,
                          const Tensors<T, kDim>& tensors, const Shared<T, kDim>& shared,
                          int begin) {
  const Range range(largest_of(shared.statistics.magnitude, work.tokens));
  const float k_factor = range.down * plan.scale, v_factor = kWeightsDown<T>;
  while (begin < work.tokens) {
    float grad_k[kDim / 8][4], grad_v[kDim / 8][4];
    key_gradients<T, kDim>(shared.rows.first, shared.rows.second, shared.columns.first,
                           shared.columns.second, work.tokens, plan.exponent_scale,
                           shared.statistics, range, grad_k, grad_v);
    store_strip<T, kDim>(shared.output, grad_k, {k_factor, k_factor}, tensors.grad_k(), begin,
                         work.tokens);
    store_strip<T, kDim>(shared.output, grad_v, {v_factor, v_factor}, tensors.grad_v(), begin,
                         work.tokens);
    begin += plan.warps * kStrip;
    if (begin >= work.tokens) break;
    shared.rows.load(tensors.k(), tensors.v(), begin, work);
    wait_for_loads();
    __syncwarp();
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(Traits::kThreads(kDim), 1)
    large_backward(const WindowAttention args, const LargePlan plan) {
  zero_gradient_padding<T>(args);
  WindowAndHead work;
  if (!find_window(args, work)) return;
  const TokenMap raster = TokenMap::raster(work.window);
  const Tensors<T, kDim> tensors{
      args, raster, args.window_order ? TokenMap::window_order(work.window) : raster, work.head};
  const int begin = int(threadIdx.x / kWarp) * kStrip;
  Shared<T, kDim> shared(plan, begin);

  shared.rows.load(tensors.q(), tensors.grad_out(), begin, work);
  shared.columns.load_all(tensors.k(), tensors.v(), work);
  wait_for_loads();
  __syncthreads();
  query_phase(plan, work, tensors, shared, begin);
  __syncthreads();  // the statistics are complete, and nobody needs the columns any more
  if (plan.resident) {
    const Pair<T, kDim> keys = shared.columns;
    shared.columns = shared.rows.at(-begin);
    shared.rows = keys.at(begin);
  } else {
    shared.rows.load(tensors.k(), tensors.v(), begin, work);
    shared.columns.load_all(tensors.q(), tensors.grad_out(), work);
    wait_for_loads();
    __syncthreads();
  }
  key_phase(plan, work, tensors, shared, begin);
}

}  // namespace

namespace cuda {

int64_t large_windows_scratch(const WindowAttention&) { return 0; }

const char* large_windows_backward(const WindowAttention& args, void* stream) {
  const LargePlan plan = plan_backward(args);
  return with_half_and_head_dim(args, [&](auto element, auto head_dim) {
    return launch(large_backward<decltype(element), head_dim>, dim3(unsigned(large_blocks(args))),
                  dim3(plan.warps * kWarp), plan.shared_bytes, stream, args, plan);
  });
}

}  // namespace cuda
}  // namespace uhd

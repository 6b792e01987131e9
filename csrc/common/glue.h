// SPDX-License-Identifier: Apache-2.0
// What the glue of every op needs: torch's stable ABI, the device it registers for, and argument
// checks.
//
// The same glue source is compiled into libuhd_cpu (defines the schemas, registers CPU) and into
// libuhd_cuda (registers CUDA), so the two devices cannot drift. User errors are raised in Python;
// the checks here are the last line and can only throw RuntimeError.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "common/dtype.h"
#include "common/view_table.h"

// UHD_WITH_CUDA: libuhd_cuda. UHD_EMULATED: a libuhd_cpu whose operators run the CUDA kernels in
// the emulator. Neither: the CPU kernels.
#ifdef UHD_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#define UHD_DEVICE_KEY CUDA
#else
#define UHD_DEVICE_KEY CPU
#endif
#if defined(UHD_WITH_CUDA) || defined(UHD_EMULATED)
#define UHD_CUDA_KERNELS
#endif

namespace uhd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
}

// A contiguous tensor on the device of another. torch::stable::new_empty finds its operator by name
// and passes arguments through the dispatcher's stack: half a microsecond for every result.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(),
                                                   static_cast<int64_t>(sizes.size()), &type,
                                                   nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_empty(like, sizes, like.scalar_type());
}

// Kernels read the elements of a row (the last dimension) side by side, at any stride between rows;
// a tensor that is laid out otherwise is copied.
inline Tensor with_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// The product of two sizes; an absurd option must not wrap around into a small allocation.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), "a size of ", a, " * ", b,
                  " elements does not fit in 64 bits");
  return product;
}

// Reads an (S + 1, 4) int64 view table that describes tensors of so many rows. On the CPU the table
// is checked, because a kernel trusts it with its addresses.
ViewTable view_table(const Tensor& views, int64_t window, int64_t token_rows, int64_t window_rows);

#ifdef UHD_WITH_CUDA

inline const Tensor* as_tensor(const Tensor& x) { return &x; }
inline const Tensor* as_tensor(const std::optional<Tensor>& x) { return x ? &*x : nullptr; }
template <class T>
const Tensor* as_tensor(const T&) {
  return nullptr;
}

// The dispatcher comes here if any tensor is on a CUDA device; kernels need all of them on one.
template <auto function>
struct OnOneDevice;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct OnOneDevice<function> {
  static Result call(Arguments... arguments) {
    const Tensor* first = nullptr;
    for (const Tensor* x : {as_tensor(arguments)...}) {
      if (x == nullptr) continue;
      if (first == nullptr) first = x;
      STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == first->get_device_index(),
                      "tensors must be on one device");
    }
    return function(arguments...);
  }
};
#define UHD_BOX(function) TORCH_BOX((&uhd::OnOneDevice<function>::call))

#else
// No kernel for the CPU is called if any tensor is on another device.
#define UHD_BOX(function) TORCH_BOX(function)
#endif

constexpr int64_t kLargestCount = (int64_t{1} << 31) - 1;

#ifdef UHD_CUDA_KERNELS

// Makes the device of a tensor the current one, until it goes out of scope. Launchers need it, and
// so does what asks the device for its limits.
class OnDevice {
 public:
#ifdef UHD_WITH_CUDA
  explicit OnDevice(const Tensor& of) : guard_(of.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#else
  explicit OnDevice(const Tensor&) {}
#endif
};

// Calls launcher(args, stream) for the device and the current stream of `on`.
template <class Arguments>
void launch_on(const Tensor& on, const char* (*launcher)(const Arguments&, void*),
               const Arguments& args) {
  const OnDevice guard(on);
  void* stream = nullptr;
#ifdef UHD_WITH_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
#endif
  const char* error = launcher(args, stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA kernel launch failed: ", error);
}

#else

// Padding comes out as zeros: the rows of a contiguous tensor from `begin` on.
inline void zero_rows(Tensor& out, int64_t begin) {
  const int64_t rows = out.dim() ? out.size(0) : 0;
  if (begin >= rows || out.numel() == 0) return;
  const int64_t row_bytes = out.numel() / rows * static_cast<int64_t>(out.element_size());
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + begin * row_bytes, 0,
              static_cast<size_t>((rows - begin) * row_bytes));
}

// Runs body(chunk, begin, end) over [0, total) on torch's threads; the number of chunks is at most
// max_chunks(), so that `chunk` can index a per-thread buffer.
inline int64_t max_chunks() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

template <class Body>
void parallel_chunks(int64_t total, int64_t least, Body&& body) {
  const int64_t chunks =
      std::min<int64_t>(max_chunks(), std::max<int64_t>(1, total / std::max<int64_t>(1, least)));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, total * chunk / chunks, total * (chunk + 1) / chunks);
    }
  });
}

// How many pieces of work, each of them `bytes` long, are worth another thread.
inline int64_t least_per_thread(int64_t bytes) { return 65536 / std::max<int64_t>(1, bytes) + 1; }

#endif

}  // namespace uhd

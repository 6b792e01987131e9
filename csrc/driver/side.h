// SPDX-License-Identifier: Apache-2.0
// The two sides of a comparison: the scalar CPU kernels in float64, and the CUDA kernels in the
// type under test. The arguments of a call are laid out by the same code on both. With
// UHD_DRIVER_ON_HOST the device is the host: the CUDA kernels are emulated, or the CPU kernels
// stand in their place (csrc/races).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/view_table.h"
#ifndef UHD_DRIVER_ON_HOST
#include <cuda_runtime_api.h>
#endif

namespace uhd {
namespace driver {

// The type of sums, statistics and the parameters of a LayerNorm.
constexpr DType wide(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// ---- numbers: each is a double on its way, which every element type fits in

// Stores a multiple of 1/8 from -1.5 to 2.5, which all types hold exactly, or NaN.
inline void encode(DType dtype, double value, char* to) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  uint32_t half = bits >> 16;
  if (dtype == DType::kFloat16) {  // moves the bias of the exponent from 127 to 15
    const uint32_t size = std::isnan(value) ? 0x7e00
                          : value == 0      ? 0
                                            : ((bits & 0x7fffffff) - 0x38000000) >> 13;
    half = (half & 0x8000) | size;
  }
  const void* from = &half;  // little-endian: its low bytes
  if (dtype == DType::kFloat64) from = &value;
  if (dtype == DType::kFloat32) from = &narrow;
  std::memcpy(to, from, static_cast<size_t>(element_size(dtype)));
}

inline double decode(DType dtype, const char* from) {
  double value = 0;
  float narrow = 0;
  uint32_t half = 0;
  if (dtype == DType::kFloat64) return std::memcpy(&value, from, sizeof value), value;
  if (dtype == DType::kFloat32) return std::memcpy(&narrow, from, sizeof narrow), narrow;
  std::memcpy(&half, from, 2);
  const uint32_t bits = half << 16;
  if (dtype == DType::kBFloat16) return std::memcpy(&narrow, &bits, sizeof narrow), narrow;
  const int field = half >> 10 & 31, fraction = half & 1023;
  const double size = field == 31  ? std::numeric_limits<double>::quiet_NaN()  // or infinity
                      : field == 0 ? std::ldexp(fraction, -24)
                                   : std::ldexp(1024 + fraction, field - 25);
  return half & 0x8000 ? -size : size;
}

// ---- memory of the host, or of the device

inline bool poison = true;  // new memory is NaN; else initcheck sees what nobody has written

#ifdef UHD_DRIVER_ON_HOST
inline void* allocate(bool, size_t bytes) { return ::operator new(bytes, std::align_val_t{256}); }
inline void release(bool, void* memory) { ::operator delete(memory, std::align_val_t{256}); }
inline void copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void synchronize() {}
#else
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void* allocate(bool device, size_t bytes) {
  void* memory = nullptr;
  if (!device) return ::operator new(bytes);
  check(cudaMalloc(&memory, std::max<size_t>(1, bytes)));  // no more: memcheck sees the end
  return memory;
}
inline void release(bool device, void* memory) {
  device ? void(cudaFree(memory)) : ::operator delete(memory);
}
inline void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
inline void synchronize() { check(cudaDeviceSynchronize()); }
#endif

class Buffer {
 public:
  Buffer(bool device, size_t bytes)
      : device_(device), bytes_(bytes), memory_(allocate(device, bytes)) {}
  Buffer(Buffer&& other) noexcept
      : device_(other.device_),
        bytes_(other.bytes_),
        memory_(std::exchange(other.memory_, nullptr)) {}
  ~Buffer() { release(device_, memory_); }

  void* data() const { return memory_; }
  void upload(const std::vector<char>& bytes) const { copy(memory_, bytes.data(), bytes_); }
  void fill(char byte) const { upload(std::vector<char>(bytes_, byte)); }
  std::vector<char> download() const {
    std::vector<char> bytes(bytes_);
    copy(bytes.data(), memory_, bytes_);
    return bytes;
  }

 private:
  bool device_;
  size_t bytes_;
  void* memory_;
};

// ---- sides

class Side {
 public:
  Side() : device_(false), dtype_(DType::kFloat64) {}           // the host
  explicit Side(DType dtype) : device_(true), dtype_(dtype) {}  // the device

  DType dtype() const { return dtype_; }
  bool on_device() const { return device_; }

  // A fixed pattern, the same on both sides. Its mean is not zero, so that a sum of many is no
  // small difference of large numbers. From the element `real` on it is NaN: nobody may read that.
  const void* input(int64_t count, int64_t real) { return input(dtype_, count, real); }
  const void* parameter(int64_t count) { return input(wide(dtype_), count, count); }
  const ViewRow* views(const std::vector<ViewRow>& rows) {
    const char* begin = reinterpret_cast<const char*>(rows.data());
    return static_cast<const ViewRow*>(
        add(std::vector<char>(begin, begin + rows.size() * sizeof(ViewRow))));
  }
  // What is compared. Rows of padding are expected to become zeros, which is what the host has.
  void* output(const char* name, int64_t count) { return output(name, dtype_, count); }
  void* statistic(const char* name, int64_t count) { return output(name, wide(dtype_), count); }
  void* scratch(int64_t count) {  // of the wide type
    const size_t bytes = static_cast<size_t>(count * element_size(wide(dtype_)));
    return (memory_.emplace_back(device_, bytes), memory_.back().data());
  }
  // The address `elements` further on.
  const void* at(const void* pointer, int64_t elements) const {
    return static_cast<const char*>(pointer) + elements * element_size(dtype_);
  }

  // Runs the CUDA kernels, or scalar(args, 0, end).
  template <class Args, class Cuda, class Scalar>
  void run(const Args& args, Cuda&& cuda, Scalar&& scalar, int64_t end) const {
    if (!device_) return scalar(args, 0, end);
    if (const char* error = cuda(args, nullptr)) throw std::runtime_error(error);
    synchronize();
  }

  struct Output {
    std::string name;
    DType dtype;
    Buffer buffer;
  };
  const std::vector<Output>& outputs() const { return outputs_; }

 private:
  const void* add(const std::vector<char>& bytes) {
    memory_.emplace_back(device_, bytes.size());
    memory_.back().upload(bytes);
    return memory_.back().data();
  }
  const void* input(DType dtype, int64_t count, int64_t real) {
    const size_t size = static_cast<size_t>(element_size(dtype));
    std::vector<char> bytes(static_cast<size_t>(count) * size);
    uint64_t state = ++inputs_;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const double value = (static_cast<double>((state >> 40) % 33) - 12) / 8;
      encode(dtype, i < real ? value : std::nan(""), &bytes[static_cast<size_t>(i) * size]);
    }
    return add(bytes);
  }
  void* output(const char* name, DType dtype, int64_t count) {
    outputs_.push_back(
        {name, dtype, Buffer(device_, static_cast<size_t>(count * element_size(dtype)))});
    if (poison || !device_) outputs_.back().buffer.fill(device_ ? '\xff' : '\0');
    return outputs_.back().buffer.data();
  }

  bool device_;
  DType dtype_;
  uint64_t inputs_ = 0;
  std::vector<Buffer> memory_;
  std::vector<Output> outputs_;
};

// Calls whose outputs are compared: the forward and the backward pass of one code path.
struct Case {
  std::string name;
  DType dtype;
  int64_t terms;  // of its longest sum: see the bound in main.cpp
  std::function<void(Side&)> run;
};

std::vector<Case> all_cases();
#ifdef UHD_RACES
Case planner_case();
#endif

}  // namespace driver
}  // namespace uhd

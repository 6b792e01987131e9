// SPDX-License-Identifier: Apache-2.0
// The two sides of a comparison: the scalar CPU kernels in float64, and the CUDA kernels in the
// type under test. The arguments of a call are laid out by the same code on both.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/view_table.h"
#include "driver/numbers.h"

namespace uhd {
namespace driver {

// How far an output may be from float64, in relative L2 norm: so many roundings to the element
// type, and so many to the wide type. A rounding changes every one of the independent terms of a
// sum by at most its unit roundoff, and so the norm of the output; the worst element may be off by
// kWorstElement times as much.
struct Limit {
  double elements, sums;
  double of(DType dtype) const {
    return elements * unit_roundoff(dtype) + sums * unit_roundoff(wide(dtype));
  }
};
constexpr double kWorstElement = 8;  // 5 deviations of an error, on a number of up to some of them
constexpr Limit kSameBits{0, 0};

// A contiguous tensor that a kernel writes. Rows from real_rows on must become zeros.
struct Output {
  const char* name;
  DType dtype;  // on the device
  int64_t rows, cols, real_rows;
  Limit limit;
};

class Side {
 public:
  virtual ~Side() = default;
  virtual DType dtype() const = 0;
  virtual bool on_device() const = 0;
  virtual const void* input(const Matrix& matrix) = 0;
  virtual const ViewRow* views(const std::vector<ViewRow>& rows) = 0;
  virtual void* output(const Output& output) = 0;
  // Elements of the wide type, of any content.
  virtual void* scratch(int64_t elements) = 0;

  // The address `elements` further on.
  const void* at(const void* pointer, int64_t elements) const {
    return static_cast<const char*>(pointer) + elements * element_size(dtype());
  }
};

// ---- host

class HostSide : public Side {
 public:
  DType dtype() const override { return DType::kFloat64; }
  bool on_device() const override { return false; }
  const void* input(const Matrix& matrix) override { return matrix.values.data(); }
  const ViewRow* views(const std::vector<ViewRow>& rows) override { return rows.data(); }
  void* output(const Output& output) override {
    outputs_.emplace_back(static_cast<size_t>(output.rows * output.cols));
    return outputs_.back().data();
  }
  void* scratch(int64_t elements) override {
    scratch_.emplace_back(static_cast<size_t>(elements));
    return scratch_.back().data();
  }

  const std::vector<std::vector<double>>& outputs() const { return outputs_; }

 private:
  std::vector<std::vector<double>> outputs_, scratch_;
};

// ---- device

// Memory of the device, full of NaN at first, between two guard bands.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void* data() const { return memory_ + guard_bytes; }
  void upload(const void* from) const;
  std::vector<char> download() const;
  bool guards_intact() const;

  // A multiple of 256, or 0: then a tool that watches allocations sees every access outside.
  static size_t guard_bytes;

 private:
  char* memory_;
  size_t bytes_;
};

class DeviceSide : public Side {
 public:
  explicit DeviceSide(DType dtype) : dtype_(dtype) {}
  DType dtype() const override { return dtype_; }
  bool on_device() const override { return true; }
  const void* input(const Matrix& matrix) override;
  const ViewRow* views(const std::vector<ViewRow>& rows) override;
  void* output(const Output& output) override;
  void* scratch(int64_t elements) override;

  struct Written {
    Output output;
    std::vector<char> bytes;
  };
  std::vector<Written> outputs() const;
  // What is wrong with the memory beside the outputs' values, or nothing.
  std::string damage() const;

 private:
  struct Input {
    std::string name;
    Buffer buffer;
    std::vector<char> bytes;
  };
  const void* add_input(std::string name, std::vector<char> bytes);

  DType dtype_;
  std::vector<Input> inputs_;
  std::vector<std::pair<Output, Buffer>> outputs_;
  std::vector<Buffer> scratch_;
};

}  // namespace driver
}  // namespace uhd

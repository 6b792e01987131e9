// SPDX-License-Identifier: Apache-2.0
#include "driver/sides.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "driver/memory.h"

namespace uhd {
namespace driver {
namespace {

// Both are NaN in every element type, so that what is read here shows in the result.
constexpr char kPoison = '\xff';
constexpr char kGuard[2] = {'\xfe', '\xff'};

std::vector<char> guard_band() {
  std::vector<char> band(Buffer::guard_bytes);
  for (size_t i = 0; i < band.size(); ++i) band[i] = kGuard[i % 2];
  return band;
}

}  // namespace

size_t Buffer::guard_bytes = 4096;

Buffer::Buffer(size_t bytes)
    : memory_(static_cast<char*>(allocate(std::max<size_t>(1, bytes + 2 * guard_bytes)))),
      bytes_(bytes) {
  const std::vector<char> band = guard_band(), poison(bytes, kPoison);
  copy_to_device(memory_, band.data(), band.size());
  copy_to_device(memory_ + guard_bytes, poison.data(), bytes);
  copy_to_device(memory_ + guard_bytes + bytes, band.data(), band.size());
}

Buffer::Buffer(Buffer&& other) noexcept
    : memory_(std::exchange(other.memory_, nullptr)), bytes_(other.bytes_) {}

Buffer::~Buffer() {
  if (memory_ != nullptr) release(memory_);
}

void Buffer::upload(const void* from) const { copy_to_device(data(), from, bytes_); }

std::vector<char> Buffer::download() const {
  std::vector<char> bytes(bytes_);
  copy_to_host(bytes.data(), data(), bytes_);
  return bytes;
}

bool Buffer::guards_intact() const {
  const std::vector<char> band = guard_band();
  std::vector<char> found(band.size());
  for (const char* start : {memory_, memory_ + guard_bytes + bytes_}) {
    copy_to_host(found.data(), start, found.size());
    if (found != band) return false;
  }
  return true;
}

const void* DeviceSide::add_input(std::string name, std::vector<char> bytes) {
  inputs_.push_back({std::move(name), Buffer(bytes.size()), std::move(bytes)});
  inputs_.back().buffer.upload(inputs_.back().bytes.data());
  return inputs_.back().buffer.data();
}

const void* DeviceSide::input(const Matrix& matrix) {
  return add_input(matrix.name, encode(matrix.dtype, matrix.values));
}

const ViewRow* DeviceSide::views(const std::vector<ViewRow>& rows) {
  std::vector<char> bytes(rows.size() * sizeof(ViewRow));
  std::memcpy(bytes.data(), rows.data(), bytes.size());  // a table has a last row at least
  return static_cast<const ViewRow*>(add_input("views", std::move(bytes)));
}

void* DeviceSide::output(const Output& output) {
  outputs_.emplace_back(
      output, Buffer(static_cast<size_t>(output.rows * output.cols * element_size(output.dtype))));
  return outputs_.back().second.data();
}

void* DeviceSide::scratch(int64_t elements) {
  scratch_.emplace_back(static_cast<size_t>(elements * element_size(wide(dtype_))));
  return scratch_.back().data();
}

std::vector<DeviceSide::Written> DeviceSide::outputs() const {
  std::vector<Written> written;
  for (const auto& [output, buffer] : outputs_) written.push_back({output, buffer.download()});
  return written;
}

std::string DeviceSide::damage() const {
  for (const Input& input : inputs_) {
    if (!input.buffer.guards_intact()) return "a store outside of the input " + input.name;
    if (input.buffer.download() != input.bytes) return "the input " + input.name + " has changed";
  }
  for (const auto& [output, buffer] : outputs_) {
    if (!buffer.guards_intact()) return std::string("a store outside of the output ") + output.name;
  }
  for (const Buffer& buffer : scratch_) {
    if (!buffer.guards_intact()) return "a store outside of the scratch memory";
  }
  return "";
}

}  // namespace driver
}  // namespace uhd

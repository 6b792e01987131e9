// SPDX-License-Identifier: Apache-2.0
#include "driver/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>

namespace uhd {
namespace driver {
namespace {

struct Difference {
  double error = 0;  // relative L2
  double worst = 0;  // of one element, relative to it and the mean size
  std::string broken;
};

std::string place(const Output& output, int64_t i) {
  return "[" + std::to_string(i / output.cols) + ", " + std::to_string(i % output.cols) + "]";
}

Difference difference(const Output& output, const std::vector<double>& wanted,
                      const std::vector<double>& found) {
  Difference result;
  double squares = 0, error_squares = 0;
  const int64_t real = output.real_rows * output.cols, size = output.rows * output.cols;
  for (int64_t i = 0; i < size; ++i) {
    if (std::isnan(found[i])) {
      result.broken = "NaN at " + place(output, i);
      return result;
    }
    if (i >= real && (found[i] != 0 || std::signbit(found[i]))) {
      result.broken = "padding is not zero at " + place(output, i);
      return result;
    }
    squares += wanted[i] * wanted[i];
    error_squares += (found[i] - wanted[i]) * (found[i] - wanted[i]);
  }
  if (error_squares == 0) return result;
  const double mean_size = std::sqrt(squares / static_cast<double>(std::max<int64_t>(1, real)));
  result.error = std::sqrt(error_squares / squares);
  for (int64_t i = 0; i < real; ++i) {
    const double size_here = std::fabs(wanted[i]) + mean_size;
    result.worst = std::max(result.worst, std::fabs(found[i] - wanted[i]) / size_here);
  }
  return result;
}

}  // namespace

void Report::begin_group(const std::string& name) {
  end_group();
  group_ = name;
  cases_ = group_checks_ = 0;
  worst_ = 0;
}

void Report::end_group() {
  if (group_.empty()) return;
  std::printf("%-44s %4lld cases %6lld checks, largest error %.2f of its limit\n", group_.c_str(),
              static_cast<long long>(cases_), static_cast<long long>(group_checks_), worst_);
  std::fflush(stdout);
  group_.clear();
}

void Report::fail(const std::string& label, const std::string& what) {
  failures_.push_back(group_ + ", " + label + ": " + what);
}

void Report::expect(const std::string& label, const std::string& what) {
  ++checks_;
  ++group_checks_;
  if (!what.empty()) fail(label, what);
}

void Report::compare(const std::string& label, DType dtype, const HostSide& host,
                     const std::vector<DeviceSide::Written>& written) {
  for (size_t i = 0; i < written.size(); ++i) {
    const Output& output = written[i].output;
    const Difference found =
        difference(output, host.outputs()[i], decode(output.dtype, written[i].bytes));
    const double limit = output.limit.of(dtype);
    std::ostringstream what;
    if (!found.broken.empty()) {
      what << output.name << ": " << found.broken;
    } else if (!(found.error <= limit) || !(found.worst <= kWorstElement * limit)) {
      what << output.name << ": error " << found.error << ", of one element " << found.worst
           << ", limit " << limit;
    }
    expect(label, what.str());
    if (limit > 0) {
      worst_ = std::max({worst_, found.error / limit, found.worst / limit / kWorstElement});
    }
  }
}

void Report::compare_bits(const std::string& label, const std::vector<DeviceSide::Written>& first,
                          const std::vector<DeviceSide::Written>& again) {
  for (size_t i = 0; i < first.size(); ++i) {
    const bool same = first[i].bytes == again[i].bytes;
    expect(label, same ? "" : std::string(first[i].output.name) + ": other bits in another run");
  }
}

int Report::finish() const {
  for (const std::string& failure : failures_) std::printf("FAILED %s\n", failure.c_str());
  if (failures_.empty() && checks_ > 0) {
    std::printf("all %lld checks passed\n", static_cast<long long>(checks_));
    return 0;
  }
  std::printf("%zu failures in %lld checks\n", failures_.size(), static_cast<long long>(checks_));
  return 1;
}

}  // namespace driver
}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
// Runs calls on both sides, compares them and keeps count.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "driver/memory.h"
#include "driver/sides.h"

namespace uhd {
namespace driver {

class Report {
 public:
  explicit Report(int repeats) : repeats_(repeats) {}

  // Cases of one pass of an operator in one type; prints a line when the next group begins.
  void begin_group(const std::string& name);
  void end_group();

  // Runs reference(arguments(host side)), and launch(arguments(device side), stream) as often as
  // asked for; checks the values of the first run and the bits of the others. arguments(side) must
  // ask for the same outputs on both sides.
  template <class Arguments, class Reference, class Launch>
  void check(const std::string& label, DType dtype, Arguments&& arguments, Reference&& reference,
             Launch&& launch) {
    HostSide host;
    reference(arguments(host));
    std::vector<DeviceSide::Written> first;
    for (int run = 0; run < repeats_; ++run) {
      DeviceSide device(dtype);
      if (const char* error = launch(arguments(device), nullptr)) return fail(label, error);
      synchronize();
      if (run == 0) {
        first = device.outputs();
        compare(label, dtype, host, first);
      } else {
        compare_bits(label, first, device.outputs());
      }
      expect(label, device.damage());
    }
    ++cases_;
  }

  void fail(const std::string& label, const std::string& what);
  // Prints the last line; 0 or 1, for main.
  int finish() const;

 private:
  // A check that passed when `what` is empty.
  void expect(const std::string& label, const std::string& what);
  void compare(const std::string& label, DType dtype, const HostSide& host,
               const std::vector<DeviceSide::Written>& written);
  void compare_bits(const std::string& label, const std::vector<DeviceSide::Written>& first,
                    const std::vector<DeviceSide::Written>& again);

  int repeats_;
  int64_t checks_ = 0, cases_ = 0, group_checks_ = 0;
  double worst_ = 0;  // error in units of its limit
  std::string group_;
  std::vector<std::string> failures_;
};

}  // namespace driver
}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
// Exercises csrc/common/vec.h for one instruction set; test_vec.py compiles and runs it.
//
//   vec_check exp              the largest error of exp in units of the last place, over many
//   floats vec_check widen half|bf16  all 65536 bit patterns as floats, to stdout vec_check narrow
//   half|bf16 floats from stdin, rounded to 16 bits, to stdout
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/vec.h"

namespace uhd {
namespace {

constexpr int kWidth = kLanes<float>;

int check_exp() {
  double worst = 0;
  for (float x = -87.33f; x < 88.37f;) {
    float in[kWidth], out[kWidth];
    for (float& value : in) value = x += 1.7e-4f;
    store(out, exp(load(in)));
    for (int i = 0; i < kWidth; ++i) {
      const double exact = std::exp(static_cast<double>(in[i]));
      const float rounded = static_cast<float>(exact);
      const double ulp = static_cast<double>(std::nextafter(rounded, INFINITY)) - rounded;
      const double error = std::fabs(out[i] - exact) / ulp;
      if (!(error <= worst)) worst = error;
    }
  }
  const float edges[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 89.0f, -88.0f, -104.0f};
  std::printf("%.9g", worst);
  for (float x : edges) {
    float out[kWidth];
    store(out, exp(splat(x)));
    std::printf(" %g", out[kWidth - 1]);
  }
  std::printf("\n");
  return 0;
}

template <class Half>
int widen_all() {
  std::vector<Half> in(65536);
  std::vector<float> out(65536);
  for (int i = 0; i < 65536; ++i) in[i].bits = static_cast<uint16_t>(i);
  for (int i = 0; i < 65536; i += kWidth) store(&out[i], load(&in[i]));
  return std::fwrite(out.data(), sizeof(float), out.size(), stdout) == out.size() ? 0 : 1;
}

template <class Half>
int narrow_stdin() {
  std::vector<float> in(1 << 20);
  std::vector<Half> out(in.size());
  while (const size_t read = std::fread(in.data(), sizeof(float), in.size(), stdin)) {
    for (size_t i = 0; i < read; i += kWidth) {
      const int rest = static_cast<int>(read - i);
      // The last vector of a block goes through the masked forms.
      if (rest > kWidth) {
        store(&out[i], load(&in[i]));
      } else if (rest == kWidth) {
        store(&out[i], load(&in[i], kWidth - 1), kWidth - 1);
        store(&out[i + kWidth - 1], load(&in[i + kWidth - 1], 1), 1);
      } else {
        store(&out[i], load(&in[i], rest), rest);
      }
    }
    if (std::fwrite(out.data(), sizeof(Half), read, stdout) != read) return 1;
  }
  return 0;
}

}  // namespace
}  // namespace uhd

int main(int argc, char** argv) {
  const bool half = argc > 2 && !std::strcmp(argv[2], "half");
  if (argc == 2 && !std::strcmp(argv[1], "exp")) return uhd::check_exp();
  if (argc == 3 && !std::strcmp(argv[1], "widen")) {
    return half ? uhd::widen_all<uhd::Float16>() : uhd::widen_all<uhd::BFloat16>();
  }
  if (argc == 3 && !std::strcmp(argv[1], "narrow")) {
    return half ? uhd::narrow_stdin<uhd::Float16>() : uhd::narrow_stdin<uhd::BFloat16>();
  }
  return 2;
}

// SPDX-License-Identifier: Apache-2.0
#include "host/build_info.h"

namespace uhd {

std::map<std::string, std::string> build_info() {
  return {
      {"version", UHD_VERSION},
      {"compiler", UHD_CXX},
      {"cpu_isas", UHD_ISAS},
      {"cuda_archs", UHD_CUDA_ARCHS},
      {"torch_target", UHD_TORCH_TARGET},
  };
}

}  // namespace uhd

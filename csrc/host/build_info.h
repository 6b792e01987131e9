// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <map>
#include <string>

namespace uhd {

// What the build was configured with: version, compiler, instruction sets, CUDA architectures,
// oldest torch.
std::map<std::string, std::string> build_info();

}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
// The memory that kernels run on: that of a GPU, or with UHD_EMULATED the host's own. Whatever goes
// wrong is a std::runtime_error.
#pragma once
#include <cstddef>
#include <string>

namespace uhd {
namespace driver {

std::string device_name();
void* allocate(size_t bytes);
void release(void* memory);
void copy_to_device(void* to, const void* from, size_t bytes);
void copy_to_host(void* to, const void* from, size_t bytes);
// Waits for all launches; an error of one of them surfaces here.
void synchronize();

}  // namespace driver
}  // namespace uhd

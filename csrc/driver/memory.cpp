// SPDX-License-Identifier: Apache-2.0
#include "driver/memory.h"

#ifdef UHD_EMULATED
#include <cstring>
#include <new>
#else
#include <cuda_runtime_api.h>

#include <stdexcept>
#endif

namespace uhd {
namespace driver {

#ifdef UHD_EMULATED

std::string device_name() { return "the emulator"; }
// As aligned as cudaMalloc's memory.
void* allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t{256}); }
void release(void* memory) { ::operator delete(memory, std::align_val_t{256}); }
void copy_to_device(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // of nothing, the address may be null
}
void copy_to_host(void* to, const void* from, size_t bytes) { copy_to_device(to, from, bytes); }
void synchronize() {}

#else

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace

std::string device_name() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return properties.name;
}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}

void release(void* memory) { (void)cudaFree(memory); }

void copy_to_device(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}

void copy_to_host(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy to the host");
}

void synchronize() { check(cudaDeviceSynchronize(), "kernel"); }

#endif

}  // namespace driver
}  // namespace uhd

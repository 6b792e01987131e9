// SPDX-License-Identifier: Apache-2.0
// The library is found at run time, among those that `import torch` has mapped: nothing is linked,
// so that one binary serves CUDA 12 and 13 and a torch that has no cuBLASLt.
#ifdef UHD_WITH_CUDA  // the CPU library compiles the same list of files
#include "linear_activation/cublaslt.h"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

namespace uhd {
namespace cublaslt {
namespace {

#define UHD_CUBLASLT_FUNCTIONS(apply)                                                        \
  apply(GetVersion) apply(Create) apply(Matmul) apply(MatmulAlgoGetHeuristic)                \
      apply(MatmulDescCreate) apply(MatmulDescSetAttribute) apply(MatmulDescDestroy)         \
          apply(MatrixLayoutCreate) apply(MatrixLayoutDestroy) apply(MatmulPreferenceCreate) \
              apply(MatmulPreferenceSetAttribute) apply(MatmulPreferenceDestroy)

// The functions of the library, with their types from its header.
struct Library {
#define UHD_DECLARE(name) decltype(&cublasLt##name) name = nullptr;
  UHD_CUBLASLT_FUNCTIONS(UHD_DECLARE)
#undef UHD_DECLARE
  bool complete = false;
};

Library load() {
  Library functions;
  void* file = nullptr;
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (!file) file = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
  }
  if (!file) return functions;
  functions.complete = true;
#define UHD_FIND(name)                                                                        \
  functions.name = reinterpret_cast<decltype(functions.name)>(dlsym(file, "cublasLt" #name)); \
  functions.complete = functions.complete && functions.name;
  UHD_CUBLASLT_FUNCTIONS(UHD_FIND)
#undef UHD_FIND
  return functions;
}

const Library& library() {
  static const Library functions = load();
  return functions;
}

void check(cublasStatus_t status, const char* function) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "linear_activation: cublasLt", function,
                  " failed with status ", static_cast<int>(status));
}

struct Destroy {
  void operator()(cublasLtMatmulDesc_t operation) const { library().MatmulDescDestroy(operation); }
  void operator()(cublasLtMatrixLayout_t layout) const { library().MatrixLayoutDestroy(layout); }
  void operator()(cublasLtMatmulPreference_t preference) const {
    library().MatmulPreferenceDestroy(preference);
  }
};
template <class Pointer>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy>;

// cuBLASLt asks this much of u, and of the rest for loads of 16 bytes: addresses in bytes, strides
// between rows in elements.
constexpr uint32_t kAlignment = 16;
constexpr int64_t kStride = 8;
constexpr uint64_t kWorkspaceBytes = 32 << 20;  // what NVIDIA advises for Hopper
constexpr int kCandidates = 8;

// What follows the product.
struct Epilogue {
  const void* bias;  // (O,) or null
  void* u;           // (R, O) or null
  int64_t stride;    // of u
};

Owned<cublasLtMatmulDesc_t> describe(const Epilogue& epilogue) {
  cublasLtMatmulDesc_t created = nullptr;
  check(library().MatmulDescCreate(&created, CUBLAS_COMPUTE_32F, CUDA_R_32F), "MatmulDescCreate");
  Owned<cublasLtMatmulDesc_t> operation(created);
  const auto set = [&](cublasLtMatmulDescAttributes_t name, const auto& value) {
    check(library().MatmulDescSetAttribute(created, name, &value, sizeof value),
          "MatmulDescSetAttribute");
  };
  uint32_t kind = epilogue.u ? CUBLASLT_EPILOGUE_GELU_AUX : CUBLASLT_EPILOGUE_GELU;
  if (epilogue.bias) kind |= CUBLASLT_EPILOGUE_BIAS;
  // cuBLASLt stores matrices by columns and so sees ours transposed: h^T = GELU((weight^T)^T z^T).
  set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(CUBLAS_OP_T));
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, kind);
  if (epilogue.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, epilogue.bias);
  if (epilogue.u) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, epilogue.u);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, epilogue.stride);
  }
  return operation;
}

Owned<cublasLtMatrixLayout_t> layout(const Tensor& x) {
  const auto type = x.scalar_type() == ScalarType::BFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  cublasLtMatrixLayout_t created = nullptr;
  check(library().MatrixLayoutCreate(&created, type, static_cast<uint64_t>(x.size(1)),
                                     static_cast<uint64_t>(x.size(0)), x.stride(0)),
        "MatrixLayoutCreate");
  return Owned<cublasLtMatrixLayout_t>(created);
}

Owned<cublasLtMatmulPreference_t> preference() {
  cublasLtMatmulPreference_t created = nullptr;
  check(library().MatmulPreferenceCreate(&created), "MatmulPreferenceCreate");
  Owned<cublasLtMatmulPreference_t> wishes(created);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
    check(library().MatmulPreferenceSetAttribute(created, name, &value, sizeof value),
          "MatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  // Parts of a sum that was split meet in float32; the other schemes would round them first.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (auto name :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    set(name, kAlignment);
  }
  return wishes;
}

// One for each device. They live as long as the process: at its end CUDA may be gone before them.
cublasLtHandle_t handle_of(int32_t device) {
  static std::mutex mutex;
  static auto& handles = *new std::map<int32_t, cublasLtHandle_t>;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (!handle) check(library().Create(&handle), "Create");
  return handle;
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kAlignment == 0; }

bool fits(const Tensor& x) {
  return x.size(0) > 0 && x.size(1) > 0 && x.stride(1) == 1 && x.stride(0) >= x.size(1) &&
         x.stride(0) % kStride == 0 && aligned(x.const_data_ptr());
}

bool is_half(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
}

}  // namespace

int64_t version() {
  if (!library().complete) return 0;
  alignas(kAlignment) char anything[kAlignment];  // its address is stored, not read
  describe({anything, anything, kStride});        // throws if the library refuses what is used here
  return static_cast<int64_t>(library().GetVersion());
}

bool linear_gelu(const Tensor& z, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& h, const Tensor& u) {
  if (!library().complete || !is_half(z) || !fits(z) || !fits(weight) || !fits(h)) return false;
  const bool save = u.numel() > 0;
  if ((bias && !aligned(bias->const_data_ptr())) || (save && !fits(u))) return false;
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  const cublasLtHandle_t handle = handle_of(z.get_device_index());
  const auto operation = describe({bias ? bias->const_data_ptr() : nullptr,
                                   save ? u.mutable_data_ptr() : nullptr, h.stride(0)});
  const auto a = layout(weight), b = layout(z), d = layout(h);
  cublasLtMatmulHeuristicResult_t candidates[kCandidates] = {};
  int count = 0;
  const cublasStatus_t asked =
      library().MatmulAlgoGetHeuristic(handle, operation.get(), a.get(), b.get(), d.get(), d.get(),
                                       preference().get(), kCandidates, candidates, &count);
  if (asked == CUBLAS_STATUS_NOT_SUPPORTED) return false;
  check(asked, "MatmulAlgoGetHeuristic");
  const Tensor workspace = new_empty(z, {int64_t{kWorkspaceBytes}}, ScalarType::Byte);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(z.get_device_index(), &stream));
  const float one = 1, zero = 0;
  for (int i = 0; i < count; ++i) {
    if (candidates[i].state != CUBLAS_STATUS_SUCCESS) continue;
    const cublasStatus_t status = library().Matmul(
        handle, operation.get(), &one, weight.const_data_ptr(), a.get(), z.const_data_ptr(),
        b.get(), &zero, h.mutable_data_ptr(), d.get(), h.mutable_data_ptr(), d.get(),
        &candidates[i].algo, workspace.mutable_data_ptr(), kWorkspaceBytes,
        static_cast<cudaStream_t>(stream));
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) continue;
    check(status, "Matmul");
    return true;
  }
  return false;
}

}  // namespace cublaslt
}  // namespace uhd

#else

namespace uhd {
namespace cublaslt {

int64_t version() { return -1; }

bool linear_gelu(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
                 const Tensor&) {
  return false;
}

}  // namespace cublaslt
}  // namespace uhd

#endif

STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) { m.def("_cublaslt_version() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, CompositeExplicitAutograd, m) {
  m.impl("_cublaslt_version", TORCH_BOX(&uhd::cublaslt::version));
}

#endif

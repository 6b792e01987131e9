// SPDX-License-Identifier: Apache-2.0
// Tensor cores, and the copies that feed them, for BFloat16 and Float16.
//
// Layouts as in the PTX ISA. With group = lane / 4 and place = lane % 4, element pairs (two
// neighbours of a row in one register, the first in the low bits):
//   A (16 x 16, rows)    a[0]: row group,   columns 2 place + {0, 1}    a[1]: row group + 8
//                        a[2], a[3]: the same rows, columns + 8
//   B (16 x 8, columns)  b[0]: column group, rows 2 place + {0, 1}      b[1]: rows + 8
//   C, D (16 x 8)        d[0], d[1]: row group, columns 2 place + {0, 1};  d[2], d[3]: row group +
//   8
#pragma once
#include "common/elements.cuh"

namespace uhd {
namespace {

#ifdef UHD_EMULATED

template <class T>
UHD_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_16x8x16<T>(d, a, b);
}
template <class T>
UHD_DEVICE void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  emulator::mma_16x8x8<T>(d, a, b);
}
UHD_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulator::ldmatrix(r, 4, row, false);
}
UHD_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  emulator::ldmatrix(r, 2, row, false);
}
UHD_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulator::ldmatrix(r, 4, row, true);
}
UHD_DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  emulator::ldmatrix(r, 2, row, true);
}
UHD_DEVICE uint32_t movmatrix(uint32_t a) { return emulator::movmatrix(a); }
UHD_DEVICE void cp_async_16(void* shared, const void* global) {
  emulator::cp_async_16(shared, global);
}
UHD_DEVICE void cp_async_16_or_zero(void* shared, const void* global, bool copy) {
  emulator::cp_async_16(shared, global, copy ? 16 : 0);
}
UHD_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int kLeft>
UHD_DEVICE void cp_async_wait() {
  emulator::cp_async_wait<kLeft>();
}

#else

// d += a b
template <class T>
UHD_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <class T>
UHD_DEVICE void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);

template <>
UHD_DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
UHD_DEVICE void mma_16x8x16<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
UHD_DEVICE void mma_16x8x8<BFloat16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <>
UHD_DEVICE void mma_16x8x8<Float16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

UHD_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Each lane names one row of 16 bytes: lanes 0-7 the rows of the first 8 x 8 matrix, 8-15 of the
// second, and so on. Register i then holds matrix i as an A or B fragment. The clobber keeps these
// reads behind the stores that filled the rows.
UHD_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
UHD_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
UHD_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
UHD_DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// The transpose of an 8 x 8 matrix of halves that is spread over the warp as a fragment.
UHD_DEVICE uint32_t movmatrix(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// Copies 16 bytes without passing through registers. They are there after cp_async_commit and a
// cp_async_wait<n> that leaves at most the n newest groups under way, for this thread; for others
// after a barrier.
UHD_DEVICE void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
// The same, or 16 bytes of zeros, and then the source is not touched.
UHD_DEVICE void cp_async_16_or_zero(void* shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(copy ? 16 : 0)
               : "memory");
}
UHD_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
UHD_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace
}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
// The emulator's tensor core against tables written down from the PTX ISA, and its conversions. A
// second file of the program emulator_check: several kernel files must be able to share cuda.h.
//
//   emulator_check layouts            number of wrong elements of each instruction, by element type
//   emulator_check products           error of a product in units of its bound, also with a planted
//                                     bug in the fragments
//   emulator_check words              functions on bits and numbers that need no running kernel
//   emulator_check widen half|bf16    all 65536 bit patterns as floats, to stdout
//   emulator_check narrow half|bf16   floats from stdin, rounded to 16 bits, to stdout
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "emulator/cuda.h"

namespace {

using uhd::BFloat16;
using uhd::Float16;
using uhd::emulator::launch;
using uhd::emulator::narrow;
using uhd::emulator::widen;

// ---- PTX ISA, "Matrix Fragments for mma": which element of the matrix is a<i>, b<i>, c<i> of a
// lane. a<i> is half i % 2 of register i / 2.

struct Element {
  int row, column;
};
using Layout = Element (*)(int lane, int i);

Element a_of_k16(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {upper ? group : group + 8, thread_in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Element b_of_k16(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {thread_in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group};
}
Element a_of_k8(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {i < 2 ? group : group + 8, thread_in_group * 2 + (i & 1)};
}
Element b_of_k8(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {thread_in_group * 2 + i, group};
}
Element accumulator(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {i < 2 ? group : group + 8, thread_in_group * 2 + (i & 1)};
}

template <class T, class Matrix>
std::vector<uint32_t> pack(Layout layout, int count, Matrix matrix) {
  std::vector<uint32_t> registers(32 * count / 2);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < count; ++i) {
      const Element element = layout(lane, i);
      const uint32_t bits = narrow<T>(matrix(element.row, element.column)).bits;
      registers[(lane * count + i) / 2] |= bits << 16 * (i % 2);
    }
  }
  return registers;
}

template <class T, int kDepth>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  float sums[4];
  uint32_t left[kDepth / 4], right[kDepth / 8];
  for (int i = 0; i < 4; ++i) sums[i] = d[4 * lane + i];
  for (int i = 0; i < kDepth / 4; ++i) left[i] = a[kDepth / 4 * lane + i];
  for (int i = 0; i < kDepth / 8; ++i) right[i] = b[kDepth / 8 * lane + i];
  if constexpr (kDepth == 16) {
    uhd::emulator::mma_16x8x16<T>(sums, left, right);
  } else {
    uhd::emulator::mma_16x8x8<T>(sums, left, right[0]);
  }
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sums[i];
}

// Number of wrong elements of D = C + A B, where C(m, n) = 512 (8 m + n + 1) tells every element
// from every other one; all numbers are exact.
template <class T, int kDepth, class A, class B, class Product>
int wrong_products(A a, B b, Product product) {
  const bool deep = kDepth == 16;
  const auto left = pack<T>(deep ? a_of_k16 : a_of_k8, kDepth / 2, a);
  const auto right = pack<T>(deep ? b_of_k16 : b_of_k8, kDepth / 4, b);
  float d[128];
  for (int i = 0; i < 128; ++i) {
    const Element element = accumulator(i / 4, i % 4);
    d[i] = 512.0f * (8 * element.row + element.column + 1);
  }
  launch(multiply_fragments<T, kDepth>, 1, 32, 0, left.data(), right.data(),
         static_cast<float*>(d));
  int wrong = 0;
  for (int i = 0; i < 128; ++i) {
    const auto [row, column] = accumulator(i / 4, i % 4);
    wrong += !(d[i] == 512.0f * (8 * row + column + 1) + product(row, column));
  }
  return wrong;
}

template <class T, int kDepth>
int wrong_mma() {
  const auto numbered_a = [](int m, int k) { return kDepth * m + k + 1.0f; };
  const auto numbered_b = [](int k, int n) { return 8 * k + n + 1.0f; };
  int wrong = 0;
  for (int k = 0; k < kDepth; ++k) {
    for (int m = 0; m < 16; ++m) {
      wrong += wrong_products<T, kDepth>(
          [&](int row, int column) { return row == m && column == k ? 1.0f : 0.0f; }, numbered_b,
          [&](int row, int column) { return row == m ? numbered_b(k, column) : 0.0f; });
    }
    for (int n = 0; n < 8; ++n) {
      wrong += wrong_products<T, kDepth>(
          numbered_a, [&](int row, int column) { return row == k && column == n ? 1.0f : 0.0f; },
          [&](int row, int column) { return column == n ? numbered_a(row, k) : 0.0f; });
    }
  }
  return wrong;
}

// ---- PTX ISA, "ldmatrix" and "movmatrix": lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of
// row l / 4; with .trans, of column l / 4.

int row_of_lane(int lane) { return (5 * lane + 3) % 32; }  // rows lie in no simple order

__global__ void load_matrices(uint32_t* out, int count, bool transpose) {
  uint16_t* shared = static_cast<uint16_t*>(uhd::emulator::dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x);
  uint16_t* row = shared + 8 * row_of_lane(lane);
  for (int i = 0; i < 8; ++i) row[i] = static_cast<uint16_t>(1000 + 8 * lane + i);
  __syncthreads();
  // Lanes whose address does not count pass none.
  const void* address = lane < 8 * count ? row : nullptr;
  uhd::emulator::ldmatrix(out + 4 * lane, count, address, transpose);
}

int wrong_ldmatrix() {
  int wrong = 0;
  for (int count : {1, 2, 4}) {
    for (bool transpose : {false, true}) {
      std::vector<uint32_t> out(128, 0xdeadbeef);
      launch(load_matrices, 1, 32, 512, out.data(), count, transpose);
      for (int i = 0; i < 256; ++i) {
        const int lane = i / 8, matrix = i / 2 % 4, line = lane / 4, place = lane % 4 * 2 + i % 2;
        const int row = transpose ? place : line, column = transpose ? line : place;
        const uint32_t wanted = matrix < count ? 1000 + 64 * matrix + 8 * row + column
                                               : 0xdeadbeef >> 16 * (i % 2) & 0xffff;
        wrong += (out[4 * lane + matrix] >> 16 * (i % 2) & 0xffff) != wanted;
      }
    }
  }
  return wrong;
}

__global__ void move_matrix(uint32_t* x) {
  x[threadIdx.x] = uhd::emulator::movmatrix(x[threadIdx.x]);
}

int wrong_movmatrix() {
  int wrong = 0;
  for (int hot = 0; hot < 64; ++hot) {
    uint32_t x[32] = {};
    const int row = hot / 8, column = hot % 8;
    x[4 * row + column / 2] = 0xabcdu << 16 * (column % 2);
    launch(move_matrix, 1, 32, 0, static_cast<uint32_t*>(x));
    for (int lane = 0; lane < 32; ++lane) {
      const bool here = lane == 4 * column + row / 2;
      wrong += x[lane] != (here ? 0xabcdu << 16 * (row % 2) : 0);
    }
  }
  return wrong;
}

int print_layouts() {
  std::printf("mma_16x8x16 %d %d\n", wrong_mma<BFloat16, 16>(), wrong_mma<Float16, 16>());
  std::printf("mma_16x8x8 %d %d\n", wrong_mma<BFloat16, 8>(), wrong_mma<Float16, 8>());
  std::printf("ldmatrix %d\n", wrong_ldmatrix());
  std::printf("movmatrix %d\n", wrong_movmatrix());
  return 0;
}

// ---- a product of random matrices, fragments loaded as a kernel would

template <class T, bool kSwapped>
__global__ void multiply(const T* a, const T* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, pair = lane % 4 * 2;
  const auto left = [&](int row, int k) {
    return a[16 * row + k].bits | static_cast<uint32_t>(a[16 * row + k + 1].bits) << 16;
  };
  const auto right = [&](int k) {
    return b[8 * k + group].bits | static_cast<uint32_t>(b[8 * (k + 1) + group].bits) << 16;
  };
  const int first = kSwapped ? 8 : 0;  // the planted bug: A's two k halves change places
  const uint32_t a_fragment[4] = {left(group, pair + first), left(group + 8, pair + first),
                                  left(group, pair + 8 - first), left(group + 8, pair + 8 - first)};
  const uint32_t b_fragment[2] = {right(pair), right(pair + 8)};
  float sums[4] = {};
  uhd::emulator::mma_16x8x16<T>(sums, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) d[8 * (group + i / 2 * 8) + pair + i % 2] = sums[i];
}

// The worst error, over the bound of sums in float32: the products are exact and 16 additions
// round, each by at most 2^-24 of a partial sum, which is not above the sum of the magnitudes (1 +
// 2^-20).
template <class T, bool kSwapped>
double worst_error() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  T a[256], b[128];
  for (T& value : a) value = narrow<T>(normal(random));
  for (T& value : b) value = narrow<T>(normal(random));
  float d[128];
  launch(multiply<T, kSwapped>, 1, 32, 0, static_cast<const T*>(a), static_cast<const T*>(b),
         static_cast<float*>(d));
  double worst = 0;
  for (int i = 0; i < 128; ++i) {
    double sum = 0, magnitude = 0;
    for (int k = 0; k < 16; ++k) {
      const double product =
          static_cast<double>(widen(a[i / 8 * 16 + k])) * widen(b[8 * k + i % 8]);
      sum += product;
      magnitude += std::fabs(product);
    }
    const double error = std::fabs(d[i] - sum) / (16 * 0x1p-24 * magnitude * (1 + 0x1p-20));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

int print_products() {
  std::printf("%g %g\n", worst_error<BFloat16, false>(), worst_error<Float16, false>());
  std::printf("%g %g\n", worst_error<BFloat16, true>(), worst_error<Float16, true>());
  return 0;
}

int print_words() {
  const double x = -1.5e300;
  const bool joined = __hiloint2double(__double2hiint(x), __double2loint(x)) == x;
  std::printf("%x %x %x\n", __byte_perm(0x33221100, 0x77665544, 0x7250),
              __byte_perm(0x33221100, 0x77665544, 0x5410),
              __byte_perm(0x33221100, 0x77665544, 0x7632));
  std::printf("%d %x %d\n", joined, static_cast<unsigned>(__double2hiint(-2.0)),
              __double2loint(-2.0));
  std::printf("%x %g %d %d %d %d\n", __float_as_uint(-2.0f), __int_as_float(0x40400000),
              __popc(0xf0f1), __clz(1), __clz(0), __ffs(8));
  std::printf("%g %g\n", rsqrtf(16.0f), rsqrt(0.25));
  return 0;
}

template <class T>
int widen_all() {
  std::vector<float> out(65536);
  for (int i = 0; i < 65536; ++i) out[i] = widen(T{static_cast<uint16_t>(i)});
  return std::fwrite(out.data(), sizeof(float), out.size(), stdout) == out.size() ? 0 : 1;
}

template <class T>
int narrow_stdin() {
  std::vector<float> in(1 << 16);
  std::vector<T> out(in.size());
  while (const size_t read = std::fread(in.data(), sizeof(float), in.size(), stdin)) {
    for (size_t i = 0; i < read; ++i) out[i] = narrow<T>(in[i]);
    if (std::fwrite(out.data(), sizeof(T), read, stdout) != read) return 1;
  }
  return 0;
}

}  // namespace

int layouts_main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "", kind = argc > 2 ? argv[2] : "";
  if (command == "layouts") return print_layouts();
  if (command == "products") return print_products();
  if (command == "words") return print_words();
  if (command == "widen") return kind == "half" ? widen_all<Float16>() : widen_all<BFloat16>();
  if (command == "narrow") {
    return kind == "half" ? narrow_stdin<Float16>() : narrow_stdin<BFloat16>();
  }
  return 2;
}

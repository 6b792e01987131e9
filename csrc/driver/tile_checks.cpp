// SPDX-License-Identifier: Apache-2.0
#include "driver/checks.h"
#include "tile_average/tile_average.h"
#include "tile_block_diagonal/tile_block_diagonal.h"
#include "tile_vector/tile_vector.h"

namespace uhd {
namespace driver {
namespace {

struct Sizes {
  int64_t tiles, rows, cols, gap;

  std::string name() const {
    return std::to_string(tiles) + " tiles, weight " + std::to_string(rows) + "x" +
           std::to_string(cols) + ", gap " + std::to_string(gap);
  }
  // Each tile is one addition, then a division.
  Limit sum_limit() const { return {1, static_cast<double>(tiles + 1)}; }
};

constexpr Sizes kSizes[] = {{4, 16, 64, 0},  {3, 5, 7, 0},    {2, 33, 24, 8}, {4, 6, 36, 1},
                            {1, 3, 8, 0},    {9, 2, 1, 0},    {2, 0, 8, 0},   {3, 4, 0, 0},
                            {5, 1, 1, 0},    {4, 130, 72, 0}, {4, 3, 6, 2},   {16, 7, 20, 4},
                            {4, 20, 1160, 0}};
constexpr int kQuickSizes = 4;

template <class Body>
void for_sizes(Report& report, const char* name, bool quick, Body&& body) {
  for (const char* pass : {"forward", "backward"}) {
    for (DType dtype : kDTypes) {
      report.begin_group(std::string(name) + " " + pass + " " + name_of(dtype));
      Random random(7);
      int left = quick ? kQuickSizes : static_cast<int>(std::size(kSizes));
      for (const Sizes& sizes : kSizes) {
        if (left-- > 0) body(std::string(pass) == "forward", dtype, random, sizes);
      }
    }
  }
}

// The weight of a forward pass, or the gradient of `rows` x `cols` outputs of a backward pass.
Matrix input_of(Random& random, const char* name, DType dtype, int64_t rows, int64_t cols,
                int64_t gap) {
  return random_matrix(random, name, dtype, rows, cols, rows, gap);
}

}  // namespace

void check_tile_average(Report& report, bool quick) {
  for_sizes(report, "tile_average", quick,
            [&](bool forward, DType dtype, Random& random, const Sizes& sizes) {
              const auto [tiles, rows, cols, gap] = sizes;
              const Matrix input =
                  forward ? input_of(random, "weight", dtype, rows, cols, gap)
                          : input_of(random, "grad_out", dtype, rows, tiles * cols, gap);
              const auto arguments = [&, tiles = tiles, rows = rows, cols = cols](Side& side) {
                TileAverage args{};
                args.dtype = side.dtype();
                args.tiles = tiles;
                args.rows = rows;
                args.cols = cols;
                const int64_t out_cols = forward ? tiles * cols : cols;
                const Output out{"out", dtype, rows, out_cols, rows, sizes.sum_limit()};
                (forward ? args.weight : args.grad_out) = side.input(input);
                (forward ? args.weight_stride : args.grad_out_stride) = input.stride;
                (forward ? args.out : args.grad_weight) = side.output(out);
                return args;
              };
              const auto reference = [&](const TileAverage& args) {
                if (args.rows == 0 || args.cols == 0) return;
                forward ? scalar::tile_average_forward(args, 0, args.rows)
                        : scalar::tile_average_backward(args, 0, args.rows);
              };
              report.check(sizes.name(), dtype, arguments, reference,
                           forward ? cuda::tile_average_forward : cuda::tile_average_backward);
            });
}

void check_tile_block_diagonal(Report& report, bool quick) {
  for_sizes(report, "tile_block_diagonal", quick,
            [&](bool forward, DType dtype, Random& random, const Sizes& sizes) {
              const auto [tiles, rows, cols, gap] = sizes;
              const Matrix input =
                  forward ? input_of(random, "weight", dtype, rows, cols, gap)
                          : input_of(random, "grad_out", dtype, tiles * rows, tiles * cols, gap);
              const auto arguments = [&, tiles = tiles, rows = rows, cols = cols](Side& side) {
                TileBlockDiagonal args{};
                args.dtype = side.dtype();
                args.tiles = tiles;
                args.rows = rows;
                args.cols = cols;
                const int64_t times = forward ? tiles : 1;
                const Output out{"out",        dtype,
                                 times * rows, times * cols,
                                 times * rows, forward ? kSameBits : sizes.sum_limit()};
                (forward ? args.weight : args.grad_out) = side.input(input);
                (forward ? args.weight_stride : args.grad_out_stride) = input.stride;
                (forward ? args.out : args.grad_weight) = side.output(out);
                return args;
              };
              const auto reference = [&](const TileBlockDiagonal& args) {
                if (args.rows == 0 || args.cols == 0) return;
                forward ? scalar::tile_block_diagonal_forward(args, 0, args.tiles * args.rows)
                        : scalar::tile_block_diagonal_backward(args, 0, args.rows);
              };
              report.check(
                  sizes.name(), dtype, arguments, reference,
                  forward ? cuda::tile_block_diagonal_forward : cuda::tile_block_diagonal_backward);
            });
}

void check_tile_vector(Report& report, bool quick) {
  for_sizes(report, "tile_vector", quick,
            [&](bool forward, DType dtype, Random& random, const Sizes& sizes) {
              const int64_t tiles = sizes.tiles, size = sizes.rows * sizes.cols;
              const Matrix input = forward ? input_of(random, "vector", dtype, 1, size, 0)
                                           : input_of(random, "grad_out", dtype, tiles, size, 0);
              const auto arguments = [&](Side& side) {
                TileVector args{};
                args.dtype = side.dtype();
                args.tiles = tiles;
                args.size = size;
                const int64_t rows = forward ? tiles : 1;
                const Output out{"out", dtype, rows,
                                 size,  rows,  forward ? kSameBits : sizes.sum_limit()};
                (forward ? args.vector : args.grad_out) = side.input(input);
                (forward ? args.out : args.grad_vector) = side.output(out);
                return args;
              };
              const auto reference = [&](const TileVector& args) {
                if (args.size == 0) return;
                forward ? scalar::tile_vector_forward(args, 0, args.tiles)
                        : scalar::tile_vector_backward(args, 0, args.size);
              };
              report.check(sizes.name(), dtype, arguments, reference,
                           forward ? cuda::tile_vector_forward : cuda::tile_vector_backward);
            });
}

}  // namespace driver
}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
#include "driver/checks.h"
#include "tile_weight/tile_weight.h"

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

// `down` and `across`: whether the tiles lie below each other, and side by side.
void check(Report& report, const std::string& name, bool quick, bool down, bool across,
           bool divided) {
  for (const char* pass : {"forward", "backward"}) {
    const bool forward = std::string(pass) == "forward";
    for (DType dtype : kDTypes) {
      report.begin_group(name + " " + pass + " " + name_of(dtype));
      Random random(7);
      int left = quick ? kQuickSizes : static_cast<int>(std::size(kSizes));
      for (const Sizes& sizes : kSizes) {
        if (left-- == 0) break;
        TileWeight shape{};
        shape.tiles = sizes.tiles;
        shape.rows = across ? sizes.rows : 1;
        shape.cols = across ? sizes.cols : sizes.rows * sizes.cols;
        shape.down = down ? sizes.tiles : 1;
        shape.across = across ? sizes.tiles : 1;
        shape.divisor = divided ? sizes.tiles : 1;
        const int64_t large_rows = shape.out_rows(), large_cols = shape.out_cols();
        const int64_t rows = forward ? shape.rows : large_rows;
        const Matrix input =
            random_matrix(random, forward ? "weight" : "grad_out", dtype, rows,
                          forward ? shape.cols : large_cols, rows, across ? sizes.gap : 0);
        const int64_t out_rows = forward ? large_rows : shape.rows;
        const Output out{"out",    dtype,
                         out_rows, forward ? large_cols : shape.cols,
                         out_rows, forward && !divided ? kSameBits : sizes.sum_limit()};
        const auto arguments = [&](Side& side) {
          TileWeight args = shape;
          args.dtype = side.dtype();
          (forward ? args.weight : args.grad_out) = side.input(input);
          (forward ? args.weight_stride : args.grad_out_stride) = input.stride;
          (forward ? args.out : args.grad_weight) = side.output(out);
          return args;
        };
        const auto reference = [&](const TileWeight& args) {
          if (args.rows == 0 || args.cols == 0) return;
          forward ? scalar::tile_weight_forward(args, 0, args.out_rows())
                  : scalar::tile_weight_backward(args, 0, args.rows * args.cols);
        };
        report.check(sizes.name(), dtype, arguments, reference,
                     forward ? cuda::tile_weight_forward : cuda::tile_weight_backward);
      }
    }
  }
}

}  // namespace

void check_tile_average(Report& report, bool quick) {
  check(report, "tile_average", quick, false, true, true);
}

void check_tile_block_diagonal(Report& report, bool quick) {
  check(report, "tile_block_diagonal", quick, true, true, false);
}

void check_tile_vector(Report& report, bool quick) {
  check(report, "tile_vector", quick, true, false, false);
}

}  // namespace driver
}  // namespace uhd

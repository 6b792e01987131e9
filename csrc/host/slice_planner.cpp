// SPDX-License-Identifier: Apache-2.0
#include "host/slice_planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace uhd {
namespace {

struct Grid {
  int64_t rows;
  int64_t columns;
};

struct Size {
  int64_t width;
  int64_t height;
};

// Python has validated everything already; this is the last line before a silent overflow.
void check_range(const char* name, int64_t value, int64_t largest) {
  if (value < 1 || value > largest) {
    throw std::invalid_argument(std::string(name) + " must be an integer in [1, " +
                                std::to_string(largest) + "], got " + std::to_string(value));
  }
}

// The multiple of `unit` nearest to `length`, at least one unit. nearbyint rounds half to even, as
// Python's round does: 84 -> 112, but 28 -> 56 and 140 -> 112 for unit 56.
int64_t round_to_multiple(double length, int64_t unit) {
  const auto count = static_cast<int64_t>(std::nearbyint(length / static_cast<double>(unit)));
  return std::max<int64_t>(count, 1) * unit;
}

// Sides of a view of about scale_resolution^2 px: aspect ratio kept, aligned to merge patches.
// Always scaled, up or down: an image that is not sliced is scaled up by the released rule, and a
// sliced one is larger than scale_resolution^2 px.
Size fit_view(int64_t width, int64_t height, const SliceOptions& options) {
  const double aspect = static_cast<double>(width) / static_cast<double>(height);
  // The released order: the width follows from the height after its truncation.
  const double fitted_height =
      std::trunc(static_cast<double>(options.scale_resolution) / std::sqrt(aspect));
  const double fitted_width = std::trunc(fitted_height * aspect);
  const int64_t unit = options.patch_size * options.merge;
  return {round_to_multiple(fitted_width, unit), round_to_multiple(fitted_height, unit)};
}

// The grid whose aspect ratio is nearest to the image's in the logarithm; {0, 0} leaves it whole.
Grid best_grid(int64_t width, int64_t height, const SliceOptions& options) {
  const auto w = static_cast<double>(width);
  const auto h = static_cast<double>(height);
  // Above 2^53 px the product is rounded, but then the quotient is above 2^21 and max_slices wins.
  const double area = static_cast<double>(width * height);
  const auto resolution = static_cast<double>(options.scale_resolution);
  const double needed = std::ceil(area / (resolution * resolution));
  const auto ideal =
      static_cast<int64_t>(std::min(needed, static_cast<double>(options.max_slices)));
  if (ideal <= 1) return {0, 0};

  const double log_aspect = std::log(w / h);
  Grid best{0, 0};
  double smallest = std::numeric_limits<double>::infinity();
  for (int64_t slices = std::max<int64_t>(ideal - 1, 2);
       slices <= std::min(ideal + 1, options.max_slices); ++slices) {
    for (int64_t rows = 1; rows <= slices; ++rows) {
      if (slices % rows != 0) continue;
      const int64_t columns = slices / rows;
      const double error =
          std::abs(log_aspect - std::log(static_cast<double>(columns) / static_cast<double>(rows)));
      // Ties are decided on the doubles as they are: log(1.5) and log(2/3) differ in the last bit,
      // which is why a square image of six slices gets two rows and not three.
      if (error < smallest || (error == smallest && rows > best.rows)) {
        best = {rows, columns};
        smallest = error;
      }
    }
  }
  return best;
}

int64_t num_patches(Size view, int64_t patch_size) {
  return (view.width / patch_size) * (view.height / patch_size);
}

}  // namespace

void check_options(const SliceOptions& options) {
  check_range("max_slices", options.max_slices, kLargestMaxSlices);
  check_range("scale_resolution", options.scale_resolution, kLargestScaleResolution);
  check_range("patch_size", options.patch_size, kLargestPatchSize);
  check_range("merge", options.merge, kLargestMerge);
}

SlicePlan plan_slices(int64_t width, int64_t height, const SliceOptions& options) {
  check_range("width", width, kLargestSide);
  check_range("height", height, kLargestSide);
  const Grid grid = best_grid(width, height, options);
  const Size thumbnail = fit_view(width, height, options);
  int64_t num_tokens = num_patches(thumbnail, options.patch_size);
  Size slice{0, 0};
  if (grid.rows > 0) {
    // The image is first rounded to whole columns and rows, so these quotients are exact.
    const int64_t cell_width =
        round_to_multiple(static_cast<double>(width), grid.columns) / grid.columns;
    const int64_t cell_height =
        round_to_multiple(static_cast<double>(height), grid.rows) / grid.rows;
    slice = fit_view(cell_width, cell_height, options);
    num_tokens += grid.rows * grid.columns * num_patches(slice, options.patch_size);
  }
  return {grid.rows,
          grid.columns,
          thumbnail.width,
          thumbnail.height,
          slice.width,
          slice.height,
          1 + grid.rows * grid.columns,
          num_tokens};
}

}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
// The slice planner: into which views an image is cut. No torch and no Python in it.
//
// It follows the rule of LLaVA-UHD v4 and MiniCPM-V 4.6 to the last bit: every real number here is
// a double that goes through the same operations in the same order as
// uhd_ops/slicing/reference_planner.py.
#pragma once

#include <cstdint>

namespace uhd {

// Largest accepted values. Within them no intermediate overflows: a view has fewer than 2^43
// patches, a plan fewer than 2^55. uhd_ops/slicing/_checks.py holds the same numbers for the Python
// side.
constexpr int64_t kLargestSide = 2147483647;
constexpr int64_t kLargestMaxSlices = 4096;
constexpr int64_t kLargestScaleResolution = 65536;
constexpr int64_t kLargestPatchSize = 65536;
constexpr int64_t kLargestMerge = 1024;

struct SliceOptions {
  int64_t max_slices;        // an image is cut into at most this many slices
  int64_t scale_resolution;  // a view has about scale_resolution^2 pixels
  int64_t patch_size;        // px
  int64_t merge;             // view sides are multiples of merge patches
};

// One row of the table that Python sees; an unsliced image has zeros in the grid and slice fields.
struct SlicePlan {
  int64_t grid_rows;
  int64_t grid_columns;
  int64_t thumbnail_width;   // px
  int64_t thumbnail_height;  // px
  int64_t slice_width;       // px, of one slice
  int64_t slice_height;      // px, of one slice
  int64_t num_views;         // thumbnail and slices
  int64_t num_tokens;        // patches of all views
};

// Throws std::invalid_argument if an option is outside [1, its largest value].
void check_options(const SliceOptions& options);

// Plans one image of width x height px. `options` must have passed check_options.
// Throws std::invalid_argument if a side is outside [1, kLargestSide].
SlicePlan plan_slices(int64_t width, int64_t height, const SliceOptions& options);

}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
// The slice planner on several threads, as the threads of a data loader call it.
#include "driver/side.h"
#include "host/slice_planner.h"
#include "races/threads.h"

namespace uhd {
namespace driver {
namespace {

constexpr int64_t kFields = 8;

// Plans of the images [begin, end): wide and high ones, and sizes at which grids tie.
void plan(double* out, int64_t begin, int64_t end) {
  const SliceOptions options{9, 448, 14, 4};
  for (int64_t i = begin; i < end; ++i) {
    const SlicePlan p = plan_slices(1 + i * 37 % 3000, 1 + i * i % 2500, options);
    const int64_t fields[kFields] = {p.grid_rows,        p.grid_columns, p.thumbnail_width,
                                     p.thumbnail_height, p.slice_width,  p.slice_height,
                                     p.num_views,        p.num_tokens};
    for (int64_t f = 0; f < kFields; ++f) out[i * kFields + f] = static_cast<double>(fields[f]);
  }
}

}  // namespace

Case planner_case() {
  constexpr int64_t images = 4000;
  return {"slice planner", DType::kFloat64, 1, [](Side& side) {
            double* out = static_cast<double*>(side.output("plans", images * kFields));
            check_options({9, 448, 14, 4});
            side.run(
                out,
                [](double* plans, void*) -> const char* {
                  races::share("plan_slices", images, [=](int64_t, int64_t begin, int64_t end) {
                    plan(plans, begin, end);
                  });
                  return nullptr;
                },
                plan, images);
          }};
}

}  // namespace driver
}  // namespace uhd

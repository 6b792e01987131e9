// SPDX-License-Identifier: Apache-2.0
// The checks of each operator: every pass and element type, `quick` on a small part of the cases.
#pragma once
#include "driver/report.h"

namespace uhd {
namespace driver {

void check_linear_activation(Report& report, bool quick);
void check_pixel_unshuffle(Report& report, bool quick);
void check_tile_average(Report& report, bool quick);
void check_tile_block_diagonal(Report& report, bool quick);
void check_tile_vector(Report& report, bool quick);
void check_unshuffle_norm(Report& report, bool quick);
void check_window_attention(Report& report, bool quick);
void check_window_mean(Report& report, bool quick);
void check_window_pool(Report& report, bool quick);

}  // namespace driver
}  // namespace uhd

// SPDX-License-Identifier: Apache-2.0
// The pybind11 module uhd_ops._host: host-side helpers, NumPy arrays in and out, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/build_info.h"
#include "host/slice_planner.h"

namespace py = pybind11;

namespace {

// No forcecast: a float or 32-bit array is an error here, not a silent copy; Python has converted
// it.
using Int64Array = py::array_t<int64_t, py::array::c_style>;

py::array_t<uhd::SlicePlan> plan_slices(const Int64Array& widths, const Int64Array& heights,
                                        int64_t max_slices, int64_t scale_resolution,
                                        int64_t patch_size, int64_t merge) {
  if (widths.ndim() != 1 || heights.ndim() != 1 || widths.size() != heights.size()) {
    throw py::value_error("widths and heights must be one-dimensional and of one length");
  }
  const uhd::SliceOptions options{max_slices, scale_resolution, patch_size, merge};
  uhd::check_options(options);
  py::array_t<uhd::SlicePlan> plans(widths.size());
  const int64_t* width = widths.data();
  const int64_t* height = heights.data();
  uhd::SlicePlan* plan = plans.mutable_data();
  const py::ssize_t count = widths.size();
  {
    const py::gil_scoped_release release;
    for (py::ssize_t i = 0; i < count; ++i) {
      plan[i] = uhd::plan_slices(width[i], height[i], options);
    }
  }
  return plans;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of uhd_ops: NumPy arrays in and out, no torch.";

  PYBIND11_NUMPY_DTYPE(uhd::SlicePlan, grid_rows, grid_columns, thumbnail_width, thumbnail_height,
                       slice_width, slice_height, num_views, num_tokens);
  m.def("plan_slices", &plan_slices, py::arg("widths").noconvert(), py::arg("heights").noconvert(),
        py::kw_only(), py::arg("max_slices"), py::arg("scale_resolution"), py::arg("patch_size"),
        py::arg("merge"),
        "Plan many images; the rows are those of uhd_ops.slicing.plan_slices_batch.");
  m.def("build_info", &uhd::build_info, "What the build was configured with, by name.");
}

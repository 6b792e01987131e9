# SPDX-License-Identifier: Apache-2.0
"""Faults to be planted in the CUDA kernels, each with the smallest check that must notice it.

A fault is a replacement of text that stands exactly once in a file, so it survives changes
elsewhere; where the text has changed, test_mutants.py asks for a new one. To leave out a barrier
that changes nothing is no fault: without the last __syncwarp of store_strip, each lane overwrites
only what it has read itself. Faults in everything else are in faults_on_cpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@dataclass(frozen=True)
class Fault:
    """What is wrong, where, and what must say so.

    ``check`` is a name of cases of uhd_cuda_driver, or a test. Only ``unit`` is compiled with the
    fault, where that is not ``file``: the file whose code the check runs. A CPU kernel is compiled
    for ``isa`` alone, and the check runs on that.
    """

    what: str
    file: str  # under csrc; of Python beside it, as uhd_ops/...
    old: str
    new: str
    check: str
    unit: str = ""
    isa: str = "scalar"

    @property
    def source(self) -> str:
        """The file to be compiled, under csrc."""
        return self.unit or self.file

    @property
    def path(self) -> Path:
        """The file to be changed."""
        return (CSRC.parent if self.is_python else CSRC) / self.file

    @property
    def is_python(self) -> bool:
        """Whether nothing needs to be compiled."""
        return self.file.endswith(".py")

    @property
    def is_emulated(self) -> bool:
        """Whether it concerns the CUDA kernels."""
        return self.source.endswith(".cu")

    @property
    def objects(self) -> str:
        """What CMake compiles the file for."""
        if self.is_emulated:
            return "kernels_emulated"
        if self.source.endswith("_cpu.cpp"):
            return f"kernels_{self.isa}"
        return "uhd_host" if self.source.startswith("host/") else "uhd_cpu"

    def planted(self) -> str:
        """Return the text of the file with the fault.

        Raises:
            ValueError: The text to be replaced is not there, or is there twice.
        """
        text = self.path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.what}: {self.path.relative_to(CSRC.parent)} must have this text once, "
                f"has it {text.count(self.old)} times:\n{self.old}"
            )
        return text.replace(self.old, self.new)


ATTENTION = "window_attention/window_attention"
NORM = "unshuffle_norm/unshuffle_norm"
KERNEL_TESTS = "python_tests/test_window_attention_kernels.py"

FAULTS = [
    # Barriers and buffers: only the greedy orders of the emulator see some of these.
    Fault(
        "norm, backward: the sums of the next window in the buffer of this one",
        "unshuffle_norm/backward_2x2.cuh",
        "turn % 2 * 2 * (blockDim.x / kWarp)",
        "turn * 0",
        "unshuffle_norm, side 2, 1152 channels, bfloat16",
        f"{NORM}_backward_cuda.cu",
    ),
    Fault(
        "norm, windows of any side, backward: the same",
        "unshuffle_norm/backward_any.cuh",
        "turn % 2 * 2 * (blockDim.x / kWarp)",
        "turn * 0",
        "unshuffle_norm, side 3, 1152 channels, bfloat16",
        f"{NORM}_backward_cuda.cu",
    ),
    Fault(
        "norm, forward: the sums of the next window in the buffer of this one",
        f"{NORM}_cuda.cu",
        "turn % 2 * 2 * (blockDim.x / kWarp);\n    forward_window",
        "turn * 0;\n    forward_window",
        "unshuffle_norm, side 2, 1152 channels, bfloat16",
    ),
    Fault(
        "large windows, backward: no barrier after the second load",
        f"{ATTENTION}_large_backward_cuda.cu",
        "wait_for_loads();\n    __syncthreads();\n  }\n  key_phase",
        "wait_for_loads();\n  }\n  key_phase",
        "window_attention, side 16, head size 128, bfloat16",
    ),
    Fault(
        "large windows, backward: no barrier before the columns are replaced",
        f"{ATTENTION}_large_backward_cuda.cu",
        "  __syncthreads();  // the statistics are complete, and nobody needs the columns any more",
        "",
        "window_attention, side 16, head size 128, bfloat16",
    ),
    Fault(
        "column sums: no barrier before the sums of other warps are read",
        "common/column_sums.cuh",
        "  __syncthreads();",
        "",
        "linear_activation, of each kind, float32",
        "linear_activation/linear_activation_cuda.cu",
    ),
    Fault(
        "large windows: no __syncwarp before others' rows of a strip are read",
        "window_attention/large_rows.cuh",
        "  __syncwarp();\n#pragma unroll 1  // as above",
        "#pragma unroll 1  // as above",
        "window_attention, side 8, head size 72, bfloat16",
        f"{ATTENTION}_large_cuda.cu",
    ),
    Fault(
        "large windows: asynchronous copies are not waited for",
        "window_attention/large_rows.cuh",
        "cp_async_wait<0>();",
        "cp_async_wait<1>();",
        "window_attention, side 8, head size 72, bfloat16",
        f"{ATTENTION}_large_cuda.cu",
    ),
    # Shared memory.
    Fault(
        "large windows, backward: too little shared memory for the statistics",
        "window_attention/large_plan.cuh",
        "kStatistics = 3;",
        "kStatistics = 2;",
        "window_attention, side 8, head size 72, bfloat16",
        f"{ATTENTION}_large_backward_cuda.cu",
    ),
    # Masks and votes.
    Fault(
        "teams of lanes name the whole warp in their shuffles",
        "window_attention/general_windows.cuh",
        "kFullWarp >> (kWarp - Shape::kLanes) << first",
        "kFullWarp | first",
        "window_attention, side 2, head size 64, float32",
        f"{ATTENTION}_general_cuda.cu",
    ),
    Fault(
        "small windows: each lane decides alone whether a value is not finite",
        "window_attention/small_products.cuh",
        "__any_sync(kFullWarp, (trace & 0x7fff7fff) != 0)",
        "(trace & 0x7fff7fff) != 0",
        f"{KERNEL_TESTS}::test_what_is_not_finite_stays_in_its_window",
        f"{ATTENTION}_small_cuda.cu",
    ),
    Fault(
        "small windows: tokens of other windows of the tile have weight",
        "window_attention/small_windows.cuh",
        "row_slot(r) >> result.shift == column_slot(i) >> result.shift",
        "true",
        "window_attention, side 2, head size 72, bfloat16",
        f"{ATTENTION}_small_cuda.cu",
    ),
    Fault(
        "large windows: slots beyond the last token have weight",
        "window_attention/large_softmax.cuh",
        "column_of(n, i) < count ?",
        "column_of(n, i) < count + 1 ?",
        "window_attention, side 11, head size 72, float16",
        f"{ATTENTION}_large_cuda.cu",
    ),
    # Fragments of the tensor cores.
    Fault(
        "large products: the last step of head size 128 takes the columns of the one before",
        "window_attention/large_products.cuh",
        "ldmatrix_x4(b, column + n * 8 * kStride + k * 16);",
        "ldmatrix_x4(b, column + n * 8 * kStride + (k == 7 ? 6 : k) * 16);",
        "window_attention, side 8, head size 128, bfloat16",
        f"{ATTENTION}_large_cuda.cu",
    ),
    Fault(
        "small windows: quarters of the transposed weights in the place of each other",
        "window_attention/small_weights.cuh",
        "i % 2 * 2 + i / 2;",
        "i;",
        "window_attention, side 4, head size 72, bfloat16",
        f"{ATTENTION}_small_cuda.cu",
    ),
    # Ragged edges, look-ups, padding.
    Fault(
        "windows at the right edge of a view are taken for whole ones",
        "common/windows.cuh",
        "const int cols = width - left < f ? width - left : f;",
        "const int cols = f;",
        "window_mean, side 3, 5 channels, float32",
        "window_mean/window_mean_cuda.cu",
    ),
    Fault(
        "the first window of a view is looked for in the view before",
        "common/windows.cuh",
        "(table.rows[middle].*begin <= index ? low : high)",
        "(table.rows[middle].*begin < index ? low : high)",
        "pixel_unshuffle, side 2, 5 channels, float32",
        "pixel_unshuffle/pixel_unshuffle_cuda.cu",
    ),
    Fault(
        "large windows: rows of a third of the tokens are found by a reciprocal that is too small",
        "window_attention/large_rows.cuh",
        "reciprocal_((65535u + cols) / cols)",
        "reciprocal_(65536u / cols)",
        "window_attention, side 11, head size 72, float16",
        f"{ATTENTION}_large_cuda.cu",
    ),
    Fault(
        "the last row of padding keeps what was there",
        "common/windows.cuh",
        "const int64_t stop = end * row_elements;",
        "const int64_t stop = (end - 1) * row_elements;",
        "window_mean, side 2, 8 channels, float32",
        "window_mean/window_mean_cuda.cu",
    ),
    Fault(
        "small windows: a warp with the rest of the heads goes on beyond the last",
        f"{ATTENTION}_small_cuda.cu",
        "min(begin + heads_each, heads)",
        "begin + heads_each",
        "window_attention, side 2, head size 72, bfloat16",
    ),
    # Rotary embedding, and heads that share keys and values.
    Fault(
        "rotary embedding: the way back takes the sine of the other channel of the pair",
        f"{ATTENTION}_rotary_cuda.cu",
        "b * cos_b - a * sin_a",
        "b * cos_b - a * sin_b",
        "rotary embedding, 1 parts, float32",
    ),
    Fault(
        "rotary embedding: all heads take the angles of the first",
        f"{ATTENTION}_rotary_cuda.cu",
        "angles = head * args.table_strides.head;",
        "angles = 0;",
        "rotary embedding, 0 parts, bfloat16",
    ),
    Fault(
        "rotary embedding: a head that has two parts is taken for one part",
        f"{ATTENTION}_rotary_cuda.cu",
        "pairs / int(args.parts)",
        "pairs",
        "rotary embedding, 2 parts, float16",
    ),
    Fault(
        "grouped queries, small windows: every so many heads share keys, not neighbours",
        f"{ATTENTION}_small_cuda.cu",
        "args.group == 1 ? head : head / int(args.group)",
        "head % int(args.kv_heads)",
        "window_attention, side 2, head size 72, bfloat16",
    ),
    Fault(
        "grouped queries, large windows: the same",
        "window_attention/large_rows.cuh",
        "work.head / int(args.group)",
        "work.head % int(args.kv_heads)",
        "window_attention, side 8, head size 72, bfloat16",
        f"{ATTENTION}_large_cuda.cu",
    ),
    Fault(
        "grouped queries, backward: keys do without the last head of their group",
        f"{ATTENTION}_general_backward_cuda.cu",
        "end = first + int(args.group);",
        "end = first + int(args.group) - (args.group > 1);",
        "window_attention, side 2, head size 72, float32",
    ),
    # Sums of gradients.
    Fault(
        "norm: a block writes its sums over those of another",
        "unshuffle_norm/backward_2x2.cuh",
        "static_cast<S*>(args.partials) + blockIdx.x * 2 * args.merged_channels()",
        "static_cast<S*>(args.partials) + blockIdx.x / 2 * 2 * args.merged_channels()",
        "unshuffle_norm, side 2, 1152 channels, float32",
        f"{NORM}_backward_cuda.cu",
    ),
    Fault(
        "activation: the bias does without the gradients of the last warp",
        "linear_activation/linear_activation_cuda.cu",
        "for (int w = 1; w < Traits::kWarps; ++w) {",
        "for (int w = 1; w < Traits::kWarps - 1; ++w) {",
        "linear_activation, of each kind, float32",
    ),
    Fault(
        "pooling: of windows with an edge the first token has the largest logit",
        "window_pool/pool_any.cuh",
        "if (logits.value[c] > largest.value[c]) largest.value[c] = logits.value[c];",
        "if (logits.value[c] > 80) largest.value[c] = logits.value[c];",
        "python_tests/test_window_pool.py::test_weights_that_vanish",
        "window_pool/window_pool_cuda.cu",
    ),
]

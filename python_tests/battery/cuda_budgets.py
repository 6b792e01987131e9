# SPDX-License-Identifier: Apache-2.0
"""What every CUDA kernel may use and must have, on every architecture; read by test_cuda_library.

Registers decide how many warps a multiprocessor holds (65536 registers: 64 a thread for 32 warps,
128 for 16, 168 for 12, 255 is the most). A budget is the step that the kernel was designed for, so
a change that crosses one is seen. No kernel may spill or use local memory, whatever the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

# 16 bytes a lane, with or without a hint for the caches.
LOAD, STORE = r"LDG\.E(\.\w+)*\.128", r"STG\.E(\.\w+)*\.128"
COPY = r"LDGSTS\.E(\.\w+)*\.128"  # cp.async
MMA, LDSM, MOVM = r"HMMA\.", r"LDSM\.", r"MOVM\."
HALF = r"(BFloat16|Float16)"


@dataclass(frozen=True)
class Budget:
    """Of the kernels whose name, without parameters, matches a regular expression."""

    name: str
    registers: int
    opcodes: tuple[str, ...] = ()


BUDGETS = (
    # window_attention: tensor cores, sides 1 to 4
    Budget(rf"small_forward<{HALF}, (64|72|80|96)>", 96, (LOAD, STORE, MMA)),
    Budget(rf"small_forward<{HALF}, 128>", 128, (LOAD, STORE, MMA)),  # 104 for compute 8.0
    Budget(rf"small_backward<{HALF}, (64|72|80)>", 128, (LOAD, STORE, MMA, MOVM)),
    Budget(rf"small_backward<{HALF}, (96|128)>", 168, (LOAD, STORE, MMA, MOVM)),
    # window_attention: tensor cores, sides 5 to 16; shared memory bounds the blocks first
    Budget(rf"large_forward<{HALF}, (64|72|80|96), \w+>", 128, (COPY, STORE, MMA, LDSM)),
    Budget(rf"large_forward<{HALF}, 128, \w+>", 168, (COPY, STORE, MMA, LDSM)),
    Budget(rf"large_backward<{HALF}, (64|72|80)>", 168, (COPY, STORE, MMA, LDSM)),
    Budget(rf"large_backward<{HALF}, (96|128)>", 255, (COPY, STORE, MMA, LDSM)),
    # window_attention: the general kernel
    Budget(r"general_forward<Shape<(float|BFloat16|Float16), [48], .*>", 128, (LOAD, STORE)),
    Budget(r"general_forward<Shape<double, 2, .*>", 168, (LOAD, STORE)),  # 134 for 10.0 and 12.0
    Budget(r"general_queries<Shape<\w+, [248], .*>", 168, (LOAD, STORE)),
    Budget(r"general_keys<Shape<(float|BFloat16|Float16), [48], .*>", 192, (LOAD, STORE)),
    Budget(r"general_keys<Shape<double, 2, .*>", 255, (LOAD, STORE)),  # two blocks, as with 192
    Budget(r"general_(forward|queries)<Shape<\w+, 1, .*>", 128),
    Budget(r"general_keys<Shape<(float|BFloat16|Float16), 1, .*>", 128),
    Budget(r"general_keys<Shape<double, 1, .*>", 168),
    # window_attention: rotary embedding in front of it
    Budget(r"rotate_rows<\w+>", 48),
    # unshuffle_norm
    Budget(r"forward_2x2<(float|BFloat16|Float16), true>", 96, (LOAD, STORE)),
    Budget(r"forward_2x2<(float|BFloat16|Float16), false>", 128),
    Budget(rf"backward_2x2<{HALF}, true, 288>", 72, (LOAD, STORE)),  # 27 warps
    Budget(r"backward_2x2<float, true, 576>", 56, (LOAD, STORE)),  # 36 warps
    Budget(r"backward_2x2<(float|BFloat16|Float16), (true|false), 768>", 80),
    Budget(r"forward_any<\w+>", 80),
    Budget(r"backward_any<\w+>", 128),
    Budget(r"sum_partials<(float|double)>", 64),  # 58 for 12.0, 40 before
    # linear_activation; a width above 1 is the 16-byte path
    Budget(rf"activation_forward<.*, {HALF}, 8>", 80, (LOAD, STORE)),  # 24 warps
    Budget(r"activation_forward<.*, (float, 4|double, 2)>", 64, (LOAD, STORE)),
    Budget(r"activation_forward<.*, 1>", 64),
    Budget(rf"activation_backward<.*, {HALF}, 8>", 88, (LOAD, STORE)),
    Budget(r"activation_backward<.*, float, 4>", 88, (LOAD, STORE)),
    Budget(r"activation_backward<.*, double, 2>", 96, (LOAD, STORE)),
    Budget(r"activation_backward<.*, 1>", 88),
    Budget(r"column_sums<(float|double)>", 40),  # for 12.0, 32 before
    # window_mean, pixel_unshuffle
    Budget(r"mean_(forward|backward)<\w+, [248]>", 64, (LOAD, STORE)),
    Budget(r"mean_(forward|backward)<\w+, 1>", 64),
    Budget(r"unshuffle_forward<unsigned __int128>", 64, (LOAD, STORE)),
    Budget(r"unshuffle_forward<unsigned (long|int|short)>", 64),
    Budget(r"unshuffle_backward<\w+, [248]>", 64, (LOAD, STORE)),
    Budget(r"unshuffle_backward<\w+, 1>", 64),
    # window_pool; the 16-byte path holds 8 or 9 chunks
    Budget(r"pool_(forward|backward)<\w+, [248]>", 128, (LOAD, STORE)),
    Budget(r"pool_forward<\w+, 1>", 112),
    Budget(r"pool_backward<\w+, 1>", 128),
    # weight tiling
    Budget(r"tile_(shares|sums)<\w+, [248]>", 48, (LOAD, STORE)),
    Budget(r"tile_(shares|sums)<\w+, 1>", 48),
    Budget(r"tile_copies<unsigned __int128>", 48, (LOAD, STORE)),
    Budget(r"tile_copies<unsigned (long|int|short)>", 48),
)

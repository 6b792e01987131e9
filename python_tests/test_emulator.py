# SPDX-License-Identifier: Apache-2.0
"""The emulator that runs the CUDA kernels without a device (csrc/emulator).

Three builds of one C++ program: as the kernels use it, under AddressSanitizer, and with the
portable switch between fibers instead of the assembly.
"""

import os
import re
import shutil
import subprocess
from itertools import permutations
from pathlib import Path

import pytest
import torch
from battery.halves import HALVES, check_rounding, check_widening
from battery.marks import native_only

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "battery" / f"emulator_{part}.cpp" for part in ("check", "layouts")]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-pthread"]
BUILDS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    "ucontext": ["-O0", "-DUHD_EMULATOR_UCONTEXT"],
}
FAIR = ("ascending", "descending", "1", "2", "3")
GREEDY = ("greedy", "greedy-descending", "greedy-1", "greedy-2")
ORDERS = FAIR + GREEDY
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)

# Like test_vec.py: where the kernels are built there is a compiler, and this never skips.
pytestmark = native_only("the definitions have no CUDA kernels")


@pytest.fixture(scope="module")
def emulator_check(tmp_path_factory):
    """Return a function that runs the check program; each build is compiled when first needed."""
    assert COMPILER, "no C++ compiler: set CXX"
    folder = tmp_path_factory.mktemp("emulator")

    def run(*arguments, build="plain", order="ascending", host_threads=1, stdin=b"", check=True):
        program = folder / build
        if not program.exists():
            command = [COMPILER, *FLAGS, *BUILDS[build], f"-I{HERE.parent / 'csrc'}", *SOURCES]
            subprocess.run([*command, "-o", program], check=True)
        environment = {
            **os.environ,
            "UHD_EMULATOR_ORDER": order,
            "UHD_EMULATOR_THREADS": str(host_threads),
            # Leaks cannot be looked for where a debugger is not allowed, and are not the question.
            "ASAN_OPTIONS": "detect_leaks=0",
        }
        return subprocess.run(
            [program, *arguments],
            input=stdin,
            capture_output=True,
            check=check,
            timeout=60,
            env=environment,
        )

    return run


def numbers(result, kind=float):
    return [kind(word) for word in result.stdout.split()]


# ---- threads and barriers


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("order", ORDERS)
def test_block_reduction(emulator_check, order, build):
    with_barrier, _ = numbers(emulator_check("reduce", order=order, build=build), int)
    assert with_barrier


@pytest.mark.parametrize("orders", [FAIR, GREEDY], ids=["fair", "greedy"])
def test_missing_barrier_is_caught(emulator_check, orders):
    outcomes = [numbers(emulator_check("reduce", order=order), int)[1] for order in orders]
    assert not all(outcomes)


def test_missing_barrier_before_the_next_use_is_caught_where_a_warp_runs_ahead(emulator_check):
    outcomes = {order: numbers(emulator_check("reuse", order=order), int) for order in ORDERS}
    assert outcomes == {order: [1, int(order in FAIR)] for order in ORDERS}


def test_a_greedy_warp_goes_on_until_it_must_wait(emulator_check):
    turns = {order: numbers(emulator_check("turns", order=order), int) for order in ORDERS}
    assert turns["ascending"] == [0, 10, 20, 1, 11, 21, 2, 12, 22]
    assert turns["descending"] == [20, 10, 0, 21, 11, 1, 22, 12, 2]
    assert turns["greedy"] == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert turns["greedy-descending"] == [20, 21, 22, 10, 11, 12, 0, 1, 2]
    assert turns["greedy-1"] in (
        [10 * warp + step for warp in warps for step in range(3)]
        for warps in permutations(range(3))
    )


def test_host_threads_share_a_grid(emulator_check):
    for order in ORDERS:
        assert numbers(emulator_check("reduce", order=order, host_threads=3), int)[0]


def test_launches_from_two_host_threads(emulator_check):
    for host_threads in (1, 2):
        assert numbers(emulator_check("concurrent", host_threads=host_threads), int) == [1, 1]


@pytest.mark.parametrize("build", ["plain", "asan"])
def test_the_cuda_runtime_is_asked_once(emulator_check, build):
    """But for a question without an answer, such as one that failed: launches of four threads."""
    assert numbers(emulator_check("asked_once", build=build), int) == [1, 1, 400, 0]


def test_orders(emulator_check):
    ascending = [100 * block + thread for block in range(5) for thread in range(8)]
    assert numbers(emulator_check("orders"), int) == ascending
    assert numbers(emulator_check("orders", order="greedy"), int) == ascending
    assert numbers(emulator_check("orders", order="descending"), int) == ascending[::-1]
    shuffled = numbers(emulator_check("orders", order="1"), int)
    assert sorted(shuffled) == ascending
    assert shuffled == numbers(emulator_check("orders", order="1"), int)
    assert shuffled != numbers(emulator_check("orders", order="2"), int)
    blocks = [shuffled[8 * i : 8 * i + 8] for i in range(5)]
    assert all(len({entry // 100 for entry in block}) == 1 for block in blocks)
    assert len({tuple(entry % 100 for entry in block) for block in blocks}) > 1


def test_random_orders_start_anywhere(emulator_check):
    firsts = {numbers(emulator_check("orders", order=str(seed)), int)[0] for seed in range(20)}
    assert len({first // 100 for first in firsts}) == 5
    assert len({first % 100 for first in firsts}) > 2


@pytest.mark.parametrize("name", ["UHD_EMULATOR_ORDER", "UHD_EMULATOR_THREADS"])
@pytest.mark.parametrize(
    "value",
    [
        "backwards",
        "-1",
        "1.5",
        " 2",
        "99999999999999999999x",
        "greed",
        "greedy-",
        "greedy-x",
        "greedy1",
    ],
)
def test_bad_options_are_refused(emulator_check, name, value):
    option = {"order": value} if name.endswith("ORDER") else {"host_threads": value}
    result = emulator_check("reduce", check=False, **option)
    assert result.returncode == 3
    assert name in result.stderr.decode()
    assert f'"{value}"' in result.stderr.decode()


def test_shared_memory_is_poisoned_before_every_block(emulator_check):
    assert numbers(emulator_check("poison"), int) == [64, 64, 64]


# ---- collectives


def collectives_of(lane):
    """What the lane gets in emulator_check.cpp's use_collectives, from the CUDA C++ guide."""
    half, eighth = lane // 16 * 16, lane // 8 * 8
    third = sum(1 << other for other in range(half, half + 16) if other % 3 == 0)
    partner = lane ^ 9  # in another group of 8: only the groups before may be read
    return [
        (lane * 7 + 3) % 32,
        eighth + 5,
        lane - 3 if lane - half >= 3 else lane,
        lane + 3 if lane - half < 13 else lane,
        partner if partner // 8 <= lane // 8 else lane,
        (1 << 40) + (lane ^ 5),
        2 * (lane + 2 if lane - half < 14 else lane) + 1,
        third,
        int(half == 16),
        int(half == 0),
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_collectives(emulator_check, order):
    got = numbers(emulator_check("collectives", order=order), int)
    assert got == [value for lane in range(32) for value in collectives_of(lane)]


# ---- asynchronous copies


def test_copies_land_when_waited_for(emulator_check):
    got = torch.tensor(numbers(emulator_check("copies"))).view(3, 12)
    nan = float("nan")
    wanted = torch.tensor(
        [
            [nan] * 12,
            [1, 2, 3, 4] + [nan] * 8,
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0],
        ]
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


# ---- what hardware would punish

BLOCK_0 = r" \[block \(0, 0, 0\), thread \(\d+, 0, 0\)\]$"
LINE = r"emulator_check\.cpp:\d+"
OUTSIDE = r"the 16 bytes do not lie in the \d+ bytes of shared memory of this block" + BLOCK_0
FAULTS = {
    "barrier_of_some": rf"divergent barrier: .*__syncthreads at .*{LINE}.*" + BLOCK_0,
    "barriers_on_two_lines": rf"divergent barrier: .*{LINE}, but .*{LINE}" + BLOCK_0,
    "deadlock": rf"deadlock: 32 threads wait in __syncthreads at .*{LINE}, "
    rf"32 threads wait in __syncwarp at .*{LINE}, 0 have exited" + r" \[block \(0, 0, [01]\), .*",
    "different_collectives": "lanes of a warp are in different collectives" + ".*" + BLOCK_0,
    "different_masks": "deadlock: 32 threads wait in __syncwarp" + ".*" + BLOCK_0,
    "mask_misses_caller": rf"__shfl_sync at .*{LINE}: the mask misses the calling lane" + BLOCK_0,
    "mask_names_exited": "(the mask names lanes that have exited|exits while lanes wait for it)",
    "mask_names_nobody": "the mask names lanes that have exited" + BLOCK_0,
    "shuffle_outside_mask": r"reads lane \d+, which the mask does not name" + BLOCK_0,
    "shuffle_width": "width must be a power of two up to 32" + BLOCK_0,
    "byte_perm": "__byte_perm: a selector digit above 7",
    "grid_x_zero": r"launch with grid \(0, 1, 1\), must be",
    "grid_x": r"launch with grid \(2147483648, 1, 1\), must be",
    "grid_y": r"launch with grid \(1, 65536, 1\), must be",
    "grid_z": r"launch with grid \(1, 1, 65536\), must be",
    "block_zero": r"launch with block \(32, 0, 1\), must be",
    "block_size": r"launch with block \(32, 33, 1\), must be .* at most 1024 threads",
    "block_z": r"launch with block \(1, 1, 65\), must be",
    "shared_limit": "launch with 232449 bytes of shared memory, must be at most 227 KB",
    "copy_shared_misaligned": r"cp.async: shared address is not 16-byte aligned \(offset 4\)",
    "copy_global_misaligned": "cp.async: global address is not 16-byte aligned" + BLOCK_0,
    "copy_past_shared": "cp.async: " + OUTSIDE,
    "copy_before_shared": "cp.async: " + OUTSIDE,
    "copy_into_global": "cp.async: " + OUTSIDE,
    "copy_17_bytes": "cp.async: must copy 0 to 16 bytes, got 17" + BLOCK_0,
    "copy_uncommitted": "exits with 1 cp.async copies that were never waited for" + BLOCK_0,
    "copy_unwaited": "exits with 1 cp.async copies that were never waited for" + BLOCK_0,
    "matrix_misaligned": "ldmatrix: shared address is not 16-byte aligned",
    "matrix_past_shared": "ldmatrix: " + OUTSIDE,
    "matrix_of_some": "(mask names lanes that have exited|exits while lanes wait for it in ldm)",
    "matrix_three": "ldmatrix loads 1, 2 or 4 matrices, got 3" + BLOCK_0,
    "nested_launch": "launch inside of a kernel" + BLOCK_0,
    "thrown_by_kernel": "^thrown by a kernel$",
    "outside_of_kernel": "device code outside of a kernel",
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("order", ["ascending", "descending", "1", "greedy"])
def test_misuse_is_refused_and_the_next_launch_works(emulator_check, order, build):
    lines = emulator_check("faults", order=order, build=build).stdout.decode().splitlines()
    faults = {name: (message, after) for name, message, after in (x.split("\t") for x in lines)}
    assert set(faults) == set(FAULTS)
    for name, (message, after) in faults.items():
        assert re.search(FAULTS[name], message), f"{name}: {message}"
        assert after == "usable", name


@pytest.mark.parametrize("where", ["global", "shared"])
def test_address_sanitizer_sees_a_store_past_the_end(emulator_check, where):
    right = emulator_check("overrun", where, "0", build="asan")
    assert right.stdout.decode() == "unnoticed\n"
    wrong = emulator_check("overrun", where, "1", build="asan", check=False)
    assert wrong.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in wrong.stderr.decode()
    assert f"store_{where}" in wrong.stderr.decode()
    assert wrong.stdout == b""


# ---- tensor core


@pytest.mark.parametrize("order", ["ascending", "descending", "1"])
def test_fragment_layouts_are_those_of_the_ptx_isa(emulator_check, order):
    lines = emulator_check("layouts", order=order).stdout.decode().splitlines()
    wrong = {name: counts for name, *counts in map(str.split, lines)}
    assert wrong == {
        "mma_16x8x16": ["0", "0"],
        "mma_16x8x8": ["0", "0"],
        "ldmatrix": ["0"],
        "movmatrix": ["0"],
    }


def test_a_fragment_bug_is_caught(emulator_check):
    right_bf16, right_half, *swapped = numbers(emulator_check("products"))
    assert 0 < right_bf16 <= 1
    assert 0 < right_half <= 1
    assert min(swapped) > 1000


# ---- arithmetic


def test_functions_of_the_language(emulator_check):
    assert emulator_check("words").stdout.decode().splitlines() == [
        "77225500 55441100 77663322",
        "1 c0000000 0",
        "c0000000 3 9 31 32 4",
        "0.25 2",
    ]


@pytest.mark.parametrize("check", [check_widening, check_rounding])
@pytest.mark.parametrize("kind", HALVES)
def test_halves(emulator_check, kind, check):
    check(lambda *words, stdin=b"": emulator_check(*words, stdin=stdin).stdout, kind)

# SPDX-License-Identifier: Apache-2.0
"""Results depend on the arguments and on nothing else: not on memory, threads or neighbours."""

import functools
from threading import Barrier

import torch
from battery import (
    GRIDDED,
    NATIVE,
    assert_same,
    assert_same_bits,
    device_of,
    gradients,
    make_call,
    output_rows,
    per_case,
    per_op,
    per_variant,
    public,
    run,
    using_isa,
)
from battery.calls import in_threads, random_like, token_rows

from uhd_ops import clear_caches

# Enough windows of every size for several threads, the smallest views last.
MANY = [(16, 16), (5, 7), (13, 11), (1, 9), (1, 1), (0, 4)]


@per_variant()
def test_every_element_is_written(name, options, isa, dtype):
    # torch fills whatever at::empty returns with NaN here, below the operators' C++ too.
    call = make_call(name, dtype, device=device_of(isa), **options)
    with using_isa(isa):
        wanted_out, wanted_grads = gradients(public(name), call)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(8, device=device_of(isa)).isnan().all()
        out, grads = gradients(public(name), call)
    assert not out.isnan().any()
    assert not any(grad.isnan().any() for grad in grads.values())
    assert_same_bits(out, wanted_out)
    assert_same_bits(grads, wanted_grads, "gradient")


@per_variant()
def test_two_runs_agree_bit_for_bit(name, options, isa, dtype):
    with using_isa(isa):
        call = make_call(name, dtype, device=device_of(isa), **options)
        out, grads = gradients(public(name), call)
        # The second run allocates other memory: the first results are still alive.
        again, grads_again = gradients(public(name), call.map_tensors(torch.clone))
    assert_same_bits(again, out)
    assert_same_bits(grads_again, grads, "gradient")


@per_case(cuda=())
def test_number_of_threads(name, options, device):
    call = make_call(name, grids=MANY, device=device, **options)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(public(name), call))
    for out, grads in results[1:]:
        assert_same(name, "threads", call, out, results[0][0])
        assert_same(name, "threads", call, grads, results[0][1], "gradient")


@per_op(cuda=())
def test_eight_callers_at_once(name, device):
    # They share the tables of their grids, which nobody has made yet.
    calls = [make_call(name, grids=MANY, seed=seed, device=device) for seed in range(8)]
    results = {}

    def work(seed):
        start.wait()
        results[seed] = [gradients(public(name), calls[seed]) for _ in range(3)]

    clear_caches()
    start = Barrier(len(calls))
    in_threads(work, range(len(calls)))
    for seed, call in enumerate(calls):
        wanted_out, wanted_grads = gradients(public(name), call)
        for out, grads in results[seed]:
            assert_same(name, "threads", call, out, wanted_out)
            assert_same(name, "threads", call, grads, wanted_grads, "gradient")


@per_variant(GRIDDED, cuda=GRIDDED)
def test_a_view_alone_equals_the_view_in_a_batch(name, options, isa, dtype):
    call = make_call(name, dtype, MANY, device=device_of(isa), **options)
    rows, tokens = output_rows(name, call, public(name)), token_rows(MANY)
    with using_isa(isa):
        grad_out = random_like(run(public(name), call))
        out, grads = gradients(public(name), call, grad_out)
        for i in range(len(MANY)):
            alone = call.only_view(i)
            out_alone, grads_alone = gradients(public(name), alone, grad_out[rows[i]])
            assert_same(name, "batch_invariance", alone, out[rows[i]], out_alone, f"view {i}")
            mine = {key: grads[key][tokens[i]] for key in call.per_token}
            wanted = {key: grads_alone[key] for key in call.per_token}
            assert_same(name, "batch_invariance", alone, mine, wanted, f"view {i}: gradient")


@per_variant(GRIDDED, cuda=GRIDDED)
def test_a_nan_stays_in_its_view(name, options, isa, dtype):
    call = make_call(name, dtype, MANY, device=device_of(isa), **options)
    rows, tokens = output_rows(name, call, public(name)), token_rows(MANY)
    same = assert_same_bits
    if isa == "cuda" and name not in NATIVE:  # torch's own kernels may add in another order
        same = functools.partial(assert_same, name, "batch_invariance", call)
    with using_isa(isa):
        out, grads = gradients(public(name), call)
        for i, position in ((1, call.per_token[0]), (4, call.per_token[-1])):
            spoilt = call.get(position).clone()
            spoilt[tokens[i]] = float("nan")
            bad_out, bad_grads = gradients(public(name), call.put(position, spoilt))
            assert bad_out[rows[i]].isnan().any()
            for view in range(len(MANY)):
                if view == i:
                    continue
                same(bad_out[rows[view]], out[rows[view]], f"view {view}")
                for key in call.per_token:
                    mine = tokens[view]
                    same(bad_grads[key][mine], grads[key][mine], f"view {view}: {key}")


@per_case()
def test_inputs_are_left_alone(name, options, device):
    call = make_call(name, device=device, **options)
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)]
    copies = [x.clone() for x in tensors]
    versions = [x._version for x in tensors]
    grad_out = random_like(run(public(name), call))
    grad_copy = grad_out.clone()
    out, grads = gradients(public(name), call, grad_out)
    for x, copy, version in zip(tensors, copies, versions, strict=True):
        assert_same_bits(x, copy, "input")
        assert x._version == version
    assert_same_bits(grad_out, grad_copy, "grad_out")
    # No result shares memory with an argument or with another result.
    storages = [x.untyped_storage().data_ptr() for x in (*tensors, grad_out, out, *grads.values())]
    assert len(set(storages)) == len(storages)

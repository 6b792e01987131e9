# SPDX-License-Identifier: Apache-2.0
"""Where shards are encoded: in this process, in processes of this machine, or by Ray Data."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from uhd_ops.corpus.encoding import EncodedShard, ShardEncoder
from uhd_ops.corpus.plan import ShardPlan

MakeWorker = Callable[[], ShardEncoder]


def run_local(
    make_worker: MakeWorker, shards: Iterable[ShardPlan], workers: int
) -> Iterator[EncodedShard]:
    """Encode shards in this process, or in so many others; in the order in which they finish.

    Raises:
        RuntimeError: A process died, most often because memory ran out.
    """
    shards = iter(shards)
    if workers == 1:
        worker = None
        for shard in shards:
            worker = worker or make_worker()
            yield worker.encode(shard)
        return
    context = multiprocessing.get_context("spawn")  # threads of this process do not survive a fork
    pool = ProcessPoolExecutor(workers, context, _start_process, (make_worker,))
    running: set[Future[EncodedShard]] = set()
    try:
        # One more than there are workers: nobody waits for the next one, and no more are kept.
        for shard in itertools.islice(shards, workers + 1):
            running.add(pool.submit(_encode_in_process, shard))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                for shard in itertools.islice(shards, 1):
                    running.add(pool.submit(_encode_in_process, shard))
                yield result
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker died, perhaps for want of memory; what is finished is kept, and the same "
            "command goes on with the rest"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: ShardEncoder | None = None  # of a process that run_local started


def _start_process(make_worker: MakeWorker) -> None:
    # Nobody tells a process of a pool that the one that it works for was killed.
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    global _worker
    _worker = make_worker()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _encode_in_process(shard: ShardPlan) -> EncodedShard:
    return _worker.encode(shard)


def run_ray(
    make_worker: MakeWorker,
    shards: Iterable[ShardPlan],
    workers: int,
    *,
    threads: int,
    device: str,
) -> Iterator[EncodedShard]:
    """Encode shards with Ray Data, on this machine or the cluster that RAY_ADDRESS names.

    Workers are an actor pool: one that dies is replaced, and its shard encoded again. Each has
    ``threads`` processors, or a share of a GPU and of a processor. On a machine too small for that
    the workers share what is there, but for half a processor: Ray's own tasks need some, and would
    wait for ever for actors that hold all.

    Args:
        make_worker: Makes a worker; it can be pickled.
        shards: What to encode; all of them are planned before the first is encoded.
        workers: How many actors.
        threads: Threads of one.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ImportError: There is no Ray.
        RuntimeError: The cluster has no GPU, and ``device`` is ``"cuda"``.
    """
    if importlib.util.find_spec("ray") is None:
        raise ImportError("engine 'ray' needs Ray Data: pip install 'uhd_ops[ray]'")
    import ray  # pyright: ignore[reportMissingImports]

    own = not ray.is_initialized()
    if own:
        ray.init(logging_level="warning", log_to_driver=False)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        resources = _share(ray.cluster_resources(), workers, threads, device)
        rows = [{"shard": shard.to_json()} for shard in shards]
        if not rows:
            return
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(make_worker,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            **resources,
        )
        for row in dataset.iter_rows():
            yield EncodedShard(int(row["number"]), row["data"], json.loads(row["entries"]))
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray has given up: {error}") from error
    finally:
        if own:
            ray.shutdown()


class _Actor:
    """A worker as Ray Data has it: columns of a batch in, columns of a batch out."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self.worker = make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        shards = [self.worker.encode(ShardPlan.from_json(text)) for text in batch["shard"]]
        return {
            "number": [shard.number for shard in shards],
            "data": [shard.data for shard in shards],
            "entries": [json.dumps(shard.entries) for shard in shards],
        }


def _share(cluster: dict[str, float], workers: int, threads: int, device: str) -> dict[str, float]:
    """Processors and GPUs of one actor."""
    processors = cluster.get("CPU", 0.0)
    share = max(0.01, min(threads, (processors - 0.5) / workers))
    if device != "cuda":
        return {"num_cpus": share}
    gpus = cluster.get("GPU", 0.0)
    if not gpus:
        raise RuntimeError("device 'cuda' needs a GPU, and Ray's cluster has none")
    return {"num_cpus": share, "num_gpus": min(1.0, gpus / workers)}

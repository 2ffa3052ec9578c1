"""Writing the shards of a plan: units in parallel, and one shard's end beside the next one's work.

Units of a shard run on worker threads (torch releases the GIL), each single-threaded, and write to
their planned places. Every shard is hashed by a thread of its own while it is written; flushing and
the rest of the hash go on while the next ones are computed. So a machine with many cores hashes
several shards at once, and the speed of SHA-256 on one core bounds nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from v4quant.conversion.delivery import Delivery
from v4quant.conversion.journal import FinishedShard, Journal
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import TensorRecord
from v4quant.conversion.unit import convert_unit
from v4quant.conversion.units import ShardPlan, Unit
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.shards import ShardWriter, temporary_path
from v4quant_kernels.progress import Progress

_CLOSING = 2  # shards being flushed and hashed beside the one being computed


def write_shards(
    plan: Plan,
    shards: list[ShardPlan],
    out: Path,
    stats: Evidence | None,
    workers: int,
    journal: Journal,
    delivery: Delivery,
    progress: Progress,
) -> None:
    """Convert shards in order; each is closed, journaled and handed over beside the next ones.

    Raises what `convert_unit`, the writer and the delivery raise.
    """
    progress.start("Converting", sum(u.bytes_in for s in shards for u in s.units), "B")
    pool = ThreadPoolExecutor(workers, "convert", initializer=_one_thread)
    finisher = ThreadPoolExecutor(_CLOSING, "finish")
    closing: deque[Future[None]] = deque()
    sources, needed = plan.checkpoint.shards, _last_use(shards)
    last_readers = _last_readers(shards)
    sources.expect(list(needed))
    try:
        for number, shard in enumerate(shards):
            while len(closing) > _CLOSING or (closing and not delivery.has_room(shard.nbytes)):
                closing.popleft().result()
            delivery.make_room(shard.nbytes)
            sources.acquire(shard.source_files)
            writer = ShardWriter(out / shard.file, shard.file_plan(), delivery.reads_again)
            try:
                records = _convert_shard(plan, shard, writer, stats, pool, progress, last_readers)
            except BaseException:
                writer.abort()
                raise
            for file in shard.source_files:
                if needed[file] == number:
                    sources.release(file)
            closing.append(finisher.submit(_close_shard, writer, records, journal, delivery))
        for future in closing:
            future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        finisher.shutdown()
        # An interrupt may fall between a file's creation and the writer that would remove it.
        for shard in shards:
            temporary_path(out / shard.file).unlink(missing_ok=True)
        raise
    finally:
        pool.shutdown()
        finisher.shutdown()
        progress.finish()


def _last_use(shards: list[ShardPlan]) -> dict[str, int]:
    """Source shards in the order they are first needed, and who needs each last."""
    return {file: number for number, shard in enumerate(shards) for file in shard.source_files}


def _last_readers(shards: list[ShardPlan]) -> dict[str, tuple[str, Unit]]:
    """Who reads a source tensor last: the output file, and the unit of it."""
    units = ((shard.file, unit) for shard in shards for unit in shard.units)
    return {p.name: (file, u) for file, u in units for s in u.sources for p in s.parts.values()}


def _close_shard(
    writer: ShardWriter, records: list[TensorRecord], journal: Journal, delivery: Delivery
) -> None:
    """Flush, rename, journal, hand over: in this order, beside the next shard's conversion."""
    written = writer.close()
    journal.add(FinishedShard(written, tuple(records)))
    delivery.take(written)


def _convert_shard(
    plan: Plan,
    shard: ShardPlan,
    writer: ShardWriter,
    stats: Evidence | None,
    pool: ThreadPoolExecutor,
    progress: Progress,
    last_readers: dict[str, tuple[str, Unit]],
) -> list[TensorRecord]:
    futures = [pool.submit(convert_unit, plan, u, writer, stats) for u in shard.units]
    records: list[TensorRecord] = []
    try:
        for unit, future in zip(shard.units, futures, strict=True):
            done = future.result()
            records += [] if unit.again else done
            progress.advance(unit.bytes_in)
            for part in (p for s in unit.sources for p in s.parts.values()):
                file, last = last_readers[part.name]
                if file == shard.file and last is unit and not part.stride:
                    plan.checkpoint.shards.spent(part.file, part.offset, part.nbytes)
    except BaseException:
        # Nothing may still write when the caller removes the file.
        _cancel(futures)
        raise
    return records


def _cancel(futures: Iterable[Future[Any]]) -> None:
    running = [f for f in futures if not f.cancel()]
    for future in running:
        future.exception()


def _one_thread() -> None:
    # Per thread in torch: fixed partitioning keeps sums, and so bytes, the same for any workers.
    torch.set_num_threads(1)

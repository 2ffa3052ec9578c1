"""Writing the shards of plans: units in parallel, and one shard's end beside the next one's work.

Units run on worker threads (torch releases the GIL), each single-threaded, and write to their
planned places. Every shard is hashed by a thread of its own while it is written; flushing and the
rest of the hash go on while the next ones are computed. So a machine with many cores hashes several
shards at once, and the speed of SHA-256 on one core bounds nothing.

Several conversions of one source go through it in step: the next unit is always one of the
conversion that has come least far. So the first to read a tensor brings it into the page cache, the
others find it there, and the disk reads the source once, whatever its size. Workers are shared, so
memory and the number of open shards are what bounds this, as for one conversion.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from v4quant.conversion.delivery import Delivery
from v4quant.conversion.journal import FinishedShard, Journal
from v4quant.conversion.pace import Pace
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import TensorRecord
from v4quant.conversion.shared_source import SharedSource
from v4quant.conversion.unit import convert_unit
from v4quant.conversion.units import ShardPlan, Unit
from v4quant.own_folders import SameFolder
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.errors import OutputError
from v4quant_formats.shards import ShardWriter, temporary_path
from v4quant_kernels.progress import Progress

_CLOSING = 2  # shards of a conversion being flushed and hashed beside the one being computed
_QUEUED = 256  # units of a conversion handed to the workers before the oldest is waited for


@dataclass(frozen=True)
class Writing:
    """Shards of a plan that are to be written to the folder `out`, in order."""

    plan: Plan
    shards: tuple[ShardPlan, ...]
    out: Path
    stats: Evidence | None
    journal: Journal
    delivery: Delivery


@dataclass(frozen=True)
class _Shop:
    """What all conversions share."""

    source: SharedSource
    workers: ThreadPoolExecutor
    finishers: ThreadPoolExecutor
    pace: Pace
    progress: Progress


def write_shards(
    conversions: Sequence[Writing],
    workers: int,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Convert shards of one source, all conversions in step.

    Each shard is closed, journaled and handed over beside the next ones. check() is called before
    every unit. Raises what it, `convert_unit`, the writer and the delivery raise.
    """
    shards = [shard for one in conversions for shard in one.shards]
    pace = Pace((one.plan, unit) for one in conversions for s in one.shards for unit in s.units)
    progress.start("Converting", pace.total, "B")
    shop = _Shop(
        SharedSource(conversions[0].plan.checkpoint.shards, shards),
        ThreadPoolExecutor(workers, "convert", initializer=_one_thread),
        ThreadPoolExecutor(_CLOSING * len(conversions), "finish"),
        pace,
        progress,
    )
    turns = [_write(one, shop) for one in conversions]
    shop.source.expect()
    try:
        _take_turns(turns, check)
    except BaseException:
        shop.workers.shutdown(cancel_futures=True)
        for turn in turns:
            turn.close()
        shop.finishers.shutdown()
        # An interrupt may fall between a file's creation and the writer that would remove it.
        for one in conversions:
            for shard in one.shards:
                temporary_path(one.out / shard.file).unlink(missing_ok=True)
        raise
    finally:
        shop.workers.shutdown()
        shop.finishers.shutdown()
        progress.finish()


def _take_turns(turns: Sequence[Iterator[int]], check: Callable[[], None]) -> None:
    """Let whoever has come least far go on, until all are through."""
    places = dict.fromkeys(range(len(turns)), 0)
    while places:
        check()
        last = min(places, key=lambda i: places[i])
        place = next(turns[last], None)
        if place is None:
            del places[last]
        else:
            places[last] = place


def _write(one: Writing, shop: _Shop) -> Generator[int, None, None]:
    """Write one conversion's shards; before each unit, how many bytes of the source lie behind."""
    closing: deque[Future[None]] = deque()
    begins = _begins(one.plan)
    home = SameFolder(one.out)
    home.require()
    for shard in one.shards:
        while len(closing) > _CLOSING or (closing and not one.delivery.has_room(shard.nbytes)):
            closing.popleft().result()
        one.delivery.make_room(shard.nbytes)
        shop.source.acquire(shard)
        home.require()
        writer = ShardWriter(one.out / shard.file, shard.file_plan(), one.delivery.reads_again)
        try:
            records = yield from _convert_units(one, shop, shard, begins[shard.file], writer)
        except BaseException:
            writer.abort()
            raise
        shop.source.leave(shard)
        closing.append(shop.finishers.submit(_close_shard, writer, records, one))
    for future in closing:
        future.result()
    home.require()


def _begins(plan: Plan) -> dict[str, int]:
    """How many bytes of the source a plan has read before each of its shards."""
    begins, place = dict[str, int](), 0
    for shard in plan.shards:
        begins[shard.file] = place
        place += sum(unit.bytes_in for unit in shard.units)
    return begins


def _close_shard(writer: ShardWriter, records: list[TensorRecord], one: Writing) -> None:
    """Flush, rename, journal, hand over: in this order, beside the next shard's conversion."""
    if os.path.lexists(writer.path):  # what a killed run left there went before the work began
        writer.abort()
        raise OutputError(
            f"{writer.path}: was put there by somebody else while the conversion ran; move it "
            "away, and the same command goes on"
        )
    written = writer.close()
    one.journal.add(FinishedShard(written, tuple(records)))
    one.delivery.take(written)


def _convert_units(
    one: Writing, shop: _Shop, shard: ShardPlan, place: int, writer: ShardWriter
) -> Generator[int, None, list[TensorRecord]]:
    """Hand a shard's units to the workers, one a turn; `place` is where the first begins."""
    running: deque[tuple[Unit, Future[list[TensorRecord]]]] = deque()
    records: list[TensorRecord] = []

    def collect() -> None:
        unit, future = running[0]
        done = future.result()
        running.popleft()
        records.extend([] if unit.again else done)
        shop.progress.advance(shop.pace.done(one.plan, unit))
        shop.source.read(unit)

    try:
        for unit in shard.units:
            yield place
            place += unit.bytes_in
            done = shop.workers.submit(convert_unit, one.plan, unit, writer, one.stats)
            running.append((unit, done))
            while running and (len(running) > _QUEUED or running[0][1].done()):
                collect()
        while running:
            collect()
    except BaseException:
        # Nothing may still write when the caller removes the file.
        _cancel(future for _, future in running)
        raise
    return records


def _cancel(futures: Iterable[Future[Any]]) -> None:
    running = [f for f in futures if not f.cancel()]
    for future in running:
        future.exception()


def _one_thread() -> None:
    # Per thread in torch: fixed partitioning keeps sums, and so bytes, the same for any workers.
    torch.set_num_threads(1)

"""A release's files made when their bytes are asked for: nobody has them on disk.

Header and tensors of the synthetic release, the same bytes at every request. A few large tensors
are made before the first one, and kept in files, for no client waits that long.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from v4quant.synthetic.configs import make_config
from v4quant.synthetic.inventory import shards_of
from v4quant.synthetic.values import Faults, pieces
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import index_json
from v4quant_formats.shards import FilePlan, plan_shard
from v4quant_formats.spec import TensorSpec

_KEPT = 8  # tensors in memory: neighbours are asked for together
_LARGE = 256 << 20  # bytes of a tensor that is made before the first request: clients do not wait
_AT_ONCE = 2  # tensors being made


class Release:
    """A release's files, made on demand."""

    def __init__(
        self, release: str, overrides: dict[str, int], tiny: bool, folder: Path | None = None
    ) -> None:
        """overrides: integer fields of config.json. tiny: the layout in small.

        folder: where the few large tensors are kept; needed if there are any.
        """
        self.config = make_config(release, tiny, overrides, None)
        self.experts = int(self.config.get("n_routed_experts", 0))
        chosen = shards_of(release, self.config)
        self.plans: dict[str, FilePlan] = {
            f"model-{i:05d}-of-{len(chosen):05d}.safetensors": plan_shard(specs)
            for i, specs in enumerate(chosen, 1)
        }
        where = {s.name: file for file, plan in self.plans.items() for s in plan.specs}
        total = sum(s.nbytes for plan in self.plans.values() for s in plan.specs)
        self.small = {
            "config.json": json.dumps(self.config).encode(),
            INDEX_NAME: index_json(where, total),
        }
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._making: dict[str, threading.Lock] = {}
        self._makers = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._large: dict[str, memoryview] = {}
        for spec in (s for plan in self.plans.values() for s in plan.specs):
            if spec.nbytes >= _LARGE:
                assert folder is not None, f"{spec.name} needs a folder"
                self._keep(spec, folder)

    def _keep(self, spec: TensorSpec, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / hashlib.sha1(spec.name.encode()).hexdigest()
        with path.open("w+b") as file:
            for piece in pieces(spec, 0, self.experts, Faults()):
                file.write(piece.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._large[spec.name] = memoryview(data)

    def tensor(self, spec: TensorSpec) -> bytes | memoryview:
        """A tensor's bytes."""
        if spec.name in self._large:
            return self._large[spec.name]
        with self._lock:
            making = self._making.setdefault(spec.name, threading.Lock())
        # Slices of one tensor are asked for side by side; it is made once, and few at a time.
        with making:
            with self._lock:
                found = self._made.get(spec.name)
            if found is None:
                with self._makers:
                    parts = pieces(spec, 0, self.experts, Faults())
                    found = b"".join(p.view(-1).view(torch.uint8).numpy().tobytes() for p in parts)
                with self._lock:
                    self._made[spec.name] = found
                    while len(self._made) > _KEPT:
                        self._made.popitem(last=False)
        return found

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """Bytes `start:stop` of a shard."""
        plan, at = self.plans[file], 0
        for piece, offset, nbytes in [
            (None, 0, len(plan.header)), *((s, s.offset, s.nbytes) for s in plan.specs)
        ]:  # fmt: skip
            assert offset == at, "planned shards have no gaps"
            at += nbytes
            if offset < stop and at > start:
                data = plan.header if piece is None else self.tensor(piece)
                yield data[max(0, start - offset) : stop - offset]

    def digests(self, kept: Path | None = None) -> dict[str, str]:
        """SHA-256 of every shard: all of the release is made once.

        kept: a file of digests found before, which the same release reads; written if absent.
        """
        headers = {f: hashlib.sha256(p.header).hexdigest() for f, p in self.plans.items()}
        if kept is not None and kept.is_file():
            known = json.loads(kept.read_text(encoding="utf-8"))
            if known["headers"] == headers:
                digests: dict[str, str] = known["digests"]
                return digests

        def digest(file: str) -> str:
            sha = hashlib.sha256()
            for data in self.read(file, 0, self.plans[file].nbytes):
                sha.update(data)
            return sha.hexdigest()

        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(self.plans, pool.map(digest, self.plans), strict=True))
        if kept is not None:
            text = json.dumps({"headers": headers, "digests": found})
            kept.write_text(text, encoding="utf-8")
        return found

"""An adapter that lies on the hub is fetched, checked and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY, folder_bytes
from tests.support.fake_hub import FakeHub
from tests.support.lora import Lora
from v4quant.hub.errors import HubNotFound
from v4quant.hub.refs import HubReferenceError, parse_hub
from v4quant.source import open_source
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense


def test_an_adapter_of_a_repository_is_merged(
    plain_hub: FakeHub, tmp_path: Path, generator: torch.Generator
) -> None:
    lora = Lora(generator)
    folder = lora.write(tmp_path / "lora-v4")
    plain_hub.add_repo("maker/lora-v4", folder_bytes(folder))
    with open_source(TINY, adapter=parse_hub("hf://maker/lora-v4")) as merged:
        with open_source(TINY, adapter=folder) as wanted:
            assert merged.digest() == wanted.digest()
            assert merged.deltas is not None and merged.deltas.name == "lora-v4"
        module, delta = next(iter(lora.deltas.items()))
        with open_checkpoint(TINY) as base:
            sum_ = (read_dense(base, module).double() + delta).float()
        assert torch.equal(read_dense(merged, module), sum_)
    with pytest.raises(HubReferenceError, match="an adapter has no quants"):
        open_source(TINY, adapter=parse_hub("hf://maker/lora-v4:Q4_K"))
    plain_hub.add_repo("maker/none", {"README.md": b"x"})
    with pytest.raises(HubNotFound, match=r"adapter_config\.json"):
        open_source(TINY, adapter=parse_hub("hf://maker/none"))

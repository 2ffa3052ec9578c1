"""Engram's constants against public vectors and the oracle, and what is wrong with a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from v4quant.synthetic.configs import make_config
from v4quant.synthetic.tokenizer import make_tokenizer, special_tokens
from v4quant_formats.engram import engram_tables, is_prime, read_token_map, token_map
from v4quant_formats.model_config import ConfigError, load_model_config, parse_model_config

DATA = Path(__file__).parent.parent / "data"
ORACLE = DATA / "v41-tiny"


def test_constants_of_the_release() -> None:
    """Row counts are the released tables'; multipliers and primes a published test vector."""
    first, second = engram_tables((1, 14), 16_000_000, 8, 4, 99_092)
    assert (first.rows, second.rows) == (384_006_168, 384_016_682)
    assert first.primes[:4] == (16_000_057, 16_000_079, 16_000_081, 16_000_097)
    assert second.primes[-3:] == (16_000_877, 16_000_879, 16_000_889)
    assert len({*first.primes, *second.primes}) == 48
    assert first.multipliers == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert second.multipliers == (67716810739261, 51510806800915, 30921347202721, 82619226485591)
    assert first.offsets[:2] == (0, 16_000_057) and len(first.offsets) == 24
    assert max(first.multipliers) * 99_091 < 2**63


def test_primes() -> None:
    sieve = [True] * 10_000
    for n in range(2, 10_000):
        if sieve[n]:
            sieve[n * n :: n] = [False] * len(sieve[n * n :: n])
    assert [n for n in range(10_000) if is_prime(n)] == [n for n in range(2, 10_000) if sieve[n]]
    # Strong pseudoprimes to the bases up to 7 and up to 23.
    assert not is_prime(3_215_031_751) and not is_prime(3_825_123_056_546_413_051)
    assert is_prime(2**61 - 1) and not is_prime((2**31 - 1) * (2**17 - 1))


def _file(path: Path) -> tuple[bytes | None, Path]:
    return (path.read_bytes() if path.exists() else None), path


def test_token_map_is_the_oracles() -> None:
    config = load_model_config(ORACLE)
    assert config.v41 is not None
    size = config.v41.engram_compressed_vocab_size
    found = read_token_map(*_file(ORACLE / "tokenizer.json"), config.vocab_size, size)
    reference = load_file(DATA / "v41-tiny.reference.safetensors")["engram_token_map"]
    assert list(found) == reference.tolist()


def test_a_tokenizer_of_another_compressed_size_is_refused(tmp_path: Path) -> None:
    shutil.copy(ORACLE / "tokenizer.json", tmp_path)
    with pytest.raises(ConfigError, match=r"gives 342 compressed token ids.*says.*341"):
        read_token_map(*_file(tmp_path / "tokenizer.json"), 512, 341)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        read_token_map(*_file(tmp_path / "tokenizer.json"), 512, 342)
    # A panic of the library's Rust code, and a decoder that makes a token a novel.
    table = json.loads((ORACLE / "tokenizer.json").read_text())
    long = {"type": "Replace", "pattern": {"Regex": "^"}, "content": "x" * 10**5}
    for decoder in (long, {"type": "Sequence", "decoders": [long, long]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**table, "decoder": decoder}))
        with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
            read_token_map(*_file(tmp_path / "tokenizer.json"), 512, 342)
    with pytest.raises(ConfigError, match="missing, but Engram"):
        read_token_map(*_file(tmp_path / "other.json"), 512, 342)


@pytest.mark.parametrize(
    "change", [{"engram_vocab_size": 212}, {"engram_n_heads": 3}, {"engram_num_embeddings": [1, 2]}]
)
def test_tables_of_other_primes_are_refused(change: dict[str, object]) -> None:
    raw = json.loads((ORACLE / "config.json").read_text())
    raw["text_config"] |= change
    with pytest.raises(ConfigError, match="primes that n-grams are hashed by add up to"):
        parse_model_config(raw)


def test_fewer_candidates_than_choices_are_refused() -> None:
    raw = json.loads((ORACLE / "config.json").read_text())
    raw["text_config"]["candidate_topk_blocks"] = 3
    with pytest.raises(ConfigError, match="as few as 17 entries, index_topk is 24"):
        parse_model_config(raw)


@pytest.mark.parametrize("vocab", [128, 300, 512, 3000])
def test_synthetic_tokenizers_compress_as_their_config_says(vocab: int) -> None:
    config = make_config("v41", True, {"vocab_size": vocab})
    parsed = parse_model_config(config)
    assert parsed.v41 is not None and parsed.image_token_id is not None and parsed.dspark
    specials = special_tokens(vocab, parsed.dspark.noise_token_id, parsed.image_token_id)
    size = parsed.v41.engram_compressed_vocab_size
    tokenizer = make_tokenizer(vocab, size, specials)
    assert tokenizer.get_vocab_size() == vocab
    assert tokenizer.token_to_id("<｜deepseek_image｜>") == parsed.image_token_id
    assert max(token_map(tokenizer, vocab)) + 1 == size
    if vocab >= 512:
        assert size < vocab
        ids = tokenizer.encode("Abc abc\n").ids
        assert tokenizer.decode(ids) == "Abc abc\n"

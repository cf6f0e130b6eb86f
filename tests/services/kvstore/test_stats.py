import pytest

from services.kvstore.blob import BlobHeader, BlobKind
from services.kvstore.stats import TierStats
from services.kvstore.tier import TierCost
from tests.services.kvstore.blobs import LAYOUT_DIGEST, MODEL_DIGEST, key_of


def _header(kind: BlobKind = BlobKind.BODY, nbytes: int = 1_000_000 - 128) -> BlobHeader:
    return BlobHeader(
        kind=kind,
        key=key_of(0),
        model_digest=MODEL_DIGEST,
        layout_digest=LAYOUT_DIGEST,
        start=256,
        end=384,
        payload_nbytes=nbytes,
    )


def test_hits_count_the_tokens_of_bodies_alone() -> None:
    stats = TierStats()
    stats.hit(_header())
    stats.hit(_header(BlobKind.TAIL))
    assert (stats.hits, stats.hit_tokens, stats.loaded_bytes) == (2, 128, 2_000_000)


def test_the_rate_is_that_of_the_time_in_which_something_was_loading() -> None:
    stats = TierStats()
    for start in (0.0, 100.0, 200.0):  # two loads that overlap, then nothing for long
        stats.begin(start)
        stats.begin(start + 1.0)
        stats.loaded(start + 2.0, start, _header())
        stats.loaded(start + 2.0, start + 1.0, _header())
        stats.end(start + 2.0, num_missed=0)
        stats.end(start + 2.0, num_missed=1)
    assert stats.cost is not None
    assert stats.cost.bytes_per_second == pytest.approx(1e6, rel=0.5)
    assert 1.0 <= stats.cost.latency_seconds <= 2.0
    assert (stats.hits, stats.misses) == (6, 3)
    assert (stats.latency_seconds(0.0), stats.latency_seconds(1.0)) == (1.0, 2.0)


def test_an_estimate_counts_until_something_is_measured() -> None:
    stats = TierStats()
    assert stats.cost is None
    stats.estimate(TierCost(0.5, 1e3))
    assert stats.cost == TierCost(0.5, 1e3)
    stats.estimate(TierCost(9.0, 9.0))
    assert stats.cost == TierCost(0.5, 1e3)
    stats.begin(0.0)
    stats.loaded(1.0, 0.0, _header())
    stats.end(1.0, num_missed=0)
    assert stats.cost is not None
    assert stats.cost.bytes_per_second > 1e3


def test_without_loads_there_are_no_latencies() -> None:
    assert TierStats().latency_seconds(0.99) == 0.0

from pathlib import Path
from xml.etree import ElementTree

import pytest

from services.kvstore.simulate import POLICIES, HitRates, hit_rates, simulate
from services.kvstore.traces import Blob, Trace, all_traces


def test_every_policy_is_measured_on_every_trace_at_every_size(tmp_path: Path) -> None:
    simulation = simulate(200, cache_shares=(0.1, 0.5))
    assert len(simulation.rows) == 4 * len(POLICIES) * 2
    for row in simulation.rows:
        assert 0 <= row.rates.resumable <= row.rates.hit <= 1
    simulation.write_plot(tmp_path / "plot.svg")
    drawing = ElementTree.parse(tmp_path / "plot.svg").getroot()
    words = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {"zipf", "scan", "loop", "multi-turn", *POLICIES, "10%", "50%"} <= words


def test_one_size_can_be_drawn(tmp_path: Path) -> None:
    simulation = simulate(50, policies=["lru"], cache_shares=(0.1,))
    simulation.write_plot(tmp_path / "plot.svg")
    ElementTree.parse(tmp_path / "plot.svg")


def test_a_trace_depends_on_nothing_but_its_seed() -> None:
    assert all_traces(100, seed=3) == all_traces(100, seed=3)
    assert all_traces(100, seed=3) != all_traces(100, seed=4)
    assert {trace.name: len(trace.requests) for trace in all_traces(100)} == {
        "zipf": 100,
        "scan": 100,
        "loop": 100,
        "multi-turn": 100,
    }


def test_hits_are_counted_in_bytes_and_resumable_ones_up_to_the_first_gap() -> None:
    a, b, c = Blob(b"a" * 32, 100), Blob(b"b" * 32, 200), Blob(b"c" * 32, 100)
    trace = Trace("by hand", [[a, b], [a, c], [c], [b, a]])
    # Room for 300 of the 400 bytes, by LRU: b leaves for c; in the end b misses, and a is no use.
    assert hit_rates(POLICIES["lru"](), trace, 0.75) == HitRates(300 / 900, 200 / 900)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(KeyError, match="fifo2"):
        simulate(10, policies=["fifo2"])

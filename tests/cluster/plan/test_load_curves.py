from pathlib import Path

import pytest

from cluster.config import SettingsError
from cluster.plan.load_curves import read_curve, synthetic_curves


def test_a_recorded_rate_holds_until_the_next_line(tmp_path: Path) -> None:
    trace = tmp_path / "monday.csv"
    trace.write_text("seconds,requests_per_second\n100,5\n103,7.5\n104.5,0\n107,1\n")
    curve = read_curve(trace)
    assert curve.name == "monday"
    assert curve.rates.tolist() == [5, 5, 5, 7.5, 7.5, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must be seconds,requests_per_second"),
        ("time,rate\n1,2\n", "the first line must be seconds,requests_per_second"),
        ("seconds,requests_per_second\n0,1\n", "1 lines of values"),
        ("seconds,requests_per_second\n0,1\n5,many\n", "line 3, '5,many'"),
        ("seconds,requests_per_second\n0,1\n5\n", "line 3, '5'"),
        ("seconds,requests_per_second\n0,1\n5,-1\n", "line 3, '5,-1'"),
        ("seconds,requests_per_second\n0,1\nnan,1\n", "line 3, 'nan,1'"),
        ("seconds,requests_per_second\n0,1\n9,1\n8,1\n", "8 seconds come after 9"),
        ("seconds,requests_per_second\n0,1\n0.5,1\n", "spans 0.5 seconds"),
        ("seconds,requests_per_second\n0,1\n1e12,1\n", "spans 1e[+]12 seconds"),
    ],
)
def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with pytest.raises(SettingsError, match=rf"--trace .*trace.csv: .*{message}"):
        read_curve(trace)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.csv"):
        read_curve(tmp_path / "nowhere.csv")


def test_made_up_loads_depend_on_nothing_but_the_seed_and_keep_to_the_peak() -> None:
    first, again, other = (synthetic_curves(50, seed) for seed in (1, 1, 2))
    for curve, same in zip(first, again, strict=True):
        assert (curve.rates == same.rates).all()
        assert 25 <= curve.rates.max() <= 50
        assert curve.rates.min() >= 0
    assert any((curve.rates != each.rates).any() for curve, each in zip(first, other, strict=True))

"""Tables for people."""

from cluster.output import text_table


def test_columns_line_up_and_numbers_stand_to_the_right() -> None:
    table = text_table(("role", "pid"), [("gateway", 7), ("router", 1234)])
    assert table.splitlines() == ["role      pid", "gateway     7", "router   1234"]


def test_a_table_without_rows_is_its_header() -> None:
    assert text_table(("role", "pid"), []) == "role  pid"

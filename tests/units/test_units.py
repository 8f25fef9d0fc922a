import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion import CompanionError
from companion.units import format_bytes, format_count, format_seconds, format_table, parse_bytes


@pytest.mark.parametrize(
    ("function", "number", "text"),
    [
        (format_count, 0, "0"),
        (format_count, 999, "999"),
        (format_count, 1000, "1.000 k"),
        (format_count, 1_814_083_944, "1.814 G"),
        (format_count, 999_960, "1.000 M"),  # not 1000 k
        (format_count, 70.6e9, "70.60 G"),
        (format_count, 312e12, "312.0 T"),
        (format_bytes, 0, "0 B"),
        (format_bytes, 1023, "1023 B"),
        (format_bytes, 1024, "1.000 KiB"),
        (format_bytes, 46_830_571, "44.66 MiB"),
        (format_seconds, 0.00123, "1.230 ms"),
        (format_seconds, 1.5e-9, "1.500 ns"),
        (format_seconds, 0.9999999, "1.000 s"),
        (format_seconds, 9.9996, "10.00 s"),
        (format_seconds, 123.4, "123.4 s"),
        (format_seconds, 12345, "12345 s"),
    ],
)
def test_examples(function, number, text):
    assert function(number) == text


def test_a_unit_follows_the_prefix():
    assert format_count(3.628e9, "FLOP") == "3.628 GFLOP"


@given(st.floats(1e-8, 1e6))
def test_seconds_can_be_read_back(number):
    value, unit = format_seconds(number).split()
    scale = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1}[unit]
    assert float(value) * scale == pytest.approx(number, rel=6e-4)


def test_a_table_has_aligned_columns_and_no_blanks_at_the_end():
    assert format_table([("a", "state"), ("longer", "ok"), ("b", "")]) == "a       state\nlonger  ok\nb"


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("123", 123), ("123 B", 123), ("256MiB", 2**28), ("1.5 GiB", 3 * 2**29), (" 2KiB", 2048)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1 GB", "1e3", "GiB", "0x10", "1 KiB 2", "nan", "1_000"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(CompanionError, match="is not a size: give a number of bytes"):
        parse_bytes(text)

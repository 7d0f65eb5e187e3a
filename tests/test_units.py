import pytest

from toolkit import units


@pytest.mark.parametrize(
    ("text", "table", "value"),
    [
        ("2 ms", units.MILLISECONDS, 2),
        ("500 µs", units.MILLISECONDS, 0.5),
        ("1.5s", units.MILLISECONDS, 1500),
        ("92 %", units.FRACTION, 0.92),
        ("150 MB", units.BYTES, 150e6),
        ("1 MiB", units.BYTES, 1048576),
        ("60M", units.FLOPS, 60e6),
        (1000, units.FLOPS, 1000),
        ("1000 samples/s", units.RATE, 1000),
        ("10 W", units.WATTS, 10),
        ("500 mW", units.WATTS, 0.5),
        ("5 mJ", units.MILLIJOULES, 5),
        ("0.2 J", units.MILLIJOULES, 200),
        ("70 µJ", units.MILLIJOULES, 0.07),
    ],
)
def test_parse(text: object, table: dict[str, float], value: float) -> None:
    assert units.parse(text, table) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "ms", "two ms", "2 apples", "-2 ms", True, None])
def test_what_is_no_latency(text: object) -> None:
    with pytest.raises(ValueError, match="ms"):
        units.parse(text, units.MILLISECONDS)


def test_nearest_names_the_closest_or_all() -> None:
    assert units.nearest("jetson-orim", ["a100", "jetson-orin"]) == "did you mean 'jetson-orin'?"
    assert units.nearest("zzz", ["b", "a"]) == "known: a, b"


def test_formats() -> None:
    assert units.count(81_102_208) == "81.1M"
    assert units.flops(81_102_208) == "81.1 MFLOPs"
    assert units.flops(12) == "12 FLOPs"
    assert units.size(1_210_000) == "1.21 MB"
    assert units.duration(125) == "2 min 05 s"
    assert units.duration(4320) == "1 h 12 min"

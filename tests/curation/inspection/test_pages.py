"""Numbers as a reader sees them, and escaping that a template cannot get around."""

import pytest

from curation.inspection import pages


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [
        (None, "–"),
        (0, "0 %"),
        (1, "100 %"),
        (0.00001, "<0.01 %"),
        (0.0042, "0.42 %"),
        (0.0512, "5.1 %"),
        (0.99996, ">99.9 %"),  # not everything: never shown as 100 %
    ],
)
def test_percent(fraction: float | None, shown: str) -> None:
    assert pages.percent(fraction) == shown


def test_sizes_and_durations() -> None:
    assert [pages.size(n) for n in (None, 999, 1000, 156_200_000, 2_312_000_000)] == [
        "–",
        "999 bytes",
        "1.0 kB",
        "156 MB",
        "2.3 GB",
    ]
    assert [pages.duration(s) for s in (None, 0.04, 99.94, 100, 3660)] == [
        "–",
        "0.0 s",
        "99.9 s",
        "1 min 40 s",
        "1 h 1 min",
    ]


def test_decimals() -> None:
    shown = [pages.decimal(value) for value in (None, 0.816, -0.104, -0.0001, 1)]
    assert shown == ["–", "0.82", "−0.10", "0.00", "1.00"]


def test_a_value_has_its_place_on_an_axis_and_beyond_it_the_end() -> None:
    places = [float(pages.place(value, -1, 1, 10, 100)) for value in (-1, 0, 0.5, 1, 7, -7)]
    assert places == [10, 60, 85, 110, 110, 10]
    assert float(pages.place(0.25, 0, 1, 100, -100)) == 75  # upwards
    assert float(pages.place(1, 1, 1, 10, 100)) == 10  # an axis of no length


@pytest.mark.parametrize(
    ("lowest", "shown"),
    [
        (0.0, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (0.31, "0.2 0.4 0.6 0.8 1.0"),
        (0.5, "0.5 0.6 0.7 0.8 0.9 1.0"),
        (0.97, "0.97 0.98 0.99 1.00"),
        (0.9995, "0.999 1.000"),
        (1.0, "0.999 1.000"),
    ],
)
def test_ticks_end_at_one_and_hold_the_lowest(lowest: float, shown: str) -> None:
    ticks = pages.ticks(lowest)
    assert " ".join(name for _, name in ticks) == shown
    assert ticks[0][0] <= lowest


def test_values_are_escaped_and_controls_spelled_out() -> None:
    html = pages.render("run.html.j2", root='<b>"\u202e', counts=[("a", "1")], arms=[])
    assert "<b>" not in html
    assert "&lt;b&gt;&#34;\\u202e" in html

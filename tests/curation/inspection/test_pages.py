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


def test_values_are_escaped_and_controls_spelled_out() -> None:
    html = pages.render("run.html.j2", root='<b>"\u202e', counts=[("a", "1")], arms=[])
    assert "<b>" not in html
    assert "&lt;b&gt;&#34;\\u202e" in html

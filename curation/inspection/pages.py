"""The templates' environment: everything is escaped, numbers are formatted in one place.

A template gets no way around escaping: nothing here or in the templates marks a string as safe.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from curation.inspection.excerpts import visible


def render(template: str, **values: Any) -> str:
    """The HTML of a template in this folder. Raises jinja2.UndefinedError for a value it lacks."""
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "percent": percent,
        "size": size,
        "duration": duration,
        "decimal": decimal,
        "place": place,
        "ticks": ticks,
        "short": lambda document_id: document_id[:12],
    }
    return environment


def _finalize(value: Any) -> Any:
    """Control and bidirectional override characters are spelled out in whatever a template prints."""
    return visible(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value


def count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def percent(fraction: float | None) -> str:
    """One decimal, two below 1 %; never 0 % or 100 % for what is not."""
    if fraction is None:
        return "–"
    value = 100 * fraction
    if value in (0, 100):
        return f"{value:.0f} %"
    if value < 0.01:
        return "<0.01 %"
    if 99.9 < value < 100:
        return ">99.9 %"
    return f"{value:.2f} %" if value < 1 else f"{value:.1f} %"


def decimal(value: float | None) -> str:
    """Two decimals, with a minus that is one."""
    return "–" if value is None else f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def place(value: float, start: float, end: float, left: float, width: float) -> str:
    """Where `value` is drawn on an axis from `start` to `end` that is `width` wide and begins at `left`; beyond its
    ends, at the end."""
    fraction = (value - start) / (end - start) if end > start else 0.0
    return f"{left + width * min(1.0, max(0.0, fraction)):.2f}"


def ticks(lowest: float) -> list[tuple[float, str]]:
    """Round numbers from `lowest` (0..1) or just below it to 1, at most six, and how they are written."""
    span = max(0.0, 1 - lowest)
    step = next((s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1) if span <= 5 * s + 1e-9), 0.2)
    num = max(1, math.ceil(span / step - 1e-9))
    digits = 1 if step >= 0.1 else 2 if step >= 0.01 else 3
    return [(round(1 - k * step, 3), f"{1 - k * step:.{digits}f}") for k in range(num, -1, -1)]


def size(num_bytes: float | None) -> str:
    """Decimal units: 1 MB is 10**6 bytes."""
    if num_bytes is None:
        return "–"
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "bytes" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

"""Pages in a real Chromium."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def fits(html: str, folder: Path, width_px: int, title: str) -> None:
    """Assert that a page of that title, with all details open and without its policy against scripts, is no wider than
    `width_px`. Another title: text of the page ran as script."""
    html = html.replace("<details", "<details open")
    html = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("&", "&amp;").replace('"', "&quot;")
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe style="width:{width_px}px;height:800px;border:0" srcdoc="{html}" onload="'
        "const d = this.contentDocument, e = d.documentElement;"
        "document.title = e.clientWidth + ' ' + e.scrollWidth + ' ' + d.title\"></iframe>"
    )
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), "--disable-component-update", "--disable-sync",
         f"--user-data-dir={folder / 'profile'}", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=90, check=True, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    found = re.search(rf"<title>(\d+) (\d+) {re.escape(title)}</title>", done.stdout)
    assert found is not None
    inner_px, content_px = map(int, found.groups())
    assert width_px - 20 <= inner_px <= width_px
    assert content_px <= inner_px

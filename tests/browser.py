"""Headless Chromium for the report's tests. ``python tests/browser.py PAGE FOLDER`` takes screenshots to look at."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def browser() -> Iterator[Any]:
    """A playwright browser on the system's Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        try:
            yield launched
        finally:
            launched.close()


def open_page(launched: Any, path: Path, width: int = 1400, scheme: str = "light", fragment: str = "") -> Any:
    """The page, drawn; ``page.problems`` lists console errors, ``page.requests`` every address but the file's."""
    page = launched.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(200_000)  # two busy cores can take a minute
    page.problems, page.requests = [], []
    page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("request", lambda r: page.requests.append(r.url) if not r.url.startswith(path.as_uri()) else None)
    page.goto(path.as_uri() + fragment)
    page.wait_for_function(
        "[...document.querySelectorAll('[data-chart]')].every((c) => c.querySelector('svg'))", timeout=200_000
    )
    return page


def screenshots(path: Path, folder: Path) -> None:
    with browser() as launched:
        for scheme in ("light", "dark"):
            for width in (1400, 400):
                page = open_page(launched, path, width, scheme)
                page.screenshot(path=folder / f"{scheme}-{width}.png", full_page=True)
                print(scheme, width, page.problems, page.requests)
                page.close()


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))

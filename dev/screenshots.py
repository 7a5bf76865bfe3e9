"""Takes the pictures of a report in docs/: python dev/screenshots.py demo/report.html

Any report with clips of two models will do; `make demo` writes the one that is shown. Needs
playwright and Chromium, as the tests do.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def top(page: Page) -> None:
    page.evaluate("scrollTo(0, 0)")


def clips(page: Page) -> None:
    at_frame(page, 9)
    page.locator("#clips").evaluate("(section) => section.scrollIntoView()")
    page.wait_for_timeout(1000)


def first_row(page: Page) -> None:
    clips(page)
    page.keyboard.press("j")
    page.wait_for_timeout(1000)


def rating(page: Page) -> None:
    clips(page)
    page.keyboard.press("b")
    page.locator("[name=rater]").fill("Ada")
    page.get_by_role("button", name="Begin").click()
    page.keyboard.press("1")
    at_frame(page, 9)


def at_frame(page: Page, number: int) -> None:
    """Stop all visible clips at this frame, with the page's own keys."""
    page.locator("#clips .row").first.evaluate("(row) => row.scrollIntoView()")
    page.wait_for_timeout(1000)  # Until the clips are loaded.
    page.keyboard.press(" ")
    page.keyboard.press("r")
    for _ in range(number - 1):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(1000)


SHOTS: dict[str, tuple[Callable[[Page], None], dict[str, int], str]] = {
    "report-scores": (top, DESKTOP, "light"),
    "report-clips-dark": (clips, DESKTOP, "dark"),
    "report-rating": (rating, DESKTOP, "light"),
    "report-phone": (first_row, PHONE, "light"),
}


def main(report: Path) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, (show, size, scheme) in SHOTS.items():
            page = browser.new_page(viewport=size, color_scheme=scheme, has_touch=size is PHONE)
            page.goto(report.resolve().as_uri())
            show(page)
            path = DOCS / f"{name}.png"
            page.screenshot(path=path)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"A headless Chromium for the tests of pages, and what a page does in it."

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _lacking(reason):
    "Skips the test; a test of a page that is skipped on CI is tested nowhere, so there it fails."
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@contextmanager
def chromium():
    "The browser of this computer; the test is skipped where it or Playwright is absent."
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _lacking("Playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _lacking(f"no browser found, looked for {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Seen:
    "What happened since the page was opened."

    problems: list[str] = field(default_factory=list)  # errors and warnings of the console, and errors of the page's scripts
    requests: list[str] = field(default_factory=list)  # addresses that were asked for

    @property
    def elsewhere(self):
        "Addresses outside the page."
        return [a for a in self.requests if not a.startswith(("file:", "data:"))]


@contextmanager
def opened(browser, path, anchor="", **options):
    "The file, opened without a network, as (page, what was seen); `options` are those of a browser context."
    context = browser.new_context(**{"locale": "en-US", **options})
    try:
        context.set_offline(True)
        context.set_default_timeout(5000)
        context.set_default_navigation_timeout(30000)
        page, seen = context.new_page(), Seen()
        page.on("console", lambda m: seen.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: seen.problems.append(str(e)))
        page.on("request", lambda r: seen.requests.append(r.url))
        page.goto(path.resolve().as_uri() + (f"#{anchor}" if anchor else ""), wait_until="load")
        yield page, seen
    finally:
        context.close()


def faults(page):
    "What axe-core finds serious or critical, as sentences with the first place."
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        _lacking("axe is not installed: pip install axe-playwright-python")
    found = Axe().run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]}" for v in serious]

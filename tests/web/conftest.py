"""Headless Chromium: Playwright's own where that is installed, else the system's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, sync_playwright

WEB = Path(__file__).parents[2] / "web"
SYSTEM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# no request leaves for it: the pages of `modules` answer themselves
ORIGIN = "http://pladis.test"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path).exists()
        program = None if own else next(filter(None, map(shutil.which, SYSTEM)), None)
        # root has no sandbox
        sandbox = not hasattr(os, "geteuid") or os.geteuid() != 0
        try:
            running = playwright.chromium.launch(executable_path=program, chromium_sandbox=sandbox)
        except Error as error:
            if own or program:
                raise
            pytest.skip(f"no browser: python -m playwright install chromium ({error.message.splitlines()[0]})")
        yield running
        running.close()


@pytest.fixture(scope="module")
def modules(browser) -> Page:
    """A page that can import the modules of web/, without ComfyUI."""
    page = browser.new_page()

    def answer(route) -> None:
        file = WEB / route.request.url.removeprefix(f"{ORIGIN}/")
        if file.is_file():
            route.fulfill(path=file, content_type="text/javascript")
        else:
            route.fulfill(body="<!doctype html>", content_type="text/html")

    page.route(f"{ORIGIN}/**", answer)
    page.goto(f"{ORIGIN}/")
    return page

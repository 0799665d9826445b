"""Headless Chromium: Playwright's own where that is installed, else the system's."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, sync_playwright
from test_hosts import host_python

from comfy_server import Server

WEB = Path(__file__).parents[2] / "web"
SYSTEM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# no request leaves for it: the pages of `modules` answer themselves
ORIGIN = "http://pladis.test"
RENDERERS = {"classic": False, "nodes-2": True}


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


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    host = Path(os.environ["COMFYUI_PATH"])
    python = host_python(os.environ["PLADIS_HOST"], host)
    with Server(python, host, tmp_path_factory.mktemp("comfyui")) as running:
        # a new user's dialog would be in the way
        running.set("Comfy.TutorialCompleted", True)
        yield running


@pytest.fixture(scope="module", params=RENDERERS)
def opened(request, server, browser) -> Page:
    """ComfyUI's page in one of its renderers."""
    server.set("Comfy.VueNodes.Enabled", RENDERERS[request.param])
    page = browser.new_page(viewport={"width": 1600, "height": 960})
    page.set_default_timeout(20_000)
    page.renderer, page.errors = request.param, []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.extend(re.findall(".*already registered.*", message.text)))
    page.goto(server.url)
    page.wait_for_function("window.app?.extensions?.some(({ name }) => name === 'pladis.panels')")
    page.wait_for_function("app.graph && app.extensionManager && 'PLADISApply' in LiteGraph.registered_node_types")
    yield page
    page.close()

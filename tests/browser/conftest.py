"""A real Chromium on the page of a real ComfyUI with the pack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from comfy_page import ComfyPage
from comfy_server import ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the template browser opens by itself, once
    "Comfy.Minimap.Visible": False,
}


@pytest.fixture(scope="module")  # a page that nobody looks at still takes a quarter of a core
def comfy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(output=tmp_path_factory.mktemp("output")) as server:
        server.post("/settings", SETTINGS)
        yield server


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened_page(browser: Browser, comfy_server: ComfyServer) -> Iterator[ComfyPage]:
    tab = browser.new_page(viewport={"width": 1800, "height": 1000})
    tab.set_default_timeout(60_000)  # with two busy cores the page takes its time
    page = ComfyPage(tab, comfy_server.url)
    page.open()
    yield page
    tab.close()


@pytest.fixture
def page(opened_page: ComfyPage) -> Iterator[ComfyPage]:
    """The page with an empty graph; afterwards the pack must not have caused any error in it."""
    opened_page.reset()
    yield opened_page
    assert not opened_page.errors

"""Shared by all tests: one thread each (two processes of two threads each are slower than two of one), real CIFAR-10,
and headless Chromium for the tests of pages, which opens a file and notes whatever went wrong.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puma.cli.app import main

# Started in the background by a script, pytest inherits an ignored Ctrl-C and hands it down to the processes it tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# For the processes that tests start; this one is told below.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
torch.set_num_threads(1)

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder of real CIFAR-10 in the Hugging Face layout that may lie beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("shared CIFAR-10 is absent")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command in this process: ``command("score", ...)`` returns its exit code."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["puma", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    return run


class Opened:
    """A page that is open, with the console errors and the requests it caused."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def outside(self) -> list[str]:
        """Requests other than the file itself and what lies inside it."""
        return [url for url in self.requests if not url.startswith(("file:", "data:"))]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser; a test that wants it is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no Chromium at {CHROMIUM} (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """Open a file: ``open_page(path, width=1200, dark=False)``; the network is off."""
    contexts = []

    def opener(path: Path, width: int = 1200, dark: bool = False) -> Opened:
        scheme = "dark" if dark else "light"
        contexts.append(
            chromium.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme)
        )
        seen = Opened(contexts[-1].new_page())
        seen.page.goto(path.resolve().as_uri())
        return seen

    yield opener
    for context in contexts:
        context.close()

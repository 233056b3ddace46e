"""The page in a browser; needs Chromium and the extra 'browser'."""

import re
import shutil

import pytest

from jaxspec.serving.connections import Limits
from tests.serving import servers

CHROMIUM = shutil.which("chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")

pytestmark = [pytest.mark.gate, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1180, 390])
def test_a_tree_grows(scheme, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as run, servers.serve(limits=Limits()) as (port, _):
        browser = run.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        size, looks = {"width": width, "height": 800}, {"color_scheme": scheme}
        page = browser.new_page(viewport=size, reduced_motion="reduce", **looks)
        page.set_default_timeout(180_000)  # ms; the first answer compiles
        faults = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.fill("#prompt", "abcabcabcabc")
        page.click("#go")
        page.locator("#title", has_text=re.compile(r"round \d+ of \d+")).wait_for()
        assert faults == [] and page.inner_text("#fault") == ""
        assert float(page.inner_text("#tau")) > 1 and page.inner_text("#gain").endswith("×")
        assert page.locator("#answer span").count() > 5
        assert page.locator("#tree rect").count() >= 2
        title = page.inner_text("#title")
        page.click("#back")
        assert page.inner_text("#title") != title
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.fill("#prompt", " ")
        page.click("#go")
        page.locator("#fault", has_text="the prompt is empty").wait_for()
        browser.close()

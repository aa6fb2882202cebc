"""The book in a real browser: nothing is asked of the network, nothing fails, a telephone's width is enough."""
import os
import shutil

import pytest
from handbook_fixtures import built_book

CHROMIUM = shutil.which("chromium")
if not CHROMIUM and not os.environ.get("HANDRECON_BROWSER"):
    pytest.skip("no Chromium: `make test-browser` installs it", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")
PATIENCE = 300_000  # milliseconds; the cores may be busy with something else
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NARROW = ["index", "start", "conventions", "glossary", "systems", "reproduction", "performance", "map", "house", "contributing", "cite", "licences", "explore",
          "data/index", "data/freihand", "data/stb", "data/detections", "api/index", "api/mano", "api/s2hand", "nbs/00_conventions", "nbs/02_mano", "nbs/07_losses",
          "nbs/08_temporal", "nbs/09_stereo", "nbs/10_centermap", "nbs/14_datasets", "nbs/20_s2hand", "nbs/reproduce/s2hand"]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return built_book(tmp_path_factory)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, built):
    "Opens a page from the disk and keeps what went wrong in `visit.trouble`."
    opened = []

    def go(name, width=1200):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE)
        opened.append(page)
        page.on("console", lambda m: go.trouble.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: go.trouble.append(str(e)))
        page.on("requestfailed", lambda r: go.trouble.append(f"failed: {r.url}"))
        page.on("request", lambda r: go.trouble.append(f"network: {r.url}") if not r.url.startswith(("file:", "data:", "blob:")) else None)
        address, _, query = name.partition("?")
        page.goto(f"file://{built}/html/{address}.html" + (f"?{query}" if query else ""))
        if page.locator("mjx-container, span.math").count(): page.wait_for_function("() => window.MathJax && MathJax.startup && MathJax.startup.document")
        return page

    go.trouble = []
    yield go
    for page in opened: page.close()


def test_narrow_pages_do_not_scroll_sideways(visit):
    wide = []
    for name in NARROW:
        page = visit(name, 390)
        if page.locator("span.math, div.math").count(): page.evaluate("() => MathJax.startup.promise")
        if (width := page.evaluate("() => document.documentElement.scrollWidth")) > 390: wide.append((name, width))
        page.close()
    assert not wide
    assert not visit.trouble


def test_mathematics_is_set(visit):
    page = visit("nbs/07_losses")
    page.wait_for_selector("mjx-container", state="attached")
    page.evaluate("() => MathJax.startup.promise")
    assert page.locator("mjx-container").count() > 50 and page.locator("mjx-merror").count() == 0
    assert not visit.trouble


def test_a_figure_can_be_turned(visit):
    page = visit("start")
    page.locator(".plotly-figure").scroll_into_view_if_needed()
    page.wait_for_selector(".plotly-figure .js-plotly-plot, .plotly-figure.js-plotly-plot")
    assert page.evaluate("() => document.querySelector('.plotly-figure')._fullData[0].x.length") == 778
    assert not visit.trouble


def test_search_finds(visit):
    page = visit("search?q=barycentric")
    page.wait_for_selector("#search-results li a")
    assert any("05_raster" in (link.get_attribute("href") or "") for link in page.locator("#search-results li a").all())
    assert not [t for t in visit.trouble if t.startswith("network")]

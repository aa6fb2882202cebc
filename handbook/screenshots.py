"""The explorers' pictures for the book: opens each in Voilà and Chromium and writes handbook/pictures/explore_NAME.png. Needs what `make test-browser` installs."""
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def served(port: int) -> subprocess.Popen:
    "Voilà on the notebooks, ready to answer."
    settings = str(ROOT / "nbs/explore/.voila")
    process = subprocess.Popen([Path(sys.executable).parent / "voila", "nbs", "--no-browser", f"--port={port}"], cwd=ROOT, stderr=subprocess.DEVNULL,
                               env=os.environ | {"JUPYTER_PATH": settings, "JUPYTER_CONFIG_PATH": settings})
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/voila/tree/explore", timeout=20)
            return process
        except OSError: time.sleep(0.5)
    process.kill()
    raise SystemExit("Voilà does not answer")


def photograph(browser, port: int, name: str) -> None:
    "Figures and controls, in 128 colours."
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(f"http://127.0.0.1:{port}/voila/render/explore/{name}.ipynb", timeout=300_000)
    page.wait_for_selector(".hr-status[data-state=ready]", timeout=300_000)
    page.wait_for_timeout(5_000)
    height = page.evaluate("() => Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))")
    page.set_viewport_size({"width": 1100, "height": min(3000, height + 100)})
    page.wait_for_timeout(2_000)
    picture = Image.open(io.BytesIO(page.locator(".hr-explorer").screenshot())).convert("RGB").quantize(128)
    picture.save(ROOT / f"handbook/pictures/explore_{name}.png", optimize=True)
    page.close()


if __name__ == "__main__":
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = served(port)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            for name in sys.argv[1:] or sorted(path.stem for path in (ROOT / "nbs/explore").glob("*.ipynb")):
                photograph(browser, port, name)
                print(name)
            browser.close()
    finally:
        process.terminate()
        process.wait()

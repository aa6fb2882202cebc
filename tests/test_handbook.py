"""The book: it builds without a warning, nothing in it leads nowhere, and what it says about the code is so."""
import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest
from handbook_fixtures import ROOT, built_book, equations, reference, stage


class Page(HTMLParser):
    "What a test asks a page about."

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.pictures, self.ids = [], [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and "href" in a: self.links.append(a["href"])
        if tag == "img":
            self.pictures.append((a.get("src", ""), a.get("alt", "")))
            self.loads.append(a.get("src", ""))
        if tag in ("script", "iframe", "source") and "src" in a: self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "preload", "icon"): self.loads.append(a["href"])


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return built_book(tmp_path_factory)


@pytest.fixture(scope="session")
def pages(built):
    return {path: Page(path) for path in sorted((built / "html").rglob("*.html")) if "_static" not in path.parts}


def test_builds_without_a_warning_and_in_time(built):
    done = json.loads((built / "done.json").read_text())
    assert not done["failed"], done["said"][-3000:]
    assert done["seconds"] < 180, "of one core: three minutes"


def test_every_link_leads_somewhere(pages, built):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"https?:|mailto:", link): continue
            name, _, fragment = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists(): broken.append(f"{path.name}: {link}")
            elif fragment and target in pages and fragment not in pages[target].ids: broken.append(f"{path.name}: {link}")
    assert not broken, broken[:20]


def test_nothing_is_loaded_from_the_network(pages):
    loads = {(path.name, load) for path, page in pages.items() for load in page.loads if load and not load.startswith("data:")}
    assert not [pair for pair in loads if re.match(r"(https?:)?//", pair[1])]
    missing = [(path.name, load) for path, page in pages.items() for load in page.loads
               if load and not load.startswith("data:") and not (path.parent / unquote(load).partition("?")[0]).exists()]
    assert not missing, missing[:10]


def test_pages_are_light(pages):
    "A page with its own pictures; what all pages share is fetched once."
    for path, page in pages.items():
        own = sum((path.parent / unquote(src)).stat().st_size for src, _ in dict.fromkeys(page.pictures) if src and not src.startswith("data:"))
        assert path.stat().st_size + own < 1e6, f"{path.name}: {path.stat().st_size + own} bytes"


def test_pictures_say_what_they_show(pages):
    silent = {(path.name, src) for path, page in pages.items() for src, alt in page.pictures if len(alt) < 8 or alt.endswith((".png", ".jpg"))}
    assert not silent, sorted(silent)[:10]


def test_every_lesson_is_a_page_and_every_module_too(built):
    for path in (ROOT / "nbs").rglob("[0-9a-z]*.ipynb"):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts): continue
        page = built / "html/nbs" / path.relative_to(ROOT / "nbs").with_suffix(".html")
        assert "Open in JupyterLab" in page.read_text(), path.name
    for module, *_ in reference.lessons():
        assert not module or (built / f"html/api/{module}.html").exists()


def test_source_shows_as_prose_with_code(built):
    for path in (built / "source/nbs").rglob("*.ipynb"):
        assert not [c.source for c in nbformat.read(path, 4).cells if re.search(r"^#\|", c.source, flags=re.M)], path.name


def test_search_knows_the_lessons(built):
    index = (built / "html/searchindex.js").read_text()
    assert all(word in index for word in ("barycentr", "quaternion", "procrust"))


def test_reference_has_every_public_name():
    for module, notebook, title, about in reference.lessons():
        if not module: continue
        text = reference.page(module, notebook, title, about)
        loaded = importlib.import_module(f"handrecon.{module}")
        defined = [name for name in loaded.__all__ if getattr(getattr(loaded, name), "__module__", "") == f"handrecon.{module}" and not name.startswith("_")]
        missing = [name for name in defined if f"# {name}\n" not in text and f"{name} = " not in text]
        assert not missing, f"{module}: {missing}"


def test_a_signature_keeps_shapes_and_units():
    text = reference.page("camera", "04_camera.ipynb", "The camera", "")
    assert 'points: Float[Tensor, "B N 3"],  # camera axes, metres' in text


def test_functions_on_the_map_exist_and_their_lessons_name_the_equation():
    places = equations.places()
    prose = {(p.paper, p.number, p.notebook) for p in places if not p.name}
    derived = {(paper, number) for paper, number, notebook in prose}
    assert len({(p.paper, p.number) for p in places if p.name}) > 20
    for p in places:
        if not p.name: continue
        assert hasattr(importlib.import_module(f"handrecon.{p.module}"), p.name), p
        system = p.notebook.startswith("2")     # composes what earlier lessons derive
        assert (p.paper, p.number) in derived if system else (p.paper, p.number, p.notebook) in prose, f"{p.notebook} has {p.name} for Eq. {p.number} of {p.paper}, but its text does not name it"


def test_every_equation_has_a_function():
    found = {(p.paper, p.number) for p in equations.places() if p.name}
    missing = [(paper, number) for paper, (*_, numbered) in equations.PAPERS.items() for number in numbered if (paper, number) not in found]
    assert not missing, missing


@pytest.mark.parametrize("text, notebook, expected", [
    ("see Eq. 6 of S²HAND", "00_x", {("S²HAND", 6)}),
    ("(Eq. 19-20)", "08_temporal", {("S²HAND(V)", 19), ("S²HAND(V)", 20)}),
    ("S²HAND(V), Eq. 17", "07_losses", {("S²HAND(V)", 17)}),
    ("Ren, Zhu and Zhang, Eq. 4 and 5; S²HAND, §3.2", "02_mano", {("Multi-hand", 4), ("Multi-hand", 5)}),
    ("Equation (2) of this page", "05_raster", set()),
    ("Eq. 99", "07_losses", set()),
    ("(Sun et al. 2018, Eq. 2)", "11b_keypoint_branch", set()),
    (r"$$E = 1 \tag{4}$$", "07_losses", {("S²HAND", 4)}),
    (r"$$E = 1 \tag{4}$$", "05_raster", set()),
])
def test_equations_are_recognised(text, notebook, expected):
    assert equations.mentioned(text, notebook) == expected


CODE = [(path.name, block) for path in sorted((ROOT / "handbook").rglob("*.md")) if "_build" not in path.parts
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)]


@pytest.mark.parametrize("block", [block for _, block in CODE], ids=[name for name, _ in CODE])
def test_python_on_a_page_runs_as_pasted(block, tmp_path):
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_on_the_pages_exist():
    from typer.testing import CliRunner

    from handrecon.cli import app
    shown = CliRunner().invoke(app, ["--help"]).output
    for path in (ROOT / "handbook").glob("**/*.md"):
        if "_build" in path.parts: continue
        for command in set(re.findall(r"(?:^|`)\$? ?handrecon ([a-z][a-z-]+)", path.read_text(), flags=re.M)):
            assert re.search(rf"^\W*{command}\b", shown, flags=re.M), f"{path.name} shows `handrecon {command}`, which --help does not know"


def test_reproduction_commands_name_what_there_is():
    from handrecon import runs
    text = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "handbook").glob("*.md"), *(ROOT / "handbook/data").glob("*.md")])
    commands = set(re.findall(r"handrecon reproduce ([a-z0-9_]+)([^`\n#]*)", text))
    assert len(commands) > 8
    for system, options in commands:
        assert system in runs.SYSTEMS, system
        module = importlib.import_module(f"handrecon.{system}")
        for kind, known in (("profile", module.RECIPES), ("dataset", module.DATASETS)):
            for name in re.findall(rf"--{kind} (\w+)", options): assert name in known, f"{system}{options}"


def test_captions_are_the_words_before_the_picture():
    prose = "## A [part](x.ipynb)\n\nFirst.\n\nThe **mean** of $x$ in `code`."
    assert stage.caption(prose, "A part") == "A part: The mean of in code."

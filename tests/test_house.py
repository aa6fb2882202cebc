"""The order of the house: no lesson needs a later one, no private name crosses a room, and exported code is a lesson and not a listing."""
import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NUMBER = {}                 # module -> (number, letter)
for _path in LESSONS:
    _text = "\n".join(c.source for c in nbformat.read(_path, 4).cells if c.cell_type == "code")
    _number, _letter = re.match(r"(\d+)([a-z]?)_", _path.name).groups()
    NUMBER[re.search(r"#\| default_exp (\w+)", _text).group(1)] = (int(_number), _letter)

# Circles between files, and why each may stay: bodies of one lesson, of which the first calls the faster ones.
CIRCLES = {
    frozenset({"mano", "mano_files", "fast_hand", "cuda_hand"}): "the hand model calls its fast bodies, which are made from it",
    frozenset({"raster", "contour", "cuda_raster", "batch_contour"}): "the rasteriser calls its body for graphics cards",
}


def _imports(module):
    "(imported module, name) of a module of ours, wherever the import stands."
    tree = ast.parse((ROOT / f"handrecon/{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "handrecon"):
            inside = (node.module or "").removeprefix("handrecon").strip(".")
            for alias in node.names: yield (inside, alias.name) if inside else (alias.name, "")


def later_imports(numbers, imports):
    "(module, imported) where the second is of a later number."
    return sorted({(m, other) for m in numbers for other, _ in imports(m) if other in numbers and numbers[other][0] > numbers[m][0]})


def test_no_lesson_imports_a_later_one():
    assert later_imports(NUMBER, _imports) == []


def test_the_check_of_order_sees_a_later_import():
    assert later_imports({"a": (1, ""), "b": (2, ""), "c": (2, "b")}, lambda m: {"a": [("b", "x")], "b": [("c", "x")], "c": [("a", "x")]}[m]) == [("a", "b")]


def test_the_command_line_comes_last():
    assert max(NUMBER, key=NUMBER.get) == "cli"


def _circles():
    reach = {m: {o for o, _ in _imports(m) if o in NUMBER} for m in NUMBER}
    for k in NUMBER:
        for i in NUMBER:
            if k in reach[i]: reach[i] |= reach[k]
    return {frozenset(o for o in reach[m] if m in reach[o]) for m in NUMBER if m in reach[m]}


def test_circles_between_files_are_justified():
    for circle in _circles():
        assert any(circle <= known for known in CIRCLES), f"{sorted(circle)} import one another"
        assert len({NUMBER[m][0] for m in circle}) == 1 or circle <= frozenset().union(*CIRCLES), sorted(circle)


def test_private_names_do_not_cross_rooms():
    crossing = sorted({(m, other, name) for m in NUMBER for other, name in _imports(m) if name.startswith("_") and not name.startswith("__")})
    assert crossing == []


# ── lessons ─────────────────────────────────────────────────────────────────

LONGEST = 25           # lines of code of an export cell; kernels and classes excepted
WORDS_A_LINE = 6       # of prose, for each exported line
MOST = json.loads((ROOT / "tests/data/house_exceptions.json").read_text())   # module -> complaints it still has; a number may fall, never rise


def code_lines(source):
    "Lines that are neither empty, comment, magic nor docstring."
    tree = ast.parse(re.sub(r"^[!%].*$", "", source, flags=re.M))
    documented = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(n, clean=False) is not None]
    skip = {line for n in documented for line in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    return sum(1 for i, line in enumerate(source.splitlines(), 1) if i not in skip and line.strip() and not line.strip().startswith("#"))


def exports(cells):
    "(index, cell, statements) of the cells that define something for the library."
    for i, c in enumerate(cells):
        if c.cell_type != "code" or not c.source.startswith("#| export"): continue
        body = ast.parse(c.source).body
        if any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) or isinstance(n, (ast.Assign, ast.AnnAssign)) for n in body): yield i, c, body


def complaints(cells):
    "What a reader would mind about a lesson's export cells."
    found = []
    for i, c, body in exports(cells):
        functions = [n.name for n in body if isinstance(n, ast.FunctionDef)]
        public = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
        kernel = any(isinstance(n, ast.ClassDef) for n in body) or re.search(r"@(compiled|vectorized|kernel|numba|njit)", c.source)
        name = (public or functions or ["constants"])[0]
        if functions and not kernel and code_lines(c.source) > LONGEST: found.append(("long", name, code_lines(c.source)))
        if len(public) > 1: found.append(("two names", name, len(public)))
        proof = [k for k, other in enumerate(cells[i + 1:], 1) if other.cell_type == "code" and not other.source.startswith("#|")]
        if (public or functions) and (not proof or proof[0] > 2): found.append(("no proof within two cells", name, proof[0] if proof else 0))
    prose = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    exported = sum(code_lines(c.source) for _, c, _ in exports(cells))
    if exported and prose / exported < WORDS_A_LINE: found.append(("prose", "words a line", round(prose / exported, 1)))
    return found


@pytest.mark.parametrize("module", sorted(MOST))
def test_exported_code_is_a_lesson(module):
    "The lessons that were written or cut anew. Those that are not finished have a number of complaints that they must not exceed."
    path = next(p for p in LESSONS if p.stem.partition("_")[2] == module)
    found = complaints(nbformat.read(path, 4).cells)
    assert len(found) <= MOST[module], found


def test_the_check_of_lessons_sees_a_listing():
    cell = lambda kind, source: nbformat.from_dict({"cell_type": kind, "source": source})
    long = "#| export\ndef f(x):\n" + "    x = x + 1\n" * 30 + "    return x\n\n\ndef g(x): return x"
    words = {c[0] for c in complaints([cell("markdown", "Two words"), cell("code", long)])}
    assert words == {"long", "two names", "no proof within two cells", "prose"}
    short = [cell("markdown", "A line of code, and enough words about it that nobody minds."), cell("code", "#| export\ndef f(x): return x"), cell("code", "f(1)")]
    assert complaints(short) == []


# ── numbers ─────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def renumber():
    import importlib.util
    spec = importlib.util.spec_from_file_location("renumber", ROOT / "handbook/renumber.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_renumbering_changes_what_names_a_lesson_and_nothing_else(renumber):
    moves = {"18b_video": "42_video", "42_old": "18b_old"}
    text = "[lesson 18b](18b_video.ipynb), [18b. Video](../nbs/18b_video.md#x), `18b_video`, lesson 18b, 18b frames, lesson 42, 18b_videos; lessons 18b to 20"
    assert renumber.renumbered(text, moves) == (
        "[lesson 42](42_video.ipynb), [42. Video](../nbs/42_video.md#x), `42_video`, lesson 42, 18b frames, lesson 18b, 18b_videos; lessons 18b to 20")
    assert renumber.undecided(text, moves) == ["lessons 18b to 20"]


def test_renumbering_a_copy_leaves_a_house_that_exports_alike(renumber, tmp_path):
    import shutil
    import subprocess
    import sys
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in listed:
        if name and (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    subprocess.run("git init -q && git add -A", shell=True, cwd=tmp_path, check=True)
    files = next(p.stem for p in LESSONS if p.stem.endswith("_files"))
    renumber.main(tmp_path, {files: "99_files"})
    assert (tmp_path / "nbs/99_files.ipynb").exists() and not (tmp_path / f"nbs/{files}.ipynb").exists()
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True)
    same = (tmp_path / "handrecon/files.py").read_text().replace("99_files", files)
    assert same == (ROOT / "handrecon/files.py").read_text()
    assert "99_files" in (tmp_path / "README.md").read_text() and files not in (tmp_path / "README.md").read_text()
    with pytest.raises(SystemExit, match="no such lesson"): renumber.main(tmp_path, {files: "98_files"})
    with pytest.raises(SystemExit, match="taken"): renumber.main(tmp_path, {"99_files": "01_rotation"})


def test_every_lesson_stands_in_the_readme_once_and_in_order():
    rows = re.findall(r"^\| \[[^\]]*\]\(nbs/([0-9][^)]*)\.ipynb\)", (ROOT / "README.md").read_text(), flags=re.M)
    assert rows == [p.stem for p in LESSONS]

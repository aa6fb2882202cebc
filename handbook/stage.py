"""Lays out the book's source in _build/source, or in the folder given: pages, notebooks as prose with code, and everything that is generated."""
import re
import shutil
import sys
from pathlib import Path

import equations
import nbformat
import reference
import tables

from handrecon import protocols

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "handbook"


def caption(prose: str, heading: str) -> str:
    "What a picture shows, for somebody who cannot see it: the words that lead up to it."
    words = re.sub(r"<[^>]+>|\$\$?[^$]*\$\$?|[*_`#|]|\]\([^)]*\)|[\[\"\\]", "", prose.strip().split("\n\n")[-1])
    return f"{heading}: {' '.join(words.split())[:200]}".rstrip(": ")


def prose_with_code(notebook, name: str):
    "Without nbdev's own cells and marks; every picture says what it shows."
    heading, prose, cells = "", "", []
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in notebook.cells:
        if re.search(r"^#\|\s*(hide|default_exp)", cell.source, flags=re.M): continue
        if cell.cell_type == "markdown":
            prose = cell.source
            heading = ([heading] + re.findall(r"^#+ (.*)", prose, flags=re.M))[-1]
        else:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            alt = caption(prose, heading)
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
            for output in cell.outputs:
                if figure := output.get("data", {}).get("application/vnd.plotly.v1+json"):
                    output["data"] = {"text/html": tables.live(figure, alt)}
        cells.append(cell)
    first, picture = cells[0], f"explore_{Path(name).stem}.png"
    if number := re.match(r"\d\d[a-z]?(?=_)", name): first.source = re.sub(r"^# ", f"# {number[0]} ", first.source)
    if (BOOK / "pictures" / picture).exists(): first.source += f"\n\n![The page as it looks when it runs](../../pictures/{picture})"
    first.source += f'\n\n<div class="open-in-lab">Open in JupyterLab: <code>make lab</code> in a clone, then <code>{name}</code>.</div>'
    notebook.cells = cells
    return notebook


def stage(source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns("_build", "__pycache__", "results", "static", "*.py", "*.json"))
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        name = path.relative_to(ROOT / "nbs")
        if any(part.startswith(".") for part in name.parts): continue
        (source / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(prose_with_code(nbformat.read(path, 4), str(name)), source / "nbs" / name)
    tables.claims_page(source)
    written = reference.pages() | {"map.md": equations.page(), "protocols.md": protocols.protocols_page(), "deviations.md": protocols.deviations_page()} | tables.fragments()
    for name, text in written.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)


if __name__ == "__main__":
    stage(Path(sys.argv[1]) if len(sys.argv) > 1 else BOOK / "_build/source")

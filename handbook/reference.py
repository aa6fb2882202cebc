"""The API reference: every public name of the library, its signature as it stands in the source, and its docstring."""
import ast
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
DEFINITION = ast.FunctionDef | ast.ClassDef


def lessons() -> list[tuple[str, str, str, str]]:
    "(module, notebook, title, one-line description) in reading order."
    rows = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, 4)
        module = next((c.source.split("default_exp ")[1].split()[0] for c in notebook.cells if "#| default_exp " in c.source), "")
        head = notebook.cells[0].source.splitlines()
        rows.append((module, path.name, head[0].lstrip("# "), next((line[1:].strip() for line in head if line.startswith(">")), "")))
    return rows


def anchor(module: str, name: str) -> str:
    "Where a name is explained. Targets know no capitals, and a class may be named as a function is."
    return f"{'class.' if name[0].isupper() else ''}handrecon.{module}.{name}"


def signature(node: DEFINITION, lines: list[str]) -> str:
    "The lines before the body: names, shapes and the units in their comments."
    first = min([node.lineno] + [d.lineno for d in node.decorator_list])
    return "\n".join(line[node.col_offset:] for line in lines[first - 1:node.body[0].lineno - 1]) or lines[node.lineno - 1].strip()


def fields(node: ast.ClassDef, lines: list[str]) -> str:
    "The annotated fields of a class, with their comments."
    return "\n".join(line for field in node.body if isinstance(field, ast.AnnAssign) for line in lines[field.lineno - 1:field.end_lineno])


def entry(node: DEFINITION, lines: list[str], module: str, prefix: str = "", level: int = 2) -> list[str]:
    "A heading, a signature, a docstring; for a class its public methods too."
    code = signature(node, lines) + ("\n" + fields(node, lines) if isinstance(node, ast.ClassDef) and fields(node, lines) else "")
    heading = (prefix + node.name).replace("__", r"\_\_")
    text = [f"({anchor(module, prefix + node.name)})=", f"{'#' * level} {heading}", "```python\n" + code + "\n```", ast.get_docstring(node) or ""]
    if isinstance(node, ast.ClassDef):
        methods = {method.name: method for method in reversed(node.body) if isinstance(method, ast.FunctionDef)}   # of a property, its getter
        for name, method in reversed(methods.items()):
            if name in ("__init__", "forward") or not name.startswith("_"):
                text += entry(method, lines, module, f"{node.name}.", level + 1)
    return text


def constants(tree: ast.Module, lines: list[str]) -> str:
    "Public constants as they are written, long ones cut short."
    text = []
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name) or node.targets[0].id.startswith("_"): continue
        long = node.end_lineno > node.lineno + 5
        if long and isinstance(node.value, ast.Constant | ast.JoinedStr): text.append(f'{node.targets[0].id} = "…"')
        else: text += lines[node.lineno - 1:node.lineno + 4 if long else node.end_lineno] + ["    # …"] * long
    return "\n".join(text)


def page(module: str, notebook: str, title: str, about: str) -> str:
    source = (ROOT / "handrecon" / f"{module}.py").read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    public = [node for node in tree.body if isinstance(node, DEFINITION) and not node.name.startswith("_")]
    text = [f"# {module}", f"{about}. Built in [{title}](../nbs/{notebook})."]
    if values := constants(tree, lines): text += ["## Constants", f"```python\n{values}\n```"]
    return "\n\n".join(text + [part for node in public for part in entry(node, lines, module) if part]) + "\n"


def pages() -> dict[str, str]:
    "Name of a page -> its text."
    rows = [row for row in lessons() if row[0] and (ROOT / "handrecon" / f"{row[0]}.py").exists()]
    table = "\n".join(f"| [{m}]({m}.md) | {about} | [{title}](../nbs/{notebook}) |" for m, notebook, title, about in rows)
    listed = "\n".join(m for m, *_ in rows)
    index = ("# Reference\n\nEvery public name, with its shapes and units. `from handrecon.camera import project` is how each is imported; "
             "`import handrecon` alone is light.\n\n| module | what it is for | built in |\n|---|---|---|\n" + table +
             f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n")
    return {"api/index.md": index} | {f"api/{row[0]}.md": page(*row) for row in rows}

"""The map from the papers' equations to the code, read from the notebooks: a function that says "Eq. 6" in its cell is where Eq. 6 is."""
import ast
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
from reference import anchor

ROOT = Path(__file__).parent.parent

PAPERS = {  # paper -> title, how a notebook names it, the decades of lessons that mean it when they name none, its numbered equations
    "S²HAND": ("Chen et al., *Model-based 3D Hand Reconstruction via Self-Supervised Learning*, CVPR 2021",
               r"S²HAND(?!\(V\))", ("07", "11", "20"), {
        1: ("$E$", "the three parts of the objective"),
        2: ("$E_{3d}$", "geometric, photometric and statistical terms"),
        3: ("$E_{loc}$", "projected joints on detected joints"),
        4: ("$E_{ori}$", "projected bones along detected bones"),
        5: ("$E_{geo}$", "both of them, weighted"),
        6: ("$E_{pixel}$", "rendered colours are the picture's"),
        7: ("$E_{SSIM}$", "rendered structure is the picture's"),
        8: ("$E_{photo}$", "both of them, weighted"),
        9: ("$E_{regu}$", "shape, texture, scale and joint limits"),
        10: ("$E_{2d}$", "the 2D branch on detected joints"),
        11: ("$E_{con}$", "the 2D branch on projected joints"),
    }),
    "S²HAND(V)": ("Tu et al., *Consistent 3D Hand Reconstruction in Video via Self-Supervised Learning*, TPAMI 2023 (Eq. 1 to 11 are S²HAND's)",
                  r"S²HAND\(V\)|TPAMI", ("08", "21"), {
        12: ("$q$", "a rotation as a unit quaternion"),
        13: ("$q_t$", "from one orientation to another about one axis, at any speed $\\phi(t)$"),
        14: ("$\\mu q_0+\\varepsilon q_1$", "the same as a normalised combination"),
        15: ("$q_t$, $\\phi(t)=t$", "slerp: constant speed"),
        16: ("$\\eta$", "the angle between two quaternions as vectors"),
        17: ("$E_{quat}$", "the way through all frames is no longer than the direct way"),
        18: ("$H_i$", "pose and rotation of a frame as quaternions"),
        19: ("$\\gamma$", "rotation angle from the angle between quaternions"),
        20: ("$\\Re(q_1q_0^{-1})$", "why"),
        21: ("$E_{T\\&S}$", "texture and shape stay what they are"),
        22: ("$C^L$", "lit texture, in the zero pose"),
        23: ("$E_{S^2HAND(V)}$", "the whole objective"),
    }),
    "Binocular": ("Chen et al., *Self-supervised Transfer Learning for Hand Mesh Recovery from Binocular Images*, ICCV 2021",
                  r"[Bb]inocular|ICCV|Chen et al\. 2021b", ("09", "22"), {
        1: ("$z$", "depth from disparity"),
        2: ("$disp$", "disparity from rendered depth"),
        3: ("$L_{photo-cons}$", "one view warped into the other"),
        4: ("$SSIM$", "structural similarity of two pictures"),
        5: ("$L_{edge}$", "edges keep the length that the pre-trained network gave them"),
        6: ("$L_{lap}$", "a vertex lies amid its neighbours"),
        7: ("$L_{mask}$", "rendered outline on the mask"),
        8: ("$L_{chamfer}$", "both branches' vertices coincide"),
        9: ("$L_{normal}$", "one branch's edges are square to the other's normals"),
        10: ("$L_{total}$", "the whole objective"),
    }),
    "Multi-hand": ("Ren, Zhu and Zhang, *End-to-end Weakly-supervised Single-stage Multiple 3D Hand Mesh Reconstruction from a Single RGB Image*, 2022",
                   r"Ren\b|[Mm]ulti-hand|SMHR", ("10", "23"), {
        1: ("$\\mathcal L$", "where, what, and both agreeing"),
        2: ("$\\mathcal L_{loc}$", "centre map, left-right map, key-point maps"),
        3: ("$\\mathcal L_{cp}$", "focal loss of the centre map"),
        4: ("$M(\\beta,\\theta)$", "the hand model"),
        5: ("$V_P(\\beta,\\theta)$", "template plus shape and pose fields"),
        6: ("$K$, $T_i$", "camera and placement of a hand"),
        7: ("$\\mathcal L_{rec}$", "re-projection, photometric and regularising terms"),
        8: ("$\\mathcal L_{rep}$", "projected joints and bones"),
        9: ("$\\mathcal L_{pho}$", "rendered colours are the picture's"),
        10: ("$\\mathcal L_{reg}$", "pose and shape stay plausible"),
        11: ("$\\mathcal L_{con}$", "key-point maps agree with projected joints"),
    }),
}
OTHERS = re.compile(r"\b(?!Chen|Tu|Ren)[A-Z]\w+ et al\.[^.;)]{0,20}$")   # somebody else's equation follows
EQUATION = re.compile(r"\bEqs?\.? ?\(?(\d+)\)?((?:(?: ?[–-] ?|, | to | and |/)\(?\d+\b\)?)*)")


class Place(NamedTuple):
    paper: str
    number: int
    notebook: str   # file name without its ending
    module: str
    name: str       # public function or class; empty where prose alone names the equation


def numbers(first: str, rest: str) -> list[int]:
    "`3`, `3 and 5`, `3, 4` or `3–9`, as integers."
    found = [int(first)]
    for sign, number in re.findall(r"(–|-|,| to| and|/) ?\(?(\d+)", rest):
        found += range(found[-1] + 1, int(number) + 1) if sign in ("–", "-", " to") else [int(number)]
    return found


def mentioned(text: str, notebook: str) -> set[tuple[str, int]]:
    "(paper, number) of every equation that a text names; a sentence without a paper's name means the lesson's own paper."
    own = [paper for paper, (_, _, decades, _) in PAPERS.items() if notebook.startswith(decades)]
    found = set()
    for match in EQUATION.finditer(text):
        before, after = text[max(0, match.start() - 60):match.start()], text[match.end():match.end() + 30]
        if OTHERS.search(before): continue
        last = lambda pattern: max((m.end() for m in re.finditer(pattern, before)), default=0)
        named = sorted((p for p in PAPERS if last(PAPERS[p][1])), key=lambda p: -last(PAPERS[p][1]))   # the name before it, else after it
        named = named or [p for p in PAPERS if re.search(PAPERS[p][1], after)]
        for paper in (named or own)[:1]:
            found |= {(paper, n) for n in numbers(*match.groups()) if n in PAPERS[paper][3]}
    for numbered in re.findall(r"\\(?:tag\{|qquad ?\()([\d, ]+)[})]", text) if own else []:     # beside a displayed formula
        found |= {(own[0], int(n)) for n in numbered.split(",") if int(n) in PAPERS[own[0]][3]}
    return found


def places() -> list[Place]:
    "Every function whose cell names an equation, in reading order."
    found = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells, module = nbformat.read(path, 4).cells, ""
        for cell in cells:
            if match := re.search(r"#\| default_exp (\w+)", cell.source): module = match[1]
            if "#| export" not in cell.source:
                found += [Place(*m, path.stem, module, "") for m in sorted(mentioned(cell.source, path.stem)) if cell.cell_type == "markdown"]
                continue
            names = [n.name for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
            found += [Place(*m, path.stem, module, names[0]) for m in sorted(mentioned(cell.source, path.stem)) if names]
    return list(dict.fromkeys(found))


def page() -> str:
    "map.md"
    every = places()
    text = ["# From equation to code", "Each numbered equation of the four papers, what it is, the lesson that derives it and the function that computes it. "
            "This page is read from the notebooks: a function is listed where its own text names the equation. A dash means that no function does."]
    for paper, (title, _, _, equations) in PAPERS.items():
        rows = ["| Eq. | symbol | meaning | lesson | function |", "|---|---|---|---|---|"]
        for number, (symbol, meaning) in equations.items():
            here = [p for p in every if (p.paper, p.number) == (paper, number)]
            lessons = dict.fromkeys(f"[{p.notebook}](nbs/{p.notebook}.ipynb)" for p in here)
            functions = dict.fromkeys(f"[`{p.name}`](#{anchor(p.module, p.name)})" for p in here if p.name)
            rows.append(f"| {number} | {symbol} | {meaning} | {', '.join(lessons) or '–'} | {', '.join(functions) or '–'} |")
        text += [f"## {paper}", title + ".", "\n".join(rows)]
    return "\n\n".join(text) + "\n"

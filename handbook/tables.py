"""What pages include: made from the library and the records, so that it cannot disagree with them."""
import html
import json
from pathlib import Path

import nbformat

from handrecon import claims, conventions, ledger
from handrecon.proxy_hand import posture, proxy_hand
from handrecon.viz import plotly_mesh

ROOT = Path(__file__).parent.parent


def live(figure: dict, alt: str) -> str:
    "A plotly figure as a place that figures.js fills."
    data = json.dumps(figure, separators=(",", ":")).replace("</", "<\\/")
    return f'<div class="plotly-figure" role="img" aria-label="{html.escape(alt)}"><p>{html.escape(alt)}</p><script type="application/json">{data}</script></div>'


def table(head: list[str], rows: list[list]) -> str:
    "Markdown; a vertical bar in a cell does not end it."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def joint_orders() -> str:
    "Where each of our 21 joints is kept by others."
    names = ["ho3d", "s2hand-mano", "rhd", "stb", "interhand"]
    return table(["", "joint", *names], [[i, joint, *(conventions.JOINT_ORDERS[name][i] for name in names)] for i, joint in enumerate(conventions.JOINT_NAMES)])


def joint_limits() -> str:
    "Degrees, in MANO's local axes."
    ranges = zip(conventions.MANO_JOINT_NAMES[1:], conventions.JOINT_LIMITS_DEGREES)
    return table(["joint", "x", "y", "z"], [[name, *(f"{low} to {high}" for low, high in limits)] for name, limits in ranges])


def hand() -> str:
    "A hand that can be turned."
    model = proxy_hand()
    mesh = model(posture("point")[None])
    figure = plotly_mesh(mesh.vertices[0].round(decimals=4), model.faces, joints=mesh.joints[0])
    return live(json.loads(figure.update_layout(template=None).to_json()), "The proxy hand, pointing, with its skeleton inside; drag to turn it") + "\n"


def reproduction() -> str:
    "Each paper's comparisons: the paper's number, ours, and the command that made it."
    text = []
    rows = [(claim, ledger.ledger_row(claim, ROOT / "handbook/results")) for claim in ledger.all_claims()]
    for system in dict.fromkeys(claim.system for claim, _ in rows):
        lines = []
        for claim, row in rows:
            if claim.system != system: continue
            runs = {run.name: run for run in claim.runs}
            for label in dict.fromkeys([*claim.paper, *claim.ours]):
                mine = row["ours"].get(label)
                ours = f"{claims.Measured(dict(enumerate(mine['values'])))} ({len(mine['values'])})" if mine else "–"
                run = runs.get(claim.ours.get(label, "").partition(":")[0])
                lines.append([f"[{claim.id}](claims.md#{claim.id}), {claim.where}", label, claim.paper.get(label, "–"), ours, row["verdict"],
                              f"`{claims.command(claim, run, 0)}`" if run else "–"])
        text.append(f"### {ledger.PAPERS.get(system, system)}\n\n" + table(["claim", "quantity", "paper", "ours", "verdict", "command"], lines))
    return "\n".join(text) or "No system has claims yet.\n"


def claims_page(source: Path) -> None:
    "claims.md and its picture, from the records of this moment."
    rows = [ledger.ledger_row(claim, ROOT / "handbook/results") for claim in ledger.all_claims()]
    (source / "claims.md").write_text(ledger.page(rows))
    if ledger.drawn(rows): ledger.forest_plot(rows).savefig(source / ledger.PICTURE, dpi=90)


def explore() -> str:
    "The widget notebooks, each with its picture if there is one."
    text = []
    for path in sorted((ROOT / "nbs/explore").glob("*.ipynb")):
        head = nbformat.read(path, 4).cells[0].source.splitlines()
        title, about = head[0].lstrip("# "), next((line[1:].strip() for line in head if line.startswith(">")), "")
        text += [f"## [{title}](nbs/explore/{path.name})", about]
        if (ROOT / f"handbook/pictures/explore_{path.stem}.png").exists():
            text.append(f"![The widget {title}: {about}](pictures/explore_{path.stem}.png)")
    return "\n\n".join(text) + "\n"


def fragments() -> dict[str, str]:
    return {f"generated/{make.__name__}.md": make() for make in (joint_orders, joint_limits, hand, reproduction, explore)}

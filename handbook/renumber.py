"""Give lessons other numbers, everywhere at once: files, links, the words beside the links, tests, README and this book.

    python handbook/renumber.py 18_reconstruct=43_reconstruct 50_cli=50_cli        # then: nbdev_export

Only what names a lesson is changed: its file name, and its number in "lesson NN" or in the text of a link to it. What it cannot decide (ranges such
as "lessons 00 to 07") is printed, for a person to read. Nothing is written where a new name is taken or an old one is missing."""
import re
import subprocess
import sys
from pathlib import Path

TEXTS = ("*.ipynb", "*.md", "*.py", "*.ini", "*.toml", "*.cff", "Makefile")


def number(stem: str) -> str:
    "18b of 18b_video."
    return stem.partition("_")[0]


def renumbered(text: str, moves: dict[str, str]) -> str:
    "The same text with the new names; all at once, so that two lessons can swap their numbers."
    stems = "|".join(sorted(map(re.escape, moves), key=len, reverse=True))
    numbers = {number(old): number(new) for old, new in moves.items()}
    words = "|".join(sorted(map(re.escape, numbers), key=len, reverse=True))

    def new_name(m: re.Match) -> str:
        if m["stem"]: return moves[m["stem"]]
        if m["word"]: return m["before"] + numbers[m["word"]]
        old = m["target"]
        inside = re.sub(rf"(?<!\w){re.escape(number(old))}(?!\w)", number(moves[old]), m["inside"])
        return f"[{inside}]({m['folder']}{moves[old]}"

    return re.sub(rf"\[(?P<inside>[^\]\n]*)\]\((?P<folder>[^)\s]*?)(?P<target>{stems})(?!\w)"
                  rf"|(?<!\w)(?P<stem>{stems})(?!\w)"
                  rf"|(?P<before>\b[Ll]esson )(?P<word>{words})(?!\w)(?! (?:to|and) \d)", new_name, text)


def undecided(text: str, moves: dict[str, str]) -> list[str]:
    "Ranges and lists of lessons that a person must read."
    moved = {number(old) for old in moves}
    found = re.findall(r"\b[Ll]essons [0-9][0-9a-z]*(?:(?:, | and | to |–| or )[0-9][0-9a-z]*)+", text)
    return [phrase for phrase in found if moved & set(re.findall(r"[0-9]+[a-z]?", phrase))]


def main(root: Path, moves: dict[str, str]) -> list[str]:
    "Rename and rewrite; the phrases left for a person, with their files."
    for old, new in moves.items():
        if not (root / f"nbs/{old}.ipynb").exists(): raise SystemExit(f"nbs/{old}.ipynb: no such lesson")
        if (root / f"nbs/{new}.ipynb").exists() and new not in moves: raise SystemExit(f"nbs/{new}.ipynb: taken; give it another number in the same command")
    listed = subprocess.run(["git", "ls-files", "-z", *TEXTS], cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    doubts = []
    for path in (root / name for name in listed if name):
        if not path.exists(): continue
        before = path.read_text(encoding="utf-8")
        after = renumbered(before, moves)
        if after != before: path.write_text(after, encoding="utf-8")
        doubts += [f"{path.relative_to(root)}: {phrase}" for phrase in undecided(after, moves)]
    for old in moves: (root / f"nbs/{old}.ipynb").rename(root / f"nbs/{old}.ipynb.moving")
    for old, new in moves.items(): (root / f"nbs/{old}.ipynb.moving").rename(root / f"nbs/{new}.ipynb")
    return doubts


if __name__ == "__main__":
    if not sys.argv[1:] or any("=" not in word for word in sys.argv[1:]): raise SystemExit(__doc__)
    for doubt in main(Path(__file__).parent.parent, dict(word.split("=", 1) for word in sys.argv[1:])): print("read:", doubt)

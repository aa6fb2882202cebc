"""What the README shows must work as pasted."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_lesson_is_listed():
    missing = [p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb") if f"nbs/{p.name}" not in README]
    assert not missing, f"the README does not list {missing}"


def test_commands_exist():
    from typer.testing import CliRunner

    from handrecon.cli import app
    shown = CliRunner().invoke(app, ["--help"]).output
    for command in set(re.findall(r"^handrecon ([a-z-]+)", README, flags=re.M)):
        assert command in shown, f"the README shows `handrecon {command}`, which --help does not know"

"""The package as another project sees it: names at the top, types, a version."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import handrecon

ROOT = Path(__file__).parent.parent
PROGRAM = '''
from typing import assert_type

import torch
from torch import Tensor, nn

import handrecon
from handrecon import HandModel
from handrecon.camera import project
from handrecon.proxy_hand import proxy_hand

hand: HandModel = proxy_hand()
K = torch.tensor([[[500.0, 0, 112], [0, 500, 112], [0, 0, 1]]])
assert_type(project(hand(torch.zeros(1, 45)).joints, K), Tensor)
assert_type(handrecon.load("s2hand"), nn.Module)
assert_type(handrecon.__version__, str)
'''


def test_names_at_the_top_are_the_modules_own():
    from handrecon.camera import project
    from handrecon.mano import HandModel
    assert handrecon.HandModel is HandModel and handrecon.project is project and handrecon.viz.__name__ == "handrecon.viz"
    assert {"HandModel", "load", "viz", "fit"} <= set(dir(handrecon)) and all(hasattr(handrecon, name) for name in handrecon.__all__)
    with pytest.raises(AttributeError, match="no attribute 'hand_model'"): handrecon.hand_model


def test_a_small_program_passes_mypy(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", tmp_path / "cache", program], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "MYPYPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    program.write_text(PROGRAM + "assert_type(handrecon.__version__, int)\n")      # so it does look
    done = subprocess.run([sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", tmp_path / "cache", program], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "MYPYPATH": str(ROOT)})
    assert done.returncode == 1 and "assert_type" in done.stdout + done.stderr or "not \"int\"" in done.stdout


def test_the_version_is_told():
    done = subprocess.run([sys.executable, "-c", "from handrecon.cli import main; main()", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, handrecon.__version__), done.stderr

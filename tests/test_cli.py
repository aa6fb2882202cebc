"""The command line: quick, one sentence an error, right exit codes, nothing half written."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from handrecon import __version__, cli

COMMANDS = {"version", "reconstruct", "detect", "synth", "evaluate", "reproduce", "check-mano", "check-data", "bench", "export", "claims"}


def call(*arguments):
    answer = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return answer.exit_code, answer.stdout, answer.stderr


def fails(*arguments):
    code, out, err = call(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, (code, out, err)
    return err


def test_help_is_light_and_lists_what_works():
    code = "import sys, handrecon.cli as c; print([m for m in ('torch', 'cv2', 'numba', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    code, out, _ = call("--help")
    assert code == 0 and {line.split()[0] for line in out[out.index("Commands:"):].splitlines()[1:] if line.strip()} == COMMANDS
    for command in COMMANDS:
        assert call(command, "--help")[0] == 0
    assert call("version") == (0, f"{__version__}\n", "")


def test_usage_errors_end_with_2():
    for line in ((), ("nonsense",), ("reconstruct", "a.png"), ("reproduce",), ("synth", "--n", "0", "--out", "x"), ("evaluate",)):
        assert call(*line)[0] == 2


@pytest.fixture
def photo(tmp_path):
    from handrecon.camera import project
    from handrecon.keypoints import Detections, write_openpose
    from handrecon.proxy_hand import posture, proxy_hand
    from handrecon.reconstruct import guess_intrinsics
    from handrecon.viz import save_picture
    import torch
    save_picture(tmp_path / "photo.png", np.full((96, 128, 3), 90, np.uint8))
    mesh = proxy_hand()(posture("relaxed")[None], translation=torch.tensor([[-0.08, 0.0, 0.45]]))
    write_openpose(tmp_path / "det", Detections(["photo"], project(mesh.joints, guess_intrinsics(96, 128)[None]), torch.ones(1, 21), ["right"]))
    return tmp_path / "photo.png"


def test_reconstruct(photo, tmp_path, monkeypatch):
    from handrecon import hands as R
    fit = R.fit_to_detections
    monkeypatch.setattr(R, "fit_to_detections", lambda o, hand, init, config: fit(o, hand, init, type(config)(steps=40)))
    code, out, err = call("reconstruct", photo, "--detections", tmp_path / "det", "--out", tmp_path / "out", "--focal", 150)
    assert code == 0 and "1 hand" in out and "after" in out, err
    assert sorted(os.listdir(tmp_path / "out")) == ["hands.json", "photo.glb", "photo.npz", "photo.overlay.png"]
    assert json.loads((tmp_path / "out/hands.json").read_text())["hands"][0]["K"][0][0] == 150


def test_reconstruct_refuses_in_one_sentence(photo, tmp_path):
    out = ("--out", tmp_path / "out")
    det = ("--detections", tmp_path / "det")
    other = tmp_path / "other.safetensors"
    from torch import nn
    from handrecon.training import save_checkpoint
    save_checkpoint(other, nn.Linear(2, 2), {"system": "binocular"})
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    assert "no such file" in fails("reconstruct", tmp_path / "absent.png", *det, *out)
    assert "camera:97: no such camera" in fails("reconstruct", "camera:97", *out)
    assert "--frames" in fails("reconstruct", photo, "--frames", "3", *out)
    assert "--box" in fails("reconstruct", photo, "--box", "1,2,three,4", *out)
    assert "--box" in fails("reconstruct", photo, "--box", "1,2,nan,4", *out)
    assert "side" in fails("reconstruct", photo, "--side", "middle", *det, *out)
    assert "focal" in fails("reconstruct", photo, "--focal", "0", *det, *out)
    assert "binocular" in fails("reconstruct", photo, "--checkpoint", other, *out)
    assert "broken.safetensors" in fails("reconstruct", photo, "--checkpoint", tmp_path / "broken.safetensors", *out)
    assert "absent" in fails("reconstruct", photo, "--checkpoint", tmp_path / "absent", *out)
    assert not (tmp_path / "out").exists()


def test_reproduce_checks_before_it_runs(tmp_path):
    assert "s2hand" in fails("reproduce", "s2hnad")
    assert "profile" in fails("reproduce", "s2hand", "--profile", "smokey", "--out", tmp_path / "run")
    assert "steps" in fails("reproduce", "s2hand", "--profile", "smoke", "--set", "stepss=3", "--out", tmp_path / "run")
    assert "key=value" in fails("reproduce", "s2hand", "--set", "=3", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_reproduce_help_lists_systems_and_their_profiles():
    from handrecon.runs import SYSTEMS
    code, out, _ = call("reproduce", "--help")
    assert code == 0
    for system in SYSTEMS:
        assert any(line.split()[0] == system and "smoke" in line and "ledger" in out for line in out.splitlines() if line.strip()), system


def test_claims(tmp_path):
    code, out, err = call("claims", "--handbook", tmp_path)
    assert code == 0, err
    assert call("claims", "--handbook", tmp_path, "--check")[0] == 0
    rows = json.loads(call("claims", "--handbook", tmp_path, "--json")[1])
    assert [row["id"] for row in rows] == [line.split()[0] for line in out.splitlines() if line] and all(row["verdict"] in ("not run", "not comparable") for row in rows)
    assert "no claim is called 'tabel-2'" in fails("claims", "--run", "tabel-2", "--handbook", tmp_path)
    (tmp_path / "claims.md").write_text("edited by hand")
    assert "stale" in fails("claims", "--handbook", tmp_path, "--check")


def test_bench_data(tmp_path):
    assert call("synth", "--n", 2, "--out", tmp_path / "a")[0] == 0
    code, out, _ = call("bench", "data", "--root", tmp_path / "a")
    assert code == 0 and "decode, one thread" in out and "pictures a second" in out
    assert "bench expects mano, render, data, step, infer or hands, found 'disk'" in fails("bench", "disk")
    assert "--page needs --json" in fails("bench", "mano", "--page", tmp_path / "p.md")


def test_export(tmp_path, monkeypatch):
    assert "--format expects onnx, found 'tflite'" in fails("export", "--out", tmp_path / "x", "--format", "tflite")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'handrecon[export]'" in fails("export", "--out", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_synth_writes_layouts_that_check_data_accepts(tmp_path):
    assert call("synth", "--n", 3, "--seed", 5, "--out", tmp_path / "a")[0] == 0
    assert "another recipe" in fails("synth", "--n", 3, "--seed", 6, "--out", tmp_path / "a")
    assert "layout" in fails("synth", "--layout", "nonsense", "--n", 1, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    code, out, err = call("check-data", "freihand", tmp_path / "a", "--sheet", tmp_path / "sheet.png")
    assert code == 0 and "3 pictures" in out and (tmp_path / "sheet.png").stat().st_size > 1000, err
    (tmp_path / "a/training/rgb/00000001.jpg").unlink()
    code, _, err = call("check-data", "freihand", tmp_path / "a")
    assert code == 2 and "missing" in err and "Traceback" not in err
    assert "nyu" in fails("check-data", "nyu", tmp_path) and "no such folder" in fails("check-data", "freihand", tmp_path / "absent")


def test_check_mano(tmp_path):
    from mano_fixtures import fabricate
    np.savez(tmp_path / "MANO_RIGHT.npz", **fabricate())
    code, out, err = call("check-mano", tmp_path / "MANO_RIGHT.npz", "--picture", tmp_path / "hand.png")
    assert code == 0 and "778 vertices" in out and (tmp_path / "hand.png").exists(), err
    (tmp_path / "MANO_LEFT.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    fails("check-mano", tmp_path / "MANO_LEFT.pkl")
    fails("check-mano", tmp_path / "absent.pkl")
    fails("check-mano", tmp_path / "MANO_RIGHT.npz", "--side", "up")


def test_evaluate_agrees_with_the_library(tmp_path):
    from handrecon.metrics import evaluate_hands, format_report
    random = np.random.default_rng(0)
    xyz = random.normal(0, 0.05, (4, 21, 3)) + [0, 0, 0.6]
    verts = random.normal(0, 0.05, (4, 778, 3)) + [0, 0, 0.6]
    guess = xyz + random.normal(0, 0.004, xyz.shape), verts + random.normal(0, 0.004, verts.shape)
    (tmp_path / "evaluation_xyz.json").write_text(json.dumps(xyz.tolist()))
    (tmp_path / "evaluation_verts.json").write_text(json.dumps(verts.tolist()))
    (tmp_path / "pred.json").write_text(json.dumps([x.tolist() for x in guess]))
    code, out, err = call("evaluate", "--dataset", "freihand", "--gt", tmp_path, "--pred", tmp_path / "pred.json", "--json", tmp_path / "scores.json")
    scores = evaluate_hands(xyz, verts, *guess)
    assert code == 0 and out == format_report(scores) + "\n" and "Warning" in err and "3,960" in err
    assert json.loads((tmp_path / "scores.json").read_text()) == pytest.approx(scores, rel=1e-12)
    assert "freihand or ho3d" in fails("evaluate", "--dataset", "stb", "--gt", tmp_path, "--pred", tmp_path / "pred.json")
    assert "absent.json" in fails("evaluate", "--dataset", "freihand", "--gt", tmp_path, "--pred", tmp_path / "absent.json")


@pytest.mark.parametrize("error, code", [
    (ValueError("two\nlines"), 2), (FileNotFoundError(2, "No such file", "a.png"), 2), (ImportError("pip install"), 2),
    (KeyboardInterrupt(), 130), (RuntimeError("oops"), 1), (KeyError("k"), 1), (ZeroDivisionError(), 1)])
def test_every_failure_is_a_sentence(monkeypatch, error, code):
    def command():
        raise error
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    cli.app.command("fail")(cli.guarded(command))
    found, out, err = call("fail")
    assert found == code and out == "" and err.count("\n") == 1 and "Traceback" not in err
    answer = CliRunner().invoke(cli.app, ["--debug", "fail"])
    assert answer.exception is error or code == 130


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing(tmp_path, photo, number, code):
    "Stop the program while its results are half written."
    script = ("import sys, time, handrecon.hands as h, handrecon.reconstruct as r; from handrecon import cli\n"
              "fit = h.fit_to_detections; h.fit_to_detections = lambda o, h, i, c: fit(o, h, i, type(c)(steps=3))\n"
              "def slow(*a): print('writing', flush=True); time.sleep(60)\n"
              f"r.write_glb = slow; sys.argv = ['handrecon', 'reconstruct', r'{photo}', '--detections', r'{tmp_path}/det', '--out', r'{tmp_path}/out']\n"
              "cli.main()")
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)   # a background job is started deaf to Ctrl-C
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        assert process.stdout.readline() == "writing\n"
        assert any(name.startswith(".unfinished-") for name in os.listdir(tmp_path / "out"))
        time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert not (tmp_path / "out").exists()

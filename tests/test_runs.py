"""A run is its settings: names are checked, values are typed, folders are not mixed up, notebooks travel along."""
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

import handrecon
from handrecon import runs
from handrecon.runs import RunError, claim_folder, config_hash, describe, nearest, override, parse_value, reproduce, resolve, run_notebook, settings

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    steps: int = 5
    span: tuple = (1, 2)


@dataclass(frozen=True)
class Other:
    steps: int = 1


@dataclass(frozen=True)
class Outer:
    n: int = 3
    flag: bool = False
    name: str = "a"
    inner: Inner = Inner()


@dataclass(frozen=True)
class Twice:
    a: Inner = Inner()
    b: Other = Other()


def test_settings_are_dotted():
    assert list(settings(Outer())) == ["n", "flag", "name", "inner.lr", "inner.steps", "inner.span"]


@pytest.mark.parametrize("key,text,path,value", [
    ("lr", "0.5", "inner.lr", 0.5), ("inner.lr", "2", "inner.lr", 2.0), ("steps", 7, "inner.steps", 7), ("flag", "True", "flag", True),
    ("flag", "false", "flag", False), ("name", "5", "name", "5"), ("span", "[3, 4]", "inner.span", (3, 4)), ("n", "-1", "n", -1)])
def test_override_reads_text_as_the_default_s_type(key, text, path, value):
    changed = settings(override(Outer(), {key: text}))
    assert changed[path] == value and type(changed[path]) is type(value)
    assert {k: v for k, v in changed.items() if k != path} == {k: v for k, v in settings(Outer()).items() if k != path}


@pytest.mark.parametrize("changes,message", [
    ({"stpes": 1}, "did you mean 'inner.steps'?"), ({"inner.lrr": 1}, "did you mean 'inner.lr'?"), ({"zzz": 1}, "known: flag"),
    ({"n": "2.5"}, "'n' takes a int (now 3), got '2.5'"), ({"flag": "1"}, "takes a bool"), ({"lr": "fast"}, "takes a float")])
def test_override_says_what_is_wrong(changes, message):
    with pytest.raises(RunError) as problem: override(Outer(), changes)
    assert message in str(problem.value) and "\n" not in str(problem.value)


def test_a_name_in_two_places_must_be_spelt_out():
    with pytest.raises(RunError, match="ambiguous: write one of a.steps, b.steps"): override(Twice(), {"steps": 2})
    assert override(Twice(), {"b.steps": 2}).b.steps == 2


@given(st.integers(-10**9, 10**9), st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_values_survive_the_command_line(n, x, s):
    assert parse_value(str(n), 0, "n") == n
    assert parse_value(repr(x), 0.0, "x") == x
    assert parse_value(s, "", "s") == s


@given(st.dictionaries(st.text(max_size=5), st.integers(), min_size=1))
def test_hash_ignores_order_and_sees_values(config):
    assert config_hash(config) == config_hash(dict(reversed(config.items())))
    key = next(iter(config))
    assert config_hash(config) != config_hash(config | {key: config[key] + 1})


def test_nearest_hints():
    assert nearest("smoek", ["smoke", "quick"]) == "did you mean 'smoke'?"
    assert nearest("xyz", ["smoke", "quick"]) == "known: quick, smoke"


def test_folder_of_another_run_is_refused(tmp_path):
    mine, other = ({"seed": s} | {"hash": config_hash({"seed": s})} for s in (0, 1))
    claim_folder(tmp_path / "run", mine, resume=False)
    claim_folder(tmp_path / "run", mine, resume=True)
    with pytest.raises(RunError, match="begun with other settings"): claim_folder(tmp_path / "run", other, resume=True)
    assert json.loads((tmp_path / "run/config.json").read_text()) == mine


@pytest.mark.parametrize("arguments,message", [
    (dict(system="s2hnad"), "did you mean 's2hand'?"), (dict(profile="smok"), "did you mean 'smoke'?"),
    (dict(overrides={"w_jj": 1}), "did you mean 'model.w_J'?"), (dict(dataset="freihnad"), "did you mean 'freihand'?")])
def test_reproduce_stops_before_it_begins(tmp_path, arguments, message):
    with pytest.raises(RunError) as problem: reproduce(**arguments, out=tmp_path / "run")
    assert message in str(problem.value)
    assert not (tmp_path / "run").exists()


def test_packaged_notebooks_are_the_notebooks():
    for system in runs.SYSTEMS:
        source = ROOT / "nbs/reproduce" / f"{system}.ipynb"
        assert run_notebook(system).read_bytes() == source.read_bytes(), f"copy {source.name} to handrecon/notebooks/"
        notebook = nbformat.read(source, 4)
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
        assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("system", runs.SYSTEMS)
def test_every_profile_of_every_system_resolves(system):
    import importlib
    module = importlib.import_module(f"handrecon.{system}")
    assert {"smoke", "ledger"} <= set(module.RECIPES) and "synthetic" in module.DATASETS
    hashes = set()
    for profile in module.RECIPES:
        recipe = resolve(system, profile, {})
        config = describe(system, profile, "synthetic", 0, recipe)
        assert config == json.loads(json.dumps(config)) and config["hash"] == describe(system, profile, "synthetic", 0, recipe)["hash"]
        hashes |= {config["hash"], describe(system, profile, "synthetic", 1, recipe)["hash"]}
    assert len(hashes) == 2 * len(module.RECIPES)


def test_the_papers_weights_are_the_defaults():
    assert describe("s2hand", "paper", "freihand", 0, resolve("s2hand", "paper", {}))["settings"]["model"]["w_ori"] == 100.0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smoke"
    return out, reproduce("s2hand", "smoke", out=out, seed=3)


def test_smoke_run_leaves_everything(smoke):
    out, record = smoke
    for name in ("report.ipynb", "report.html", "metrics.json", "config.json", "checkpoint.safetensors", "record.json"):
        assert (out / name).stat().st_size > 100, name
    assert list((out / "figures").glob("*.png"))
    assert record == json.loads((out / "record.json").read_text())
    assert set(record) >= {"code", "torch", "numba", "python"} and record["code"] == json.loads((out / "code.json").read_text())["code"]
    assert record["seed"] == 3 and record["version"] == handrecon.__version__ and record["seconds"] < 120
    for who in ("self-supervised", "supervised", "mean pose"):
        assert 0 < record["metrics"][who]["PA-MPJPE"] < 100


def test_killed_run_resumes_to_the_same_numbers(smoke, tmp_path):
    command = "from handrecon.runs import reproduce; reproduce('s2hand', 'smoke', out='run', seed=3, resume=True)"
    process = subprocess.Popen([sys.executable, "-c", command], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.time()
    while not list(tmp_path.glob("run/self-supervised/*.safetensors")) and process.poll() is None and time.time() - began < 120: time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "run/metrics.json").exists(), "the run ended before it could be killed"
    time.sleep(2)  # the kernel notices that its parent is gone
    record = reproduce("s2hand", "smoke", out=tmp_path / "run", seed=3, resume=True)
    for who in ("self-supervised", "supervised"):
        assert record["metrics"][who]["PA-MPJPE"] == pytest.approx(smoke[1]["metrics"][who]["PA-MPJPE"], rel=1e-3)


def test_finished_run_is_left_alone_until_something_changes(smoke, tmp_path, monkeypatch):
    out, record = smoke
    executed = []
    monkeypatch.setattr(runs, "_execute", lambda *a: executed.append(a))
    monkeypatch.setattr(runs, "code_version", lambda: {"code": record["code"]})   # whatever else is being edited meanwhile
    again = lambda: reproduce("s2hand", "smoke", out=out, seed=3, resume=True)
    before = {path: path.stat().st_mtime_ns for path in runs.results(out)}
    assert again() == record and not executed
    assert before == {path: path.stat().st_mtime_ns for path in runs.results(out)}
    config = describe("s2hand", "smoke", "synthetic", 3, resolve("s2hand", "smoke", {}))
    assert runs.finished(out, config, "") == record
    assert runs.finished(out, config, "elsewhere") is None
    assert runs.finished(out, config | {"hash": "0"}, "") is None
    figure = next((out / "figures").iterdir())
    kept = figure.read_bytes()
    figure.write_bytes(kept + b" ")
    assert runs.finished(out, config, "") is None
    figure.write_bytes(kept)
    monkeypatch.setattr(runs, "code_version", lambda: {"code": "other"})
    assert runs.finished(out, config, "") is None


def test_code_version_sees_every_source(tmp_path, monkeypatch):
    package = tmp_path / "handrecon"
    (package / "notebooks").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "notebooks/s2hand.ipynb").write_text("{}")
    monkeypatch.setattr(handrecon, "__file__", str(package / "__init__.py"))
    before = runs.code_version()
    assert before["commit"] is None
    for path in (package / "__init__.py", package / "notebooks/s2hand.ipynb", package / "new.py"):
        path.write_text("changed")
        assert runs.code_version()["code"] != before["code"]
        before = runs.code_version()


def test_a_process_that_dies_is_one_sentence(tmp_path, monkeypatch):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("out = ''", metadata={"tags": ["parameters"]}),
                                               nbformat.v4.new_code_cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")])
    notebook.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(notebook, tmp_path / "dies.ipynb")
    monkeypatch.setattr(runs, "run_notebook", lambda system: tmp_path / "dies.ipynb")
    with pytest.raises(RunError, match="the run's process died") as problem: reproduce("s2hand", "smoke", out=tmp_path / "run")
    assert "\n" not in str(problem.value) and not (tmp_path / "run/record.json").exists()


def test_another_kernel_of_the_same_name_does_not_shadow(tmp_path, monkeypatch):
    spec = tmp_path / "kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    cell = nbformat.v4.new_code_cell("import sys, pathlib, handrecon\npathlib.Path(out, 'who.txt').write_text(sys.executable + '\\n' + handrecon.__file__)")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("out = ''", metadata={"tags": ["parameters"]}), cell])
    notebook.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(notebook, tmp_path / "who.ipynb")
    runs._execute(tmp_path / "who.ipynb", tmp_path, {"out": str(tmp_path)})
    assert (tmp_path / "who.txt").read_text().splitlines() == [sys.executable, handrecon.__file__]


@pytest.mark.parametrize("change, words", [
    ({"datset": "freihand"}, "no parameter is called 'datset': did you mean 'dataset'?"), ({"dataset": "freihnad"}, "did you mean 'freihand'?"), ({"profile": "smoek"}, "did you mean 'smoke'?")])
@pytest.mark.parametrize("system", runs.SYSTEMS[:1])
def test_papermill_alone_refuses_wrong_parameters(tmp_path, system, change, words):
    import papermill
    from papermill.exceptions import PapermillExecutionError
    with runs.own_kernel() as kernel, pytest.raises(PapermillExecutionError) as problem:
        papermill.execute_notebook(run_notebook(system), tmp_path / "report.ipynb", {"out": str(tmp_path / "run")} | change, kernel_name=kernel, progress_bar=False)
    assert words in problem.value.evalue and not (tmp_path / "run").exists()


def test_a_record_of_other_code_is_refused(tmp_path):
    (tmp_path / "code.json").write_text(json.dumps({"code": "other", "version": "9"}))
    with pytest.raises(RunError, match="ran other code than it was begun by.*found other") as problem: runs.check_code(tmp_path, runs.code_version())
    assert str(tmp_path) in str(problem.value) and "\n" not in str(problem.value)


def test_failure_in_the_notebook_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="no folder") as problem:
        reproduce("s2hand", "smoke", dataset="freihand", data_root=tmp_path / "absent", out=tmp_path / "run")
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("system", runs.SYSTEMS)
def test_every_setting_arrives_as_it_left(system):
    "Through JSON and through papermill's parameters cell, for every field of every profile: same value, same type."
    import importlib

    from papermill.translators import PythonTranslator
    for profile, recipe in importlib.import_module(f"handrecon.{system}").RECIPES.items():
        sent = settings(recipe)
        namespace = {}
        exec(PythonTranslator.codify({"overrides": runs.plain(sent)}), namespace)
        for changes in (json.loads(json.dumps(sent)), namespace["overrides"]):
            arrived = override(recipe, changes)
            assert arrived == recipe, profile
            assert {name: type(value) for name, value in settings(arrived).items()} == {name: type(value) for name, value in sent.items()}, profile


def test_numbers_of_numpy_and_paths_are_made_plain():
    import numpy as np
    sent = {"a": np.float32(0.5), "b": (np.int64(3), Path("x")), "c": np.array([True]), "d": np.float64(0.25)}
    arrived = runs.plain(sent)
    assert arrived == {"a": 0.5, "b": [3, "x"], "c": [True], "d": 0.25} and type(arrived["d"]) is float
    with pytest.raises(RunError, match="cannot be a object"): runs.plain({"a": object()})

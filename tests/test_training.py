"""The loop: determined, resumable to the bit, honest; the files it writes and refuses."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import handrecon.training as training
from handrecon.conventions import Observation
from handrecon.training import (ArrayBatches, TrainConfig, TrainingDiverged, batch_seed, fit, learning_rate, load_checkpoint, load_weights,
                                map_tensors, read_history, save_checkpoint)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "These networks are too small to share between cores."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


torch.manual_seed(0)
POINTS = torch.randn(96, 3)
TARGETS = POINTS[:, :1] - 2 * POINTS[:, 1:2]
BASE = TrainConfig(steps=12, batch_size=8, lr=1e-2, save_every=5, log_every=4, device="cpu")


def net(norm=False, dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def terms(model, batch):
    return {"fit": (model(batch[0]) - batch[1]).square().mean(), "size": 1e-4 * sum(p.square().sum() for p in model.parameters())}


def data(n=8, seed=0):
    return ArrayBatches((POINTS, TARGETS), n, seed)


def run(config=BASE, out=None, model=None, batches=None, loss=terms, **more):
    model = model or net()
    return fit(model, loss, batches or data(config.micro_batch), config, out, progress=False, **more), model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---------------------------------------------------------------- configuration and schedule

@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("steps", 1.5), ("steps", True), ("batch_size", -1), ("lr", 0.0), ("lr", float("inf")), ("lr", "fast"), ("schedule", "linear"),
    ("milestones", (0.5, 0.2)), ("milestones", (1.2,)), ("milestones", 0.5), ("factor", 0.0), ("factor", 2.0), ("warmup", -1), ("clip", 0.0),
    ("accumulate", 0), ("ema", 1.0), ("seed", -1), ("precision", "fp8"), ("device", "toaster"), ("device", "mps"), ("prefetch", -1),
    ("log_every", 0), ("save_every", 0)])
def test_bad_values_are_one_sentence_naming_the_field(field, value):
    config = object.__new__(TrainConfig)  # the shape checks of the tests would refuse the wrong types first
    for name, default in TrainConfig().__dict__.items():
        object.__setattr__(config, name, default)
    object.__setattr__(config, field, value)
    with pytest.raises(ValueError, match=rf"^TrainConfig\.{field}: expected .*, found ") as error:
        config.__post_init__()
    assert "\n" not in str(error.value)


def test_batch_must_divide():
    with pytest.raises(ValueError, match="multiple of accumulate × processes = 3 × 1, found 64"):
        TrainConfig(accumulate=3)
    assert TrainConfig(accumulate=4).micro_batch == 16


def test_paper_schedule():
    c = TrainConfig(steps=90)
    assert [learning_rate(t, c) for t in (0, 29, 30, 59, 60, 89)] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    fine = TrainConfig(steps=60, lr=2.5e-4, factor=1 / 3)
    assert learning_rate(45, fine) == pytest.approx(2.5e-4 / 9)


@given(st.integers(1, 500), st.sampled_from(["step", "cosine", "constant"]), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_rate_rises_then_falls_and_stays_positive(steps, schedule, warmup):
    c = TrainConfig(steps=steps, schedule=schedule, warmup=warmup)
    rates = [learning_rate(t, c) for t in range(steps)]
    assert all(0 < r <= c.lr for r in rates)
    after = rates[warmup:]
    assert all(a >= b for a, b in zip(after, after[1:]))


# ---------------------------------------------------------------- data

@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_every_epoch_is_a_permutation(n, size, seed):
    if size > n:
        with pytest.raises(ValueError, match="common length"):
            ArrayBatches(torch.arange(n), size, seed)
        return
    b = ArrayBatches(torch.arange(n), size, seed)
    epoch = torch.cat([b.batch_at(3 * b.per_epoch + i) for i in range(b.per_epoch)])
    assert len(set(epoch.tolist())) == len(epoch) == n // size * size
    assert torch.equal(b.batch_at(5), ArrayBatches(torch.arange(n), size, seed).batch_at(5))


def test_arrays_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"found lengths \[3, 4\]"):
        ArrayBatches((torch.zeros(3), torch.zeros(4)), 2)


class Pair(NamedTuple):
    a: torch.Tensor
    b: dict


def test_map_walks_every_kind_of_batch():
    o = Observation(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 3), torch.zeros(2, 21, 2), torch.zeros(2, 21))
    tree = Pair(torch.zeros(2), {"o": o, "l": [torch.zeros(2), "word", None]})
    out = map_tensors(tree, lambda t: t + 1)
    assert isinstance(out, Pair) and isinstance(out.b["o"], Observation) and out.b["l"][1:] == ["word", None]
    assert out.a.sum() == 2 and out.b["o"].K.sum() == 18 and out.b["l"][0].sum() == 2 and tree.a.sum() == 0


def test_seeds_do_not_collide():
    seeds = {batch_seed(s, i) for s in range(20) for i in range(200)}
    assert len(seeds) == 4000 and all(0 <= s < 2**63 for s in seeds)


def test_wrong_batch_size_and_wrong_terms_are_named():
    with pytest.raises(ValueError, match=r"= 8 samples, found lengths \[4\]"):
        run(batches=data(4))
    with pytest.raises(ValueError, match=r"expected scalars, found 'fit' of shape \(8, 1\)"):
        run(loss=lambda m, b: {"fit": m(b[0])})


# ---------------------------------------------------------------- the loop

def test_it_learns_and_logs_each_term():
    seen = []
    history, model = run(replace(BASE, steps=200), on_log=lambda done, means: seen.append((done, means["fit"])))
    assert history["fit"][-20:].mean() < 0.5 * history["fit"][:20].mean()
    assert np.allclose(history["total"], history["fit"] + history["size"], atol=1e-6)
    assert len(history) == 200 and history.names == ["step", "seconds", "lr", "total", "fit", "size", "grad_norm"]
    assert [d for d, _ in seen] == list(range(4, 201, 4)) and not model.training
    assert seen[2][1] == pytest.approx(history["fit"][8:12].mean())


def test_first_step_is_adam_by_hand():
    config = replace(BASE, steps=1, lr=0.1)
    model, before = net(), net()
    run(config, model=model)
    total = sum(terms(before, data().batch_at(0)).values())
    total.backward()
    for p, q in zip(before.parameters(), model.parameters()):  # after bias correction the first step is lr·g/(|g| + eps)
        assert torch.allclose(q, p - 0.1 * p.grad / (p.grad.abs() + 1e-8), atol=1e-6)


def test_same_seed_same_run_other_seed_other_run_and_the_caller_s_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = net(dropout=0.3)
    torch.manual_seed(5)
    first, _ = run(model=model)
    assert torch.rand(1) == expected
    assert (first["total"] == run(model=net(dropout=0.3))[0]["total"]).all()
    assert (first["total"] != run(replace(BASE, seed=1), model=net(dropout=0.3))[0]["total"]).any()


@pytest.mark.parametrize("prefetch", [1, 3, 50])
def test_prefetch_changes_nothing(prefetch):
    assert (run()[0]["total"] == run(replace(BASE, prefetch=prefetch))[0]["total"]).all()


def test_a_failing_source_is_reported_through_the_thread():
    def broken(index):
        if index == 5:
            raise OSError("disk on fire")
        return data().batch_at(index)
    with pytest.raises(OSError, match="disk on fire"):
        run(replace(BASE, prefetch=2), batches=broken)


def test_accumulation_equals_the_big_batch_without_batch_norm_only():
    big, small = run(replace(BASE, steps=20)), run(replace(BASE, steps=20, accumulate=4))
    assert np.allclose(big[0]["total"], small[0]["total"], rtol=1e-4)
    big, small = run(replace(BASE, steps=20), model=net(norm=True)), run(replace(BASE, steps=20, accumulate=4), model=net(norm=True))
    assert not np.allclose(big[0]["total"], small[0]["total"], rtol=1e-2)


def test_clip_limits_the_first_update():
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    history, _ = run(replace(BASE, steps=1, clip=1e-9), model=model)
    moved = max((a - b).abs().max().item() for a, b in zip(start, model.parameters()))
    assert history["grad_norm"][0] > 1e-3 and moved < 0.5 * BASE.lr  # Adam's eps = 1e-8 now outweighs the gradient


def test_average_is_the_recursion():
    values = []
    def loss(model, batch):
        values.append(model[0].weight.detach().clone())
        return terms(model, batch)
    _, model = run(replace(BASE, ema=0.5), loss=loss)
    _, plain = run(replace(BASE))
    after = values[1:] + [plain[0].weight.detach()]
    mean = values[0]
    for step, w in enumerate(after):
        d = min(0.5, (1 + step) / (10 + step))
        mean = d * mean + (1 - d) * w
    assert torch.allclose(model[0].weight, mean, atol=1e-6) and not torch.allclose(model[0].weight, plain[0].weight, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns(precision):
    history, model = run(replace(BASE, steps=150, precision=precision))
    assert history["fit"][-20:].mean() < 0.6 * history["fit"][:20].mean()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (history["total"] != run(replace(BASE, steps=150))[0]["total"]).any()  # it was really 16 bits


def test_no_cuda_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        run(replace(BASE, device="cuda"))


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, {"accumulate": 2, "prefetch": 2}, {"precision": "float16"}])
def test_resume_is_exact(tmp_path, more):
    class Stop(Exception): pass
    config = replace(BASE, **more)
    whole, model = run(config, model=net(True, 0.3))
    def batches(index):
        if index == 8 * config.accumulate:
            raise Stop
        return data(config.micro_batch).batch_at(index)
    with pytest.raises(Stop):
        run(config, tmp_path, net(True, 0.3), batches)
    resumed, again = run(replace(config, log_every=3, save_every=4), tmp_path, net(True, 0.3), resume=True)
    assert (resumed["total"] == whole["total"]).all() and same(model, again)
    assert (read_history(tmp_path / "train.csv")["total"] == whole["total"]).all()


SCRIPT = """
import os, signal, sys
from dataclasses import dataclass
import torch
from torch import nn
from handrecon.training import ArrayBatches, TrainConfig, fit, save_checkpoint
@dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    y: torch.Tensor
out, kill_at, batch_norm, politely = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "bn", sys.argv[3] == "politely"
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32) if batch_norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.3 * batch_norm), nn.Linear(32, 1))
points = torch.randn(200, 2)
config = TrainConfig(steps=30, batch_size=20, ema=0.9, log_every=1000 if politely else 5, save_every=1000 if politely else 7, device="cpu")
data = ArrayBatches(Batch(points, points.prod(1, keepdim=True)), config.micro_batch)
def batch_at(index):
    if index == kill_at:
        os.kill(os.getpid(), signal.SIGTERM if politely else signal.SIGKILL)
    return data.batch_at(index)
fit(model, lambda m, b: {"fit": (m(b.x) - b.y).square().mean()}, batch_at, config, out, resume=True, progress=False)
if os.environ.get("RANK", "0") == "0":
    save_checkpoint(out + "/final.safetensors", model, {"system": "toy"})
"""


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def _script(out, kill_at=-1, kind="bn", launcher=()):
    return subprocess.run([sys.executable, *launcher, *(("-c", SCRIPT) if not launcher else (str(out.parent / "script.py"),)), str(out), str(kill_at), kind],
                          capture_output=True, text=True, timeout=300)


def test_sigkill_and_resume_give_the_bits_of_an_undisturbed_run(tmp_path):
    assert _script(tmp_path / "killed", 23).returncode == -signal.SIGKILL
    assert len(read_history(tmp_path / "killed/train.csv")) >= 20 and not (tmp_path / "killed/final.safetensors").exists()
    for folder in ("killed", "peaceful"):
        done = _script(tmp_path / folder)
        assert done.returncode == 0, done.stderr
    a, b = (read_history(tmp_path / f / "train.csv") for f in ("killed", "peaceful"))
    assert len(a) == 30 and (a["total"] == b["total"]).all()
    a, b = (load_checkpoint(tmp_path / f / "final.safetensors").weights for f in ("killed", "peaceful"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not [p for p in (tmp_path / "killed").iterdir() if p.name.startswith(".")]


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    pytest.importorskip("lightning_fabric")
    (tmp_path / "script.py").write_text(SCRIPT)
    two = _script(tmp_path / "two", kind="plain", launcher=TWO_PROCESSES)
    assert two.returncode == 0, two.stderr[-3000:]
    assert _script(tmp_path / "one", kind="plain").returncode == 0
    a, b = (read_history(tmp_path / f / "train.csv") for f in ("two", "one"))
    for name in ("total", "fit"):
        assert np.allclose(a[name], b[name], rtol=1e-4)
    assert np.allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
    a, b = (load_checkpoint(tmp_path / f / "final.safetensors").weights for f in ("two", "one"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_two_processes_stop_together_when_one_is_asked_to(tmp_path):
    pytest.importorskip("lightning_fabric")
    (tmp_path / "script.py").write_text(SCRIPT)
    stopped = _script(tmp_path / "two", 24, "politely", TWO_PROCESSES)                       # the first process's 13th batch; nothing would be logged or saved before the end
    assert stopped.returncode != 0 and "stopped after 15 steps" in stopped.stderr, stopped.stderr[-3000:]
    assert len(read_history(tmp_path / "two/train.csv")) == 15 and not (tmp_path / "two/final.safetensors").exists()
    assert _script(tmp_path / "two", kind="politely", launcher=TWO_PROCESSES).returncode == 0
    assert _script(tmp_path / "one", kind="politely").returncode == 0
    a, b = (load_checkpoint(tmp_path / f / "final.safetensors").weights for f in ("two", "one"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_resume_of_another_run_is_refused(tmp_path):
    run(BASE, tmp_path)
    with pytest.raises(ValueError, match=r"expected lr = 0.01 as the run began, found 0.5"):
        run(replace(BASE, lr=0.5), tmp_path, resume=True)
    with pytest.raises(ValueError, match="of shape"):
        run(BASE, tmp_path, nn.Sequential(nn.Linear(3, 9), nn.Identity(), nn.ReLU(), nn.Identity(), nn.Linear(9, 1)), resume=True)
    save_checkpoint(tmp_path / "state.safetensors", net(), {"system": "toy"})
    with pytest.raises(ValueError, match="expected the state of a training run, found a model file"):
        run(BASE, tmp_path, resume=True)


def test_resume_of_a_finished_run_does_nothing_and_without_a_state_begins(tmp_path):
    first, model = run(BASE, tmp_path, resume=True)
    again, other = run(BASE, tmp_path, resume=True, batches=lambda i: pytest.fail("no batch is needed"))
    assert (first["total"] == again["total"]).all() and same(model, other)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    def batches(index):
        if index == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return data().batch_at(index)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after 7 steps; resume=True goes on from"):
        run(BASE, tmp_path, batches=batches)
    assert signal.getsignal(signal.SIGINT) is before
    assert (run(BASE, tmp_path, resume=True)[0]["total"] == run()[0]["total"]).all()


def test_a_broken_last_line_of_the_log_is_survived(tmp_path):
    run(BASE, tmp_path)
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text[:-30])
    assert len(read_history(tmp_path / "train.csv")) == 11


# ---------------------------------------------------------------- failure

def test_nan_stops_with_a_sentence_and_keeps_the_last_good_state(tmp_path):
    calls = []
    def loss(model, batch):
        calls.append(0)
        return {**terms(model, batch), "ori": model[0].weight.sum() * (float("nan") if len(calls) == 8 else 0.0)}
    with pytest.raises(TrainingDiverged, match=r"^training stopped: the loss term 'ori' is nan at step 7 \(the last good state is .* after 5 steps\)$"):
        run(BASE, tmp_path, loss=loss)
    weights, meta = training._read_tensors(tmp_path / "state.safetensors")
    assert meta["step"] == 5 and all(v.isfinite().all() for v in weights.values() if v.is_floating_point())
    assert read_history(tmp_path / "train.csv")["step"].tolist() == list(range(7))


def test_nan_gradient_behind_a_finite_loss_is_caught(tmp_path):
    loss = lambda model, batch: {"root": (model[0].weight * 0).sum().sqrt()}  # value 0, gradient 0/0
    with pytest.raises(TrainingDiverged, match="the gradient's norm is nan at step 0"):
        run(replace(BASE, save_every=1), tmp_path, loss=loss)
    assert not (tmp_path / "state.safetensors").exists()


# ---------------------------------------------------------------- model files

def test_checkpoint_round_trip_and_half_size(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    model[1].running_var[0] = 1e6  # beyond float16
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        save_checkpoint(tmp_path / name, model, {"system": "toy", "config": {"a": [1, 2]}}, dtype)
    full, half = (load_checkpoint(tmp_path / n, "toy") for n in ("full", "half"))
    assert full.meta == {"system": "toy", "config": {"a": [1, 2]}}
    assert all(torch.equal(full.weights[k], v) for k, v in model.state_dict().items())
    assert all(torch.allclose(half.weights[k].float(), v.float(), rtol=1e-3, atol=1e-6) for k, v in model.state_dict().items())
    assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "full").stat().st_size
    other = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    load_weights(other, full.weights, "full")
    assert same(model, other)


def test_wrong_files_are_one_sentence(tmp_path):
    save_checkpoint(tmp_path / "good", net(), {"system": "toy"})
    whole = (tmp_path / "good").read_bytes()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello, I am not a checkpoint")
    (tmp_path / "torn").write_bytes(whole[:len(whole) // 2])
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    run(BASE, tmp_path / "run")
    for path, words in (("missing", "no such file"), ("empty", "not a whole"), ("text", "not a whole"), ("torn", "not a whole"),
                        ("foreign", "not one that handrecon wrote"), ("run/state.safetensors", "found the state of a training run")):
        with pytest.raises(ValueError, match=words) as error:
            load_checkpoint(tmp_path / path)
        assert "\n" not in str(error.value) and path in str(error.value)
    with pytest.raises(ValueError, match="expected a 's2hand' model, found a 'toy' model"):
        load_checkpoint(tmp_path / "good", "s2hand")
    with pytest.raises(ValueError, match="meta\\['system'\\]"):
        save_checkpoint(tmp_path / "bad", net(), {})
    assert not (tmp_path / "bad").exists()


def test_weights_that_do_not_fit_leave_the_model_alone():
    model, before = net(), net()
    good = model.state_dict()
    cases = [({k: v for k, v in good.items() if k != "4.bias"}, "lacks '4.bias', which the model has"),
             ({**good, "5.bias": torch.zeros(1)}, "has '5.bias', which the model lacks"),
             ({**good, "0.weight": torch.zeros(2, 3)}, r"expected '0.weight' of shape \(16, 3\), found \(2, 3\)")]
    for weights, words in cases:
        with pytest.raises(ValueError, match=words):
            load_weights(model, weights, "file")
    assert same(model, before)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "model"
    save_checkpoint(path, net(), {"system": "toy", "n": 1})
    def fail(*_): raise OSError("disk full")
    monkeypatch.setattr(training.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, net(), {"system": "toy", "n": 2})
    monkeypatch.undo()
    assert load_checkpoint(path).meta["n"] == 1 and list(tmp_path.iterdir()) == [path]


def test_the_header_is_json_text(tmp_path):
    save_checkpoint(tmp_path / "m", net(), {"system": "toy"})
    raw = (tmp_path / "m").read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["handrecon"]) == {"system": "toy"}


def test_one_process_does_not_import_the_engine():
    code = "import sys, handrecon.training; assert not {'lightning_fabric', 'matplotlib', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

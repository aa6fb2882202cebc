"""The benchmark's rows are complete and its scene is what it says."""
import json
import math
import time

import pytest
import torch

from handrecon import bench
from handrecon.bench import bench_render, median_ms, render_scene
from handrecon.raster import rasterize


def test_rows():
    rows = bench_render(sizes=(32,), batches=(1, 2), budget=0.02)
    assert {(r["name"], r["batch"]) for r in rows} == {(n, b) for n in ("rasterize", "render", "render + soft silhouette") for b in (1, 2)}
    assert all(0 < r["forward_ms"] and 0 < r["forward_backward_ms"] == r["per_image_ms"] * r["batch"] and r["ratio"] is None for r in rows)


def test_a_device_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expects a device of this machine, found 'cuda' although PyTorch sees no CUDA device"):
        bench.bench("render", device="cuda")


def test_rows_of_another_device_say_pictures_a_second_and_what_memory_allows():
    rows = bench_render(sizes=(32,), batches=(2,), budget=0.0, device="cpu:0")     # any name but "cpu" is treated as a graphics card
    assert {"render", "four channels written once, gradients read once"} <= {row["name"] for row in rows}
    assert all(row["per_second"] == pytest.approx(2e3 / row["forward_backward_ms"]) for row in rows)
    assert "pictures a second" in bench.table(rows)[0]


def test_scene_and_timer():
    vertices, faces, K, _, _ = render_scene(48, 2)
    assert 0.25 < (rasterize(vertices, faces, K, (48, 48)).face_index >= 0).float().mean() < 0.5
    calls = []
    assert median_ms(lambda: calls.append(0), 0.0) >= 0 and len(calls) == 6


def test_taking_turns():
    order = []
    times = bench.alternate({"a": lambda: (order.append("a"), time.sleep(0.004)), "b": lambda: order.append("b")}, 0.0, 3, turn=0.0)
    assert order == ["a", "b"] * 4 and times["a"] >= 4 > times["b"] >= 0


def test_a_turn_is_a_loop_of_its_own_and_its_beginning_does_not_count():
    durations = {"slow to settle": iter([0.0] + 9 * ([0.02] + [0.001] * 200)), "long": iter([0.04] * 9)}
    def nap(name):
        order.append(name)
        time.sleep(next(durations[name]))
    order = []
    times = bench.alternate({name: lambda name=name: nap(name) for name in durations}, 0.0, 3, turn=0.03)
    changes = sum(a != b for a, b in zip(order, order[1:]))
    assert changes == 7 and order.count("long") == 4        # warm-up and three rounds; a call longer than a turn is one turn
    assert order.count("slow to settle") > 8 and 1 <= times["slow to settle"] < 15 and times["long"] >= 40


@pytest.mark.parametrize("peers", [False, True])
def test_hand_layers_compute_the_same(peers):
    inputs = [s * torch.randn(3, n, generator=torch.Generator().manual_seed(0)) for s, n in ((0.4, 45), (1, 10), (1, 3))]
    layers = bench.hand_layers(3, peers)
    wanted = layers.pop("handrecon, plain torch")(*inputs)[0]
    for name, layer in layers.items():
        vertices = layer(*inputs)[0] / (1000 if name == "manopth" else 1)      # millimetres
        assert (vertices - wanted).abs().max() < 5e-6, name
    rows = bench.bench_mano((2,), peers, 0.0)
    assert {r["name"] for r in rows} == {*layers, "handrecon, plain torch"}
    assert all((r["ratio"] is None) == (len(layers) == 2) and r["forward_ms"] > 0 for r in rows)


def test_a_gpu_is_asked_for_larger_batches(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(bench, "bench_mano", lambda batches, peers, device: asked.update({device: batches}) or [])
    commands = [bench.bench("mano", True, device)["command"] for device in ("cpu", "cuda", "cuda:1")]
    assert asked["cpu"] == (1, 32, 64, 256) and {64, 1024} <= set(asked["cuda"]) and asked["cuda:1"] == asked["cuda"]
    assert commands[1] == "handrecon bench mano --peers --device cuda"


def test_growth_and_finer_faces():
    vertices, faces, *_ = render_scene(32, 2)
    finer, more = bench.split_faces(vertices, faces)
    edges = vertices.shape[1] + len(faces) - 1                                  # Euler: a hand cut off at the wrist is a disc
    assert len(more) == 4 * len(faces) and finer.shape[1] == vertices.shape[1] + edges
    area = lambda v, f: torch.linalg.cross(v[0, f[:, 1]] - v[0, f[:, 0]], v[0, f[:, 2]] - v[0, f[:, 0]]).norm(dim=1).sum()
    assert torch.isclose(area(finer, more), area(vertices, faces), rtol=1e-4)
    rows = bench.bench_growth((32,), (0, 1), (1, 2), 0.0)
    assert [(r["vary"], r["value"]) for r in rows] == [("pixels a side", 32), ("faces", 1538), ("faces", 6152), ("hands", 1), ("hands", 2)]


def test_step_shares(monkeypatch):
    monkeypatch.setitem(bench.STEPS, "tiny", (bench.STEPS["small network, 64²"][0], 2))
    rows = bench.bench_step(("tiny",), 1)
    assert [r["part"] for r in rows] == ["data", "network", "hand", "render", "losses", "optimiser"]
    assert math.isclose(sum(r["share"] for r in rows), 1) and all(r["ms"] > 0 for r in rows)


def test_infer_rows():
    rows = bench.bench_infer(bench.S2HandConfig(backbone="small", image_size=64), budget=0.0)
    assert rows[0]["name"] == "PyTorch" and all(r["ms"] > 0 and r["difference"] <= 1e-4 for r in rows)


def test_all_hands_of_a_picture():
    rows = bench.bench_hands((1, 3), 64, 0.0)
    assert [r["hands"] for r in rows] == [1, 3] * 3 and all(r["ms"] > 0 for r in rows)
    assert list(dict.fromkeys(r["name"] for r in rows)) == ["packaged", "packaged, without the mirror image", "ResNet-50"]


def test_the_hands_that_are_asked_for_are_answered(monkeypatch):
    answered = []
    forward = bench.MultiHand.forward
    def spy(self, image, K, hands, threshold):
        peaks, out = forward(self, image, K, hands, threshold)
        answered.append((self.config.backbone, self.config.mirror, tuple(image.shape[-2:]), float(K[0, 0, 0]), int(peaks.kept.sum())))
        return peaks, out
    monkeypatch.setattr(bench.MultiHand, "forward", spy)
    bench.bench_hands((3,), 128, 0.0)
    small = bench.load_multihand().config
    assert set(answered) == {(small.backbone, True, (64, 64), 64.0, 3), (small.backbone, False, (64, 64), 64.0, 3), ("resnet50", False, (128, 128), 128.0, 3)}


def test_record_and_page(tmp_path):
    machine = bench.machine()
    part = lambda ms: {"date": "2026-01-01", "command": "handrecon bench infer", "machine": machine, "rows": [dict(name="PyTorch", size=64, ms=ms, difference=0.0)]}
    bench.write_record(tmp_path / "r.json", {"infer": part(1.0)})
    render = {**part(0), "command": "handrecon bench render", "rows": bench_render((32,), (1,), budget=0.0) + bench.bench_growth((32,), (0,), (1,), 0.0)}
    record = bench.write_record(tmp_path / "r.json", {"render": render})
    assert list(record) == ["render", "infer"] and json.loads((tmp_path / "r.json").read_text()) == record
    assert bench.write_record(tmp_path / "r.json", {"infer": part(2.0)})["infer"]["rows"][0]["ms"] == 2.0
    bench.write_page(record, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "`handrecon bench render` on 2026-01-01" in text and "| PyTorch | 64² | 1 | 0e+00 |" in text and (tmp_path / "performance.png").stat().st_size > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.md", "performance.png", "r.json"]
    for content in ("no json", "[1]", '{"cats": {}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json: expected a record"): bench.write_record(tmp_path / "bad.json", {})
    with pytest.raises(ValueError, match="bench expects mano"): bench.bench("cats")

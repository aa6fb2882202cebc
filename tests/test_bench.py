"""The benchmark's rows are complete and its scene is what it says."""
from handrecon.bench import bench_render, median_ms, render_scene
from handrecon.raster import rasterize


def test_rows():
    rows = bench_render(sizes=(32,), batches=(1, 2), budget=0.02)
    assert {(r["name"], r["batch"]) for r in rows} == {(n, b) for n in ("rasterize", "render", "render + soft silhouette") for b in (1, 2)}
    assert all(0 < r["forward_ms"] and 0 < r["forward_backward_ms"] == r["per_image_ms"] * r["batch"] and r["ratio"] is None for r in rows)


def test_scene_and_timer():
    vertices, faces, K, _, _ = render_scene(48, 2)
    assert 0.25 < (rasterize(vertices, faces, K, (48, 48)).face_index >= 0).float().mean() < 0.5
    calls = []
    assert median_ms(lambda: calls.append(0), 0.0) >= 0 and len(calls) == 6

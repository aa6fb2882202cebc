"""Videos: tracks, the smooth fit, resuming, adaptation, and an animation that is the hand model's own."""
import json
import struct
import threading
import time
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from handrecon import fit as F
from handrecon import gltf as G
from handrecon import hands as H
from handrecon import reconstruct as R
from handrecon import sources as S
from handrecon import video as V
from handrecon.camera import project
from handrecon.keypoints import Detections, write_openpose
from handrecon.mano import HandModel, mirror_arrays
from handrecon.proxy_hand import posture, proxy_hand
from handrecon.rotation import quaternion_angle
from handrecon.fit import FitConfig, joints_only
from handrecon.s2hand import load
from handrecon.sequences import SequenceConfig, make_sequences
from handrecon.viz import to_picture

QUICK = FitConfig(steps=30, tried=32, starts=4, kept=2, postures=("flat", "relaxed", "fist"))
SMOOTH = V.SmoothFit(steps=40, window=12, overlap=4)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def film():
    return make_sequences(1, 5, SequenceConfig(frames=16))


@pytest.fixture(scope="module")
def clip(film, tmp_path_factory):
    "A video of that film with detections; nobody is there in frames 6 and 7."
    folder = tmp_path_factory.mktemp("clip")
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (128, 128))
    for image in film.observation.image: writer.write(cv2.cvtColor(to_picture(image), cv2.COLOR_RGB2BGR))
    writer.release()
    confidence = film.observation.confidence.clone()
    confidence[6:8] = 0
    write_openpose(folder / "det" / "clip", Detections([f"clip_{i:012d}" for i in range(16)], film.observation.keypoints, confidence, ["right"] * 16))
    return folder


def hand(x, y=50.0, side="right", size=40.0):
    return S.Hand2D(torch.tensor([x - size / 2, y - size / 2, x + size / 2, y + size / 2]), side, torch.full((21, 2), x), torch.ones(21))


# ---- tracks

def test_tracks_follow_hands_and_vote_on_sides():
    frames = [[hand(30 + 3.0 * t, side="left" if t == 4 else "right"), hand(220 - 3.0 * t, 120, "left")][::1 - 2 * (t % 2)] for t in range(12)]
    frames[5] = frames[5][:1]
    tracks = V.link_tracks(frames)
    assert sorted((t.side, len(t.frames)) for t in tracks) == [("left", 12), ("right", 11)] or sorted((t.side, len(t.frames)) for t in tracks) == [("left", 11), ("right", 12)]
    for t in tracks:
        x = [float(frames[f][k].xy[0, 0]) for f, k in zip(t.frames, t.places)]
        assert max(abs(b - a) for a, b in zip(x, x[1:])) <= 6.1


def test_a_hand_that_is_long_gone_is_another():
    frames = [[hand(50.0)] if t < 3 or t > 20 else [] for t in range(25)]
    assert [len(t.frames) for t in V.link_tracks(frames)] == [3, 4]
    assert [len(t.frames) for t in V.link_tracks(frames, patience=30)] == [7]
    assert V.stretches([0, 1, 2, 5, 6, 9]) == [(0, 3), (3, 5), (5, 6)] and V.stretches([]) == []


@pytest.mark.parametrize("cost, met", [(0.3, False), (0.0, True)])
def test_sides_tell_hands_apart_that_cross(cost, met):
    "Each jumps over the other between two frames: by distance alone they turn back."
    tracks = V.link_tracks([[hand(46.0 + 12 * t), hand(160.0 - 12 * t, side="left")] for t in range(11)], other_side=cost)
    assert len(tracks) == 2 and all((len(set(t.places)) == 2) == met for t in tracks)


def test_answers_for_the_wrong_side_are_not_used():
    frames = [[hand(50.0 + t, side="left" if t == 3 else "right")] for t in range(6)]
    tracks = V.link_tracks(frames)
    values = {"pose": np.arange(6.0)[:, None]}
    found = V._of_one_side(V.Hands(np.arange(6), np.zeros(6, int), values, {}), frames, tracks)
    assert tracks[0].side == "right" and found.values["pose"][:, 0].tolist() == [0, 1, 2, 2, 4, 5] and values["pose"][3] == 3


def test_what_a_fit_keeps_of_a_frame_is_small():
    "A thousand frames' pictures would be memory that grows with the film."
    seen = H.crop_observation(None, torch.eye(3), hand(50.0), 224, False)
    assert sum(getattr(seen, f).nbytes for f in seen.__dataclass_fields__) < 1000


def test_steady_boxes_do_not_tremble():
    g = torch.Generator().manual_seed(0)
    frames = [[hand(float(50 + t + 3 * torch.randn((), generator=g)))] for t in range(30)]
    new = V.steady(frames, V.link_tracks(frames))
    bend = lambda hs: torch.stack([h[0].box[0] for h in hs]).diff(n=2).abs().mean()
    assert bend(new) < 0.3 * bend(frames) and all(torch.equal(a[0].xy, b[0].xy) for a, b in zip(new, frames))


# ---- the fit

def test_interpolation_passes_through_its_keys():
    g = torch.Generator().manual_seed(1)
    from handrecon.rotation import matrix_to_quaternion, random_rotations
    keys = V.HandState(torch.randn(3, 45, generator=g), torch.randn(3, 10, generator=g), random_rotations(3, g), torch.randn(3, 3, generator=g))
    at = torch.tensor([2.0, 6.0, 9.0])
    again = V.interpolate(keys, at, at)
    assert torch.allclose(again.pose, keys.pose) and torch.allclose(again.rotation, keys.rotation, atol=1e-5)
    between = V.interpolate(keys, at, torch.tensor([0.0, 4.0, 20.0]))
    assert torch.allclose(between.pose[1], (keys.pose[0] + keys.pose[1]) / 2, atol=1e-6)
    assert torch.equal(between.pose[0], keys.pose[0]) and torch.equal(between.pose[2], keys.pose[2])
    q = matrix_to_quaternion(torch.stack([keys.rotation[0], between.rotation[1], keys.rotation[1]]))
    assert torch.allclose(quaternion_angle(q[0], q[1]), quaternion_angle(q[1], q[2]), atol=1e-3)


def test_a_stretch_has_one_shape_and_trembles_less(film):
    seen, truth = film.observation, film.truth
    together = V.fit_stretches(seen, [(0, 16)], proxy_hand(), None, QUICK, SMOOTH)
    rough = V.fit_stretches(seen, [(0, 16)], proxy_hand(), None, QUICK, replace(SMOOTH, w_quat=0.0, w_acceleration=0.0, w_depth=0.0))
    skeleton = joints_only(proxy_hand())
    joints = {name: skeleton(x.pose, x.shape).joints @ x.rotation.mT + x.translation[:, None] for name, x in (("together", together), ("rough", rough))}
    bend = lambda x: x.diff(n=2, dim=0).norm(dim=-1).mean()
    local = lambda x: x - x[:, :1]
    assert (together.shape == together.shape[:1]).all()
    assert bend(local(joints["together"])) < 0.6 * bend(local(joints["rough"]))
    assert bend(joints["together"][:, :1, 2:]) < 0.3 * bend(joints["rough"][:, :1, 2:])
    size = (truth.keypoints.amax(1) - truth.keypoints.amin(1)).amax(1)
    off = (project(joints["together"], seen.K) - truth.keypoints).norm(dim=-1).median(1).values / size
    assert off.median() < 0.06


# ---- the animation

def clip_of(side, frames=4):
    g, model = torch.Generator().manual_seed(2), proxy_hand()
    if side == "left": model = HandModel(mirror_arrays({n: getattr(model, n).numpy() for n in model.ARRAYS}), "left", fingertips=model.fingertips)
    pose = torch.stack([torch.lerp(posture("fist"), posture("pinch"), torch.tensor(t / 3)) for t in range(frames)])
    return G.Clip(model, torch.randn(10, generator=g).numpy(), np.arange(frames) / 25, pose.numpy(), (2 * torch.randn(frames, 3, generator=g)).numpy(),
                  torch.randn(frames, 3, generator=g).numpy(), np.linspace(0.8, 1.2, frames).astype(np.float32), np.array([True, True, False, True]), None)


def test_the_animation_is_the_hand_models_own(tmp_path):
    clips = [clip_of("right"), clip_of("left")]
    G.write_animation(tmp_path / "two.glb", clips)
    for t in (0, 1, 3):
        for c, found in zip(clips, G.read_animation(tmp_path / "two.glb", t)):
            row = lambda x: torch.from_numpy(np.asarray(x[t:t + 1], np.float32))
            mesh = c.model(row(c.pose), torch.from_numpy(c.shape)[None], row(c.rotation), row(c.translation), row(c.scale))
            assert np.abs(found - mesh.vertices[0].numpy() * [1, -1, -1]).max() < 5e-6
    gone = G.read_animation(tmp_path / "two.glb", 2)[0]
    assert np.ptp(gone, axis=0).max() < 1e-6                                 # nothing to see


def test_the_glb_keeps_the_formats_rules(tmp_path):
    G.write_animation(tmp_path / "a.glb", [clip_of("right")])
    data = (tmp_path / "a.glb").read_bytes()
    size = struct.unpack("<I", data[12:16])[0]
    tree, body = json.loads(data[20:20 + size]), data[28 + size:]
    assert struct.unpack("<4sII", data[:12]) == (b"glTF", 2, len(data)) and size % 4 == 0 and len(body) % 4 == 0
    assert tree["buffers"][0]["byteLength"] == len(body)
    width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}
    bytes_of = {5126: 4, 5123: 2, 5125: 4, 5121: 1}
    for a in tree["accessors"]:
        view = tree["bufferViews"][a["bufferView"]]
        assert view["byteOffset"] % 4 == 0 and view["byteLength"] == a["count"] * width[a["type"]] * bytes_of[a["componentType"]] and view["byteOffset"] + view["byteLength"] <= len(body)
    part = tree["meshes"][0]["primitives"][0]
    attributes = part["attributes"]
    floats = lambda i: np.frombuffer(body, "<f4", tree["accessors"][i]["count"] * width[tree["accessors"][i]["type"]], tree["bufferViews"][tree["accessors"][i]["bufferView"]]["byteOffset"])
    weights = sum(floats(attributes[f"WEIGHTS_{k}"]).reshape(-1, 4).sum(1) for k in range(2))
    assert np.abs(weights - 1).max() < 1e-5
    assert all("min" in tree["accessors"][i] for i in (attributes["POSITION"], tree["animations"][0]["samplers"][0]["input"]))
    assert len(part["targets"]) == len(tree["meshes"][0]["weights"])
    for sampler in tree["animations"][0]["samplers"]:
        times, values = (tree["accessors"][sampler[k]]["count"] for k in ("input", "output"))
        assert values % times == 0
    assert (np.diff(floats(tree["animations"][0]["samplers"][0]["input"])) > 0).all()
    for channel in tree["animations"][0]["channels"]:
        if channel["target"]["path"] == "rotation":
            q = floats(tree["animations"][0]["samplers"][channel["sampler"]]["output"]).reshape(-1, 4)
            assert np.abs(np.linalg.norm(q, axis=1) - 1).max() < 1e-5 and ((q[1:] * q[:-1]).sum(1) >= -1e-6).all()


def test_another_library_reads_the_glb(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    G.write_animation(tmp_path / "a.glb", [clip_of("right")])
    scene = trimesh.load(tmp_path / "a.glb", process=False)
    mesh, = scene.geometry.values()
    assert mesh.vertices.shape == (proxy_hand().n_vertices, 3) and len(mesh.faces) == proxy_hand().n_faces


@pytest.mark.parametrize("path, clips, words", [("a.gltf", 1, "ending in .glb"), ("a.glb", 0, "no hand")])
def test_animation_mistakes(tmp_path, path, clips, words):
    with pytest.raises(ValueError, match=words):
        G.write_animation(tmp_path / path, [clip_of("right")] * clips)


# ---- beginning to end

@pytest.fixture(scope="module")
def network():
    return load("s2hand")


def test_upright_crops_make_the_network_blind_to_roll(network):
    from handrecon.s2hand import move_camera
    from handrecon.synthetic import SyntheticConfig
    seen = make_sequences(2, 5, SequenceConfig(SyntheticConfig(image_size=network.config.image_size, view_spread=0.2), frames=8)).observation
    one, zero = torch.ones(16), torch.zeros(16, 2)
    upside, _ = move_camera(seen, torch.full((16,), 3.0), one, zero)
    distance = lambda roll: (H.predict_upright(network, upside, roll)[0].keypoints - upside.keypoints).norm(dim=-1)[upside.confidence > 0].median()
    assert distance(H.upright_roll(upside.keypoints, upside.confidence)) < 0.6 * distance(torch.zeros(16))
    assert torch.equal(H.upright_roll(seen.keypoints, torch.zeros(16, 21)), torch.zeros(16))


def test_a_video_from_beginning_to_end(clip, network, tmp_path):
    summary, = R.reconstruct([clip / "clip.mp4"], tmp_path / "out", network, clip / "det", config=QUICK, progress=False)
    assert (summary.hands, summary.frames_with_hand) == (14, 14) and summary.after[1] < summary.before[1] and summary.after[1] < 0.08
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clip.glb", "clip.npz", "clip.overlay.mp4", "clip.plots.png", "hands.json"]
    written = json.loads((tmp_path / "out/hands.json").read_text())
    shapes = {tuple(h["shape"]) for h in written["hands"]}
    assert len(shapes) == 1 and written["sources"][0]["meshes"] == [{"file": "clip.glb", "mesh": 0, "side": "right", "frames": 14, "plots": "clip.plots.png"}]
    stored = np.load(tmp_path / "out/clip.npz")["vertices"]
    for h in written["hands"][::5]:
        said = G.read_animation(tmp_path / "out/clip.glb", h["frame"])[0] * [1, -1, -1]
        assert np.abs(said - stored[h["vertices_row"]]).max() < 2e-5
    assert np.ptp(G.read_animation(tmp_path / "out/clip.glb", 6)[0], axis=0).max() < 1e-6
    assert not (V.cache_folder() / "video").exists() or not any((V.cache_folder() / "video").iterdir())


def test_a_killed_run_goes_on(clip, network, tmp_path, monkeypatch):
    source, = S.find_sources([clip / "clip.mp4"])
    hands = S.pair_detections(source, clip / "det")
    solve = lambda: V.solve_video(source, hands, network, F.axis_angle_hand(network.hand), config=QUICK, smooth=SMOOTH, progress=False)
    calls, ask, descend = [], V.predict_upright, V.descend
    monkeypatch.setattr(V, "predict_upright", lambda *a: calls.append("network") or ask(*a))

    def killed(*a, **k):
        calls.append("fit")
        if calls.count("fit") == 3: raise KeyboardInterrupt
        return descend(*a, **k)

    monkeypatch.setattr(V, "descend", killed)
    with pytest.raises(KeyboardInterrupt):
        solve()
    before = list(calls)
    monkeypatch.setattr(V, "descend", lambda *a, **k: calls.append("fit") or descend(*a, **k))
    resumed = solve()
    assert "network" not in calls[len(before):] and calls[len(before):].count("fit") < len(before) + 4
    resumed.keep.forget()
    whole = solve()
    assert all(np.allclose(resumed.found.values[k], whole.found.values[k], equal_nan=True, atol=1e-5) for k in whole.found.values)
    whole.keep.forget()


def test_a_broken_piece_is_made_again(tmp_path):
    keep = V.Keep(tmp_path / "pieces")
    assert keep("a", lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert keep("a", lambda: 1 / 0)["x"].tolist() == [0, 1, 2]
    (tmp_path / "pieces/a.npz").write_bytes(b"PK broken")
    assert keep("a", lambda: {"x": np.arange(2)})["x"].tolist() == [0, 1]
    keep.forget()
    assert not (tmp_path / "pieces").exists() and V.Keep(None)("a", lambda: {"x": np.ones(1)})["x"].sum() == 1


def test_adaptation_reports_before_and_after(clip, network):
    source, = S.find_sources([clip / "clip.mp4"])
    hands = S.pair_detections(source, clip / "det")
    tracks = V.link_tracks(hands)
    films = V.track_films(source, V.steady(hands, tracks), tracks, network.config.image_size, None)
    assert len(films) == 14 and films.clips == [(6, 14)] or films.clips                          # six frames are too few
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    done = V.adapt(network, films, 3, progress=False)
    assert set(done.before) == set(done.after) and {"ACC", "shape S.D.", "texture S.D.", "2D error"} <= set(done.before)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())              # the shipped one stays
    assert any(not torch.equal(v, weights[k]) for k, v in done.network.state_dict().items())
    assert "->" in str(done)


def test_an_adaptation_that_makes_the_hand_jump_is_told_and_not_used(clip, network, monkeypatch):
    before = dict.fromkeys(("ACC", "2D error", "2D error of the box", "shape S.D.", "texture S.D.", "quaternion loss"), 1.0)
    worse, better = V.Adaptation(None, before, before | {"ACC": 1.5}), V.Adaptation(None, before, before | {"ACC": 0.5})
    assert not worse.helped and "not used" in str(worse) and better.helped and "not used" not in str(better)
    monkeypatch.setattr(V, "_adapted", lambda *_: worse)                                         # whose network is none at all
    source, = S.find_sources([clip / "clip.mp4"])
    hands = S.pair_detections(source, clip / "det")
    solve = lambda steps: V.solve_video(source, hands, network, network.hand, None, False, adapt_steps=steps, progress=False)
    assert np.array_equal(solve(3).found.values["pose"], solve(0).found.values["pose"])


@pytest.mark.parametrize("options", [dict(adapt=5), dict(adapt=-1, network=0), dict(adapt=5, network=0, box=[0, 0, 64, 64])])
def test_adapting_needs_its_ingredients(clip, network, tmp_path, options):
    options = options | ({"network": network} if "network" in options else {})
    if "box" not in options: options["detections"] = clip / "det"
    with pytest.raises(ValueError, match="adapting needs"):
        R.reconstruct([clip / "clip.mp4"], tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


# ---- side by side, and averaged

def test_works_side_by_side_answer_in_order_on_one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        def work(k):
            time.sleep(0.02 * (3 - k))
            return {"k": k, "threads": torch.get_num_threads(), "name": threading.current_thread().name}
        made = list(V.side_by_side([partial(work, k) for k in range(4)]))
        assert [m["k"] for m in made] == [0, 1, 2, 3] and {m["threads"] for m in made} == {1}
        assert len({m["name"] for m in made}) == 2 and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError): list(V.side_by_side([lambda: {"x": 1 // 0}, partial(work, 0)]))
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert [m["name"] for m in V.side_by_side([partial(work, 3), partial(work, 2)])] == ["MainThread"] * 2
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize("length, window, overlap", [(1, 8, 2), (8, 8, 2), (9, 8, 2), (100, 8, 2), (1000, 288, 16)])
def test_windows_cover_a_stretch_with_their_overlap(length, window, overlap):
    found = V.windows_of(5, 5 + length, V.SmoothFit(window=window, overlap=overlap))
    assert found[0][0] == 5 and found[-1][1] == 5 + length and all(b - a <= window for a, b in found)
    assert all(b - c == overlap and c > a for (a, b), (c, _) in zip(found, found[1:]))


def test_tracks_are_averaged_within_their_stretches():
    g, frames = torch.Generator().manual_seed(0), [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    values = {name: torch.randn(10, width, generator=g).numpy() * 0.3 for name, width in V._ROWS.items()}
    values["translation"][5:] += 10.0
    found = V.Hands(np.array(frames), np.zeros(10, int), values, {})
    calm = V.average_tracks(found, [V.Track("right", frames, [0] * 10)], 1.5).values
    for name in ("shape", "scale", "before", "skin"): assert (calm[name] == values[name]).all()
    assert calm["translation"][:5].max() < 5 < calm["translation"][5:].min()                   # nothing leaks over the gap
    jump = lambda x: np.abs(np.diff(x[:5], axis=0)).mean()
    for name in ("rotation", "pose", "translation"): assert jump(calm[name]) < 0.6 * jump(values[name]), name

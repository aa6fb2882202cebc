"""From found hands to result files: conventions, choices, empty results."""
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from handrecon import reconstruct as R, video
from handrecon.camera import project
from handrecon.gltf import read_animation
from handrecon.hands import Finder, distinct_hands, find_hands, hand_of_mesh
from handrecon.multihand import RECIPES, MultiHand, load, quarter_turned, save
from handrecon.proxy_hand import proxy_hand, sample_poses
from handrecon.reconstruct import choose_finder, reconstruct_every_hand
from handrecon.scenes import SceneConfig, make_scenes
from handrecon.sources import InputError, Source, guess_intrinsics
from handrecon.training import packaged
from handrecon.viz import save_picture, to_picture

K = torch.tensor([[200.0, 0, 64], [0, 200, 48], [0, 0, 1]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MultiHand(replace(RECIPES["smoke"].model, weights="", channels=32, head=64)).eval()


@pytest.fixture
def photo(tmp_path):
    save_picture(tmp_path / "photo.png", np.full((96, 128, 3), 120, np.uint8))
    return tmp_path / "photo.png"


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_formula_for_both_sides(model, side):
    g = torch.Generator().manual_seed(3)
    pose, shape, rotation, place = sample_poses(1, g, side=side), torch.randn(1, 10, generator=g), torch.randn(1, 3, generator=g), torch.tensor([[0.05, -0.02, 0.6]])
    mesh = proxy_hand(side)(pose, shape, rotation, place)
    hand = hand_of_mesh(side, 0.7, K, mesh.vertices[0], mesh.joints[0], pose[0], shape[0], rotation[0], model.right)
    again = proxy_hand()(hand.pose[None], hand.shape[None], hand.rotation[None], hand.translation[None]).vertices[0]
    assert torch.allclose(again * torch.tensor([-1.0 if side == "left" else 1, 1, 1]), mesh.vertices[0], atol=1e-5)
    assert (hand.side, hand.score, hand.scale) == (side, 0.7, 1.0)


def test_files_and_an_empty_result(model, photo, tmp_path):
    (some,) = reconstruct_every_hand([photo], tmp_path / "some", Finder(model, min_score=0.0, max_hands=2), progress=False)
    assert 1 <= some.hands <= 2
    names = {p.name for p in (tmp_path / "some").iterdir()}
    assert {"hands.json", "photo.glb", "photo.npz", "photo.overlay.png"} <= names
    (none,) = reconstruct_every_hand([photo], tmp_path / "none", Finder(model, min_score=0.999), progress=False)
    assert none.hands == 0 and json.loads((tmp_path / "none/hands.json").read_text())["hands"] == []
    assert (tmp_path / "none/photo.overlay.png").exists()


@pytest.fixture(scope="module")
def upright_hands():
    scenes = make_scenes(6, 5, SceneConfig(image_size=256, focal=300.0, hands=(1, 1), size=(100.0, 110.0), view_spread=0.1, border=0.0, contact=0.0))
    return Finder(load(packaged("multihand")), focal=300.0), [to_picture(image) for image in scenes.image]


@pytest.mark.parametrize("turned", [0, 1, 2, 3])
def test_a_hand_is_looked_at_from_the_side_it_is_best_seen_from(turned, upright_hands):
    finder, pictures = upright_hands
    rolled = [np.ascontiguousarray(np.rot90(picture, turned)) for picture in pictures]        # counter-clockwise: as many quarters clockwise put it right
    source = Source(Path("scene.png"), "scene", False, 256, 256, 1, 0.0)
    assert finder.sides(source, rolled).mean(0).argmax() == turned
    (upright,), (found,) = finder(source, pictures[0], 0), finder(source, rolled[0], turned)
    x, y = upright.keypoints.T
    for _ in range(turned): x, y = y, 256 - x
    assert (found.keypoints - torch.stack([x, y], 1)).norm(dim=-1).mean() < 3 and found.side == upright.side
    assert torch.allclose(found.joints[:, 2], upright.joints[:, 2], atol=0.02)
    best = finder(source, rolled[0], int(finder.sides(source, rolled[:1])[0].argmax()))
    assert [h.score for h in finder(source, rolled[0])] == [h.score for h in best]              # left to itself, it takes the side from which it is surest


def test_a_film_is_turned_with_the_hand_and_not_by_one_odd_frame():
    up, over = np.array([0.5, 0.2, 0.2, 0.2]), np.array([0.2, 0.2, 0.5, 0.2])
    assert video.steady_quarters(np.array([up, up, over, over, over]), 64) == [0] * 20 + [2] * 44
    assert video.steady_quarters(np.array([up, up, 0.9 * over, up, up]), 60) == [0] * 60
    assert video.steady_quarters(np.array([over]), 3) == [2, 2, 2]


def test_a_picture_without_hands_gives_an_empty_list(model):
    picture, K = torch.zeros(3, 120, 200), torch.tensor([[200.0, 0, 100], [0, 200, 60], [0, 0, 1]])
    assert find_hands(model, picture, K, min_score=0.9) == []
    some = find_hands(model, picture, K, min_score=0.0, max_hands=3)
    assert 1 <= len(some) <= 3 and all(a.score >= b.score for a, b in zip(some, some[1:]))
    assert len(distinct_hands([some[0], some[0]])) == 1


def test_a_turned_picture_holds_the_same_hands(model):
    picture = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))
    K = torch.tensor([[150.0, 0, 60], [0, 150, 50], [0, 0, 1]])
    upright = find_hands(model, picture, K, min_score=0.0, max_hands=3, sizes=(128,))
    turned, rolled, R = quarter_turned(picture, K)
    again = find_hands(model, turned, rolled, min_score=0.0, max_hands=3, sizes=(128,), quarters=(3,))       # three more turns: upright once more
    assert len(upright) == len(again) == 3
    for a, b in zip(upright, again):
        assert a.side == b.side and torch.allclose(a.vertices @ R.T, b.vertices, atol=1e-5)
        assert torch.allclose(project(b.joints[None], rolled[None])[0], b.keypoints, atol=1e-3) and torch.allclose(b.box[:2], project(b.vertices[None], rolled[None])[0].amin(0), atol=1e-3)


class Scripted(Finder):
    "Finds the flat hands of a script, which frame's number is the grey of the picture; counts its looks."

    def sides(self, source, pictures): return np.eye(4)[[0] * len(pictures)]

    def __call__(self, source, picture, quarter=None):
        frame = round(float(picture.mean()) / 8)
        if frame in self.killed: raise KeyboardInterrupt
        self.looks.append(frame)
        lens, out = guess_intrinsics(source.height, source.width), []
        for side, place in self.script(frame):
            mesh = proxy_hand(side)(torch.zeros(1, 45), None, None, torch.tensor([place]))
            out.append(hand_of_mesh(side, 0.9, lens, mesh.vertices[0], mesh.joints[0], torch.zeros(45), torch.zeros(10), torch.zeros(3), self.model.right))
        return out


def scripted(model, script, killed=()):
    finder = Scripted(model)
    for name, value in {"script": script, "killed": set(killed), "looks": []}.items(): object.__setattr__(finder, name, value)
    return finder


@pytest.fixture
def film(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writer = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 120))
    for t in range(24): writer.write(np.full((120, 160, 3), 8 * t, np.uint8))
    writer.release()
    return tmp_path / "film.mp4"


def crossing(t):
    "Two hands that pass one another; the left one is gone for a while, a flash is there once, and in frame 5 the right one is said to be left."
    yield ("left" if t == 5 else "right"), [-0.12 + 0.011 * t, 0.0, 0.5]
    if not 8 <= t < 13: yield "left", [0.12 - 0.011 * t, 0.0, 0.7]
    if t == 3: yield "right", [0.0, -0.15, 0.9]


@pytest.mark.parametrize("fit", [False, True])
def test_two_hands_over_time(model, film, tmp_path, fit):
    summary, = reconstruct_every_hand([film], tmp_path / "out", scripted(model, crossing), progress=False, fit=fit)
    written = json.loads((tmp_path / "out/hands.json").read_text())
    seen = {side: [h["frame"] for h in written["hands"] if h["side"] == side] for side in ("right", "left")}
    assert seen == {"right": list(range(24)), "left": [t for t in range(24) if not 8 <= t < 13]} and summary.after is None
    meshes = written["sources"][0]["meshes"]
    assert [(m["mesh"], m["side"], m["frames"]) for m in meshes] == [(0, "right", 24), (1, "left", 19)]
    stored = np.load(tmp_path / "out/film.npz")["vertices"]
    for t in (0, 5, 10, 20):
        moving = read_animation(tmp_path / "out/film.glb", t)
        here = {h["side"]: stored[h["vertices_row"]] for h in written["hands"] if h["frame"] == t}
        for m, side in zip(moving, ("right", "left")):
            if side in here: assert np.abs(m * [1, -1, -1] - here[side]).max() < 3e-5
            else: assert np.ptp(m, axis=0).max() < 1e-6
    for t in (4, 10, 20):
        across = {h["side"]: h["translation"][0] for h in written["hands"] if h["frame"] == t}
        assert abs(across["right"] - (-0.12 + 0.011 * t)) < 0.02             # each hand stays itself where they cross


def test_a_film_without_hands(model, film, tmp_path):
    summary, = reconstruct_every_hand([film], tmp_path / "out", scripted(model, lambda t: [("right", [0.0, 0.0, 0.6])] if t == 7 else []), progress=False)
    assert (summary.hands, summary.frames_with_hand) == (0, 0) and json.loads((tmp_path / "out/hands.json").read_text())["hands"] == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"hands.json", "film.overlay.mp4"}


def test_a_killed_search_goes_on(model, film, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "BLOCK", 8)
    with pytest.raises(KeyboardInterrupt): reconstruct_every_hand([film], tmp_path / "out", scripted(model, crossing, killed=[19]), progress=False, fit=False)
    assert not (tmp_path / "out").exists()
    again = scripted(model, crossing)
    summary, = reconstruct_every_hand([film], tmp_path / "out", again, progress=False, fit=False)
    assert again.looks == list(range(16, 24)) and summary.frames_with_hand == 24


def test_who_looks(model, tmp_path, monkeypatch):
    save(tmp_path / "net.safetensors", model)
    chosen = choose_finder(checkpoint=tmp_path / "net.safetensors", min_score=0.4, max_hands=3)
    assert (chosen.min_score, chosen.max_hands, chosen.name) == (0.4, 3, "net") and chosen.model.config == model.config
    for given in (dict(detections="x"), dict(box=[1, 2, 3, 4]), dict(side="left"), dict(adapt=5)):
        assert choose_finder(checkpoint=tmp_path / "net.safetensors", **given) is None
    monkeypatch.setattr(R, "SHIPPED_FINDER", tmp_path / "absent.safetensors")
    assert choose_finder() is None
    with pytest.raises(InputError, match="refine"): choose_finder(refine="mediapipe")
    with pytest.raises(InputError, match="min-score"): choose_finder(side="left", min_score=0.5)

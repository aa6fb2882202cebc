"""Pictures, films and a stereo pair that code makes, and the numbers that came out of them before this house was rebuilt."""
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from handrecon.camera import project
from handrecon.fit import FitConfig
from handrecon.hands import Finder
from handrecon.keypoints import Detections, write_openpose
from handrecon.multihand import load
from handrecon.proxy_hand import posture, proxy_hand
from handrecon.reconstruct import reconstruct, reconstruct_every_hand, reconstruct_stereo
from handrecon.s2hand import load as load_s2hand
from handrecon.scenes import SceneConfig, make_scenes
from handrecon.sequences import SequenceConfig, make_sequences
from handrecon.sources import guess_intrinsics
from handrecon.stereo_pairs import STB_RIG, make_pairs
from handrecon.training import packaged
from handrecon.viz import save_picture, to_picture

GOLDEN = Path(__file__).parent / "goldens/reconstruct/numbers.json"
QUICK = FitConfig(steps=30, tried=32, starts=4, kept=2, postures=("flat", "relaxed", "fist"))


def photo(folder, name, shift=0.0):
    "A grey picture and the detections of a hand in it."
    save_picture(folder / f"{name}.png", np.full((96, 128, 3), 90, np.uint8))
    mesh = proxy_hand()(posture("relaxed")[None], rotation=torch.tensor([[-1.4, 0.3, 0.2]]), translation=torch.tensor([[-0.08 + shift, 0.0, 0.45]]))
    xy = project(mesh.joints, guess_intrinsics(96, 128)[None])
    write_openpose(folder / "det", Detections([name], xy, torch.ones(1, 21), ["right"]))
    return folder / f"{name}.png"


def film(folder, pictures, name="clip"):
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(folder / f"{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (width, height))
    for picture in pictures: writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    writer.release()
    return folder / f"{name}.mp4"


def detected_film(folder):
    "Ten frames and their detections; nobody is there in one of them."
    seen = make_sequences(1, 5, SequenceConfig(frames=10)).observation
    confidence = seen.confidence.clone()
    confidence[6] = 0
    write_openpose(folder / "det" / "clip", Detections([f"clip_{i:012d}" for i in range(10)], seen.keypoints, confidence, ["right"] * 10))
    return film(folder, [to_picture(image) for image in seen.image])


def scene_picture():
    return to_picture(make_scenes(1, 5, SceneConfig(image_size=256, focal=300.0, hands=(2, 2), border=0.0, contact=0.0)).image[0])


def photo_with_detections(folder, out):
    reconstruct([photo(folder, "photo")], out, detections=folder / "det", config=QUICK, progress=False)


def photo_in_a_box(folder, out):
    save_picture(folder / "photo.png", to_picture(make_sequences(1, 5, SequenceConfig(frames=3)).observation.image[0]))
    reconstruct([folder / "photo.png"], out, load_s2hand(), side="left", config=QUICK, progress=False)


def photo_alone(folder, out):
    save_picture(folder / "photo.png", scene_picture())
    reconstruct_every_hand([folder / "photo.png"], out, Finder(load(packaged("multihand")), min_score=0.1), progress=False)


def folder_of_photos(folder, out):
    for name, shift in (("a", 0.0), ("b", 0.02)): photo(folder, name, shift)
    reconstruct([folder], out, detections=folder / "det", config=QUICK, progress=False)


def film_with_detections(folder, out):
    reconstruct([detected_film(folder)], out, load_s2hand(), detections=folder / "det", config=QUICK, progress=False)


def film_alone(folder, out):
    picture = scene_picture()
    path = film(folder, [np.roll(picture, 2 * i, 1) for i in range(8)])
    reconstruct_every_hand([path], out, Finder(load(packaged("multihand")), min_score=0.1), progress=False, fit=False)


def stereo_pair(folder, out):
    views, _ = make_pairs(1, 12, STB_RIG.scaled(0.5))
    for name, picture in (("l", views.left[0]), ("r", views.right[0])): save_picture(folder / f"{name}.png", to_picture(picture))
    rig, box = views.rig, views.box_left[0].clamp_min(0).tolist()
    box[2], box[3] = min(box[2], rig.width), min(box[3], rig.height)
    reconstruct_stereo(folder / "l.png", folder / "r.png", (rig.focal, rig.cx, rig.cy, rig.baseline), box, "binocular", out)


CASES = [photo_with_detections, photo_in_a_box, photo_alone, folder_of_photos, film_with_detections, film_alone, stereo_pair]


def glb_vertices(path):
    "Of every mesh of a GLB."
    data = path.read_bytes()
    tree = json.loads(data[20:20 + int.from_bytes(data[12:16], "little")])
    return [tree["accessors"][p["attributes"]["POSITION"]]["count"] for mesh in tree["meshes"] for p in mesh["primitives"]]


def outputs(out):
    "Names of files (but the vertices of a pair, which were not written then), vertices of meshes, and the numbers of hands.json that say where the hands are."
    written = json.loads((out / "hands.json").read_text())
    told = {"files": sorted(p.name for p in out.iterdir() if p.name != "l.npz"), "glb": {p.name: glb_vertices(p) for p in sorted(out.glob("*.glb"))}}
    if "depth" in written: told["pair"] = {k: v for k, v in written.items() if k not in ("left", "right", "about", "checkpoint", "hands", "sources")}
    else:
        told["hands"] = [{k: v for k, v in h.items() if k not in ("name", "pose", "joints", "keypoints")} | {"joints": h["joints"][::4], "pose": h["pose"][::9]} for h in written["hands"][::3]]
        told["sources"], told["count"] = written["sources"], len(written["hands"])
        told["vertices"] = {p.name: np.load(p)["vertices"].mean((0, 1)).tolist() for p in sorted(out.glob("*.npz"))}
    return told


def same(a, b, where=""):
    "Numbers to a thousandth (of a metre, a radian, a pixel ...): another processor rounds otherwise, and a descent of thirty steps carries that on."
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a: same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f"{where}[{i}]")
    elif isinstance(a, float): assert b == pytest.approx(a, abs=1e-3, rel=1e-5), where
    else: assert a == b, where


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_same_numbers(case, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    case(tmp_path / "in", tmp_path / "out")
    same(json.loads(GOLDEN.read_text())[case.__name__], outputs(tmp_path / "out"))

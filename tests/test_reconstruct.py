"""Photos, folders and videos in, hands out; bad input is one sentence and leaves nothing behind."""
import json
import os

import cv2
import numpy as np
import pytest
import torch

from handrecon import hands as H
from handrecon import reconstruct as R
from handrecon import sources as S
from handrecon.camera import project
from handrecon.keypoints import Detections, write_openpose, write_s2hand_detections
from handrecon.proxy_hand import posture, proxy_hand
from handrecon.fit import FitConfig
from handrecon.s2hand import S2Hand, S2HandConfig, save
from handrecon.viz import read_picture, save_picture

QUICK = FitConfig(steps=60)
HEIGHT, WIDTH = 96, 128


def true_joints(side="right", shift=0.0):
    "A relaxed hand before the guessed camera; its joints in the picture."
    mesh = proxy_hand()(posture("relaxed")[None], rotation=torch.tensor([[-1.4, 0.3, 0.2]]), translation=torch.tensor([[-0.08 + shift, 0.0, 0.45]]))
    uv = project(mesh.joints, S.guess_intrinsics(HEIGHT, WIDTH)[None])
    return (H.mirror_points(uv, WIDTH) if side == "left" else uv)[0], mesh


def picture(path, height=HEIGHT, width=WIDTH):
    save_picture(path, np.full((height, width, 3), 90, np.uint8))
    return path


def openpose(folder, name, side="right", xy=None, confidence=None):
    xy = true_joints(side)[0] if xy is None else xy
    return write_openpose(folder, Detections([name], xy[None], torch.ones(1, 21) if confidence is None else confidence[None], [side]))[0]


def video(path, frames=6, height=HEIGHT, width=WIDTH):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (width, height))
    for i in range(frames):
        writer.write(np.full((height, width, 3), 40 * i % 255, np.uint8))
    writer.release()
    return path


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = S2HandConfig(backbone="small", image_size=64)
    return S2Hand(config, proxy_hand(n_pca=config.n_pca, flat_hand_mean=False))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_photo_with_detections(tmp_path, side):
    openpose(tmp_path / "det", "photo", side)
    summary, = R.reconstruct([picture(tmp_path / "photo.png")], tmp_path / "out", detections=tmp_path / "det", config=QUICK, progress=False)
    assert summary.hands == 1 and summary.after[1] < 0.05 and summary.after[0] < summary.before[0]
    assert sorted(os.listdir(tmp_path / "out")) == ["hands.json", "photo.glb", "photo.npz", "photo.overlay.png"]
    written = json.loads((tmp_path / "out/hands.json").read_text())
    hand, = written["hands"]
    assert hand["side"] == side and hand["mirrored"] == (side == "left") and written["sources"][0]["meshes"][0]["file"] == "photo.glb"
    # vertices = flip(scale * H(pose, shape, rotation) + translation)
    stored = np.load(tmp_path / "out/photo.npz")
    p = {key: torch.tensor([hand[key]], dtype=torch.float32) for key in ("pose", "shape", "rotation", "translation")}
    mesh = proxy_hand()(p["pose"], p["shape"], p["rotation"], p["translation"])
    flip = torch.tensor([-1.0 if side == "left" else 1.0, 1, 1])
    assert np.abs(stored["vertices"][0] - (mesh.vertices[0] * flip).numpy()).max() < 2e-5
    assert np.abs(np.array(hand["joints"]) - (mesh.joints[0] * flip).numpy()).max() < 2e-5
    uv = project(torch.tensor([hand["joints"]]), torch.tensor([hand["K"]]))[0]
    assert np.abs(uv.numpy() - np.array(hand["keypoints"])).max() < 0.02
    # triangles look outwards: a mesh wound the wrong way has a negative volume
    v, f = stored["vertices"][0].astype(float), stored[f"faces_{side}"]
    v = v - v.mean(0)
    assert np.einsum("ij,ij->", v[f[:, 0]], np.cross(v[f[:, 1]], v[f[:, 2]])) > 0
    assert (read_picture(tmp_path / "out/photo.overlay.png") != 90).any()


def test_left_is_the_mirror_of_right(tmp_path):
    hands = {}
    for side in ("right", "left"):
        openpose(tmp_path / side, "photo", side)
        source, = S.find_sources([picture(tmp_path / "photo.png")])
        found, = S.pair_detections(source, tmp_path / side)
        hands[side], = H.reconstruct_hands([read_picture(source.path)], [S.guess_intrinsics(HEIGHT, WIDTH)], found, config=QUICK)
    flip = torch.tensor([-1.0, 1, 1])
    assert torch.allclose(hands["left"].vertices, hands["right"].vertices * flip, atol=2e-4)
    assert torch.allclose(hands["left"].pose, hands["right"].pose, atol=5e-3)


def test_a_video_with_gaps(tmp_path):
    clip, folder = video(tmp_path / "clip.mp4"), tmp_path / "det" / "clip"
    for i in range(6):
        gone = torch.zeros(21) if i in (0, 3) else None
        openpose(folder, f"clip_{i:012d}", confidence=gone)
    summary, = R.reconstruct([clip], tmp_path / "out", detections=tmp_path / "det", config=QUICK, progress=False)
    assert (summary.hands, summary.frames_with_hand) == (4, 4)
    written = json.loads((tmp_path / "out/hands.json").read_text())
    assert [hand["frame"] for hand in written["hands"]] == [1, 2, 4, 5]
    assert [hand["vertices_row"] for hand in written["hands"]] == [0, 1, 2, 3]
    assert np.load(tmp_path / "out/clip.npz")["vertices"].shape == (4, proxy_hand().n_vertices, 3)
    again, = S.find_sources([tmp_path / "out/clip.overlay.mp4"])
    assert (again.frames, again.height, again.width, again.fps) == (6, HEIGHT, WIDTH, 10)
    drawn = [np.ptp(frame.astype(int), axis=(0, 1)).max() for frame in S.read_frames(again)]
    assert min(drawn[i] for i in (1, 2, 4, 5)) > 60 > max(drawn[i] for i in (0, 3))


def test_odd_sizes_folders_and_same_names(tmp_path):
    (tmp_path / "in").mkdir()
    video(tmp_path / "in/b.mp4", 3, 64, 64)
    for name in ("b.png", "c.png"):
        picture(tmp_path / "in" / name, 65, 67)
    (tmp_path / "in/readme.txt").write_text("not a picture")
    picture(tmp_path / "in/c.overlay.png")
    assert [s.name for s in S.find_sources([tmp_path / "in"])] == ["b_mp4", "b_png", "c"]


def test_a_network_without_detections(tmp_path, network):
    summary, = R.reconstruct([picture(tmp_path / "photo.png")], tmp_path / "out", network, box=[10, 10, 70, 80], progress=False)
    assert summary.hands == 1 and summary.before is summary.after is None
    hand, = json.loads((tmp_path / "out/hands.json").read_text())["hands"]
    assert hand["box"] == [5, 10, 75, 80] and hand["error_px"] == {"before": None, "after": None}
    p = {key: torch.tensor([hand[key]], dtype=torch.float32) for key in ("pose", "shape", "rotation")}
    mesh = proxy_hand()(p["pose"], p["shape"], p["rotation"])
    joints = hand["scale"] * mesh.joints[0] + torch.tensor(hand["translation"])
    assert np.abs(joints.numpy() - np.array(hand["joints"])).max() < 2e-5


def test_a_network_with_detections(tmp_path, network):
    openpose(tmp_path / "det", "photo")
    source, = S.find_sources([picture(tmp_path / "photo.png")])
    for fit in (True, False):
        summary, = R.reconstruct([source.path], tmp_path / "out", network, tmp_path / "det", fit=fit, config=QUICK, progress=False)
        assert summary.before is not None and (summary.after is not None) == fit
    assert R.load_network(save_to(tmp_path / "net.safetensors", network))[0].config == network.config


def save_to(path, network):
    save(path, network)
    return path


def test_s2hand_detections_find_their_picture(tmp_path):
    xy, _ = true_joints()
    other = xy / 2
    write_s2hand_detections(tmp_path / "all.json", Detections(["x.jpg", "photo.jpg"], torch.stack([other, xy]), torch.ones(2, 21)))
    source, = S.find_sources([picture(tmp_path / "photo.jpg")])
    (hand,), = S.pair_detections(source, tmp_path / "all.json")
    assert (hand.xy - xy).abs().max() <= 0.5 and hand.side == "right"


def test_a_hand_found_twice_counts_once(tmp_path):
    xy, _ = true_joints()
    size = float((xy.max(0).values - xy.min(0).values).max())
    for shift, hands in ((0.1, 1), (0.5, 2)):
        both = torch.stack([xy, xy + shift * size * torch.tensor([-1.0, 0])])
        write_openpose(tmp_path / "det", Detections(["photo"] * 2, both, torch.tensor([0.7, 0.9])[:, None].expand(2, 21), ["right"] * 2))
        source, = S.find_sources([picture(tmp_path / "photo.png")])
        found, = S.pair_detections(source, tmp_path / "det")
        assert len(found) == hands and (found[0].confidence[0] == (0.9 if hands == 1 else 0.7))


def test_two_hands_in_one_photo(tmp_path):
    right, left = true_joints()[0] * 0.5, true_joints("left")[0] * 0.5 + torch.tensor([60.0, 40])
    write_openpose(tmp_path / "det", Detections(["photo"] * 2, torch.stack([left, right]), torch.ones(2, 21), ["left", "right"]))
    R.reconstruct([picture(tmp_path / "photo.png")], tmp_path / "out", detections=tmp_path / "det", config=QUICK, progress=False)
    assert sorted(os.listdir(tmp_path / "out")) == ["hands.json", "photo.glb", "photo.hand2.glb", "photo.npz", "photo.overlay.png"]
    written = json.loads((tmp_path / "out/hands.json").read_text())
    assert [m["side"] for m in written["sources"][0]["meshes"]] == ["left", "right"] == [h["side"] for h in written["hands"]]
    assert max(h["error_of_box"]["after"] for h in written["hands"]) < 0.05


def test_growing_array_and_chunks(tmp_path, monkeypatch):
    source, = S.find_sources([video(tmp_path / "clip.mp4", 70, 32, 32)])
    assert [len(c) for c in S.in_chunks([source])] == [32, 32, 6]
    monkeypatch.setattr(S, "CHUNK_BYTES", 2 * 32 * 32 * 3)
    assert {len(c) for c in S.in_chunks([source])} == {2}


def broken(tmp_path, kind):
    "Inputs and options of one mistake, and a word of the sentence it deserves."
    photo, det = picture(tmp_path / "photo.png"), tmp_path / "det"
    openpose(det, "photo")
    good = dict(detections=det)
    match kind:
        case "missing": return [tmp_path / "no.png"], good, "no.png: no such file"
        case "not an image":
            (tmp_path / "text.png").write_text("hello")
            return [tmp_path / "text.png"], good, "text.png: not a picture"
        case "no ending":
            (tmp_path / "text").write_text("hello")
            return [tmp_path / "text"], good, "not a picture"
        case "empty file":
            (tmp_path / "zero.jpg").touch()
            return [tmp_path / "zero.jpg"], good, "zero.jpg: not a picture"
        case "cut png" | "cut jpg":
            cut = tmp_path / f"cut.{kind[-3:]}"
            save_picture(cut, np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))
            cut.write_bytes(cut.read_bytes()[:3000])
            return [cut], good, "not a picture"
        case "1x1": return [picture(tmp_path / "dot.png", 1, 1)], good, "1x1 pixels"
        case "empty folder":
            (tmp_path / "none").mkdir()
            return [tmp_path / "none"], good, "no pictures"
        case "truncated video":
            data = video(tmp_path / "clip.mp4", 30).read_bytes()
            (tmp_path / "clip.mp4").write_bytes(data[:len(data) // 2])
            return [tmp_path / "clip.mp4"], good, "clip.mp4"
        case "not a video":
            (tmp_path / "clip.mp4").write_bytes(b"\0" * 1000)
            return [tmp_path / "clip.mp4"], good, "not a video"
        case "detections missing": return [photo], dict(detections=tmp_path / "nowhere"), "no such detection"
        case "detections of nobody":
            (det / "photo_keypoints.json").rename(det / "other_keypoints.json")
            return [photo], good, "no detections for photo.png"
        case "detections not json":
            (det / "photo_keypoints.json").write_text("{")
            return [photo], good, "photo_keypoints.json"
        case "detections of the wrong shape":
            (det / "photo_keypoints.json").write_text(json.dumps({"people": [{"hand_right_keypoints_2d": [1.0] * 60}]}))
            return [photo], good, "60"
        case "detections of another picture":
            openpose(det, "photo", xy=true_joints()[0] * 20)
            return [photo], good, "another picture"
        case "detections named otherwise":
            return [photo], dict(detections=openpose(det, "somebody")), "of somebody, not of photo.png"
        case "detections of a longer video":
            for i in range(9):
                openpose(det / "clip", f"clip_{i:012d}")
            return [video(tmp_path / "clip.mp4", 6)], good, "frame 6"
        case "detections of another video":
            openpose(det / "clip", "film_000000000000")
            return [video(tmp_path / "clip.mp4", 6)], good, "film"
        case "box outside": return [photo], dict(box=[0, 0, 500, 20], network=0), "does not lie in"
        case "box and detections": return [photo], dict(box=[0, 0, 50, 20], **good), "not both"
        case "side": return [photo], dict(side="up", **good), "side"
        case "focal": return [photo], dict(focal=-3.0, **good), "focal"
        case "nothing to start from": return [photo], {}, "checkpoint"
        case "no inputs": return [], good, "at least one"
        case "out is a file":
            (tmp_path / "out").write_text("mine")
            return [photo], good, "folder"
    raise AssertionError(kind)


KINDS = ["missing", "not an image", "cut png", "cut jpg", "no ending", "empty file", "1x1", "empty folder", "truncated video", "not a video", "detections missing",
         "detections of nobody", "detections not json", "detections of the wrong shape", "detections of another picture",
         "detections named otherwise", "detections of a longer video", "detections of another video", "box outside", "box and detections",
         "side", "focal", "nothing to start from", "no inputs", "out is a file"]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, kind, network):
    inputs, options, word = broken(tmp_path, kind)
    if "network" in options:
        options["network"] = network
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError) as error:
        R.reconstruct(inputs, tmp_path / "out", progress=False, **options)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    openpose(tmp_path / "det", "photo")
    photo = picture(tmp_path / "photo.png")
    for out in (tmp_path / "new/deep", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old/mine.txt").write_text("kept")
        monkeypatch.setattr(R, "write_glb", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            R.reconstruct([photo], out, detections=tmp_path / "det", config=QUICK, progress=False)
    assert not (tmp_path / "new").exists() and os.listdir(tmp_path / "old") == ["mine.txt"]


# ---- no detections, but a network with a 2D branch

@pytest.mark.parametrize("side", ["right", "left"])
def test_the_network_s_own_2d_branch_feeds_the_fit(monkeypatch, side):
    "A branch that is told the true joints: the fit must follow it, in the picture's own pixels, whichever hand it is."
    from handrecon import hands as module
    from handrecon.hands import reconstruct_hands
    from handrecon.sources import Hand2D
    from handrecon.synthetic import SyntheticConfig, make_batch
    seen, known = make_batch(1, seed=4, config=SyntheticConfig(image_size=128, view_spread=0.2, occluder=0.0))
    torch.manual_seed(0)
    network = S2Hand(S2HandConfig(backbone="small", image_size=64, rotation="6d", canonical_focal=2.14, z_bias=0.45, bone_length=0.0,
                                  branch_stacks=1, branch_modules=1, branch_width=8, branch_depth=1), proxy_hand(n_pca=30, flat_hand_mean=False))
    monkeypatch.setattr(module, "detect_keypoints", lambda model, image: (known.keypoints * 64 / 128, torch.ones(1, 21)))
    for name, value in (("LOOKS", 1), ("QUARTERS", (0.0,))): monkeypatch.setattr(module, name, value)      # it tells them for the crop as it is
    picture = (seen.image[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    K, truth = seen.K[0].clone(), known.keypoints[0].clone()
    if side == "left": picture, K[0, 2], truth[:, 0] = picture[:, ::-1].copy(), 128 - K[0, 2], 128 - truth[:, 0]
    free = FitConfig(steps=400, w_network=0.0)                                           # the network has learned nothing: no pull back to it
    (hand,) = reconstruct_hands([picture], [K], [Hand2D(torch.tensor([0.0, 0.0, 128.0, 128.0]), side)], network, config=free)
    assert hand.score == 1 and (hand.keypoints - truth).norm(dim=-1).median() < 4 and hand.error_after < hand.error_before
    (guess,) = reconstruct_hands([picture], [K], [Hand2D(torch.tensor([0.0, 0.0, 128.0, 128.0]), side)], network, fit=False)
    assert guess.error_after is None and guess.detected_size is None                     # --no-fit: the network's answer as it is


# ---- a camera

class Camera:
    "Pictures that get lighter; after `last` of them it ends, or somebody presses Ctrl-C."

    def __init__(self, last=20, ends=True, there=True):
        self.last, self.ends, self.there, self.shown, self.released = last, ends, there, 0, False

    def isOpened(self): return self.there
    def release(self): self.released = True

    def read(self):
        if self.shown == self.last:
            if self.ends: return False, None
            raise KeyboardInterrupt
        self.shown += 1
        return True, np.full((HEIGHT, WIDTH, 3), 8 * self.shown, np.uint8)


@pytest.mark.parametrize("last, ends, frames, taken", [(20, True, None, 20), (20, False, None, 20), (20, False, 7, 7), (3, False, 7, 3), (1, True, None, 1)])
def test_a_film_ends_by_number_by_itself_or_by_ctrl_c(tmp_path, last, ends, frames, taken):
    camera, tick = Camera(last, ends), iter(range(1000))
    assert S.take_film(camera, tmp_path / "camera0.mp4", frames, clock=lambda: next(tick) / 12) == taken and camera.released
    source, = S.find_sources([tmp_path / "camera0.mp4"])
    assert source.frames == taken and (taken == 1 or abs(source.fps - 12) < 0.01)
    grey = [float(x.mean()) for x in S.read_frames(source)]
    assert np.abs(np.array(grey) - 8 * np.arange(1, taken + 1)).max() < 6


def test_a_camera_s_film_joins_the_results(tmp_path, monkeypatch, network):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(S, "open_camera", lambda number: Camera(6))
    with S.filmed(["camera:1"], tmp_path / "out", 4) as sources:
        summary, = R.reconstruct(sources, tmp_path / "out", network, box=(0, 0, 64, 64), progress=False)
    assert summary.source.frames == 4 and {"camera1.mp4", "camera1.overlay.mp4", "hands.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out/hands.json").read_text())["sources"][0]["file"] == "camera1.mp4"


@pytest.mark.parametrize("inputs, options, words", [
    (["camera:0"], {}, "opened, but no picture"), (["camera:"], {}, "camera's number"), (["camera:x"], {}, "camera's number"), (["camera:97"], {"real": True}, "camera:97: no such camera"),
    (["camera:0", "a.mp4"], {}, "alone"), (["camera:0"], {"detections": "det"}, "no detections"), (["a.mp4"], {"frames": 3}, "--frames is for a camera")])
def test_camera_mistakes(tmp_path, monkeypatch, inputs, options, words, capfd):
    if not options.pop("real", False): monkeypatch.setattr(S, "open_camera", lambda number: Camera(0))
    with pytest.raises(S.InputError, match=words):
        with S.filmed(inputs, tmp_path / "out", **options): raise AssertionError("should not begin")
    assert not (tmp_path / "out").exists() and capfd.readouterr().err == ""


def test_nearer_hands_hide_farther_ones(tmp_path, network):
    "Whatever their order in the list."
    found = []
    for z, side in ((0.4, "right"), (0.6, "left")):
        mesh = proxy_hand()(torch.zeros(1, 45), None, None, torch.tensor([[0.0, 0.0, z]]))
        v, j = mesh.vertices[0], mesh.joints[0]
        flip = torch.tensor([-1.0 if side == "left" else 1.0, 1, 1])
        K = S.guess_intrinsics(HEIGHT, WIDTH)
        found.append(H.Hand3D(side, K, torch.tensor([0.0, 0, 64, 64]), 1.0, v * flip, j * flip, torch.full((21, 2), -50.0), torch.zeros(45), torch.zeros(10), torch.zeros(3), torch.tensor([0, 0, z]), 1.0, None, None, None))
    path = picture(tmp_path / "a.png")
    source, = S.find_sources([path or tmp_path / "a.png"])
    (tmp_path / "w").mkdir()
    writer, blank = R.SourceWriter(source, tmp_path / "w", proxy_hand()), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    one, other, near = writer._drawn(blank, found), writer._drawn(blank, found[::-1]), writer._drawn(blank, found[:1])
    assert (one == other).all() and (one != near).any()
    inside = near.min(-1) > 60                                  # the nearer hand's inner pixels are as if it were alone
    assert inside.sum() > 50 and np.abs(one[inside].astype(int) - near[inside]).mean() < 1
    writer.close()

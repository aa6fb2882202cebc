"""The writers: each layout is read back and compared with the scene it was made of, and an interruption leaves nothing half done."""
import hashlib
import json
import pickle
import re

import numpy as np
import pytest
import torch

from handrecon import layouts
from handrecon.camera import project
from handrecon.conventions import OPENGL_TO_OPENCV, convert_joints
from handrecon.datasets import HO3D, RHD, STB, InterHand, YouTube3D, mano_mesh
from handrecon.layouts import LAYOUTS, depth_picture, hand_of, image_aligned, old_pickle, write_layout
from handrecon.raster import rasterize
from handrecon.synthetic import SyntheticConfig

PLAIN = SyntheticConfig(view_spread=0.6, occluder=0.0, forearm=0.0, sleeve=0.0, sensor_noise=0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Every layout once, and the actors that each block was made of."
    root, scenes, original = tmp_path_factory.mktemp("layouts"), {}, layouts.shoot

    def watched(actors, present, view, *rest):
        pictures = original(actors, present, view, *rest)
        scenes.setdefault(watched.layout, []).append((actors, present, view, pictures))
        return pictures
    layouts.shoot = watched
    try:
        for name in LAYOUTS:
            watched.layout = name
            write_layout(name, root / name, 3, 5, PLAIN, progress=False)
    finally:
        layouts.shoot = original
    return root, scenes


def picture_error(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


# what was written is what is read ------------------------------------------------------------------

def test_ho3d_round_trip(made):
    root, scenes = made
    (actor,), _, view, pictures = scenes["ho3d"][0]
    data = HO3D(root / "ho3d", cache=False)
    assert len(data) == 3 and data.skipped == ["SYNT0/0003"]
    for i in range(3):
        x = data[i]
        assert np.array_equal(x.image, pictures[i])                             # png keeps every bit
        assert torch.allclose(x.K, view.K)
        assert torch.allclose(x.joints, actor.mesh.joints[i], atol=1e-6)
        assert (x.keypoints - project(actor.mesh.joints, view.Ks(3))[i]).abs().max() < 0.5
        assert torch.allclose(mano_mesh(x, hand_of("right")).vertices[0], actor.mesh.vertices[i], atol=2e-6)
        rendered = rasterize(actor.mesh.vertices[i:i + 1], actor.model.faces, view.K[None], (480, 640)).depth[0].numpy()
        assert np.abs(x.depth - rendered)[rendered > 0].max() < 1e-4            # a unit is 0.125 mm


def test_ho3d_version_3_has_jpg(tmp_path):
    write_layout("ho3d", tmp_path / "v3", 1, 0, PLAIN, version=3, progress=False)
    x = HO3D(tmp_path / "v3", cache=False)[0]
    assert x.path.endswith("0000.jpg") and x.image.shape == (480, 640, 3)
    meta = pickle.loads((tmp_path / "v3/train/SYNT0/meta/0000.pkl").read_bytes(), encoding="latin1")      # ours: safe to load
    assert meta["handVertContact"].shape == (778,)
    tips = np.load(tmp_path / "v3/manual_annotations/SYNT0_0000.npy")
    assert np.array_equal(tips, meta["handJoints3D"][[20, 19, 18, 17, 16]])
    rig = tmp_path / "v3/calibration/SYNT0/calibration"
    assert sorted(p.name for p in rig.iterdir()) == ["cam_0_depth_scale.txt", "cam_0_intrinsics.txt", "cam_orders.txt", "trans_0.txt"]
    numbers = {k: float(v) for k, v in (pair.split(":") for pair in (rig / "cam_0_intrinsics.txt").read_text().split(","))}
    K = meta["camMat"]
    assert numbers == pytest.approx({"fx": K[0, 0], "fy": K[1, 1], "ppx": K[0, 2], "ppy": K[1, 2]}, abs=1e-3)
    assert np.array_equal(np.loadtxt(rig / "trans_0.txt"), np.eye(4))


def test_stb_is_a_stereo_pair(made):
    root, scenes = made
    (actor,), _, left_view, left = scenes["stb"][0]
    _, _, right_view, right = scenes["stb"][1]
    data = STB(root / "stb")
    assert len(data) == 6 and data[0].side == "left"
    for i in range(3):
        a, b = data[2 * i], data[2 * i + 1]
        assert a.partner == 2 * i + 1 and b.partner == 2 * i
        assert np.array_equal(a.image, left[i]) and np.array_equal(b.image, right[i])
        assert torch.allclose(a.joints, actor.mesh.joints[i], atol=1e-6)
        assert torch.allclose(b.joints, right_view.see(actor.mesh.joints)[i], atol=1e-6)
        assert torch.allclose(a.keypoints[:, 1], b.keypoints[:, 1], atol=1e-3)                            # rectified
        disparity = a.keypoints[:, 0] - b.keypoints[:, 0]
        assert torch.allclose(disparity, 822.79041 * 0.120054 / a.joints[:, 2], atol=2e-3)


def test_stb_colour_camera_and_its_depth(made):
    root, scenes = made
    (actor,), _, view, pictures = scenes["stb"][2]
    data = STB(root / "stb", camera="SK")
    x = data[0]
    assert np.array_equal(x.image, pictures[0]) and torch.allclose(x.joints, actor.mesh.joints[0], atol=2e-6)
    sensor = layouts.STB_SK[1]
    seen = rasterize(sensor.see(actor.mesh.vertices[:1]), actor.model.faces, sensor.K[None], (480, 640)).depth[0].numpy()
    assert np.abs(data.read_sensor_depth(0) - seen)[seen > 0].max() <= 0.00051


def test_rhd_round_trip(made):
    root, scenes = made
    actors, _, view, pictures = scenes["rhd"][0]
    data = RHD(root / "rhd", hand="both", cache=False)
    assert len(data) == 6
    for i in range(6):
        x, actor = data[i], actors[i % 2]
        assert x.side == actor.model.side and x.other == i ^ 1
        assert np.array_equal(x.image, pictures[i // 2])
        assert torch.allclose(x.joints, actor.mesh.joints[i // 2], atol=1e-6)
        assert (project(x.joints[None], x.K[None])[0] - x.keypoints).abs().max() < 1e-3
        silhouette = rasterize(actor.mesh.vertices[i // 2:i // 2 + 1], actor.model.faces, view.K[None], (320, 320)).face_index[0].numpy() >= 0
        assert (x.mask & silhouette).sum() > 0.98 * x.mask.sum()                # the other hand may hide some of it
        assert np.abs(x.depth[x.mask] - float(x.joints[:, 2].mean())).max() < 0.15


def test_rhd_larger_hand_is_evaluated(made):
    root, _ = made
    both, larger = RHD(root / "rhd", hand="both", cache=False), RHD(root / "rhd", cache=False)
    for i in range(len(larger)):
        masks = {both[2 * i + k].side: both[2 * i + k].mask.sum() for k in range(2)}
        assert larger[i].side == max(masks, key=masks.get) and larger[i].mask.sum() == max(masks.values())
        assert (larger[i].detected - larger[i].keypoints).norm(dim=-1).median() < 5


def test_rhd_parts_run_from_tip_to_palm(made):
    root, scenes = made
    data = RHD(root / "rhd", hand="both", cache=False)
    x = data[0]
    parts = data.parts(0)
    assert set(np.unique(parts)) <= set(range(34)) and {0, 17, 33} <= set(np.unique(parts))
    rows, columns = np.nonzero(parts == 5)                                       # the left index finger's end
    middle = torch.tensor([columns.mean() + 0.5, rows.mean() + 0.5]).float()
    assert (x.keypoints - middle).norm(dim=-1).argmin() in (7, 8)


def test_interhand_round_trip(made):
    root, scenes = made
    data = InterHand(root / "interhand", cache=False)
    assert [data.label(i).side for i in range(len(data))] == ["right"] * 2 + ["left"] * 2 + ["right", "left"] * 2
    for i in range(len(data)):
        x = data[i]
        view_number, frame = x.sequence.endswith("270"), int(x.frame)
        actors, _, view, pictures = scenes["interhand"][int(view_number)]
        actor = actors[int(x.side == "right")]
        truth = view.see(actor.mesh.joints)[frame]
        assert picture_error(x.image, pictures[frame]) < 3                       # jpg
        assert torch.allclose(x.K, view.K, atol=1e-3)
        assert x.joints_valid[0] and x.joints_valid.sum() >= 15
        assert torch.allclose(x.joints[x.joints_valid], truth[x.joints_valid], atol=2e-6)
        assert (x.joints[~x.joints_valid] == 0).all() and (x.keypoints[~x.keypoints_valid] == 0).all()
        assert (x.keypoints - project(truth[None], view.K[None])[0])[x.keypoints_valid].abs().max() < 0.05
        assert torch.allclose(mano_mesh(x, hand_of(x.side)).joints[0], truth, atol=3e-6)
        inside = (x.keypoints >= x.box[:2]) & (x.keypoints <= x.box[2:])
        assert inside[x.keypoints_valid].all()
    assert data.label(4).other == 5 and data.label(5).other == 4 and data.label(0).other is None


def test_interhand_skeleton_agrees_with_the_joint_order(made):
    root, _ = made
    lines = (root / "interhand/annotations/skeleton.txt").read_text().splitlines()[1:]
    parents = {int(line.split()[1]): int(line.split()[2]) for line in lines}
    assert len(parents) == 42 and parents[20] == parents[41] == -1 and parents[0] == 1 and parents[3] == 20 and parents[24] == 41


def test_youtube_round_trip(made):
    root, scenes = made
    actors, present, view, pictures = scenes["yt3d"][0]
    data, regressed = YouTube3D(root / "yt3d", cache=False), YouTube3D(root / "yt3d", hand=hand_of("right"), cache=False)
    rows = [(i, k) for i in range(3) for k in range(2) if present[i, k]]
    assert len(data) == len(rows)
    for j, (i, k) in enumerate(rows):
        x, actor = data[j], actors[k]
        assert x.K is None and not x.joints_valid.any() and x.side == actor.model.side
        assert np.array_equal(x.image, pictures[i])
        assert torch.allclose(x.pixel_vertices, image_aligned(actor.mesh.vertices, view)[i], atol=1e-3)
        truth = project(actor.mesh.joints, view.Ks(3))[i]
        assert x.keypoints_valid.nonzero().flatten().tolist() == [4, 8, 12, 16, 20]
        assert torch.allclose(x.keypoints[4::4], truth[4::4], atol=1e-2)
        assert (regressed[j].keypoints - truth).norm(dim=-1).mean() < 2.5        # a regressor made for the rest pose is off by 1 to 2 mm
    assert data.label(2).other == 3


def test_the_other_splits_are_there(made):
    root, _ = made
    evaluation = HO3D(root / "ho3d", "evaluation", cache=False)
    assert len(evaluation) == 1 and len(STB(root / "stb", "test")) == 2 and len(RHD(root / "rhd", "evaluation", cache=False)) == 1
    assert all(len(InterHand(root / "interhand", s, cache=False)) for s in ("val", "test")) and len(YouTube3D(root / "yt3d", "val", cache=False)) == 1


def test_pictures_and_their_skeletons_agree(made):
    "An independent look: joints in plain sight lie on the hand that was rendered."
    root, scenes = made
    for name in ("ho3d", "stb", "interhand"):
        for actors, present, view, _ in scenes[name][:2]:
            for k, actor in enumerate(actors):
                seen = rasterize(view.see(actor.mesh.vertices), actor.model.faces, view.Ks(len(present)), (view.height, view.width)).face_index >= 0
                uv = project(view.see(actor.mesh.joints), view.Ks(len(present))).floor().long()
                for i in present[:, k].nonzero().flatten().tolist():
                    u, v = uv[i].unbind(-1)
                    inside = (u >= 0) & (u < view.width) & (v >= 0) & (v < view.height)
                    assert seen[i][v[inside], u[inside]].float().mean() > 0.8


# files -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("low_first", [True, False])
def test_two_byte_depth_picture(low_first):
    from handrecon.formats import two_byte_depth
    depth = np.arange(65536, dtype=np.float32).reshape(256, 256)
    assert np.array_equal(two_byte_depth(depth_picture(depth, low_first), low_first), depth)


def test_old_pickle_is_readable_by_old_numpy():
    tree = {"a": np.eye(3), "b": None, 3: [1, "x"]}
    data = old_pickle(tree)
    assert data[:2] == b"\x80\x02" and b"numpy._core" not in data and b"numpy.core" in data
    back = pickle.loads(data, encoding="latin1")
    assert np.array_equal(back["a"], np.eye(3)) and back["b"] is None and back[3] == [1, "x"]


def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("layout", ["rhd", "interhand"])
def test_same_seed_same_files_and_resuming_changes_nothing(tmp_path, monkeypatch, layout):
    write_layout(layout, tmp_path / "whole", 5, 3, PLAIN, block=2, progress=False)
    original, calls = layouts._make, []

    def interrupted(block, kind):
        calls.append(block)
        if len(calls) == 3: raise KeyboardInterrupt
        original(block, kind)
    monkeypatch.setattr(layouts, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_layout(layout, tmp_path / "parts", 5, 3, PLAIN, block=2, progress=False)
    monkeypatch.setattr(layouts, "_make", original)
    begun = {p for p in (tmp_path / "parts").rglob("*") if p.suffix in (".png", ".jpg")}
    times = {p: p.stat().st_mtime_ns for p in begun}
    write_layout(layout, tmp_path / "parts", 5, 3, PLAIN, block=2, progress=False)
    assert begun and all(p.stat().st_mtime_ns == t for p, t in times.items())    # finished blocks were not made again
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob(".*"))


def test_a_complete_folder_is_left_alone_and_another_recipe_refused(made, tmp_path):
    root, _ = made
    before = digests(root / "rhd")
    write_layout("rhd", root / "rhd", 3, 5, PLAIN, progress=False)
    assert digests(root / "rhd") == before
    with pytest.raises(ValueError, match="another recipe"):
        write_layout("rhd", root / "rhd", 4, 5, PLAIN, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ValueError, match="files that are not ours"):
        write_layout("rhd", tmp_path / "mine", 1, progress=False)


def test_full_disk_leaves_one_sentence(tmp_path, monkeypatch):
    import errno

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(layouts, "write_bytes", full)
    with pytest.raises(OSError, match="the disk is full; free some space and run the same command again"):
        write_layout("rhd", tmp_path / "rhd", 1, progress=False)


@pytest.mark.parametrize("wrong", [{"layout": "coco"}, {"n": 0}, {"version": 4, "layout": "ho3d"}])
def test_wrong_arguments(tmp_path, wrong):
    with pytest.raises(ValueError, match="write_layout: expected"):
        write_layout(**({"layout": "rhd", "root": tmp_path / "x", "n": 1} | wrong))
    assert not (tmp_path / "x").exists()


def test_hands_of_one_person_have_one_skin(made):
    _, scenes = made
    left, right = scenes["rhd"][0][0]
    assert (left.scene.skin - right.scene.skin).abs().max() < 0.02 and (left.scene.skin[0] - left.scene.skin[1]).abs().max() > 0.02


def test_evaluation_truth_of_ho3d_is_in_its_own_axes_and_order(made):
    root, scenes = made
    (actor,), _, _, _ = scenes["ho3d"][-1]
    xyz = torch.tensor(json.loads((root / "ho3d/evaluation_xyz.json").read_text()))
    assert (xyz[..., 2] < 0).all()
    ours = convert_joints(xyz, "ho3d") * torch.tensor(OPENGL_TO_OPENCV)
    assert torch.allclose(ours, actor.mesh.joints, atol=1e-5)


def test_names_follow_the_official_pattern(made):
    root, _ = made
    patterns = {"ho3d": r"(train|evaluation)/\w+/(rgb|depth)/\d{4}\.png|(train|evaluation)/\w+/meta/\d{4}\.pkl|(train|evaluation)\.txt|evaluation_(xyz|verts)\.json|openpose/\w+/detect\.json",
                "stb": r"images/B[1-6](Counting|Random)/(BB_left|BB_right|SK_color|SK_depth)_\d+\.png|labels/B[1-6](Counting|Random)_(BB|SK)\.mat",
                "rhd": r"(training|evaluation)/(color|mask|depth)/\d{5}\.png|(training|evaluation)/anno_(training|evaluation)\.pickle|(training|evaluation)/openpose/detect\.json",
                "interhand": r"images/(train|val|test)/Capture\d+/\w+/cam\d+/image\d+\.jpg|annotations/skeleton\.txt"
                             r"|annotations/(train|val|test)/InterHand2\.6M_(train|val|test)_(data|camera|joint_3d|MANO_NeuralAnnot)\.json",
                "yt3d": r"data/youtube_(train|val|test)\.json|data/youtube/\w+/video/frames/\d+\.png"}
    for name, pattern in patterns.items():
        for path in (p for p in (root / name).rglob("*") if p.is_file() and p.name != "synthetic.json"):
            assert re.fullmatch(pattern, str(path.relative_to(root / name))), path

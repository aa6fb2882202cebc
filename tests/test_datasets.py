"""The loaders: every trap of the formats, files by their official writers' habits, and nothing but one sentence for bad ones."""
import json
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mano_fixtures import Python2Pickler, fresh, py2_array

from handrecon import datasets, formats
from handrecon.camera import project
from handrecon.conventions import OPENGL_TO_OPENCV, STB_TO_FREIHAND
from handrecon.datasets import (DATASETS, FREIHAND_VERSIONS, HO3D, RHD, STB, CocoHands, FreiHAND, InterHand, OwnPictures, YouTube3D, check_data, mano_mesh, open_data,
                                palm_to_wrist, read_ho3d_meta, stb_depth_pose, suspicions)
from handrecon.formats import DataError, decode, indexed, mat_bytes, read_annotations, read_json, read_mat, read_rgb, two_byte_depth
from handrecon.keypoints import Detections, read_detections, write_s2hand_detections
from handrecon.layouts import hand_of, old_pickle, write_layout
from handrecon.proxy_hand import proxy_hand
from handrecon.synthetic import SyntheticConfig, write_freihand

SMALL = SyntheticConfig(view_spread=0.6)


@pytest.fixture(scope="module")
def frei(tmp_path_factory):
    root = tmp_path_factory.mktemp("freihand") / "d"
    write_freihand(root, 3, 1, evaluation=2, progress=False)
    for k in range(1, 4):                                    # the other three backgrounds: the same hand, another picture
        for row in range(3):
            picture = cv2.imread(str(root / f"training/rgb/{row:08d}.jpg"))
            cv2.imwrite(str(root / f"training/rgb/{row + 3 * k:08d}.jpg"), np.clip(picture.astype(int) + 10 * k, 0, 255).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name in ("ho3d", "stb", "rhd", "interhand", "yt3d", "coco-hands"):
        write_layout(name, root / name, 3, 2, SMALL, progress=False)
    return root


@pytest.fixture
def copy(made, tmp_path):
    "A copy of a data set that a test may damage."
    def make(name):
        return Path(shutil.copytree(made / name, tmp_path / name))
    return make


# FreiHAND -------------------------------------------------------------------------------------------

def test_freihand_id_is_row_plus_rows_times_version(frei):
    data = FreiHAND(frei)
    assert len(data) == 12 and data.versions == [0, 1, 2, 3]
    assert [data.picture_id(i) for i in (0, 2, 3, 11)] == [0, 2, 3, 11]
    a, b = data[1], data[1 + 3 * 2]
    assert b.path.endswith("00000007.jpg") and torch.equal(a.joints, b.joints) and torch.equal(a.K, b.K) and np.array_equal(a.mask, b.mask)
    assert not np.array_equal(a.image, b.image)
    assert torch.equal(a.detected, b.detected)               # the file lists unique samples
    one = FreiHAND(frei, versions=["hom"])
    assert len(one) == 3 and one[0].path.endswith("00000003.jpg")
    assert FREIHAND_VERSIONS == ("gs", "hom", "sample", "auto")


def test_freihand_official_arithmetic():
    data = FreiHAND.__new__(FreiHAND)
    data.K, data.versions = np.zeros((32560, 3, 3), np.float32), [0, 1, 2, 3]
    assert [data.picture_id(i) for i in (355, 355 + 32560, 355 + 2 * 32560, 355 + 3 * 32560)] == [355, 32915, 65475, 98035]
    assert len(data) == 130240 and data.picture_id(130239) == 130239


def test_freihand_parameters_add_the_mean_pose(frei):
    data = FreiHAND(frei, vertices=True)
    x = data[0]
    assert x.mano.adds_mean and x.mano.anchor == 9 and x.mano.axes == "camera"
    assert torch.allclose(x.mano.translation, x.joints[9], atol=1e-4)
    for flat in (True, False):                               # whether the model adds the mean itself must not matter
        mesh = mano_mesh(x, proxy_hand(flat_hand_mean=flat))
        assert (mesh.vertices[0] - x.vertices).abs().max() < 1e-4 and (mesh.joints[0] - x.joints).abs().max() < 1e-4
    wrong = mano_mesh(replace(x, mano=replace(x.mano, adds_mean=False)), proxy_hand())
    assert (wrong.vertices[0] - x.vertices).abs().max() > 5e-3


def test_freihand_mask_and_scale(frei):
    x = FreiHAND(frei)[2]
    assert x.mask.dtype == bool and x.mask.shape == x.image.shape[:2] and 0.02 < x.mask.mean() < 0.6
    scale = json.loads((frei / "training_scale.json").read_text())[2]
    assert float((x.joints[9] - x.joints[10]).norm()) == pytest.approx(scale, abs=1e-6)


def test_freihand_evaluation_without_its_truth(frei, tmp_path):
    root = Path(shutil.copytree(frei, tmp_path / "f"))
    (root / "evaluation_xyz.json").unlink()
    x = FreiHAND(root, "evaluation")[1]
    assert not x.joints_valid.any() and not x.keypoints_valid.any() and x.mano is None and x.mask is None and x.detected is not None


def test_detections_are_found_by_name_not_by_row(frei, tmp_path):
    found = Detections(["00000002.jpg", "00000000.jpg"], torch.arange(84.0).view(2, 21, 2), torch.ones(2, 21))
    write_s2hand_detections(tmp_path / "d.json", found)
    data = FreiHAND(frei, versions=["gs"], detections=tmp_path / "d.json")
    assert torch.equal(data.label(0).detected, found.xy[1]) and torch.equal(data.label(2).detected, found.xy[0])
    assert data.label(1).detected is None


# HO-3D ----------------------------------------------------------------------------------------------

def test_ho3d_axes_are_opengl(made):
    meta = pickle.loads((made / "ho3d/train/SYNT0/meta/0000.pkl").read_bytes(), encoding="latin1")
    x = HO3D(made / "ho3d", cache=False)[0]
    assert meta["handJoints3D"][:, 2].max() < 0 and x.joints[:, 2].min() > 0
    assert torch.allclose(x.joints[0], torch.tensor(meta["handJoints3D"][0]).float() * torch.tensor(OPENGL_TO_OPENCV), atol=1e-6)
    assert not x.mano.adds_mean and x.mano.axes == "opengl"
    assert (mano_mesh(x, proxy_hand()).joints[0] - x.joints).abs().max() < 1e-5
    assert (mano_mesh(replace(x, mano=replace(x.mano, adds_mean=True)), proxy_hand()).joints[0] - x.joints).abs().max() > 5e-3


def test_ho3d_order_has_the_tips_last(made):
    meta = pickle.loads((made / "ho3d/train/SYNT0/meta/0000.pkl").read_bytes(), encoding="latin1")
    x = HO3D(made / "ho3d", cache=False)[0]
    flip = torch.tensor(OPENGL_TO_OPENCV)
    for theirs, ours in ((16, 4), (17, 8), (18, 12), (19, 16), (20, 20), (13, 1), (7, 17)):
        assert torch.allclose(torch.tensor(meta["handJoints3D"][theirs]).float() * flip, x.joints[ours], atol=1e-6)


def test_ho3d_frames_without_annotation_are_left_out(made):
    data = HO3D(made / "ho3d", cache=False)
    assert data.skipped == ["SYNT0/0003"] and len(data) == 3 and len((made / "ho3d/train.txt").read_text().split()) == 4


def test_ho3d_evaluation_tells_the_wrist_only(copy):
    root = copy("ho3d")
    (root / "evaluation_xyz.json").unlink()
    x = HO3D(root, "evaluation", cache=False)[0]
    assert x.joints_valid.nonzero().flatten().tolist() == [0] and x.keypoints_valid.sum() == 1 and x.mano is None
    assert (x.box[:2] < x.keypoints[0]).all() and (x.keypoints[0] < x.box[2:]).all()


def test_ho3d_depth_does_not_overflow_a_byte(made):
    x = HO3D(made / "ho3d", cache=False)[0]
    picture = read_rgb(made / "ho3d/train/SYNT0/depth/0000.png")
    wrong = (picture[..., 0] + np.uint8(0) * picture[..., 1] + picture[..., 1] * np.uint8(255)).astype(np.float32)
    assert x.depth.max() == pytest.approx(1.2, abs=1e-3) and wrong.max() < 256
    hand = x.depth[x.keypoints[9, 1].int(), x.keypoints[9, 0].int()]
    assert abs(hand - x.joints[9, 2]) < 0.2


def test_two_byte_depth_by_hand():
    pixel = np.array([[[200, 3, 77]]], np.uint8)
    assert two_byte_depth(pixel)[0, 0] == 200 + 3 * 256 and two_byte_depth(pixel, low_first=False)[0, 0] == 200 * 256 + 3


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_ho3d_meta_as_python_2_wrote_it(tmp_path, protocol):
    g = np.random.default_rng(0)
    meta = {"camMat": g.normal(size=(3, 3)), "handJoints3D": g.normal(size=(21, 3)), "handPose": g.normal(size=48), "handBeta": g.normal(size=10),
            "handTrans": g.normal(size=3), "objRot": g.normal(size=(3, 1)), "objTrans": g.normal(size=3)}
    tree = {key: py2_array(value) for key, value in meta.items()} | {"objName": fresh("003_cracker_box"), "objLabel": 2, "camIDList": [fresh("0"), fresh("1")]}
    (tmp_path / "m.pkl").write_bytes(Python2Pickler(protocol).dumps(tree))
    back = read_ho3d_meta(tmp_path / "m.pkl")
    for key in ("camMat", "handPose", "handBeta", "handTrans"):
        assert np.allclose(back[key], meta[key])
    assert np.allclose(back["joints"], meta["handJoints3D"])


def test_ho3d_reader_falls_back_to_jpg(copy):
    root = copy("ho3d")
    folder = root / "train/SYNT0/rgb"
    cv2.imwrite(str(folder / "0001.jpg"), cv2.imread(str(folder / "0001.png")))
    (folder / "0001.png").unlink()
    assert HO3D(root, cache=False)[1].path.endswith("0001.jpg")


def test_ho3d_uses_the_sound_metas_and_names_the_others(copy):
    root = copy("ho3d")
    (root / "train/SYNT0/meta/0000.pkl").write_bytes(b"garbage")
    (root / "train/SYNT0/meta/0002.pkl").unlink()
    with pytest.warns(UserWarning, match="1 of 4 metas of train are missing, their frames are left out: SYNT0/0002"):
        data = HO3D(root, cache=False)
    assert data.names == ["SYNT0/0001"] and data.skipped == ["SYNT0/0003"] and "1 of 4 metas of train cannot be read" in data.left_out[1] and "0000.pkl" in data.left_out[1]
    report = check_data("ho3d", root, cache=False)
    assert len(report.problems) == 2 and "SYNT0/0002" in report.problems[0] and "train: 1 pictures" in report.lines[0] and any("1 samples opened" in line for line in report.lines)
    assert HO3D(root, "evaluation", cache=False).left_out == ()


def test_ho3d_without_any_meta_is_no_data_set(copy):
    root = copy("ho3d")
    for path in (root / "train/SYNT0/meta").iterdir(): path.unlink()
    with pytest.raises(DataError, match="4 of 4 metas of train are missing: SYNT0/0000"):
        HO3D(root, cache=False)


# STB ------------------------------------------------------------------------------------------------

def test_stb_joint_0_is_the_palm(made):
    raw = scipy.io.loadmat(made / "stb/labels/B2Counting_BB.mat")["handPara"]
    assert raw.shape == (3, 21, 1) and raw.dtype == np.float64 and raw[2].min() > 300        # millimetres
    kept = STB(made / "stb", wrist=None)
    x = kept.label(0)
    assert not x.joints_valid[0] and (x.joints[0] == 0).all() and x.joints_valid[1:].all()
    assert np.allclose(kept.palm(0) * 1000, raw[:, 0, 0], atol=1e-2)
    assert np.allclose(x.joints[1:].numpy() * 1000, raw[:, STB_TO_FREIHAND[1:], 0].T, atol=1e-2)
    with pytest.raises(ValueError, match="wrist=None"):
        STB(made / "stb").palm(0)


def test_three_palm_to_wrist_formulas():
    j = torch.randn(4, 21, 3, generator=torch.Generator().manual_seed(0))
    palm = j[:, 0]
    assert torch.allclose(palm_to_wrist(j, "middle")[:, 0], j[:, 9] + 2.2 * (palm - j[:, 9]))
    assert torch.allclose(palm_to_wrist(j, "ring")[:, 0], j[:, 13] + 2.0 * (palm - j[:, 13]))
    assert torch.allclose(palm_to_wrist(j, "knuckles")[:, 0], torch.stack([j[:, k] + 2.25 * (palm - j[:, k]) for k in (5, 9, 13, 17)]).mean(0), atol=1e-6)
    assert all(torch.equal(palm_to_wrist(j, f)[:, 1:], j[:, 1:]) for f in ("middle", "ring", "knuckles"))
    with pytest.raises(ValueError, match="one of middle, ring, knuckles, found 'thumb'"):
        palm_to_wrist(j, "thumb")


def test_stb_wrist_formula_changes_joint_0_only(made):
    a, b = STB(made / "stb", wrist="middle").label(0), STB(made / "stb", wrist="ring").label(0)
    assert torch.equal(a.joints[1:], b.joints[1:]) and (a.joints[0] - b.joints[0]).norm() > 1e-3


def test_stb_depth_camera_pose_is_the_published_one():
    R, T = stb_depth_pose()
    assert torch.allclose(R @ R.mT, torch.eye(3), atol=1e-6) and torch.allclose(T * 1000, torch.tensor([-24.0381, -0.4563, -1.2326]))
    angle = torch.tensor([0.00531, -0.01196, 0.00301])
    assert torch.allclose(R, torch.linalg.matrix_exp(torch.tensor([[0, -angle[2], angle[1]], [angle[2], 0, -angle[0]], [-angle[1], angle[0], 0]])), atol=1e-6)


def test_stb_splits(made):
    assert {x for x, _ in STB(made / "stb", "test").at} == {"B1Counting"} and not {x for x, _ in STB(made / "stb").at} & {"B1Counting", "B1Random"}
    assert len(STB(made / "stb", "all")) == 8


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["<f8", "<f4", "<i4", "u1"])
def test_mat_reader_agrees_with_scipy(tmp_path, compressed, kind):
    values = (np.random.default_rng(0).normal(size=(3, 21, 7)) * 100).astype(kind)
    scipy.io.savemat(tmp_path / "a.mat", {"other": np.eye(2), "handPara": values, "text": "x"}, do_compression=compressed)
    back = read_mat(tmp_path / "a.mat", "handPara")
    assert back.dtype == np.float64 and np.array_equal(back, values.astype(np.float64))
    assert np.array_equal(read_mat(tmp_path / "a.mat", "other"), np.eye(2))


def test_scipy_reads_our_mat(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 21, 5))
    (tmp_path / "a.mat").write_bytes(mat_bytes("handPara", values))
    assert np.array_equal(scipy.io.loadmat(tmp_path / "a.mat")["handPara"], values)
    assert np.array_equal(read_mat(tmp_path / "a.mat", "handPara"), values)


def test_mat_reader_refuses(tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(mat_bytes("x", np.eye(3)))
    with pytest.raises(DataError, match="no array 'handPara'"):
        read_mat(path, "handPara")
    path.write_bytes(b"MATLAB 7.3 MAT-file" + bytes(500))
    with pytest.raises(DataError, match="not a MATLAB 5 file"):
        read_mat(path, "x")
    with pytest.raises(DataError, match="No such file"):
        read_mat(tmp_path / "b.mat", "x")


# RHD ------------------------------------------------------------------------------------------------

def test_rhd_left_hand_comes_first(made):
    tree = pickle.loads((made / "rhd/training/anno_training.pickle").read_bytes())
    data = RHD(made / "rhd", hand="both", cache=False)
    left, right = data.label(0), data.label(1)
    assert (left.side, right.side) == ("left", "right")
    for x, first in ((left, 0), (right, 21)):
        for ours, theirs in ((0, 0), (1, 4), (4, 1), (5, 8), (8, 5), (20, 17)):
            assert np.allclose(x.joints[ours], tree[0]["xyz"][first + theirs], atol=1e-6)
            assert np.allclose(x.keypoints[ours], tree[0]["uv_vis"][first + theirs, :2], atol=1e-4)
        assert np.array_equal(x.visible.numpy().sum(), tree[0]["uv_vis"][first:first + 21, 2].sum())


def test_rhd_depth_has_the_high_byte_in_red(made):
    x = RHD(made / "rhd", cache=False)[0]
    picture = read_rgb(made / "rhd/training/depth/00000.png").astype(float)
    assert np.allclose(x.depth, 5 * (256 * picture[..., 0] + picture[..., 1]) / 65535, atol=1e-6)
    assert x.depth.max() == pytest.approx(2.0, abs=1e-3)


def test_rhd_as_python_2_wrote_it(copy, made):
    root = copy("rhd")
    tree = pickle.loads((root / "training/anno_training.pickle").read_bytes())
    old = {k: {name: py2_array(a.astype(np.float32)) for name, a in v.items()} for k, v in tree.items()}
    (root / "training/anno_training.pickle").write_bytes(Python2Pickler(2).dumps(old))
    a, b = RHD(root, cache=False).label(1), RHD(made / "rhd", cache=False).label(1)
    assert torch.equal(a.joints, b.joints) and torch.equal(a.keypoints, b.keypoints)


def test_rhd_names_every_bad_annotation(copy):
    root = copy("rhd")
    tree = pickle.loads((root / "training/anno_training.pickle").read_bytes())
    del tree[0]["K"]
    tree[2]["xyz"] = tree[2]["xyz"][:41]
    (root / "training/anno_training.pickle").write_bytes(old_pickle(tree))
    with pytest.raises(DataError, match=r"2 of 3 annotations cannot be read: .*0 has no 'K'.*xyz of 2: expected numbers of shape \(42, 3\), found \(41, 3\)"):
        RHD(root, cache=False)


# InterHand2.6M --------------------------------------------------------------------------------------

def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def interhand_file(root, what):
    return root / f"annotations/train/InterHand2.6M_train_{what}.json"


def test_interhand_world_to_camera_by_the_official_formula(made):
    root = made / "interhand"
    camera, joints, data = (json.loads(interhand_file(root, w).read_text()) for w in ("camera", "joint_3d", "data"))
    x = InterHand(root, cache=False).label(0)
    image = data["images"][0]
    c, name = camera[str(image["capture"])], image["camera"]
    world = np.array(joints[str(image["capture"])][str(image["frame_idx"])]["world_coord"])
    cam = (np.array(c["camrot"][name]) @ (world - np.array(c["campos"][name])).T).T                        # millimetres
    uv = cam[:, :2] / cam[:, 2:] * np.array(c["focal"][name]) + np.array(c["princpt"][name])
    for ours, theirs in ((0, 20), (1, 3), (4, 0), (8, 4), (20, 16)):
        if x.joints_valid[ours]:
            assert np.allclose(x.joints[ours] * 1000, cam[theirs], atol=1e-2) and np.allclose(x.keypoints[ours], uv[theirs], atol=1e-2)


def test_interhand_invalid_joints_are_not_at_one_millimetre(made):
    data = InterHand(made / "interhand", cache=False)
    for i in range(len(data)):
        x = data.label(i)
        assert (x.joints[~x.joints_valid] == 0).all() and (x.joints[x.joints_valid][:, 2] > 0.5).all()


def test_interhand_a_hand_without_wrist_does_not_count(copy):
    root = copy("interhand")
    def drop(tree): tree["0"]["2"]["joint_valid"][41] = [0]        # the left wrist of the interacting frame
    edit(interhand_file(root, "joint_3d"), drop)
    data = InterHand(root, cache=False)
    assert [data.label(i).side for i in range(len(data))] == ["right"] * 2 + ["left"] * 2 + ["right"] * 2
    assert data.label(4).other is None


def test_interhand_parameters_may_be_null_or_absent(copy):
    root = copy("interhand")
    data = InterHand(root, cache=False)
    assert data.label(0).mano.axes == "world" and data.label(0).mano.adds_mean
    tree = json.loads(interhand_file(root, "MANO_NeuralAnnot").read_text())
    assert tree["0"]["0"]["left"] is None and len(tree["0"]["0"]["right"]["pose"]) == 48
    interhand_file(root, "MANO_NeuralAnnot").unlink()
    assert InterHand(root, cache=False).label(0).mano is None


def test_interhand_says_what_is_missing(copy):
    root = copy("interhand")
    edit(interhand_file(root, "camera"), lambda tree: tree["0"]["focal"].pop("400270"))
    with pytest.raises(DataError, match="camera.json: expected campos, camrot, focal and princpt"):
        InterHand(root, cache=False)


# COCO's key points ----------------------------------------------------------------------------------

def test_coco_wholebody_is_read_as_it_was_written(made):
    tree = json.loads((made / "coco-hands/annotations/coco_wholebody_train_v1.0.json").read_text())
    data = CocoHands(made / "coco-hands", cache=False)
    assert [data.label(i).side for i in range(len(data))] == ["right", "left", "left", "right"] and data.order == "freihand"
    x, person = data[3], tree["annotations"][2]
    points = np.reshape(person["righthand_kpts"], (21, 3))
    assert np.allclose(x.keypoints, points[:, :2]) and x.keypoints_valid.all() and x.visible.tolist() == (points[:, 2] == 2).tolist()
    assert x.box.tolist() == pytest.approx([*person["righthand_box"][:2], *np.add(person["righthand_box"][:2], person["righthand_box"][2:])], abs=1e-3)
    assert x.other == 2 and x.K is None and not x.joints_valid.any() and x.image.shape == (480, 640, 3)


def hand_only(made, order="freihand"):
    "The same hands as MMPose keeps OneHand10K, Panoptic or RHD: one annotation a hand, 21 points."
    from handrecon.conventions import JOINT_ORDERS
    tree = json.loads((made / "coco-hands/annotations/coco_wholebody_train_v1.0.json").read_text())
    back, hands = np.argsort(JOINT_ORDERS[order]), []
    for person in tree["annotations"]:
        for side in ("left", "right"):
            if person[f"{side}hand_valid"]:
                points = np.reshape(person[f"{side}hand_kpts"], (21, 3))[back]
                hands.append({"id": len(hands), "image_id": person["image_id"], "keypoints": points.ravel().tolist(), "bbox": person[f"{side}hand_box"], "iscrowd": 0})
    return {"images": tree["images"], "annotations": hands, "categories": [{"id": 1, "name": "hand"}]}


@pytest.mark.parametrize("name, order", [("onehand10k_train.json", "freihand"), ("panoptic_train.json", "freihand"), ("rhd_train.json", "rhd")])
def test_hands_alone_in_each_order(made, tmp_path, name, order):
    path = tmp_path / name
    path.write_text(json.dumps(hand_only(made, order)), encoding="utf-8-sig")
    data, whole = CocoHands(made / "coco-hands", annotations=path, cache=False), CocoHands(made / "coco-hands", cache=False)
    assert data.order == order and len(data) == len(whole) and {data.label(i).side for i in range(len(data))} == {"right"}
    for i in range(len(data)): assert torch.allclose(data.label(i).keypoints, whole.label(i).keypoints, atol=1e-4)
    assert CocoHands(made / "coco-hands", annotations=path, side="left", cache=False).label(0).side == "left"
    tree = hand_only(made, "rhd")
    tree["categories"][0]["keypoints"] = ["wrist"] + [f"{f}{k}" for f in ("thumb", "index", "middle", "ring", "little") for k in (4, 3, 2, 1)]
    (tmp_path / "other.json").write_text(json.dumps(tree))
    assert CocoHands(made / "coco-hands", annotations=tmp_path / "other.json", cache=False).order == "rhd"        # the points' names decide


@pytest.mark.parametrize("points, at", [(133, {"left": 91, "right": 112}), (136, {"left": 94, "right": 115})])
def test_whole_bodies_of_points(made, tmp_path, points, at):
    tree = json.loads((made / "coco-hands/annotations/coco_wholebody_train_v1.0.json").read_text())
    for person in tree["annotations"]:
        body = np.zeros((points, 3))
        for side, first in at.items(): body[first:first + 21] = np.reshape(person.pop(f"{side}hand_kpts"), (21, 3))
        person["keypoints"] = body.ravel().tolist()
        for key in [k for k in person if "hand" in k]: del person[key]
    (tmp_path / "halpe_train_v1.json").write_text(json.dumps(tree))
    data, whole = CocoHands(made / "coco-hands", annotations=tmp_path / "halpe_train_v1.json", cache=False), CocoHands(made / "coco-hands", cache=False)
    for i in range(len(whole)): assert torch.allclose(data.label(i).keypoints, whole.label(i).keypoints) and data.label(i).side == whole.label(i).side


def test_coco_cache_check_and_errors(copy, tmp_path):
    root = copy("coco-hands")
    for _ in range(2): assert len(CocoHands(root, cache=tmp_path / "cache")) == 4
    report = check_data("coco-hands", root, cache=False)
    assert report.problems == () and report.lines[0].startswith("train: 3 pictures, 4 hands") and any(line.startswith("val") for line in report.lines)
    (root / "annotations/second_train.json").write_text("{}")
    with pytest.raises(DataError, match="expected one annotation file of train here or in annotations/, found coco_wholebody_train_v1.0.json, second_train.json"):
        CocoHands(root)
    for text in ("{}", "[]", '{"images": 3, "annotations": []}', '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "keypoints": "x"}]}',
                 '{"images": [], "annotations": [{"image_id": 3, "lefthand_kpts": [1, 2]}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="bad.json"): CocoHands(root, annotations=tmp_path / "bad.json", cache=False)


# YouTube, own pictures ------------------------------------------------------------------------------

def test_youtube_left_and_right_and_image_axes(made):
    tree = json.loads((made / "yt3d/data/youtube_train.json").read_text())
    data = YouTube3D(made / "yt3d", cache=False)
    assert [data.label(i).side for i in range(len(data))] == ["left" if a["is_left"] else "right" for a in tree["annotations"]]
    x = data[0]
    assert np.allclose(x.pixel_vertices, tree["annotations"][0]["vertices"]) and x.vertices is None and x.K is None and x.sequence == "synthetic_train_0"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    g = np.random.default_rng(0)
    cv2.imwrite(str(folder / "photo.png"), g.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    film = cv2.VideoWriter(str(folder / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for k in range(6):
        film.write(np.full((64, 96, 3), 40 * k, np.uint8))
    film.release()
    return folder


def test_own_pictures_and_video(own):
    data = OwnPictures(own)
    assert len(data) == 7 and [x.frame for x in map(data.label, range(7))] == ["0", "1", "2", "3", "4", "5", "photo"]
    x = data[6]
    assert x.image.shape == (60, 80, 3) and x.K[0, 0] == 96 and x.K[0, 2] == 40 and not x.joints_valid.any()
    assert [round(data[k].image.mean() / 40) for k in (0, 1, 2, 5, 3, 4)] == [0, 1, 2, 5, 3, 4]      # any order


def test_own_pictures_take_detections_by_name(own):
    xy, confidence = torch.full((4, 21, 2), 7.0) + torch.arange(42.0).view(21, 2), torch.ones(4, 21)
    confidence[3] = 0
    found = Detections(["photo.png", "film_000000000003", "photo.png", "film_000000000001"], xy, confidence, ["left", "right", "right", ""])
    data = OwnPictures(own, found)
    assert [(x.frame, x.side) for x in map(data.label, range(len(data)))] == [("3", "right"), ("photo", "left"), ("photo", "right")]
    assert torch.equal(data[0].detected, xy[0])


def test_own_pictures_errors(own, tmp_path):
    with pytest.raises(DataError, match="no such picture"):
        OwnPictures(tmp_path / "nothing")
    with pytest.raises(DataError, match="found no picture"):
        OwnPictures(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="a.jpg: not a picture"):
        OwnPictures(tmp_path)


# one sample for all ---------------------------------------------------------------------------------

def everything(frei, made):
    yield from ((FreiHAND(frei), "freihand"), (FreiHAND(frei, "evaluation"), "freihand"), (HO3D(made / "ho3d", cache=False), "ho3d"), (STB(made / "stb"), "stb"),
                (STB(made / "stb", camera="SK"), "stb"), (RHD(made / "rhd", cache=False), "rhd"), (InterHand(made / "interhand", cache=False), "interhand"),
                (YouTube3D(made / "yt3d", cache=False), "yt3d"))


def test_every_sample_is_one_kind_of_sample(frei, made):
    for data, name in everything(frei, made):
        for i in range(len(data)):
            x = data[i]
            assert x.dataset == name and x.side in ("left", "right") and x.image.dtype == np.uint8 and x.image.flags.c_contiguous
            assert x.joints.dtype == x.keypoints.dtype == torch.float32 and x.joints.isfinite().all() and x.keypoints.isfinite().all()
            assert Path(x.path).is_file() and not suspicions(x)
            if x.K is not None:
                both = x.joints_valid & x.keypoints_valid
                assert (project(x.joints[both][None], x.K[None])[0] - x.keypoints[both]).abs().max() < 0.5
            assert data.label(i).image is None and torch.equal(data.label(i).joints, x.joints)
        with pytest.raises(IndexError):
            data[len(data)]
        assert data[-1].path == data[len(data) - 1].path


def test_open_data_knows_the_names(frei):
    assert isinstance(open_data("freihand", frei), FreiHAND) and set(DATASETS) == {"freihand", "ho3d", "stb", "rhd", "interhand", "yt3d", "coco-hands", "own"}
    with pytest.raises(DataError, match="no data set is called 'FreiHand': expected one of freihand"):
        open_data("FreiHand", frei)


def test_mano_mesh_refuses_the_other_hand(made):
    x = HO3D(made / "ho3d", cache=False).label(0)
    with pytest.raises(ValueError, match="expected parameters and a right model"):
        mano_mesh(x, hand_of("left"))


def test_datasets_travel_to_workers(frei, made):
    for data, _ in everything(frei, made):
        again = pickle.loads(pickle.dumps(data))
        assert torch.equal(again.label(0).joints, data.label(0).joints)


# the index ------------------------------------------------------------------------------------------

def test_index_is_remembered_until_a_file_changes(tmp_path):
    source, calls = tmp_path / "a.json", []
    source.write_text("1")

    def build():
        calls.append(1)
        return {"x": np.arange(len(calls))}
    first = indexed("t", [source], build, tmp_path / "cache")
    again = indexed("t", [source], build, tmp_path / "cache")
    assert len(calls) == 1 and np.array_equal(first["x"], again["x"])
    source.write_text("22")
    assert len(indexed("t", [source], build, tmp_path / "cache")["x"]) == 2
    for file in (tmp_path / "cache").glob("*.npz"):
        file.write_bytes(b"damaged")
    assert len(indexed("t", [source], build, tmp_path / "cache")["x"]) == 3 and not list((tmp_path / "cache").glob("*.part"))


def test_cached_and_uncached_agree(made, tmp_path):
    for kind, name in ((HO3D, "ho3d"), (RHD, "rhd"), (InterHand, "interhand"), (YouTube3D, "yt3d")):
        fresh_, stored = kind(made / name, cache=False), [kind(made / name, cache=tmp_path) for _ in range(2)][1]
        for i in range(len(fresh_)):
            a, b = fresh_.label(i), stored.label(i)
            assert torch.equal(a.joints, b.joints) and torch.equal(a.keypoints, b.keypoints) and a.side == b.side and a.path == b.path


# check_data -----------------------------------------------------------------------------------------

def test_check_data_of_whole_sets(frei, made, tmp_path):
    for name, root in (("freihand", frei), *((n, made / n) for n in ("ho3d", "stb", "rhd", "interhand", "yt3d", "coco-hands"))):
        report = check_data(name, root, sheet=tmp_path / f"{name}.png", cache=False)
        assert report.problems == () and len(report.lines) >= 2, (name, report.problems)
        assert read_rgb(tmp_path / f"{name}.png").shape[1] > 200
    assert "official: 130,240" in check_data("freihand", frei).lines[0]


def test_check_data_tells_everything_at_once(copy):
    root = copy("rhd")
    (root / "training/color/00000.png").unlink()
    (root / "training/depth/00001.png").unlink()
    path = root / "training/color/00002.png"
    path.write_bytes(path.read_bytes()[:-200])
    (root / "evaluation/anno_evaluation.pickle").write_bytes(b"")
    report = check_data("rhd", root, cache=False)
    text = "\n".join(report.problems)
    assert len(report.problems) == 4
    assert "1 of 3 files of training are missing" in text and "1 of 3 depth files of training are missing" in text and "00002.png: the picture is cut off" in text and "anno_evaluation.pickle: not a pickle" in text


@pytest.mark.parametrize("kind", ["training/mask", "training/depth"])
def test_check_data_opens_pictures_without_their_companions(copy, tmp_path, kind):
    root = copy("rhd")
    shutil.rmtree(root / kind)
    report = check_data("rhd", root, cache=False, sheet=tmp_path / "sheet.png")
    assert not report.problems and any("which are optional" in line for line in report.lines) and any("6 samples opened" in line for line in report.lines)
    assert (tmp_path / "sheet.png").exists()


def test_check_data_opens_the_pictures_that_are_there(frei, tmp_path):
    root = Path(shutil.copytree(frei, tmp_path / "f"))
    for path in sorted((root / "training/rgb").iterdir())[:-1]: path.unlink()                # one of twelve is left
    (root / "training/rgb/00000000.jpg").write_bytes((root / "training/rgb/00000011.jpg").read_bytes())
    shutil.rmtree(root / "training/mask")
    report = check_data("freihand", root, cache=False)
    assert any("training: 1 samples opened" in line for line in report.lines) and any("no masks" in line for line in report.lines)
    for path in (root / "evaluation/rgb").iterdir(): path.unlink()
    report = check_data("freihand", root, cache=False)
    assert "evaluation: no sheet is drawn, since no picture could be opened" in report.lines


def test_check_data_tells_black_pictures(copy):
    root = copy("interhand")
    for path in (root / "images/train").rglob("*.jpg"): cv2.imwrite(str(path), cv2.imread(str(path)) * 0)
    report = check_data("interhand", root, cache=False)
    assert len(report.problems) == 1 and "opened pictures of train are of one colour" in report.problems[0]


def test_check_data_tells_detections_of_another_range(frei, tmp_path):
    root = Path(shutil.copytree(frei, tmp_path / "f"))
    path = root / datasets.FREIHAND_DETECTIONS["training"]
    found = read_detections(path)
    size = read_rgb(root / "training/rgb/00000000.jpg").shape[0]
    write_s2hand_detections(path, replace(found, xy=found.xy + 3 * size))
    assert "is outside the picture" in "".join(check_data("freihand", root, cache=False).problems)
    tree = json.loads(path.read_text())
    tree[0] = (found.xy / size).tolist()
    path.write_text(json.dumps(tree))
    assert "fractions of the picture" in "".join(check_data("freihand", root, cache=False).problems)


@pytest.mark.parametrize("name", ["freihand-train.json", "openpose/freihand-train.json", "openpose_v2/training/detect_all.json", "outputs/openpose/freihand-train.json"])
def test_freihand_detections_by_each_name(frei, tmp_path, name):
    root = Path(shutil.copytree(frei, tmp_path / "f"))
    usual = root / datasets.FREIHAND_DETECTIONS["training"]
    data = usual.read_bytes()
    usual.unlink()
    assert FreiHAND(root).label(0).detected is None
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    assert FreiHAND(root).label(0).detected is not None


def test_files_from_other_machines(frei, made, tmp_path):
    "Byte order marks, the other slash, hidden companions: the same samples."
    root = Path(shutil.copytree(frei, tmp_path / "f"))
    for path in root.rglob("*.json"): path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for path in list(root.rglob("*.jpg")): path.with_name(f"._{path.name}").write_bytes(b"\0\5")
    a, b = FreiHAND(root)[1], FreiHAND(frei)[1]
    assert torch.equal(a.joints, b.joints) and torch.equal(a.detected, b.detected) and check_data("freihand", root).problems == ()
    ho3d = Path(shutil.copytree(made / "ho3d", tmp_path / "h"))
    (ho3d / "train.txt").write_bytes(b"\xef\xbb\xbf" + (ho3d / "train.txt").read_bytes().replace(b"/", b"\\").replace(b"\n", b"\r\n"))
    assert HO3D(ho3d, cache=False).names == HO3D(made / "ho3d", cache=False).names
    for name, key, where in (("yt3d", b'"name": "', "data/youtube_train.json"), ("interhand", b'"file_name": "', "annotations/train/InterHand2.6M_train_data.json")):
        copy = Path(shutil.copytree(made / name, tmp_path / name))
        tree = json.loads((copy / where).read_text())
        for image in tree["images"]: image[key.decode()[1:-4]] = image[key.decode()[1:-4]].replace("/", "\\")
        (copy / where).write_text(json.dumps(tree), encoding="utf-8-sig")
        assert open_data(name, copy, cache=False).label(0).path == str(copy) + open_data(name, made / name, cache=False).label(0).path.removeprefix(str(made / name))


def test_youtube_is_scaled_to_the_picture_that_is_there(copy):
    root = copy("yt3d")
    before = YouTube3D(root, cache=False)[0]
    path = Path(before.path)
    picture = cv2.imread(str(path))
    cv2.imwrite(str(path), cv2.resize(picture, None, fx=1.5, fy=1.5))
    after = YouTube3D(root, cache=False)[0]
    assert torch.allclose(after.pixel_vertices, 1.5 * before.pixel_vertices, rtol=1e-5) and torch.allclose(after.keypoints, 1.5 * before.keypoints, rtol=1e-5)
    assert check_data("yt3d", root, cache=False).problems == ()
    cv2.imwrite(str(path), cv2.resize(picture, None, fx=1.5, fy=1))
    assert "other proportions, was it cut?" in "".join(check_data("yt3d", root, cache=False).problems)


def test_own_pictures_say_what_is_left_out(own, tmp_path):
    folder = Path(shutil.copytree(own, tmp_path / "own"))
    (folder / "._photo.png").write_bytes(b"\0\5")
    (folder / "IMG_2.HEIC").write_bytes(b"heic")
    with pytest.warns(UserWarning, match="1 pictures are left out, OpenCV does not read them: IMG_2.HEIC"):
        assert len(OwnPictures(folder)) == len(OwnPictures(own))
    with pytest.raises(ValueError, match="fractions of the picture"):
        OwnPictures(own / "photo.png", Detections(["photo"], torch.rand(1, 21, 2), torch.ones(1, 21)))


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_dark_16_bit_pictures_are_stretched(tmp_path, bits):
    grey = (np.linspace(0, 1, 64)[None] * np.ones((16, 1)))
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), (grey * (2**bits - 1)).round().astype(np.uint16))
    if bits == 16: seen = read_rgb(path)
    else:
        with pytest.warns(UserWarning, match=f"of which {bits} are used"): seen = read_rgb(path)
    assert np.abs(seen[..., 0].astype(float) - 255 * grey).max() <= 1.5


def test_mat_arrays_behind_a_text(tmp_path):
    scipy.io.savemat(tmp_path / "m.mat", {"image_path": "a/b.jpg", "names": np.array(["x", "yy"], object), "s": {"a": 1}, "pose_root": np.arange(6.0).reshape(2, 3)},
                     do_compression=True)
    assert read_mat(tmp_path / "m.mat", "pose_root").tolist() == [[0, 1, 2], [3, 4, 5]]
    for key, words in (("image_path", "no array of numbers"), ("pose", "no array 'pose' in it")):
        with pytest.raises(DataError, match=words): read_mat(tmp_path / "m.mat", key)


def test_check_data_notices_millimetres(copy):
    root = copy("rhd")
    tree = pickle.loads((root / "training/anno_training.pickle").read_bytes())
    for entry in tree.values(): entry["xyz"] = entry["xyz"] * 1000
    (root / "training/anno_training.pickle").write_bytes(old_pickle(tree))
    report = check_data("rhd", root, cache=False)
    assert "look wrong" in report.problems[0] and "m long" in report.problems[0]


def test_check_data_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(DataError, match="no data set is called 'coco'"):
        check_data("coco", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        check_data("rhd", tmp_path / "x")
    report = check_data("freihand", tmp_path)
    assert len(report.problems) == 2 and report.sheet is None


# bad files ------------------------------------------------------------------------------------------

def mutate(data, g):
    "Flip, cut, repeat or insert bytes."
    data = bytearray(data)
    for _ in range(g.integers(1, 6)):
        if not data: break
        at, kind = int(g.integers(len(data))), g.integers(5)
        if kind == 0: data[at] = int(g.integers(256))
        elif kind == 1: data[at] ^= 1 << int(g.integers(8))
        elif kind == 2: del data[at:at + int(g.integers(1, 50))]
        elif kind == 3: data[at:at] = bytes(g.integers(0, 256, int(g.integers(1, 9)), dtype=np.uint8))
        else: del data[at:]
    return bytes(data)


class Trap:
    "A pickle that would run code."
    def __reduce__(self):
        return os.system, ("echo pwned > PWNED",)


@pytest.mark.parametrize("name", ["meta", "rhd", "mat", "json", "picture"])
def test_mutated_files_give_the_documented_error(made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source, read = {
        "meta": (made / "ho3d/train/SYNT0/meta/0000.pkl", read_ho3d_meta),
        "rhd": (made / "rhd/training/anno_training.pickle", lambda p: datasets._rhd_index(p)),
        "mat": (made / "stb/labels/B2Counting_BB.mat", lambda p: read_mat(p, "handPara")),
        "json": (made / "yt3d/data/youtube_val.json", lambda p: datasets._youtube_index(p)),
        "picture": (made / "interhand/images/train/Capture0/0000_synthetic/cam400262/image0.jpg", read_rgb)}[name]
    data, g, path, refused = source.read_bytes(), np.random.default_rng(0), tmp_path / "f", 0
    end = time.time() + 15
    for _ in range(250 if name in ("meta", "rhd", "mat") else 150):
        path.write_bytes(mutate(data, g))
        try:
            read(path)
        except DataError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)[:200]
        if time.time() > end: break
    assert refused > 10 and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_interhand_json_mutations(copy):
    root, g = copy("interhand"), np.random.default_rng(1)
    refused = 0
    for what in ("data", "camera", "joint_3d", "MANO_NeuralAnnot"):
        path = interhand_file(root, what)
        data = path.read_bytes()
        for _ in range(40):
            path.write_bytes(mutate(data, g))
            try:
                InterHand(root, cache=False)
            except DataError:
                refused += 1
        path.write_bytes(data)
    assert refused > 40


json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                               ["images", "annotations", "vertices", "image_id", "id", "name", "file_name", "campos", "0", "joint_valid"]), inner, max_size=4), max_leaves=12)


@settings(max_examples=120, deadline=None)
@given(json_values)
def test_any_json_is_data_or_a_data_error(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for name in ("InterHand2.6M_train_data", "InterHand2.6M_train_camera", "InterHand2.6M_train_joint_3d", "training_K", "training_xyz", "training_mano"):
        (folder / f"{name}.json").write_text(json.dumps(value))
    for read in (lambda: datasets._interhand_index(folder, "train"), lambda: datasets._youtube_index(folder / "training_K.json"), lambda: FreiHAND(folder)):
        try:
            read()
        except DataError:
            pass


@pytest.mark.parametrize("layout", ["ho3d", "rhd"])
def test_a_pickle_never_runs(copy, tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    root = copy(layout)
    path = root / {"ho3d": "train/SYNT0/meta/0000.pkl", "rhd": "training/anno_training.pickle"}[layout]
    path.write_bytes(pickle.dumps({"camMat": Trap(), 0: Trap()}))
    with pytest.raises(DataError, match="nothing was run"):
        open_data(layout, root, cache=False)
    assert not (tmp_path / "PWNED").exists()


def test_pickle_bombs_are_refused(tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(b"\x80\x02]" + b"(" * 10 + b"2" * 100_000 + b".")             # DUP, a hundred thousand times
    with pytest.raises(DataError):
        read_annotations(path)
    path.write_bytes(b"\x80\x04\x8a\xff\xff\xff\xff.")                             # a number of four billion bytes
    with pytest.raises(DataError):
        read_annotations(path)


def test_zip_bomb_in_a_mat_stays_small(tmp_path):
    import zlib
    packed = zlib.compress(bytes(300_000_000), 9)
    head = b"MATLAB".ljust(124) + b"\x00\x01IM"
    (tmp_path / "a.mat").write_bytes(head + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed)
    with pytest.raises(DataError):
        read_mat(tmp_path / "a.mat", "handPara")


def test_pictures_that_are_cut_off_are_noticed(made):
    for path in (made / "interhand/images/train/Capture0/0000_synthetic/cam400262/image0.jpg", made / "rhd/training/color/00000.png"):
        data = path.read_bytes()
        assert decode(data, path).shape[2] == 3
        with pytest.raises(DataError, match="cut off after|not a picture"):
            decode(data[:len(data) * 3 // 4], path)
    with pytest.raises(DataError, match=r"not a picture that can be read \(0 bytes\)"):
        decode(b"", "x")
    with pytest.raises(DataError, match="No such file"):
        read_rgb("nowhere.png")


@pytest.mark.parametrize("text, message", [("[[1, 2", "truncated|cannot read"), ('{"a": 1}', "expected"), ("[[[1,2,3],[1,2,3]]]", "must be 3 × 3"), ("[[[1,2,NaN],[1,2,3],[1,2,3]]]", "NaN")])
def test_freihand_json_errors(tmp_path, text, message):
    (tmp_path / "training_K.json").write_text(text)
    with pytest.raises(DataError, match=message):
        FreiHAND(tmp_path)


def test_freihand_lists_of_different_length(frei, tmp_path):
    root = Path(shutil.copytree(frei, tmp_path / "f"))
    edit(root / "training_xyz.json", lambda tree: tree.pop())
    with pytest.raises(DataError, match="training_xyz.json: expected as many hands as training_K.json has cameras, 3, found 2"):
        FreiHAND(root)


def test_json_hook_errors_name_the_file(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="a.json: expected JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="a.json: expected JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_header_that_promises_too_much(ending):
    data = bytearray(cv2.imencode(ending, np.zeros((40, 50, 3), np.uint8))[1].tobytes())
    assert formats.header_size(bytes(data)) == (50, 40)
    at = 16 if ending == ".png" else data.index(b"\xff\xc0") + 5
    data[at:at + 2] = b"\x7f\xff" if ending == ".jpg" else b"\x00\x01"
    data[at + 2:at + 4] = b"\x7f\xff" if ending == ".jpg" else b"\x00\x00"
    if ending == ".png": data[20:24] = b"\x00\x01\x00\x00"
    with pytest.raises(DataError, match="a header that promises"):
        decode(bytes(data), "x")

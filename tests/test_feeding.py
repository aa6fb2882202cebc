"""Crops, augmentation, batches in many processes, and the packed cache."""
import json
import os
import pickle
import shutil
from math import pi
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon import feeding
from handrecon.camera import project
from handrecon.datasets import HO3D, RHD, STB, FreiHAND, YouTube3D
from handrecon.feeding import (PAPER_AUGMENTATION, STRONG_AUGMENTATION, Augmentation, Chosen, Crops, PackedPictures, bench_data, colour_table, crop_camera,
                               draws, make_loader, pack, warp, with_joints)
from handrecon.formats import DataError
from handrecon.layouts import hand_of, write_layout
from handrecon.mano import mirror_params
from handrecon.synthetic import SyntheticConfig, write_freihand


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_freihand(root / "freihand", 6, 1, evaluation=2, progress=False)
    for name in ("ho3d", "stb", "rhd", "yt3d"):
        write_layout(name, root / name, 2, 2, SyntheticConfig(view_spread=0.6), progress=False)
    return root


@pytest.fixture(scope="module")
def frei(root):
    return FreiHAND(root / "freihand", vertices=True)


# the camera ------------------------------------------------------------------------------------------

numbers = st.floats(-1, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=12, max_size=12), st.booleans())
def test_affine_and_camera_agree(n, mirror):
    K = torch.tensor([[[500 + 100 * n[0], 20 * n[1], 112 + 40 * n[2]], [0, 480 + 100 * n[3], 112 + 40 * n[4]], [0, 0, 1]]])
    X = torch.tensor([[[0.1 * n[5], 0.1 * n[6], 0.5 + 0.2 * n[7]], [0.05, -0.02, 0.4]]])
    crop = crop_camera(K, torch.tensor([[112 + 60 * n[8], 100 + 60 * n[9]]]), torch.tensor([120 + 60 * n[10]]), 96, torch.tensor([pi * n[11]]), torch.tensor([mirror]))
    seen = project(X, K) @ crop.affine[:, :, :2].mT + crop.affine[:, None, :, 2]
    assert torch.allclose(project(X @ crop.R.mT, crop.K), seen, atol=0.02)
    assert torch.linalg.det(crop.R)[0].item() == pytest.approx(-1 if mirror else 1, abs=1e-5)
    assert (crop.K[:, [1, 2, 2], [0, 0, 1]] == 0).all() and (crop.K.diagonal(dim1=1, dim2=2) > 0).all()


def test_centre_goes_to_the_centre_and_extent_to_the_size():
    K = torch.tensor([[[500.0, 0, 112], [0, 490, 112], [0, 0, 1]]])
    crop = crop_camera(K, torch.tensor([[80.0, 60.0]]), torch.tensor([50.0]), 128, torch.tensor([1.0]))
    assert torch.allclose(crop.affine[0, :, :2] @ torch.tensor([80.0, 60.0]) + crop.affine[0, :, 2], torch.tensor([64.0, 64.0]), atol=1e-3)
    assert torch.linalg.det(crop.affine[0, :, :2]).item() == pytest.approx((128 / 50) ** 2, rel=1e-4)


def test_turning_about_the_axis_is_a_plain_rotation_where_the_pixels_are_square():
    K = torch.tensor([[[500.0, 0, 112], [0, 500, 112], [0, 0, 1]]])
    crop = crop_camera(K, torch.tensor([[112.0, 112.0]]), torch.tensor([224.0]), 224, torch.tensor([0.5]))
    A = crop.affine[0, :, :2]
    assert torch.allclose(A @ A.T, torch.eye(2), atol=1e-5) and torch.allclose(crop.K, K, atol=1e-3)


# the picture ------------------------------------------------------------------------------------------

def test_warp_by_nothing_is_nothing():
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(warp(picture, np.eye(2, 3), 32), picture)


def test_warp_knows_where_a_pixel_s_centre_is():
    "A mirror image must be exactly the reversed array: off by half a pixel, it would be blurred or shifted."
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(warp(picture, np.array([[-1.0, 0, 32], [0, 1, 0]]), 32), picture[:, ::-1])
    assert np.array_equal(warp(picture, np.array([[0.0, -1, 32], [1, 0, 0]]), 32), np.rot90(picture, -1))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_warp_averages_before_it_skips(step):
    picture = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    small = warp(picture, np.array([[1 / step, 0, 0], [0, 1 / step, 0]]), 48 // step)
    mean = picture.reshape(48 // step, step, 48 // step, step, 3).astype(float).mean((1, 3))
    assert np.abs(small - mean).max() <= 1


def test_a_drawn_point_stays_on_its_key_point(frei):
    "Independent of all formulas: paint a dot at a key point, crop, turn, mirror; the dot is where the batch says."
    g = np.random.default_rng(0)
    for k in range(8):
        point = torch.tensor([[float(g.uniform(60, 160)), float(g.uniform(60, 160))]])
        picture = np.zeros((224, 224), np.uint8)
        cv2.circle(picture, tuple(int(v) for v in ((point[0] - 0.5) * 256).round()), 6 * 256, 255, -1, cv2.LINE_AA, 8)
        crop = crop_camera(torch.from_numpy(frei.K[:1]), torch.tensor([[112.0, 112.0]]), torch.tensor([200.0]), 224, torch.tensor([float(g.uniform(-3, 3))]), torch.tensor([k % 2 == 1]))
        out = warp(picture, crop.affine[0].double().numpy(), 224).astype(float)
        y, x = np.mgrid[:224, :224] + 0.5
        found = np.array([(x * out).sum(), (y * out).sum()]) / out.sum()
        expected = (point @ crop.affine[0, :, :2].T + crop.affine[0, :, 2])[0].numpy()
        assert np.abs(found - expected).max() < 0.15


# batches ------------------------------------------------------------------------------------------------

def test_whole_pictures_are_themselves(frei):
    batch = Crops(frei, 224).__getitems__([0, 3])
    assert np.array_equal(batch.image[1].numpy(), frei[3].image) and torch.allclose(batch.K[1], frei[3].K, atol=1e-3)
    assert torch.allclose(batch.keypoints[0], frei[0].keypoints, atol=1e-2) and torch.equal(batch.joints[0], frei[0].joints)
    assert torch.allclose(batch.detected[0], frei[0].detected, atol=1e-2) and batch.index.tolist() == [0, 3]


@pytest.mark.parametrize("around", ["whole", "detected", "keypoints"])
def test_everything_moves_together(frei, around):
    crops = Crops(frei, 160, around, augmentation=STRONG_AUGMENTATION, masks=True, threads=2)
    batch = crops.__getitems__(list(range(6)))
    assert (project(batch.joints, batch.K) - batch.keypoints).abs().max() < 0.02
    assert batch.image.shape == (6, 160, 160, 3) and batch.mask.shape == (6, 160, 160)
    back = batch.vertices @ batch.rotation                                  # rows: Rᵀ v
    assert torch.allclose(back[2], frei[2].vertices, atol=1e-6)
    for i in range(6):                                                      # the mesh lies on the mask as it did before, where both see it
        x = frei[i]
        before = project(x.vertices[None], x.K[None])[0].floor().long().clamp(0, 223)
        after = project(batch.vertices, batch.K)[i].floor().long()
        seen = ((after >= 0) & (after < 160)).all(-1)
        there = torch.from_numpy(x.mask)[before[seen][:, 1], before[seen][:, 0]]
        assert (batch.mask[i][after[seen][:, 1], after[seen][:, 0]] == there).float().mean() > 0.85


def test_mirrored_left_hand_is_what_the_right_hand_s_model_makes(root):
    data = STB(root / "stb")
    crops = Crops(data, 224, "keypoints", mirror_left=True)
    batch, plain = crops[0], Crops(data, 224, "keypoints")[0]
    assert not batch.left.any() and plain.left.all()
    assert np.abs(batch.image[0].numpy().astype(int) - plain.image[0].numpy()[:, ::-1].astype(int)).max() <= 2
    assert torch.allclose(batch.joints[0] * torch.tensor([-1.0, 1, 1]), plain.joints[0]) and (project(batch.joints, batch.K) - batch.keypoints).abs().max() < 0.02
    pose = torch.zeros(1, 45)
    left, right = hand_of("left")(pose), hand_of("right")(**mirror_params(pose))
    assert torch.allclose(left.joints * torch.tensor([-1.0, 1, 1]), right.joints, atol=1e-6)


def test_augmentation_is_determined_by_seed_epoch_and_index(frei):
    crops = Crops(frei, 64, augmentation=STRONG_AUGMENTATION, seed=3)
    a, b = crops.__getitems__([0, 1, 2]), crops.__getitems__([2, 0])
    assert torch.equal(a.image[2], b.image[0]) and torch.equal(a.K[0], b.K[1])
    crops.set_epoch(1)
    assert not torch.equal(crops[0].K, a.K[:1])
    crops.set_epoch(0)
    assert torch.equal(crops[0].image, a.image[:1]) and not torch.equal(Crops(frei, 64, augmentation=STRONG_AUGMENTATION, seed=4)[0].K, a.K[:1])


def test_draws_fill_their_range():
    d = draws(0, 0, range(2000))
    assert d.min() >= -1 and d.max() < 1 and abs(d.mean()) < 0.02 and abs(d.std() - 3 ** -0.5) < 0.02
    assert abs(np.corrcoef(d.T) - np.eye(9)).max() < 0.08


def test_colours(frei):
    level = np.arange(256)
    table = colour_table(Augmentation(brightness=0.5, contrast=0.5, colour=0.5), np.zeros((1, 5), np.float32))
    assert np.array_equal(table[0], np.stack([level] * 3, 1))
    bright = colour_table(Augmentation(brightness=0.5), np.array([[1, 0, 0, 0, 0]], np.float32))
    assert bright[0, 100, 0] == 150 and bright[0, 255, 0] == 255
    flat = colour_table(Augmentation(contrast=0.5), np.array([[0, -1, 0, 0, 0]], np.float32))
    assert int(flat[0, 255, 0]) - int(flat[0, 0, 0]) == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_batches_with_any_number_of_workers(frei, workers):
    crops = Crops(frei, 48, augmentation=PAPER_AUGMENTATION, seed=1, threads=2 if workers == 0 else 1)
    batches = list(make_loader(crops, 2, workers, seed=5))
    expected = list(make_loader(Crops(frei, 48, augmentation=PAPER_AUGMENTATION, seed=1), 2, 0, seed=5))
    assert len(batches) == 3
    for a, b in zip(batches, expected):
        assert torch.equal(a.index, b.index) and torch.equal(a.image, b.image) and torch.equal(a.K, b.K)


def test_workers_see_the_epoch_change(frei):
    crops = Crops(frei, 32, augmentation=PAPER_AUGMENTATION)
    loader = make_loader(crops, 3, 1, shuffle=False)
    first = next(iter(loader)).rotation
    crops.set_epoch(1)
    assert not torch.equal(next(iter(loader)).rotation, first)


def test_observation_holds_no_truth(frei):
    batch = Crops(frei, 64)[2]
    seen = batch.observation()
    assert seen.image.shape == (1, 3, 64, 64) and 0 <= seen.image.min() and seen.image.max() <= 1
    assert torch.equal(seen.keypoints, batch.detected) and seen.confidence.max() <= 1
    assert batch.to("cpu").mask is None


def test_pictures_without_a_camera(root):
    data = YouTube3D(root / "yt3d", cache=False)
    batch = Crops(data, 128, "keypoints", augmentation=PAPER_AUGMENTATION)[0]
    tips = batch.keypoints[0][batch.keypoints_valid[0]]
    assert len(tips) == 5 and (tips > 0).all() and (tips < 128).all() and not batch.joints_valid.any()


def test_crops_around_the_official_box(root):
    data = HO3D(root / "ho3d", "evaluation", cache=False)
    batch = Crops(data, 128, "box", margin=0.1)[0]
    assert ((batch.keypoints > 0) & (batch.keypoints < 128)).all()
    with pytest.raises(DataError, match="gives no box"):
        Crops(HO3D(root / "ho3d", cache=False), 128, "box")[0]


def test_with_joints_leaves_out_what_cannot_be_cropped(root, tmp_path):
    data = FreiHAND(root / "freihand", versions=["gs"], detections=tmp_path / "none.json")
    with pytest.raises(DataError, match="nothing to crop around"):
        Crops(data, 64, "detected")[0]
    assert len(with_joints(data)) == 0 and len(with_joints(data, "keypoints")) == 6
    chosen = Chosen(data, [4, 1])
    assert chosen[0].path == data[4].path and chosen[1].mask.shape == (224, 224)


def test_missing_mask_is_named(root):
    with pytest.raises(DataError, match="has no mask"):
        Crops(HO3D(root / "ho3d", cache=False), 64, masks=True)[0]


@pytest.mark.parametrize("wrong", [{"rotation": 4.0}, {"zoom": 1.0}, {"shift": -0.1}])
def test_augmentation_ranges(wrong):
    with pytest.raises(ValueError, match="Augmentation.*expected a number from 0"):
        Augmentation(**wrong)


def test_crops_arguments(frei):
    with pytest.raises(ValueError, match="Crops: expected around one of whole"):
        Crops(frei, around="hand")


# the packed cache -----------------------------------------------------------------------------------------

def test_packed_pictures_are_the_pictures(root, tmp_path):
    for data in (FreiHAND(root / "freihand"), RHD(root / "rhd", hand="both", cache=False)):
        packed = pack(data, tmp_path / data.name, progress=False)
        assert len(packed) == len({data.label(i).path for i in range(len(data))})
        for i in range(len(data)):
            assert np.array_equal(packed[data.label(i).path], data[i].image)
        a, b = Crops(data, 64)[1], Crops(data, 64, packed=packed)[1]
        assert torch.equal(a.image, b.image)


def test_pack_is_made_once_and_again_when_the_pictures_change(root, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(root / "freihand", tmp_path / "f"))
    data = FreiHAND(folder)
    pack(data, tmp_path / "p", progress=False)
    first = (tmp_path / "p/pixels.npy").stat().st_mtime_ns
    pack(data, tmp_path / "p", progress=False)
    assert (tmp_path / "p/pixels.npy").stat().st_mtime_ns == first
    os.utime(data.label(0).path, (1, 1))                                        # touched, but the same picture
    pack(data, tmp_path / "p", progress=False)
    assert (tmp_path / "p/pixels.npy").stat().st_mtime_ns == first
    cv2.imwrite(data.label(0).path, np.zeros((224, 224, 3), np.uint8))
    assert pack(data, tmp_path / "p", progress=False)[data.label(0).path].max() == 0


def test_an_interrupted_pack_leaves_nothing(root, tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(feeding, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(FreiHAND(root / "freihand"), tmp_path / "p", progress=False)
    assert list((tmp_path / "p").iterdir()) == []


@pytest.mark.parametrize("damage", ["index", "pixels", "shape", "missing"])
def test_damaged_packs(root, tmp_path, damage):
    data = FreiHAND(root / "freihand")
    pack(data, tmp_path, progress=False)
    if damage == "index": (tmp_path / "index.json").write_text("{}")
    if damage == "pixels": (tmp_path / "pixels.npy").write_bytes(b"no")
    if damage == "shape":
        about = json.loads((tmp_path / "index.json").read_text())
        (tmp_path / "index.json").write_text(json.dumps(about | {"sizes": about["sizes"][:-1]}))
    if damage == "missing": (tmp_path / "pixels.npy").unlink()
    with pytest.raises(DataError, match="packed"):
        PackedPictures(tmp_path)
    assert len(pack(data, tmp_path, progress=False)) == 6                       # made anew


def test_pack_travels_to_workers_as_a_name(root, tmp_path):
    data = FreiHAND(root / "freihand")
    packed = pack(data, tmp_path, progress=False)
    assert len(pickle.dumps(packed)) < 1000
    again = pickle.loads(pickle.dumps(Crops(data, 32, packed=packed)))
    assert torch.equal(again[0].image, Crops(data, 32)[0].image)


# speed ----------------------------------------------------------------------------------------------------

def test_bench_names_its_parts(root):
    rates = bench_data(root / "freihand", threads=2, seconds=0.05, batch=8)
    assert [name.split(",")[0] for name in rates] == ["decode", "crop", "colours", "labels", "all", "all but decoding (packed)"]
    assert all(wall > 0 and cpu > 0 for wall, cpu in rates.values())


def test_a_picture_costs_less_than_its_share(root):
    "1,500 pictures a second on 2 cores leave 1.33 ms of processor time for each; the shape checks of the tests cost some of it."
    rates = bench_data(root / "freihand", threads=1, seconds=0.5, batch=32)
    assert rates["all, 1 threads"][1] > 300

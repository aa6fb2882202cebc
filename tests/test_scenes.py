"""Rendered and composed scenes: everything that is said about a picture agrees with everything else."""
from dataclasses import fields, replace

import pytest
import torch

from handrecon.camera import project
from handrecon.proxy_hand import proxy_hand
from handrecon.scenes import (
    Cutouts, SceneBatches, SceneConfig, Scenes, compose, contact_distance, data_cutouts, jitter_colours, layout, load_scenes, make_scenes, pack, place_boxes, roll_scenes,
    synthetic_cutouts, unpack)

SMALL = SceneConfig(image_size=96, focal=192.0, hands=(0, 4), size=(30.0, 70.0), oversample=1)


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(12, 3, SMALL)


def agrees(s: Scenes, tolerance=1e-4):
    "Parameters give joints, joints give key points."
    for side in ("left", "right"):
        rows = s.in_3d & (s.right == (side == "right"))
        mesh = proxy_hand(side)(*(x[rows] for x in (s.pose, s.shape, s.rotation, s.translation)))
        assert torch.allclose(mesh.joints, s.joints[rows], atol=tolerance)
    pixels = project(s.joints.flatten(1, 2), s.K).view_as(s.keypoints)
    assert torch.allclose(pixels[s.in_3d], s.keypoints[s.in_3d], atol=1e-2)


def test_everything_agrees(scenes):
    agrees(scenes)
    assert scenes.right[scenes.valid].any() and (~scenes.right)[scenes.valid].any()
    assert float(scenes.image.min()) >= 0 and float(scenes.image.max()) <= 1
    assert (scenes.joints[scenes.valid][..., 2] > 0).all()


def test_same_seed_same_bits_other_seed_other_picture(scenes):
    again = make_scenes(12, 3, SMALL)
    assert all(torch.equal(getattr(scenes, f.name), getattr(again, f.name)) for f in fields(Scenes))
    assert not torch.equal(make_scenes(12, 4, SMALL).image, scenes.image)


def test_number_of_hands():
    for n in (0, 3):
        s = make_scenes(4, 1, replace(SMALL, hands=(n, n)))
        assert ((s.visible.sum(-1) > 0).sum(1) <= n).all() and (s.owner.amax((1, 2)) <= n).all()
    assert not make_scenes(2, 1, replace(SMALL, hands=(0, 0))).valid.any()


def test_the_nearer_hand_hides_the_other():
    s = make_scenes(40, 5, replace(SMALL, hands=(2, 2), crowd=1.0, contact=0.0, forearm=0.0, occluder=0.0))
    fewer = []
    for b in range(40):
        near, far = s.joints[b, :, :, 2].mean(-1).argsort().tolist()
        gap = (s.keypoints[b, 0].mean(0) - s.keypoints[b, 1].mean(0)).norm()
        if gap < 25 and s.joints[b, far, :, 2].amin() > s.joints[b, near, :, 2].amax():
            fewer.append(int(s.visible[b, far].sum()) - int(s.visible[b, near].sum()))
    assert len(fewer) >= 4 and sum(fewer) / len(fewer) < -1.5


def test_owner_is_seen_where_its_joints_are(scenes):
    x, y = scenes.keypoints.floor().long().unbind(-1)
    seen = (scenes.visible > 0).nonzero().tolist()
    own = [int(scenes.owner[b, y[b, n, j], x[b, n, j]]) == n + 1 for b, n, j in seen]
    assert len(own) > 50 and sum(own) > 0.8 * len(own)


def test_touching_hands_touch_and_do_not_run_through_one_another():
    hand = proxy_hand()
    a = hand(torch.zeros(4, 45)).vertices
    a = a - a.mean(1, keepdim=True)
    direction = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    step = contact_distance(a, a, direction)
    gap = torch.cdist(a + step[:, None, None] * direction[:, None], a).flatten(1).amin(1)
    assert (gap > 0).all() and (gap < 0.03).all()


def test_boxes_avoid_one_another():
    g, sizes = torch.Generator().manual_seed(0), torch.full((100, 4, 2), 120.0)
    present = torch.ones(100, 4, dtype=torch.bool)
    overlap = lambda c: (120 - (c[:, :, None] - c[:, None]).abs()).clamp_min(0).prod(-1).triu(1).sum()
    assert overlap(place_boxes(sizes, present, 512, g, crowd=0.0)) < 0.5 * overlap(place_boxes(sizes, present, 512, g, crowd=1.0))


@pytest.mark.parametrize("mirrored", [False, True])
def test_rolling_and_mirroring_keep_everything_true(scenes, mirrored):
    mirror = torch.full((12,), mirrored)
    rolled = roll_scenes(scenes, torch.linspace(-3, 3, 12), mirror)
    agrees(rolled)
    assert torch.equal(rolled.right, scenes.right ^ mirrored)
    back = roll_scenes(rolled, torch.linspace(3, -3, 12) * (-1 if mirrored else 1), mirror)
    assert torch.allclose(back.joints, scenes.joints, atol=1e-5) and torch.allclose(back.keypoints, scenes.keypoints, atol=1e-2)


def test_rolling_needs_a_centred_camera(scenes):
    off = replace(scenes, K=scenes.K + torch.tensor([[0, 0, 9.0], [0, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="optical axis"): roll_scenes(off, torch.zeros(12), torch.zeros(12, dtype=torch.bool))


def test_batches_are_determined_and_fresh(scenes):
    data = SceneBatches(pack(scenes), 4, seed=1)
    a, b = data.batch_at(5), SceneBatches(pack(scenes), 4, seed=1).batch_at(5)
    assert torch.equal(a.image, b.image) and torch.equal(a.keypoints, b.keypoints)
    assert not torch.equal(data.batch_at(5 + 3).image, a.image)
    agrees(a, 2e-3)                                                 # parameters were packed in half precision


def test_packing_loses_next_to_nothing(scenes):
    back = unpack(pack(scenes))
    assert pack(scenes).image.dtype == torch.uint8
    assert (back.image - scenes.image).abs().max() < 1 / 255 and (back.pose - scenes.pose).abs().max() < 2e-3
    assert len(load_scenes(5, 0, SMALL, block=3, progress=False).K) == 5


def test_colours_stay_colours(scenes):
    image = jitter_colours(scenes.image, torch.Generator().manual_seed(0))
    assert image.shape == scenes.image.shape and float(image.min()) >= 0 and float(image.max()) <= 1 and not torch.equal(image, scenes.image)


def test_layout_fills_rows_without_overlap():
    boxes, there = layout(300, torch.Generator().manual_seed(1))
    i, j = torch.triu_indices(9, 9, 1)
    shared = (torch.minimum(boxes[:, i, 2:], boxes[:, j, 2:]) - torch.maximum(boxes[:, i, :2], boxes[:, j, :2])).clamp_min(0).prod(-1)
    assert shared[there[:, i] & there[:, j]].max() < 1e-2
    side = (boxes[..., 2] - boxes[..., 0])[there]
    assert 95.9 < float(side.min()) and float(side.max()) < 320.1 and float(boxes.min()) >= -1e-3
    assert torch.allclose(boxes[:, 0, 2:], torch.tensor(512.0))     # the first one sits in the lower right corner


def test_pasted_hands_are_where_their_labels_are():
    cut = synthetic_cutouts(6, 0, 96)
    s = compose(cut, 5, 2, 192, (48.0, 96.0), most=4)
    assert not s.in_3d.any() and s.valid[:, 0].sum() >= 2
    x, y = s.keypoints.floor().long().unbind(-1)
    own = [int(s.owner[b, y[b, n, j], x[b, n, j]]) == n + 1 for b, n, j in (s.visible > 0).nonzero().tolist()]
    assert sum(own) > 0.8 * len(own)
    assert all(torch.equal(getattr(s, f.name), getattr(compose(cut, 5, 2, 192, (48.0, 96.0), most=4), f.name)) for f in fields(Scenes))


def test_a_flipped_right_hand_is_a_left_hand():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    cut = Cutouts(ramp.clone(), torch.ones(1, 64, 64), torch.tensor([[[10.0, 20.0]]]).expand(1, 21, 2), torch.ones(1, 21), torch.tensor([True]))
    s = compose(cut, 8, 0, 128, (40.0, 60.0), most=1)
    assert s.right.any() and (~s.right).any()
    for i in range(8):
        expected = torch.tensor([20.0 if s.right[i, 0] else 108.0, 40.0])
        assert torch.allclose(s.keypoints[i, 0, 0], expected, atol=1e-4)
        assert bool(s.image[i, 0, 5, 10] < s.image[i, 0, 5, 100]) == bool(s.right[i, 0])


def test_composition_from_files_needs_masks():
    class Bare:
        def __getitem__(self, i):
            class sample: mask, path, image = None, "00000000.jpg", None
            return sample
    with pytest.raises(Exception, match="mask|HandData"): data_cutouts(Bare(), [0])


def test_bad_settings_are_named():
    for wrong, word in ((dict(hands=(3, 1)), "hands"), (dict(size=(0.0, 1.0)), "size"), (dict(image_size=8), "image_size")):
        with pytest.raises(ValueError, match=word): SceneConfig(**wrong)
    with pytest.raises(ValueError, match="n = 0"): make_scenes(0, 0)
    with pytest.raises(ValueError, match="at least one"): compose(synthetic_cutouts(2, 0, 64), 0, 0)

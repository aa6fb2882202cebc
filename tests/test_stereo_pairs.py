"""Two worlds and two rigs: pairs that agree with their truth, crops that carry their cameras, masks made without truth."""
from dataclasses import fields, replace

import pytest
import torch

from handrecon.camera import crop_images, project
from handrecon.conventions import joint_limits
from handrecon.stereo import depth_to_disparity, disparity_to_depth, warp
from handrecon.stereo_pairs import (
    LIVING_ROOM, PAPER_RIG, STB_RIG, STUDIO, Rig, StereoCrops, World, crop_pair, make_labelled, make_pairs, mask_errors, mirror_points, mirror_views, rectified_boxes,
    skin_mask, world_poses, world_shapes)

RIG = STB_RIG.scaled(0.4)


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(16, 3, RIG)


def test_rigs_are_the_published_ones():
    assert (STB_RIG.focal, STB_RIG.cx, STB_RIG.cy, STB_RIG.baseline, STB_RIG.height, STB_RIG.width) == (822.79041, 318.47345, 250.31296, 0.120054, 480, 640)
    assert (PAPER_RIG.focal, PAPER_RIG.baseline, PAPER_RIG.height, PAPER_RIG.width) == (762.7, 0.12, 720, 1280)
    with pytest.raises(ValueError, match="baseline"):
        Rig(500.0, 0.0, 0.0, 0.0, 10, 10)


def test_a_scaled_rig_sees_the_same_scene():
    X = torch.tensor([[[0.1, -0.05, 0.6]]])
    assert torch.allclose(project(X, STB_RIG.scaled(0.5).K(1)), 0.5 * project(X, STB_RIG.K(1)), atol=1e-4)


def test_pairs_are_determined_by_their_seed(pairs):
    again = make_pairs(16, 3, RIG)
    assert all(torch.equal(a, b) for a, b in zip(pairs[0][:4] + pairs[1], again[0][:4] + again[1]))
    assert not torch.equal(pairs[0].left, make_pairs(16, 4, RIG)[0].left)


@pytest.mark.parametrize("rig", [RIG, PAPER_RIG.scaled(0.25)])
def test_both_cameras_see_the_hand_where_the_truth_says(rig):
    views, truth = make_pairs(6, 1, rig)
    assert views.left.shape[-2:] == (rig.height, rig.width)
    for offset, mask, box in ((0.0, truth.mask_left, views.box_left), (rig.baseline, truth.mask_right, views.box_right)):
        uv = project(truth.vertices - torch.tensor([offset, 0, 0]), rig.K(6))
        for i in range(6):
            rows, columns = (mask[i] > 0.5).nonzero().unbind(1)
            low, high = uv[i].amin(0).clamp(min=0), torch.minimum(uv[i].amax(0), torch.tensor([float(rig.width), rig.height]))
            assert abs(columns.min() - low[0]) < 2 and abs(columns.max() + 1 - high[0]) < 2 and abs(rows.min() - low[1]) < 2 and abs(rows.max() + 1 - high[1]) < 2
            inside = ((uv[i] > box[i, :2]) & (uv[i] < box[i, 2:])).all(-1).float().mean()
            assert inside > 0.85                      # a detector's box: a little off


def test_hands_are_not_centred_in_their_pictures(pairs):
    centre = (pairs[0].box_left[:, :2] + pairs[0].box_left[:, 2:]) / 2
    assert (centre / torch.tensor([RIG.width, RIG.height])).std(0).min() > 0.04


def test_the_hand_warps_from_one_picture_onto_the_other(pairs):
    from handrecon.proxy_hand import proxy_hand
    from handrecon.raster import rasterize
    views, truth = pairs
    depth = rasterize(truth.vertices, proxy_hand().faces, RIG.K(16), (RIG.height, RIG.width)).depth
    d = depth_to_disparity(depth, RIG.focal, RIG.baseline)
    on = ((depth > 0) & (truth.mask_left > 0.99)).float()
    difference = lambda image: ((image - views.left).abs().mean(1) * on).sum() / on.sum()
    assert difference(warp(views.right, d)) < 0.35 * difference(warp(views.right, d + 4)) and difference(warp(views.right, d)) < 0.05


def test_the_wall_has_its_own_disparity():
    world = replace(LIVING_ROOM, noise=0.0, defocus=0.0)
    views, truth = make_pairs(2, 0, RIG, world)
    shift = round(RIG.focal * RIG.baseline / 2.0)
    corner_left, corner_right = views.left[:, :, :12, 40 + shift:90 + shift], views.right[:, :, :12, 40:90]
    assert (corner_left * 0.97 - corner_right).abs().mean() < 0.02


def test_the_test_room_is_never_seen_in_training():
    world = replace(LIVING_ROOM, noise=0.0)
    test, train = make_pairs(12, 0, RIG, world, test=True)[0].left, make_pairs(12, 0, RIG, world)[0].left
    corner = lambda x: x[:, :, :20, :20].mean((2, 3))
    assert corner(test).std(0).max() < 0.06 < corner(train).std(0).max()


def test_crops_carry_their_cameras_exactly(pairs):
    views, truth = pairs
    crops = crop_pair(views, 64)
    u_l, u_r = project(truth.vertices, crops.K_left), project(truth.vertices - torch.tensor([RIG.baseline, 0, 0]), crops.K_right)
    assert (u_l - u_r)[..., 1].abs().max() < 1e-3
    z = disparity_to_depth((u_l - u_r)[..., 0], crops.focal, crops.baseline, crops.shift)
    assert (z - truth.vertices[..., 2]).abs().max() < 2e-5


def test_crops_hold_pictures_and_cameras_only():
    assert [f.name for f in fields(StereoCrops)] == ["left", "right", "K_left", "K_right", "baseline"]


def test_rectified_boxes_share_rows_and_size():
    left, right = torch.tensor([[10.0, 20, 50, 60]]), torch.tensor([[0.0, 24, 60, 84]])
    a, b = rectified_boxes(left, right)
    assert torch.equal(a[:, [1, 3]], b[:, [1, 3]]) and torch.equal(a[:, 2] - a[:, 0], b[:, 2] - b[:, 0]) and a[0, 2] - a[0, 0] == 60
    assert (a[0, 0] + a[0, 2]) / 2 == 30 and (b[0, 0] + b[0, 2]) / 2 == 30
    with pytest.raises(ValueError, match="right hand box"):
        rectified_boxes(left, right.flip(1))


def test_mirroring_a_pair_swaps_its_cameras(pairs):
    views, truth = pairs
    mirrored = mirror_views(views)
    again = mirror_views(mirrored)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(views[:4], again[:4])) and abs(again.rig.cx - views.rig.cx) < 1e-6
    X = mirror_points(truth.joints, RIG.baseline)
    u_l, u_r = (project(X - torch.tensor([b, 0, 0]), mirrored.rig.K(16))[..., 0] for b in (0.0, RIG.baseline))
    old_r = project(truth.joints - torch.tensor([RIG.baseline, 0, 0]), RIG.K(16))[..., 0]
    assert torch.allclose(u_l, RIG.width - old_r, atol=1e-3) and (u_l > u_r).all()
    assert torch.allclose(mirror_points(X, RIG.baseline), truth.joints, atol=1e-6)


def test_the_worlds_differ_in_everything():
    same = [f.name for f in fields(World) if getattr(STUDIO, f.name) == getattr(LIVING_ROOM, f.name)]
    assert set(same) <= {"jitter", "forearm"}


def test_poses_are_feasible_and_the_person_is_one():
    g = torch.Generator().manual_seed(0)
    poses = world_poses(40, g, LIVING_ROOM)
    low, high = joint_limits().reshape(45, 2).T
    assert poses.shape == (40, 45) and (poses >= low).all() and (poses <= high).all()
    assert world_shapes(9, g, LIVING_ROOM).unique(dim=0).shape[0] == 1 and world_shapes(9, g, STUDIO).unique(dim=0).shape[0] == 9


def test_labelled_hands_lie_on_their_masks():
    data = make_labelled(6, 2, 64)
    uv = project(data.vertices, data.K)
    for i in range(6):
        rows, columns = (data.mask[i] > 0.5).nonzero().unbind(1)
        assert abs(columns.float().mean() - uv[i, :, 0].mean()) < 12 and abs(rows.float().mean() - uv[i, :, 1].mean()) < 12
    assert data.image.min() >= 0 and data.image.max() <= 1


def test_skin_detector_finds_most_of_the_hand_without_truth(pairs):
    views, truth = pairs
    crops = crop_pair(views, 64)
    box, _ = rectified_boxes(views.box_left, views.box_right)
    errors = mask_errors(skin_mask(crops.left), crop_images(truth.mask_left[:, None], box, 64)[:, 0])
    assert errors.iou > 0.6 and errors.missed < 0.25


def test_skin_detector_on_a_picture_with_a_known_answer():
    image = torch.tensor([0.1, 0.3, 0.7])[:, None, None].expand(3, 64, 64).clone()
    image[:, 18:50, 18:44] = torch.tensor([0.8, 0.6, 0.45])[:, None, None]
    true = torch.zeros(1, 64, 64)
    true[:, 18:50, 18:44] = 1
    errors = mask_errors(skin_mask(image[None]), true)
    assert errors.iou > 0.97


def test_mask_errors_count():
    found, true = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    found[0, 0], true[0, :, 0] = 1, 1
    errors = mask_errors(found, true)
    assert errors.iou == pytest.approx(1 / 7) and errors.missed == pytest.approx(3 / 4) and errors.invented == pytest.approx(3 / 4)

"""Targets, peaks and places: what is drawn comes back, and nothing else does."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from handrecon.camera import project, unproject
from handrecon.centermap import (
    CENTER_BIAS, assign_joints, cell_centers, cells_of, decode, draw_gaussians, draw_targets, find_peaks, focal_loss, gather, gather_patches, gaussian_radius,
    hand_centers, least_assignment, local_soft_argmax, ray_rotation, side_limits)
from handrecon.conventions import joint_limits
from handrecon.mano import mirror_rotation

K = torch.tensor([[[512.0, 0, 256], [0, 512, 256], [0, 0, 1]]])


@given(st.floats(2, 60), st.floats(2, 60), st.floats(0.3, 0.95))
@settings(max_examples=60, deadline=None)
def test_radius_is_where_the_worst_box_overlaps_just_enough(w, h, overlap):
    r = float(gaussian_radius(torch.tensor([w, h], dtype=torch.float64), overlap))
    both = max(w - r, 0) * max(h - r, 0)
    worst = min(both / (2 * w * h - both), max(w - 2 * r, 0) * max(h - 2 * r, 0) / (w * h), w * h / ((w + 2 * r) * (h + 2 * r)))
    assert worst == pytest.approx(overlap, abs=1e-9)


@given(st.integers(0, 10), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_targets_of_k_hands_decode_to_them(k, seed):
    g = torch.Generator().manual_seed(seed)
    spots = torch.randperm(100, generator=g)[:k]                       # a coarse grid keeps centres apart
    centers = (torch.stack([spots % 10, spots // 10], -1) * 48 + 20 + 6 * torch.rand(k, 2, generator=g))[None]
    sizes = 96 + 224 * torch.rand(1, k, 2, generator=g)
    heat = draw_targets(centers, sizes, torch.ones(1, k, dtype=torch.bool), (64, 64))
    peaks = decode(heat)
    assert int(peaks.kept.sum()) == k and float(heat.max() if k else 1) == 1
    x, y = cells_of(centers, (64, 64), 8)[0].unbind(-1)
    assert sorted((y * 64 + x).tolist()) == sorted(peaks.index[0, :k].tolist())
    assert (cell_centers(peaks.index[0, :k], 64) - 4 >= 0).all()


def test_hands_that_are_not_there_leave_no_trace():
    heat = draw_targets(torch.full((1, 2, 2), 100.0), torch.full((1, 2, 2), 150.0), torch.tensor([[False, False]]), (32, 32))
    assert heat.abs().max() == 0 and not decode(heat).kept.any()


def test_equal_neighbours_count_once_and_close_centres_melt():
    heat = torch.zeros(1, 12, 12)
    heat[0, 4, 4] = heat[0, 4, 5] = 0.8
    assert int(find_peaks(heat)[heat > 0.5].sum()) == 1
    for gap, found in ((2, 1), (3, 2)):
        heat = torch.zeros(1, 12, 12)
        heat[0, 4, 3], heat[0, 4, 3 + gap] = 0.9, 0.8
        assert int(decode(heat).kept.sum()) == found


def test_best_peaks_come_first_and_the_threshold_is_applied():
    heat = torch.zeros(1, 20, 20)
    for i, value in enumerate((0.2, 0.9, 0.5)): heat[0, 3, 3 + 6 * i] = value
    peaks = decode(heat, max_hands=2, threshold=0.3)
    assert torch.allclose(peaks.score, torch.tensor([[0.9, 0.5]])) and peaks.kept.all()
    assert decode(heat, threshold=0.6).kept.sum() == 1


def test_focal_loss_has_the_right_gradient_and_a_slope_where_a_clamp_has_none():
    target = draw_gaussians(torch.tensor([[[2.0, 1.0]]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool), (4, 4))[:, None]
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: focal_loss(v, target), x)
    miss = torch.full((1, 1, 1, 1), -20.0, requires_grad=True)
    focal_loss(miss, torch.ones(1, 1, 1, 1)).backward()
    assert float(miss.grad) == pytest.approx(-1, abs=1e-4)


def test_focal_loss_is_small_only_for_the_right_map():
    target = draw_targets(torch.tensor([[[100.0, 60]]]), torch.full((1, 1, 2), 200.0), torch.ones(1, 1, dtype=torch.bool), (32, 32))[:, None]
    right = torch.where(target == 1, 8.0, -8.0)
    shifted = right.roll(5, -1)
    assert focal_loss(right, target) < 0.01 < 1 < focal_loss(shifted, target)
    assert float(torch.tensor(CENTER_BIAS).sigmoid()) == pytest.approx(0.01, abs=1e-6)


def test_centres_are_means_of_visible_joints():
    keypoints, visible = torch.rand(2, 21, 2) * 100, torch.zeros(2, 21)
    visible[0, [3, 7]] = 1
    center, size = hand_centers(keypoints, visible)
    assert torch.allclose(center[0], keypoints[0, [3, 7]].mean(0)) and torch.allclose(size[0], (keypoints[0, 3] - keypoints[0, 7]).abs(), atol=1e-5)
    assert center[1].abs().sum() == 0 and size[1].abs().sum() == 0
    box, _ = hand_centers(keypoints, torch.ones(2, 21), "box")
    assert torch.allclose(box, (keypoints.amin(1) + keypoints.amax(1)) / 2)
    with pytest.raises(ValueError, match="wrist"): hand_centers(keypoints, visible, "wrist")


def test_asking_at_cells_equals_convolving_everywhere():
    maps, kernel = torch.randn(2, 3, 9, 7), torch.randn(5, 3, 3, 3)
    index = torch.randint(63, (2, 6))
    assert torch.allclose(gather(F.conv2d(maps, kernel, padding=1), index), gather_patches(maps, index) @ kernel.flatten(1).T, atol=1e-5)


@given(st.floats(0, 512), st.floats(0, 512))
@settings(max_examples=40, deadline=None)
def test_ray_rotation_takes_the_axis_to_the_ray(u, v):
    pixel = torch.tensor([[[u, v]]])
    R = ray_rotation(pixel, K)[0, 0]
    assert torch.allclose(R @ R.mT, torch.eye(3), atol=1e-5) and float(torch.linalg.det(R)) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(project((R @ torch.tensor([0, 0, 0.7]))[None, None], K), pixel, atol=1e-2)
    assert torch.allclose(unproject(pixel, torch.full((1, 1), 0.5), K)[0, 0, 2], torch.tensor(0.5))


def test_left_limits_are_the_mirror_image():
    low, high = side_limits("left").unbind(-1)
    middle = mirror_rotation(joint_limits().mean(-1).flatten()).view(15, 3)
    assert (low <= high).all() and torch.allclose((low + high) / 2, middle, atol=1e-6)
    assert torch.equal(side_limits("right"), joint_limits())


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_assignment_costs_what_scipy_finds(seed, n, extra):
    cost = np.random.default_rng(seed).random((n, n + extra)).round(1)
    columns = least_assignment(cost)
    assert len(set(columns.tolist())) == n
    assert np.isclose(cost[np.arange(n), columns].sum(), cost[linear_sum_assignment(cost)].sum())


def test_joints_are_shared_out_and_distant_ones_left_alone():
    assert assign_joints(torch.tensor([[0.0, 0], [10, 0]]), torch.tensor([[8.0, 0], [25, 0]]), 60).tolist() == [0, 1]
    assert assign_joints(torch.tensor([[0.0, 0]]), torch.tensor([[90.0, 0]]), 60).tolist() == [-1]
    assert assign_joints(torch.zeros(2, 2), torch.zeros(0, 2), 60).tolist() == [-1, -1]


def test_soft_argmax_reads_between_cells_and_not_outside_its_window():
    heat = torch.zeros(1, 1, 16, 16)
    heat[0, 0, 5, 7] = heat[0, 0, 5, 8] = 0.8
    heat[0, 0, 12, 3] = 0.9
    at, best = local_soft_argmax(heat, torch.tensor([[[[60.0, 40.0]]]]), torch.tensor([[30.0]]))
    assert torch.allclose(at, torch.tensor([[[[64.0, 44.0]]]])) and float(best) == pytest.approx(0.8)

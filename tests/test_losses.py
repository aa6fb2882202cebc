"""Losses: values and gradients worked by hand, symmetries, independent libraries, and the traps of public code."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from handrecon import losses as L
from handrecon.conventions import BONES, joint_limits

seeds = st.integers(0, 2**31 - 1)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grad(loss, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


# --- E_loc --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("offset, distance", [((0, 0), 0), ((3, 0), 0.9), ((0, -4), 1.6), ((3, 4), 2.5), ((30, 40), 47.5)])
def test_smooth_l1_is_the_documented_huber(offset, distance):
    assert L.smooth_l1(torch.tensor([offset], dtype=torch.float64)).item() == pytest.approx(distance)


def test_location_by_hand():
    detected = rand(2, 21, 2) * 100
    predicted, confidence = detected.clone(), torch.ones(2, 21, dtype=torch.float64)
    predicted[0, 3] += torch.tensor([6.0, 8.0])  # d = 10 costs 7.5
    predicted[1, 5] += torch.tensor([0.0, 2.0])  # d = 2 costs 0.4
    confidence[0, 3] = 0.5
    assert L.joint_location_loss(predicted, detected, confidence).item() == pytest.approx((0.5 * 7.5 + 0.4) / 42)
    g = grad(lambda x: L.joint_location_loss(x, detected, confidence), predicted)
    torch.testing.assert_close(g[0, 3], torch.tensor([0.6, 0.8], dtype=torch.float64) * 0.5 / 42)
    torch.testing.assert_close(g[1, 5], torch.tensor([0.0, 0.4], dtype=torch.float64) / 42)


def test_location_public_variant_squares_the_weighted_confidence():
    detected, confidence = rand(1, 21, 2) * 100, torch.zeros(1, 21, dtype=torch.float64)
    predicted = detected.clone()
    confidence[0, 0], confidence[0, 4], confidence[0, 5] = 0.5, 0.8, 1.0
    predicted[0, 4, 0] += 10
    weights = (0.5 * 2) ** 2, (0.8 * 1.5) ** 2, 1.0
    expected = weights[1] * 7.5 / sum(weights)
    assert L.joint_location_loss(predicted, detected, confidence, variant="public").item() == pytest.approx(expected)
    assert L.joint_location_loss(predicted, detected, 0 * confidence, variant="public").item() == 0


@pytest.mark.parametrize("loss", [L.joint_location_loss, L.bone_orientation_loss])
@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 0.0, -1e30])
def test_a_joint_without_confidence_contributes_nothing(loss, hidden):
    predicted, detected, confidence = rand(2, 21, 2) * 50, rand(2, 21, 2, seed=1) * 50, rand(2, 21, seed=2)
    confidence[:, 7] = 0
    reference = loss(predicted, detected, confidence)
    changed = detected.clone()
    changed[:, 7] = hidden
    assert loss(predicted, changed, confidence) == reference
    g = grad(lambda x: loss(x, changed, confidence), predicted)
    assert g.isfinite().all()
    if loss is L.joint_location_loss:
        assert g[:, 7].abs().sum() == 0


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-math.pi, math.pi))
def test_location_does_not_change_when_the_picture_is_turned(seed, angle):
    predicted, detected, confidence = rand(2, 21, 2, seed=seed) * 50, rand(2, 21, 2, seed=seed + 1) * 50, rand(2, 21, seed=seed + 2)
    R = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    torch.testing.assert_close(L.joint_location_loss(predicted @ R, detected @ R, confidence), L.joint_location_loss(predicted, detected, confidence))


# --- E_ori --------------------------------------------------------------------------------------------------------

def test_orientation_by_hand():
    detected = rand(1, 21, 2) * 100
    predicted, confidence = detected.clone(), torch.ones(1, 21, dtype=torch.float64)
    v = detected[0, 8] - detected[0, 7]
    turned = torch.stack([-v[1], v[0]])
    predicted[0, 8] = predicted[0, 7] + turned
    confidence[0, 7], confidence[0, 8] = 0.5, 0.8
    loss = lambda x: L.bone_orientation_loss(x, detected, confidence)
    assert loss(predicted).item() == pytest.approx(0.4 * 2 / 20)
    g = grad(loss, predicted)[0, 8]
    assert g.norm().item() == pytest.approx(0.4 / 20 * 2 / v.norm().item())
    assert abs((g @ turned).item()) < 1e-15  # across the bone
    assert (g @ v).item() < 0                # a step against the gradient turns it back


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-500, 500), st.floats(1.0, 20))
def test_orientation_ignores_place_and_size(seed, shift, scale):
    predicted, detected, confidence = rand(2, 21, 2, seed=seed) * 900, rand(2, 21, 2, seed=seed + 1) * 900, rand(2, 21, seed=seed + 2)
    loss = L.bone_orientation_loss(predicted, detected, confidence, shortest=1e-6)
    torch.testing.assert_close(L.bone_orientation_loss(predicted * scale + shift, detected, confidence, shortest=1e-6), loss)
    assert 0 <= loss <= 4


@pytest.mark.parametrize("collapsed", ["predicted", "detected", "both"])
def test_coincident_joints_have_finite_gradients(collapsed):
    point, spread, con = torch.full((3, 21, 2), 40.0), rand(3, 21, 2, dtype=torch.float32) * 80, torch.ones(3, 21)
    predicted = spread if collapsed == "detected" else point
    detected = spread if collapsed == "predicted" else point
    loss = L.bone_orientation_loss(predicted, detected, con)
    g = grad(lambda x: L.bone_orientation_loss(x, detected, con), predicted)
    assert loss.isfinite() and g.isfinite().all() and g.abs().max() < 1
    if collapsed != "predicted":
        assert loss == 0 and (g == 0).all()  # a detection without direction teaches none
    else:
        assert g.abs().max() > 0             # a collapsed guess is told where to unfold


def test_a_bone_counts_only_when_both_ends_were_seen():
    predicted, detected = rand(1, 21, 2) * 50, rand(1, 21, 2, seed=1) * 50
    for parent, child in BONES:
        confidence = torch.zeros(1, 21, dtype=torch.float64)
        confidence[0, child] = 1
        assert L.bone_orientation_loss(predicted, detected, confidence) == 0
        confidence[0, parent] = 1
        assert L.bone_orientation_loss(predicted, detected, confidence) > 0


# --- photometric --------------------------------------------------------------------------------------------------

def test_photometric_confidence():
    confidence = torch.full((2, 21), 0.5)
    confidence[1, 20] = 0.1
    torch.testing.assert_close(L.photometric_confidence(confidence), torch.tensor([10.5, 10.1]))
    torch.testing.assert_close(L.photometric_confidence(confidence, "public"), torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("norm, expected", [(1, 10 * 0.7 / 2), (2, 10 * 0.5 / 2)])
def test_pixel_by_hand(norm, expected):
    image, S = torch.full((1, 3, 2, 2), 0.5), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    rendered = image.clone()
    rendered[0, :, 0, 0] += torch.tensor([0.3, 0.4, 0.0])
    loss = lambda x: L.pixel_loss(image, x, S, torch.tensor([10.0]), norm)
    assert loss(rendered).item() == pytest.approx(expected)
    g = grad(loss, rendered)
    wanted = torch.tensor([5.0, 5.0]) if norm == 1 else 5 * torch.tensor([0.6, 0.8])
    torch.testing.assert_close(g[0, :2, 0, 0], wanted)
    assert g.isfinite().all() and (g[0, :, 1] == 0).all()


def test_the_background_of_the_rendering_does_not_matter():
    image, S = rand(2, 3, 20, 20), (rand(2, 20, 20, seed=1) > 0.5).double()
    hand = rand(2, 3, 20, 20, seed=2) * S[:, None]
    white = hand + 1 - S[:, None]
    con = torch.tensor([3.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(L.pixel_loss(image, white, S, con), L.pixel_loss(image, hand, S, con))
    torch.testing.assert_close(L.ssim_loss(image, white, S), L.ssim_loss(image, hand, S))
    assert L.pixel_loss(image, image * S[:, None], S, con) == 0
    assert L.ssim_loss(image, image * S[:, None], S) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("norm", [1, 2])
def test_a_hand_outside_the_picture_costs_nothing(norm):
    image, rendered = rand(1, 3, 12, 12), torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    S = torch.zeros(1, 12, 12, dtype=torch.float64)
    assert L.pixel_loss(image, rendered, S, torch.tensor([9.0], dtype=torch.float64), norm) == 0
    g = grad(lambda s: L.pixel_loss(image, rendered, s, torch.tensor([9.0], dtype=torch.float64), norm), S)
    assert g.isfinite().all()


# --- SSIM ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(11, 11), (11, 40), (64, 37)])
def test_ssim_agrees_with_skimage(H, W):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    x, y = rand(3, 3, H, W), rand(3, 3, H, W, seed=1)
    y = 0.6 * x + 0.4 * y
    theirs = [structural_similarity(a.numpy(), b.numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5,
                                    use_sample_covariance=False, data_range=1.0) for a, b in zip(x, y)]
    np.testing.assert_allclose(L.ssim(x, y), theirs, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_ssim_is_symmetric_and_at_most_one(seed):
    x, y = rand(2, 3, 16, 18, seed=seed), rand(2, 3, 16, 18, seed=seed + 1)
    torch.testing.assert_close(L.ssim(x, y), L.ssim(y, x))
    assert (L.ssim(x, y) < 1).all()
    torch.testing.assert_close(L.ssim(x, x), torch.ones(2, dtype=torch.float64))


def test_blur_equals_convolution():
    x = rand(2, 3, 25, 31)
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    kernel = (g[:, None] * g / g.sum() ** 2).view(1, 1, 11, 11)
    expected = torch.conv2d(x.flatten(0, 1)[:, None], kernel).unflatten(0, (2, 3)).squeeze(2)
    torch.testing.assert_close(L.gaussian_blur(x), expected)


def test_ssim_survives_inference_mode_and_mixed_precision():
    x, y = rand(1, 3, 23, 29, dtype=torch.float32), rand(1, 3, 23, 29, seed=1, dtype=torch.float32)
    with torch.inference_mode():
        L.ssim(x, y)  # must not leave constants behind that training cannot use
    exact = L.ssim(x.double(), y.double())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = L.ssim(x, y.requires_grad_())
    mixed.sum().backward()
    torch.testing.assert_close(mixed.double(), exact, atol=1e-5, rtol=0)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="11×11.*10×30"):
        L.ssim(torch.rand(1, 3, 10, 30), torch.rand(1, 3, 10, 30))


# --- priors -------------------------------------------------------------------------------------------------------

def test_shape_by_hand():
    shape = torch.zeros(2, 10)
    shape[0, :2] = torch.tensor([3.0, 4.0])
    assert L.shape_regularizer(shape) == 2.5
    assert L.shape_regularizer(shape, "public").item() == pytest.approx(25 / 20)
    g = grad(L.shape_regularizer, shape)
    torch.testing.assert_close(g[0, :2], torch.tensor([0.3, 0.4]))
    assert (g[1] == 0).all()


def test_texture_by_hand():
    texture = torch.zeros(1, 9, 3, dtype=torch.float64)
    texture[0, 4, 0] = 0.9
    assert L.texture_regularizer(texture).item() == pytest.approx(0.8 / 9)
    g = grad(L.texture_regularizer, texture)
    assert g[0, 4, 0].item() == pytest.approx(8 / 81) and g[0, 0, 0].item() == pytest.approx(-1 / 81)
    assert (g[..., 1:] == 0).all()


def test_texture_statistics_are_per_sample():
    light, dark = 0.8 + 0.05 * rand(15, 200, 3) ** 4, 0.2 + 0.05 * rand(1, 200, 3, seed=1) ** 4  # skewed: some colours lie beyond 2σ
    alone = [L.texture_regularizer(hand[None]) for hand in (*light, *dark)]
    together = L.texture_regularizer(torch.cat([light, dark]))
    torch.testing.assert_close(together, torch.stack(alone).mean())
    con = rand(16, seed=2)
    weighted = L.texture_regularizer(torch.cat([light, dark]), con)
    torch.testing.assert_close(weighted, (con.square() * torch.stack(alone)).sum() / con.square().sum())
    g = grad(lambda x: L.texture_regularizer(x, torch.eye(16, dtype=torch.float64)[3]), torch.cat([light, dark]))
    assert (g[[i for i in range(16) if i != 3]] == 0).all() and g[3].abs().sum() > 0
    assert L.texture_regularizer(torch.cat([light, dark]), 0 * con) == 0


def test_scale_by_hand():
    joints = rand(2, 21, 3)
    joints[:, 9] = 0
    joints[0, 10] = torch.tensor([0.0, 0.03, 0.04])
    joints[1, 10] = torch.tensor([0.0282, 0.0, 0.0])
    assert L.scale_regularizer(joints).item() == pytest.approx(0.0218 / 2)
    g = grad(L.scale_regularizer, joints)
    torch.testing.assert_close(g[0, 10], torch.tensor([0.0, 0.3, 0.4], dtype=torch.float64))
    torch.testing.assert_close(g[0, 9], -g[0, 10])
    assert grad(L.scale_regularizer, torch.zeros(1, 21, 3)).isfinite().all()


def test_joint_limits_by_hand():
    pose = torch.zeros(2, 15, 3)
    pose[0, 1] = torch.deg2rad(torch.tensor([-8.0, 0.0, 110.0]))  # index PIP: 3° of twist, 10° of flexion beyond
    assert L.joint_limit_loss(pose.flatten(1)).rad2deg().item() == pytest.approx(23 / 15 / 2, rel=1e-5)
    assert L.joint_limit_loss(pose.flatten(1), variant="public").rad2deg().item() == pytest.approx(23 / 48 / 2, rel=1e-5)
    g = grad(L.joint_limit_loss, pose.flatten(1)).unflatten(1, (15, 3))
    torch.testing.assert_close(g[0, 1], torch.tensor([-1.0, 0.0, 2.0]) / 30)
    g[0, 1] = 0
    assert (g == 0).all()


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_poses_within_the_limits_are_free(seed):
    lower, upper = joint_limits().double().unbind(-1)
    pose = lower + (upper - lower) * rand(4, 15, 3, seed=seed)
    assert L.joint_limit_loss(pose.flatten(1)) < 1e-7
    assert L.joint_limit_loss((upper + 0.01).flatten()[None]).item() == pytest.approx(0.01 * 4, rel=1e-5)


# --- all ----------------------------------------------------------------------------------------------------------

P, Q, CON = rand(2, 21, 2) * 90, rand(2, 21, 2, seed=1) * 90, rand(2, 21, seed=2)
IMAGE, OTHER, SOFT = rand(2, 3, 11, 12, seed=3), rand(2, 3, 11, 12, seed=4), rand(2, 11, 12, seed=5)
ALL = {
    "loc": (lambda x: L.joint_location_loss(x, Q, CON), P),
    "loc public": (lambda x: L.joint_location_loss(x, Q, CON, variant="public"), P),
    "ori": (lambda x: L.bone_orientation_loss(x, Q, CON), P),
    "pixel": (lambda x: L.pixel_loss(IMAGE, x, SOFT, CON.sum(1)), OTHER),
    "pixel by silhouette": (lambda x: L.pixel_loss(IMAGE, OTHER, x, CON.sum(1)), SOFT),
    "pixel L2": (lambda x: L.pixel_loss(IMAGE, x, SOFT, CON.sum(1), 2), OTHER),
    "ssim": (lambda x: L.ssim_loss(IMAGE, x, SOFT), OTHER),
    "ssim by silhouette": (lambda x: L.ssim_loss(IMAGE, OTHER, x), SOFT),
    "shape": (L.shape_regularizer, rand(2, 10, seed=6)),
    "texture": (L.texture_regularizer, rand(2, 40, 3, seed=7) ** 3),
    "scale": (L.scale_regularizer, rand(2, 21, 3, seed=8)),
    "limits": (L.joint_limit_loss, 4 * rand(2, 45, seed=9) - 2),
}


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_finite_differences(name):
    loss, x = ALL[name]
    assert gradcheck(loss, x.clone().requires_grad_(), fast_mode=x.numel() > 100)


@pytest.mark.parametrize("name", ALL)
def test_a_repeated_batch_costs_the_same(name):
    loss, x = ALL[name]
    if name in ("shape", "texture", "scale", "limits"):
        torch.testing.assert_close(loss(torch.cat([x, x, x])), loss(x))
    assert loss(x).shape == () and loss(x) > 0

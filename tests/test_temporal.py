"""Quaternion curves and the losses of a video."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon.proxy_hand import posture, proxy_hand
from handrecon.rotation import axis_angle_to_matrix, axis_angle_to_quaternion, quaternion_angle, quaternion_multiply, slerp
from handrecon.temporal import (
    canonical_normals, detour, hand_quaternions, lit_texture, quaternion_loss, smooth_loss, temporal_loss, texture_shape_loss, transition)

FRONT = torch.tensor([[0.6, 1, 1, 1, 0.6, 1, 1, 1, 0, 0, -1.0]])


def quaternions(n, seed, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_any_monotone_speed_along_one_axis_is_free(seed, phis):
    a, b = quaternions(5, seed), quaternions(5, seed + 1)
    signs = [1, -1] * 4                                                      # a network may answer q or −q
    path = torch.stack([s * transition(a, b, p) for s, p in zip(signs, [0.0, *sorted(phis), 1.0])])
    assert detour(path).abs().max() < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.9), st.floats(0.05, 0.5))
def test_leaving_the_axis_costs(seed, phi, push):
    a, b = quaternions(5, seed), quaternions(5, seed + 1)
    middle = transition(a, b, phi)
    ends = torch.stack([a, torch.where((a * b).sum(-1, keepdim=True) < 0, -b, b), middle], 1)
    across = torch.linalg.svd(ends)[2][:, 3]                                 # at a right angle to the whole arc
    path = torch.stack([a, middle + push * across, b])
    assert detour(path).min() > 1e-4


def test_turning_back_costs_twice_the_way_back():
    a, b = quaternions(7, 0), quaternions(7, 1)
    path = torch.stack([transition(a, b, p) for p in (0.0, 0.6, 0.5, 1.0)])
    assert torch.allclose(detour(path), 0.2 * quaternion_angle(a, b))


def test_transition_is_slerp_at_constant_speed_and_ends_where_it_should():
    a, b = quaternions(50, 2), quaternions(50, 3)
    for t in (0.0, 0.2, 1.0):
        assert quaternion_angle(transition(a, b, t), slerp(a, b, t)).max() < 1e-7
    assert quaternion_angle(transition(a, b, 1.0), b).max() < 1e-7
    assert torch.allclose(quaternion_angle(a, transition(a, b, 0.3)), 0.3 * quaternion_angle(a, b))


@pytest.mark.parametrize("loss", [quaternion_loss, temporal_loss, smooth_loss])
@pytest.mark.parametrize("other", ["identical", "antipodal", "half a turn"])
def test_gradients_are_finite_where_poses_meet(loss, other):
    q = quaternions(4, 4)
    end = {"identical": q, "antipodal": -q, "half a turn": quaternion_multiply(q, torch.tensor([0, 1.0, 0, 0], dtype=q.dtype).expand(4, 4))}[other]
    path = torch.stack([q, end, q]).requires_grad_()
    gradient, = torch.autograd.grad(loss(path), path)
    assert gradient.isfinite().all()


def test_gradients_are_right():
    path = quaternions(12, 5).view(4, 3, 4).requires_grad_()
    for loss in (quaternion_loss, temporal_loss, lambda q: smooth_loss(q, 0.3)):
        assert torch.autograd.gradcheck(loss, path)


def test_compared_losses():
    turn = lambda angle: axis_angle_to_quaternion(torch.tensor([[0.0, 0.0, angle]]))
    path = torch.stack([turn(0.0), turn(0.1), turn(0.4)])
    assert torch.isclose(temporal_loss(path), torch.tensor((0.01 + 0.09) / 2))
    assert torch.isclose(smooth_loss(path, 0.2), torch.tensor(0.01 / 2))
    assert smooth_loss(path, 0.5) == 0
    assert quaternion_loss(path).abs() < 1e-6                                # one axis: the quaternion loss is content


def test_hand_quaternions_are_the_hands_rotations():
    pose = torch.stack([posture("fist"), posture("point")])
    R = axis_angle_to_matrix(torch.tensor([[0.1, 2.0, 0.3], [0.0, 0.0, 0.0]]))
    H = hand_quaternions(pose, R)
    assert H.shape == (2, 16, 4)
    assert quaternion_angle(H[0, 0], axis_angle_to_quaternion(torch.tensor([0.1, 2.0, 0.3]))) < 1e-5
    assert quaternion_angle(H[0, 4], axis_angle_to_quaternion(pose[0, 9:12])) < 1e-5


@pytest.mark.parametrize("per_face", [False, True])
def test_lit_texture_is_the_renderers_shading_in_the_canonical_pose(per_face):
    hand = proxy_hand()
    normals = canonical_normals(hand, per_face)
    assert len(normals) == (hand.n_faces if per_face else hand.n_vertices)
    texture = torch.rand(1, len(normals), 3, generator=torch.Generator().manual_seed(0))
    lit = lit_texture(texture, FRONT, normals)
    expected = texture * (0.6 + 0.6 * (-normals[:, 2:]).clamp_min(0))
    assert torch.allclose(lit, expected, atol=1e-6)


def test_texture_shape_loss_is_literally_equation_21():
    lit = torch.rand(2, 3, 5, 3, generator=torch.Generator().manual_seed(0))
    shape = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(1))
    by_hand = [sum((x[i] - x.mean(0)).norm() for i in range(3)) for y in (lit, shape) for x in y]
    assert torch.isclose(texture_shape_loss(lit, shape), sum(by_hand) / 2)
    still = lit[:, :1].expand(-1, 4, -1, -1).clone().requires_grad_()
    energy = texture_shape_loss(still, shape[:, :1].expand(-1, 4, -1))
    assert energy < 1e-5 and torch.autograd.grad(energy, still)[0].isfinite().all()


def test_two_frames_have_no_detour():
    with pytest.raises(ValueError, match="at least 3 frames, found 2"):
        quaternion_loss(torch.zeros(2, 16, 4))

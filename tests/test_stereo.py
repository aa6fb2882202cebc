"""Two eyes: disparity, warping, visibility, and each loss against a case whose answer is known."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon.camera import crop_intrinsics, project, unproject
from handrecon.proxy_hand import posture, proxy_hand, sample_textures
from handrecon.render import render
from handrecon.rotation import axis_angle_to_matrix
from handrecon.stereo import (
    FARTHEST, StereoWeights, chamfer_loss, contrast_structure, depth_error, depth_to_disparity, disparity_to_depth, edge_lengths, edge_loss, laplacian, laplacian_loss,
    mask_loss, mesh_edges, neighbour_matrix, normal_loss, occlusion_mask, photo_consistency, warp, warp_left_to_right, warp_right_to_left)

F64 = torch.float64


@pytest.fixture(scope="module")
def hand():
    return proxy_hand()


@pytest.fixture(scope="module")
def vertices(hand):
    mesh = hand(posture("relaxed")[None])
    R = axis_angle_to_matrix(torch.tensor([[1.4, 0.2, 0.1]]))
    return (mesh.vertices - mesh.vertices.mean(1, keepdim=True)) @ R.mT + torch.tensor([0.06, 0, 0.5])


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 5), st.floats(50, 2000), st.floats(0.01, 0.5), st.floats(-300, 300))
def test_depth_and_disparity_are_inverse(z, f, b, shift):
    depth = torch.tensor([[z]], dtype=F64)
    d = depth_to_disparity(depth, f, b, shift)
    assert torch.allclose(disparity_to_depth(d, f, b, shift), depth)
    assert torch.isclose(d, torch.tensor(f * b / z + shift, dtype=F64)).all()


def test_numbers_for_each_picture_and_no_depth():
    depth = torch.tensor([[[0.5, 0.0]], [[1.0, 2.0]]])
    d = depth_to_disparity(depth, torch.tensor([100.0, 200.0]), torch.tensor([0.1, 0.2]), torch.tensor([1.0, 0.0]))
    assert torch.allclose(d, torch.tensor([[[21.0, 0.0]], [[40.0, 20.0]]]))


def test_negative_disparity_is_far_away_and_not_folded_over():
    assert torch.allclose(disparity_to_depth(torch.tensor([[-20.0, 0.0]]), 500, 0.1), torch.tensor(FARTHEST))


def test_disparity_is_the_difference_of_two_projections_in_crops_too():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, 50, 3, generator=g, dtype=F64) * 0.1 + torch.tensor([0, 0, 0.7])
    K = torch.tensor([[800.0, 0, 320], [0, 800, 240], [0, 0, 1]], dtype=F64).expand(3, 3, 3)
    left, right = torch.tensor([[200.0, 100, 450, 350]] * 3, dtype=F64), torch.tensor([[70.0, 100, 320, 350]] * 3, dtype=F64)
    K_l, K_r = crop_intrinsics(K, left, 96), crop_intrinsics(K, right, 96)
    u_l, u_r = project(X, K_l), project(X - torch.tensor([0.12, 0, 0], dtype=F64), K_r)
    shift = K_l[:, 0, 2] - K_r[:, 0, 2]
    assert torch.allclose((u_l - u_r)[..., 0], depth_to_disparity(X[..., 2], K_l[:, 0, 0], 0.12, shift))
    assert torch.allclose(u_l[..., 1], u_r[..., 1])


def test_error_grows_with_the_square_of_the_distance():
    z = torch.tensor([[0.5, 1.0]])
    error = depth_error(z, 800, 0.12, 0.5)
    assert torch.isclose(error[0, 1], 4 * error[0, 0]) and torch.isclose(error[0, 1], torch.tensor(0.5 / 96))
    d = depth_to_disparity(z.double(), 800, 0.12)
    assert torch.allclose(disparity_to_depth(d - 1e-4, 800, 0.12) - z, depth_error(z.double(), 800, 0.12, 1e-4), rtol=1e-3, atol=1e-12)


def test_zero_disparity_is_the_identity():
    x = torch.rand(2, 3, 9, 13, dtype=F64)
    assert torch.allclose(warp(x, torch.zeros(2, 9, 13, dtype=F64)), x, atol=1e-12)


@pytest.mark.parametrize("shift", [1, 4])
def test_whole_pixels_move_the_picture(shift):
    x = torch.rand(1, 3, 5, 12, dtype=F64)
    d = torch.full((1, 5, 12), float(shift), dtype=F64)
    assert torch.allclose(warp_right_to_left(x, d)[..., shift:], x[..., :-shift], atol=1e-12)
    assert torch.allclose(warp_left_to_right(x, d)[..., :-shift], x[..., shift:], atol=1e-12)
    assert warp_right_to_left(x, d)[..., :shift].abs().max() < 1e-12


def test_warp_has_the_right_gradient():
    g = torch.Generator().manual_seed(1)
    x, d = torch.rand(1, 2, 4, 8, generator=g, dtype=F64, requires_grad=True), torch.rand(1, 4, 8, generator=g, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, d: warp(x, 0.2 + 0.6 * d), (x, d))


def test_warp_names_the_wrong_shape():
    with pytest.raises(ValueError, match=r"\(1, 5, 6\), found \(1, 6, 5\)"):
        warp(torch.zeros(1, 3, 5, 6), torch.zeros(1, 6, 5))


def test_a_near_plate_hides_a_strip_as_wide_as_the_disparity_step():
    depth, other = torch.full((1, 1, 100), 1.2), torch.full((1, 1, 100), 1.2)
    depth[..., 40:60] = 0.6
    other[..., 28:48] = 0.6
    seen = occlusion_mask(depth, other, depth_to_disparity(depth, 60.0, 0.12))[0, 0]
    assert (~seen[12:]).nonzero().flatten().tolist() == [22, 23, 24, 25, 26, 27]
    assert not seen[:6].any()   # outside the other picture


def _shoot(hand, vertices, texture, size=80):
    f, b = 190.0, 0.12
    K_l = torch.tensor([[[f, 0, size / 2 - f * 0.12], [0, f, size / 2], [0, 0, 1]]])
    K_r = torch.tensor([[[f, 0, size / 2 + f * 0.12], [0, f, size / 2], [0, 0, 1]]])
    left = render(vertices, hand.faces, K_l, (size, size), texture)
    right = render(vertices - torch.tensor([b, 0, 0]), hand.faces, K_r, (size, size), texture)
    return left, right, f, b, float(K_l[0, 0, 2] - K_r[0, 0, 2])


def test_a_perfect_mesh_is_photo_consistent_and_a_wrong_one_is_not(hand, vertices):
    texture = sample_textures(1, torch.Generator().manual_seed(0))
    left, right, f, b, shift = _shoot(hand, vertices, texture)

    def loss(mesh):
        l, r, *_ = _shoot(hand, mesh, texture)
        d = depth_to_disparity(l.depth, f, b, shift)
        hidden = (l.depth > 0) & ~occlusion_mask(l.depth, r.depth, d)
        return float(photo_consistency(warp(right.image, d) * l.silhouette[:, None], left.image, (left.depth > 0) * (~hidden).float()))

    exact = loss(vertices)
    assert exact < 0.02
    for dz in (-0.02, 0.02):
        assert loss(vertices + torch.tensor([0, 0, dz])) > 5 * exact


def test_photo_consistency_of_equal_and_of_known_pictures():
    x, mask = torch.rand(2, 3, 20, 20), torch.ones(2, 20, 20)
    assert photo_consistency(x, x, mask).abs().max() < 1e-6
    flat = torch.full((1, 3, 20, 20), 0.5)
    assert torch.isclose(photo_consistency(flat + 0.1, flat, mask[:1], alpha=0.0), torch.tensor(0.1)).all()   # colour alone
    assert photo_consistency(flat + 0.1, flat, mask[:1], alpha=1.0) < 1e-6                                      # structure does not mind brightness


@pytest.mark.parametrize("size", [7, 11])
def test_contrast_structure_is_scikit_images_ssim_without_luminance(size):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    g = torch.Generator().manual_seed(size)
    x = torch.rand(30, 34, generator=g, dtype=F64)
    y = 0.6 * x + 0.3 * torch.rand(30, 34, generator=g, dtype=F64)
    _, theirs = structural_similarity(x.numpy(), y.numpy(), data_range=1.0, gaussian_weights=True, sigma=size * 1.5 / 11, use_sample_covariance=False, K1=1e4, full=True)
    r = size // 2
    assert np.abs(contrast_structure(x[None, None], y[None, None], size)[0, 0].numpy() - theirs[r:-r, r:-r]).max() < 1e-6


def test_edges_of_closed_and_open_meshes(hand):
    tetrahedron = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    assert len(mesh_edges(tetrahedron)) == 6
    assert hand.n_vertices - len(mesh_edges(hand.faces)) + hand.n_faces == 1   # a sphere with one hole


def test_edge_loss_sees_size_and_nothing_rigid(hand, vertices):
    edges, v = mesh_edges(hand.faces), vertices.double()
    lengths = edge_lengths(v, edges)
    assert torch.allclose(edge_loss(1.1 * v, lengths, edges), 0.01 * lengths.square().sum(1))
    R = axis_angle_to_matrix(torch.tensor([[0.2, -1, 0.4]], dtype=F64))
    assert edge_loss(v @ R.mT - 3, lengths, edges) < 1e-18


def test_edge_without_length_has_a_finite_gradient():
    v = torch.zeros(1, 3, 3, requires_grad=True)
    edge_loss(v, torch.ones(1, 3), torch.tensor([[0, 1], [1, 2], [0, 2]])).sum().backward()
    assert v.grad.isfinite().all()


def test_laplacian_of_a_tetrahedron():
    v = torch.tensor([[[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]], dtype=F64)
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    A = neighbour_matrix(mesh_edges(faces), 4)
    assert torch.allclose(laplacian(v, A), v * 4 / 3)                        # the others' mean is −v/3
    assert torch.allclose(laplacian_loss(v, A), torch.tensor(4 / 3 * math.sqrt(3), dtype=F64))
    assert laplacian(v, A).sum(1).abs().max() < 1e-6                          # the printed sum of vectors says nothing


def test_mask_loss_counts_pixels():
    a, b = torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)
    b[0, 0, :3] = 1
    assert torch.isclose(mask_loss(a, b), torch.tensor(3 / 20)).all()


def test_chamfer_of_a_moved_mesh(hand, vertices):
    v = vertices.double()
    move = torch.tensor([1e-5, 0, 0], dtype=F64)
    assert chamfer_loss(v, v) == 0 and torch.allclose(chamfer_loss(v, v + move), torch.tensor(2e-10, dtype=F64))
    one, two = torch.tensor([[[0.0, 0, 0]]]), torch.tensor([[[3.0, 0, 0], [0, 1, 0]]])
    assert torch.isclose(chamfer_loss(one, two), torch.tensor(1.0 + 9 + 1)).all()   # 1² there, 3² + 1² back, over N = 1


def test_normal_loss_of_a_hinge(hand, vertices):
    assert normal_loss(vertices.double(), vertices.double(), hand.faces) / (3 * hand.n_faces) < 1e-6
    triangle = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]], dtype=F64)
    hinged = triangle @ axis_angle_to_matrix(torch.tensor([[0.4, 0, 0]], dtype=F64)).mT
    assert torch.allclose(normal_loss(triangle, hinged, torch.tensor([[0, 1, 2]])), torch.tensor([math.sin(0.4) * (1 + math.sqrt(0.5))], dtype=F64))


def test_branches_share_x_and_z_by_construction():
    g = torch.Generator().manual_seed(3)
    l = 60 + 20 * torch.rand(1, 9, 2, generator=g, dtype=F64)
    r = l - torch.tensor([30.0, 0]) + torch.randn(1, 9, 2, generator=g, dtype=F64)
    K = torch.tensor([[[200.0, 0, 48], [0, 200, 48], [0, 0, 1]]], dtype=F64)
    z = disparity_to_depth((l - r)[..., 0], 200, 0.12)
    X_l, X_r = unproject(l, z, K), unproject(r, z, K) + torch.tensor([0.12, 0, 0])
    assert torch.allclose(X_l[..., ::2], X_r[..., ::2]) and (X_l - X_r)[..., 1].abs().max() > 1e-4


def test_weights_are_the_papers():
    w = StereoWeights()
    assert (w.photo, w.edge, w.lap, w.mask, w.chamfer, w.normal) == (100, 1, 10, 0.1, 0.001, 0.001)

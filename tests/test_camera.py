"""Projections against OpenCV and against each other; crops that agree with their intrinsics."""
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon.camera import (crop_images, crop_intrinsics, crop_points, project, project_orthographic, project_weak_perspective,
                              square_box, uncrop_points, unproject)

numbers = lambda low, high: st.floats(low, high, allow_nan=False)


@st.composite
def scenes(draw):
    seed = draw(st.integers(0, 2**16))
    points = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(seed)).double() * 0.1 + torch.tensor([0, 0, 1.0])
    K = torch.eye(3).double().repeat(2, 1, 1)
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 1] = draw(numbers(50, 2000)), draw(numbers(50, 2000)), draw(numbers(-20, 20))
    K[:, 0, 2], K[:, 1, 2] = draw(numbers(0, 500)), draw(numbers(0, 500))
    x0, y0, w, h = draw(numbers(-200, 400)), draw(numbers(-200, 400)), draw(numbers(5, 500)), draw(numbers(5, 500))
    return points, K, torch.tensor([[x0, y0, x0 + w, y0 + h]] * 2, dtype=torch.float64), draw(st.integers(8, 256))


@settings(max_examples=50, deadline=None)
@given(scenes())
def test_round_trips_and_cropped_intrinsics(scene):
    points, K, boxes, size = scene
    uv = project(points, K)
    torch.testing.assert_close(unproject(uv, points[..., 2], K), points, atol=1e-9, rtol=0)
    torch.testing.assert_close(project(points, crop_intrinsics(K, boxes, size)), crop_points(uv, boxes, size), atol=1e-6, rtol=1e-9)
    torch.testing.assert_close(uncrop_points(crop_points(uv, boxes, size), boxes, size), uv, atol=1e-6, rtol=1e-9)


def test_project_agrees_with_opencv():
    points = torch.randn(1, 200, 3, generator=torch.Generator().manual_seed(0)).double() * 0.2 + torch.tensor([0, 0, 1.5])
    K = torch.tensor([[[640.0, 0, 311], [0, 655, 240], [0, 0, 1]]]).double()
    theirs, _ = cv2.projectPoints(points[0].numpy(), np.zeros(3), np.zeros(3), K[0].numpy(), None)
    assert np.abs(theirs[:, 0] - project(points, K)[0].numpy()).max() < 1e-9


def test_project_gradients():
    points = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0)).double() * 0.1 + torch.tensor([0, 0, 0.6])
    K = torch.tensor([[[300.0, 3, 112], [0, 310, 112], [0, 0, 1]]]).double()
    assert torch.autograd.gradcheck(project, (points.requires_grad_(), K.requires_grad_()))


def test_weak_perspective_is_perspective_at_one_depth():
    points = torch.tensor([[[0.1, -0.05, 0.8], [-0.02, 0.03, 0.8]]])
    K = torch.tensor([[[400.0, 0, 60], [0, 400, 70], [0, 0, 1]]])
    weak = project_weak_perspective(points, torch.tensor([400 / 0.8]), torch.tensor([[60.0, 70]]))
    torch.testing.assert_close(weak, project(points, K))
    torch.testing.assert_close(project_orthographic(points), points[..., :2])


def test_square_box_ignores_missing_joints_and_contains_the_rest():
    points = torch.tensor([[[40.0, 60], [100, 80], [0, 0]]])
    box = square_box(points, 0.25, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(box, torch.tensor([[25.0, 25, 115, 115]]))
    assert (square_box(points[:, :1], 0.5)[0, 2:] - square_box(points[:, :1], 0.5)[0, :2] > 0).all()
    with pytest.raises(ValueError, match="row 0 has none"): square_box(points, 0.25, torch.zeros(1, 3, dtype=torch.bool))


def test_crop_identity_constant_and_outside():
    image = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(crop_images(image, torch.tensor([[5.0, 3, 35, 33]]), 30), image[..., 3:33, 5:35])
    torch.testing.assert_close(crop_images(torch.full_like(image, 0.3), torch.tensor([[1.3, 2.2, 44.9, 30.0]]), 11), torch.full((1, 3, 11, 11), 0.3))
    outside = crop_images(torch.ones_like(image), torch.tensor([[-50.0, 0, 50, 40]]), 20)
    assert (outside[..., :10] == 0).all() and (outside[..., 10:] > 0.99).all()


def test_crop_does_not_alias():
    "A pattern finer than the crop's pixels must come out grey; reading at pixel centres would give stripes."
    stripes = (torch.arange(240) % 2).float().expand(1, 1, 240, -1)
    crop = crop_images(stripes, torch.tensor([[0.0, 0, 240, 240]]), 37)
    assert (crop - 0.5).abs().max() < 0.1


def test_crop_is_where_the_cropped_camera_looks():
    K, box, X = torch.tensor([[[300.0, 0, 112], [0, 300, 112], [0, 0, 1]]]), torch.tensor([[30.0, 20, 190, 180]]), torch.tensor([[[0.02, -0.01, 0.5]]])
    u, v = project(X, K)[0, 0]
    dot = torch.exp(-((torch.arange(224) + 0.5 - u)[None] ** 2 + (torch.arange(224) + 0.5 - v)[:, None] ** 2) / 18)[None, None]
    crop, centres = crop_images(dot, box, 64)[0, 0], torch.arange(64) + 0.5
    found = torch.stack(((crop.sum(0) * centres).sum(), (crop.sum(1) * centres).sum())) / crop.sum()
    torch.testing.assert_close(found, project(X, crop_intrinsics(K, box, 64))[0, 0], atol=0.02, rtol=0)


def test_empty_box_is_refused():
    for call in (lambda b: crop_images(torch.zeros(1, 3, 8, 8), b, 4), lambda b: crop_intrinsics(torch.eye(3)[None], b, 4)):
        with pytest.raises(ValueError, match="x1 > x0"): call(torch.tensor([[5.0, 1, 5, 9]]))

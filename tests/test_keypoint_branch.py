"""Key-point branch: coordinates from heat maps, the hourglass, its losses, and whether its doubt is honest."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon.keypoint_branch import (
    RAYLEIGH_LOG_MEAN, Hourglass, KeypointBranch, Residual, consistency_loss, fit_calibration, keypoint_loss, reliability, sigma_confidence, soft_argmax)
from handrecon.losses import joint_location_loss


def bump(x, y, sigma, h=24, w=30):
    rows, columns = torch.arange(h, dtype=torch.float64)[:, None] + 0.5, torch.arange(w, dtype=torch.float64) + 0.5
    return (-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))[None, None]


@settings(max_examples=40, deadline=None)
@given(st.floats(8, 22), st.floats(8, 16), st.floats(0.8, 1.6))
def test_centre_and_spread_of_a_gaussian_are_found_between_cells(x, y, sigma):
    found = soft_argmax(bump(x, y, sigma), (48, 120))              # 2 pixels a row, 4 pixels a column
    assert torch.allclose(found.xy[0, 0], torch.tensor([4 * x, 2 * y], dtype=torch.float64), atol=2e-3)
    assert abs(found.spread.item() - sigma * math.sqrt((16 + 4) / 2)) < 1e-2 * sigma


def test_rows_are_y_and_columns_are_x():
    logits = torch.full((1, 1, 4, 8), -50.0)
    logits[0, 0, 1, 6] = 50
    assert torch.allclose(soft_argmax(logits, (40, 80)).xy[0, 0], torch.tensor([65.0, 15.0]))


def test_the_answer_stays_in_the_picture_and_flat_maps_say_the_middle():
    g = torch.Generator().manual_seed(0)
    xy = soft_argmax(50 * torch.randn(20, 3, 8, 8, generator=g), (32, 32)).xy
    assert (xy >= 2).all() and (xy <= 30).all()
    flat = soft_argmax(torch.zeros(1, 1, 8, 8), (32, 32))
    assert torch.allclose(flat.xy, torch.tensor(16.0)) and torch.allclose(flat.spread, torch.tensor(32 / math.sqrt(12)), rtol=0.01)


def test_gradients():
    logits = torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: tuple(soft_argmax(h, (10, 12))), logits)


def test_maps_without_a_joint_axis_are_refused():
    with pytest.raises(Exception, match="heat maps|shape|logits"): soft_argmax(torch.zeros(4, 1, 1, 16), (64, 64))


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (50, 66)])
@pytest.mark.parametrize("stride", [2, 4])
def test_shapes_for_any_picture(size, stride):
    branch = KeypointBranch(8, 2, 1, stride, 2).eval()
    found = branch(torch.rand(3, 3, *size))
    assert found.xy.shape == (3, 21, 2) and found.stages.shape == (2, 3, 21, 2) and torch.equal(found.stages[-1], found.xy)
    assert found.heatmaps.shape[2:] == tuple((s + 1) // 2 // (stride // 2) for s in size)
    assert torch.allclose(found.heatmaps.sum((2, 3)), torch.ones(3, 21), atol=1e-5)


def test_paper_network():
    with torch.device("meta"): branch = KeypointBranch()
    assert len(branch.glasses) == 2 and branch.stem[-1].past.out_channels == 256
    glass, depth = branch.glasses[0][0], 0
    while isinstance(glass, Hourglass):
        assert len(glass.side) == 2 and isinstance(glass.side[0], Residual)
        glass, depth = glass.inner, depth + 1
    assert depth == 4


@pytest.mark.parametrize("wrong", [dict(stride=3), dict(stacks=0), dict(width=2), dict(depth=0)])
def test_bad_sizes_are_one_sentence(wrong):
    with pytest.raises(ValueError, match="KeypointBranch: expected"): KeypointBranch(**wrong)


def test_every_weight_learns():
    branch = KeypointBranch(8, 2, 1, 4, 2)
    keypoint_loss(branch(torch.rand(4, 3, 32, 32)).stages, 32 * torch.rand(4, 21, 2), torch.ones(4, 21)).backward()
    silent = [name for name, p in branch.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in silent if not name.endswith("bias")], silent          # a bias before a batch norm or a softmax moves nothing


def test_moved_picture_moves_the_maps():
    "Convolutions and halvings commute with a shift by a multiple of the coarsest cell, away from the border."
    branch = KeypointBranch(8, 1, 1, 2, 2).eval()
    image = torch.zeros(1, 3, 96, 96)
    image[..., 40:56, 40:56] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    a, b = branch(image).heatmaps.log(), branch(image.roll(8, -1)).heatmaps.log()
    middle = (a - a.mean((2, 3), keepdim=True))[..., 14:34, 14:30]
    assert torch.allclose(middle, (b - a.mean((2, 3), keepdim=True))[..., 14:34, 18:34], atol=0.05 * middle.abs().max().item())


def test_losses_are_eq_10_and_11():
    g = torch.Generator().manual_seed(0)
    stages, detected, con = 30 * torch.randn(2, 4, 21, 2, generator=g), 30 * torch.randn(4, 21, 2, generator=g), torch.rand(4, 21, generator=g)
    d = (stages[0] - detected).norm(dim=-1)
    by_hand = (con * torch.where(d < 5, d**2 / 10, d - 2.5)).mean()
    assert torch.isclose(keypoint_loss(stages[:1], detected, con), by_hand)
    assert torch.isclose(keypoint_loss(stages, detected, con), (by_hand + joint_location_loss(stages[1], detected, con)) / 2)
    assert torch.isclose(consistency_loss(stages[0], detected), torch.where(d < 5, d**2 / 10, d - 2.5).mean())
    assert not torch.isclose(keypoint_loss(stages, detected, con, "public"), keypoint_loss(stages, detected, con))


def test_consistency_pulls_both_sides():
    a, b = torch.zeros(1, 21, 2, requires_grad=True), torch.full((1, 21, 2), 20.0, requires_grad=True)
    consistency_loss(a, b).backward()
    assert torch.allclose(a.grad, -b.grad) and (b.grad > 0).all()


@settings(max_examples=15, deadline=None)
@given(st.floats(-1, 1), st.floats(0.3, 2), st.integers(0, 100))
def test_calibration_is_recovered(a, b, seed):
    g = torch.Generator().manual_seed(seed)
    width = torch.exp(0.5 * torch.randn(8000, generator=g))
    error = (math.exp(a) * width**b * torch.randn(2, 8000, generator=g)).norm(dim=0)
    found = fit_calibration(width, error)
    assert abs(found[0] - a) < 0.05 and abs(found[1] - b) < 0.08


def test_calibrated_branch_reports_pixels_and_travels_with_the_weights():
    branch = KeypointBranch(8, 1, 1, 4, 2).eval()
    spread = torch.rand(400, 21, generator=torch.Generator().manual_seed(0)) * 10 + 1
    branch.calibrate(spread, 0.5 * spread * math.exp(RAYLEIGH_LOG_MEAN))
    assert torch.allclose(branch.sigma(spread), 0.5 * spread, rtol=1e-3)
    again = KeypointBranch(8, 1, 1, 4, 2)
    again.load_state_dict(branch.state_dict())
    assert torch.equal(again.sigma(spread), branch.sigma(spread))
    with pytest.raises(ValueError, match="at least one joint"): branch.calibrate(spread, spread, torch.zeros_like(spread))


def test_reliability_tells_honest_from_boastful():
    g = torch.Generator().manual_seed(0)
    sigma = torch.exp(torch.randn(20000, generator=g))
    error = (sigma * torch.randn(2, 20000, generator=g)).norm(dim=0)
    honest, boastful = reliability(sigma, error), reliability(0.5 * sigma, error)
    assert (honest.covered - honest.share).abs().max() < 0.02 and (boastful.share - boastful.covered).max() > 0.25
    assert torch.allclose(honest.actual[1:-1], honest.predicted[1:-1], rtol=0.1)
    with pytest.raises(ValueError, match="at least 10 joints"): reliability(sigma[:5], error[:5])


def test_confidence_falls_with_doubt():
    con = sigma_confidence(torch.tensor([[0.0, 1.0, 3.0, 100.0]]), 3.0)
    assert con[0, 0] == 1 and torch.isclose(con[0, 2], torch.tensor(0.5)) and (con.diff() < 0).all() and con[0, 3] > 0


def test_half_precision_convolutions_full_precision_coordinates():
    branch = KeypointBranch(8, 1, 1, 4, 2).eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16): found = branch(image)
    assert found.xy.dtype == torch.float32 and (found.xy - branch(image).xy).abs().max() < 3

"""Point features: equivariance, gradients, precision, and what the encoder does with them."""
import pytest
import torch

from handrecon.networks import HandEncoder, make_backbone
from handrecon.point_features import PointFeatures


def pyramid(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 8, 16, 16, generator=generator), torch.rand(batch, 12, 8, 8, generator=generator)]


@pytest.fixture
def module():
    torch.manual_seed(0)
    return PointFeatures([8, 12], n_points=5, width=16, n_values=3)


def test_shapes_and_range(module):
    points, features = module(pyramid())
    assert points.shape == (2, 5, 2) and features.shape == (2, module.feature_dim) == (2, 25)
    assert (points > 0).all() and (points < 1).all()
    assert torch.allclose(features[:, :10], 4 * points.flatten(1) - 2)


def test_values_are_read_under_the_heat_map(module):
    module.eval()
    heat, value = module.maps(pyramid())
    by_hand = torch.einsum("bkn,bvn->bkv", heat.flatten(2).softmax(-1), value.flatten(2)).flatten(1)
    assert torch.allclose(module(pyramid())[1][:, 10:], by_hand, atol=1e-5)


def test_pictures_do_not_see_each_other(module):
    module.eval()
    both, alone = module(pyramid())[0], module([x[:1] for x in pyramid()])[0]
    assert torch.allclose(both[:1], alone, atol=1e-6)


def test_gradient_reaches_every_parameter(module):
    points, features = module(pyramid())
    (points.square().sum() + features.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert module.lateral[1].weight.grad.abs().sum() > 0


def test_float32_under_autocast(module):
    with torch.autocast("cpu", torch.bfloat16):
        points, features = module(pyramid())
    assert points.dtype == features.dtype == torch.float32


def test_every_backbone_has_a_pyramid_from_fine_to_coarse():
    for name in ("small", "efficientnet-b0"):
        backbone = make_backbone(name).eval()
        with torch.no_grad(): _, maps = backbone.pyramid(torch.rand(1, 3, 64, 64))
        sides = [x.shape[-1] for x in maps]
        assert sides[0] == 64 // backbone.low_stride and sides == sorted(set(sides), reverse=True)
        assert [x.shape[1] for x in maps] == backbone.map_dims


def test_encoder_leaves_the_points_in_the_code():
    torch.manual_seed(0)
    backbone = make_backbone("small")
    code, _ = HandEncoder(backbone, image_size=64, points=PointFeatures(backbone.map_dims))(torch.rand(2, 3, 64, 64))
    assert code.points.shape == (2, 21, 2)
    code.points.sum().backward()
    assert all(p.grad is not None for p in backbone.body.encoder.stages[3].parameters())

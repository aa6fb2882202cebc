"""Spherical harmonics against integrals over the sphere and against SciPy."""
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.special import sph_harm_y

from handrecon.harmonics import COSINE_BANDS, STEADY, harmonics, irradiance, lamp_harmonics, shade_harmonics, sphere_rule


def test_orthonormal_on_the_sphere():
    directions, weights = sphere_rule(16)
    Y = harmonics(directions)
    assert torch.allclose((Y * weights[:, None]).T @ Y, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert float(weights.sum()) == pytest.approx(4 * math.pi)


def test_same_functions_as_scipy():
    n = F.normalize(torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    theta, phi = torch.arccos(n[:, 2]).numpy(), torch.atan2(n[:, 1], n[:, 0]).numpy()
    order = [(0, 0), (1, -1), (1, 0), (1, 1), (2, -2), (2, -1), (2, 0), (2, 1), (2, 2)]
    for column, (l, m) in enumerate(order):
        c = sph_harm_y(l, abs(m), theta, phi)
        real = c.real if m == 0 else math.sqrt(2) * (-1) ** m * (c.real if m > 0 else c.imag)
        assert torch.allclose(harmonics(n)[:, column], torch.as_tensor(real), atol=1e-10), (l, m)


def test_irradiance_is_the_integral_over_the_hemisphere():
    g = torch.Generator().manual_seed(1)
    light = torch.randn(1, 2, 9, dtype=torch.float64, generator=g)
    normals = F.normalize(torch.randn(1, 10, 3, dtype=torch.float64, generator=g), dim=-1)
    directions, weights = sphere_rule(200)
    brute = ((normals[0] @ directions.T).clamp_min(0) * weights) @ (harmonics(directions) @ light[0].T)
    assert torch.allclose(brute, irradiance(light, normals)[0], atol=2e-4)


def test_factors_of_the_cosine():
    directions, weights = sphere_rule(300)
    cosine = directions[:, 2].clamp_min(0)
    for band, column in enumerate((0, 2, 6)):                  # the functions of z alone
        Y = harmonics(directions)[:, column]
        ahead = harmonics(torch.tensor([[0, 0, 1.0]], dtype=torch.float64))[0, column]
        assert float((Y * cosine * weights).sum() / ahead) == pytest.approx(COSINE_BANDS[band], abs=1e-4)


def test_white_room_and_silent_network():
    albedo, normals = torch.rand(1, 5, 3), F.normalize(torch.randn(1, 5, 3), dim=-1)
    assert torch.allclose(shade_harmonics(albedo, normals, torch.zeros(1, 27)), STEADY * albedo)
    room = torch.zeros(1, 3, 9)
    room[..., 0] = math.sqrt(4 * math.pi)
    assert torch.allclose(shade_harmonics(albedo, normals, room.flatten(1)), (1 + STEADY) * albedo, atol=1e-6)


def test_a_lamp_is_right_within_a_tenth_and_linear():
    normals = F.normalize(torch.randn(1, 500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=-1)
    direction = F.normalize(torch.tensor([[1.0, -2, -2]], dtype=torch.float64), dim=-1)
    lamp = lamp_harmonics(direction, torch.ones(1, 3, dtype=torch.float64))
    white = torch.ones(1, 500, 3, dtype=torch.float64)
    shone = shade_harmonics(white, normals, lamp) - STEADY
    assert (shone[..., 0] - (normals @ direction[0]).clamp_min(0)).abs().max() < 0.1
    assert torch.allclose(shade_harmonics(white, normals, 3 * lamp) - STEADY, 3 * shone)


def test_gradients():
    albedo, normals, light = torch.rand(1, 3, 3, dtype=torch.float64), torch.randn(1, 3, 3, dtype=torch.float64), torch.randn(1, 27, dtype=torch.float64)
    for x in (albedo, normals, light): x.requires_grad_()
    assert torch.autograd.gradcheck(shade_harmonics, (albedo, normals, light))

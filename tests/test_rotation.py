import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch.autograd import gradcheck, gradgradcheck

from handrecon import rotation as r

ANGLES = [0, 1e-300, 1e-30, 1e-15, 1e-8, 1e-5, 1e-3, 3.16e-3, 3.1622e-3, 3.1623e-3, 3.17e-3, 0.01, 0.5, 1, 2, 3,
          np.pi - 1e-3, np.pi - 1e-6, np.pi - 1e-9, np.pi - 1e-13, np.pi]


def _axes(n=200, seed=0):
    axes = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    e = torch.eye(3, dtype=torch.float64)
    return torch.cat([axes / axes.norm(dim=1, keepdim=True), e, -e, (e + e.roll(1, 0)) / 2**.5, (e - e.roll(1, 0)) / 2**.5])


def _vectors(angles=ANGLES):
    return (torch.tensor(angles, dtype=torch.float64)[:, None, None] * _axes()).reshape(-1, 3)


def _close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance, (a - b).abs().max()


def _up_to_sign(a, b, tolerance):
    _close(torch.where((a * b).sum(-1, keepdim=True) < 0, -a, a), b, tolerance)


def test_every_conversion_agrees_with_scipy():
    v = _vectors(ANGLES + [3.5, 2 * np.pi - 1e-6, 2 * np.pi, 7, 50])
    s = Rotation.from_rotvec(v.numpy())
    R, q, w = (torch.tensor(x) for x in (s.as_matrix(), s.as_quat(scalar_first=True), s.as_rotvec()))
    _close(r.axis_angle_to_matrix(v), R, 1e-14)
    _up_to_sign(r.axis_angle_to_quaternion(v), q, 1e-14)
    _close(r.quaternion_to_matrix(q), R, 1e-14)
    _up_to_sign(r.matrix_to_quaternion(R), q, 1e-14)
    interior = w.norm(dim=1) < np.pi - 1e-7
    _close(r.matrix_to_axis_angle(R)[interior], w[interior], 2e-14)
    _close(r.quaternion_to_axis_angle(q)[interior], w[interior], 2e-14)
    _close(r.axis_angle_to_matrix(r.matrix_to_axis_angle(R)), R, 1e-14)          # half turns too, whatever their sign
    assert (r.matrix_to_axis_angle(R).norm(dim=1) <= np.pi + 1e-14).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 2e-15)])
def test_relative_accuracy_of_the_round_trip(dtype, tolerance):
    angles = [a for a in ANGLES if a > 1e-35 and a < 3.14]
    v = _vectors(angles).to(dtype)
    for there_and_back in (lambda v: r.matrix_to_axis_angle(r.axis_angle_to_matrix(v)),
                           lambda v: r.quaternion_to_axis_angle(r.axis_angle_to_quaternion(v))):
        assert ((there_and_back(v).double() - v).norm(dim=1) / v.double().norm(dim=1)).max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_is_ever_nan(dtype):
    e = torch.eye(3, dtype=dtype)
    chains = {
        "matrix": r.axis_angle_to_matrix, "quaternion": r.axis_angle_to_quaternion,
        "log of matrix": lambda v: r.matrix_to_axis_angle(r.axis_angle_to_matrix(v)),
        "log of quaternion": lambda v: r.quaternion_to_axis_angle(r.axis_angle_to_quaternion(v)),
        "angle": lambda v: r.rotation_angle(r.axis_angle_to_matrix(v), e),
        "angle to itself": lambda v: r.rotation_angle(r.axis_angle_to_matrix(v), r.axis_angle_to_matrix(v.detach())),
        "6d": lambda v: r.rotation_6d_to_matrix(r.matrix_to_rotation_6d(r.axis_angle_to_matrix(v))),
        "slerp": lambda v: r.slerp(r.axis_angle_to_quaternion(v), r.axis_angle_to_quaternion(v.detach()), 0.3),
    }
    for name, chain in chains.items():
        v = _vectors(ANGLES + [2 * np.pi]).to(dtype).requires_grad_()
        first, = torch.autograd.grad(chain(v).sum(), v, create_graph=True)
        assert first.isfinite().all() and first.abs().max() < 50, name
        if first.requires_grad:
            second, = torch.autograd.grad(first.sum(), v, allow_unused=True)
            assert second is None or second.isfinite().all(), name


def test_gradients_against_finite_differences():
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    near = (torch.tensor([0, 1e-6, 1e-3, 3.15e-3, 3.17e-3, 0.1, 1, 3, np.pi, 4]).double()[:, None] * _axes(10)[:10]).requires_grad_()
    q = draw(8, 4)
    assert gradcheck(r.axis_angle_to_matrix, near) and gradgradcheck(r.axis_angle_to_matrix, near)
    assert gradcheck(r.axis_angle_to_quaternion, near) and gradgradcheck(r.axis_angle_to_quaternion, near)
    assert gradcheck(r.quaternion_to_matrix, q) and gradcheck(r.quaternion_to_axis_angle, q)
    assert gradcheck(lambda v: r.matrix_to_axis_angle(r.axis_angle_to_matrix(v)), near[:8])
    assert gradcheck(r.matrix_to_quaternion, r.random_rotations(8, 3).double().requires_grad_())
    assert gradcheck(r.rotation_6d_to_matrix, draw(8, 6)) and gradcheck(r.quaternion_angle, (q, draw(8, 4).flip(0)))
    assert gradcheck(r.quaternion_apply, (q, draw(8, 3))) and gradcheck(r.slerp, (q, draw(8, 4).flip(0), draw(8)))
    rest = torch.tensor([[1.0, 0, 0, 0], [-2, 0, 0, 0]], dtype=torch.float64).requires_grad_()
    assert gradcheck(r.quaternion_to_axis_angle, rest)


def test_algebra_of_quaternions():
    a, b = r.axis_angle_to_quaternion(_vectors()), r.axis_angle_to_quaternion(_vectors().flip(0))
    A, B = r.quaternion_to_matrix(a), r.quaternion_to_matrix(b)
    p = torch.randn(len(a), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    _close(r.quaternion_to_matrix(r.quaternion_multiply(a, b)), A @ B, 1e-14)
    _close(r.quaternion_apply(a, p), (A @ p[..., None])[..., 0], 1e-14)
    _close(r.quaternion_to_matrix(r.quaternion_conjugate(a)), A.mT, 1e-14)
    _close(r.quaternion_apply(a[:7, None], p), torch.einsum("qij,pj->qpi", A[:7], p), 1e-14)        # broadcasting
    assert (r.matrix_to_quaternion(A)[:, 0] >= 0).all()


@given(st.integers(0, 2**32), st.floats(-1e30, 1e30).filter(lambda s: abs(s) > 1e-30))
@settings(max_examples=50, deadline=None)
def test_antipodal_and_rescaled_quaternions_are_one_rotation(seed, scale):
    q = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
    for f in (r.quaternion_to_matrix, r.quaternion_to_axis_angle):
        _close(f(q), f(q * scale), 2e-5)
    assert r.quaternion_angle(q, q * scale).max() < 2e-6


def test_angles():
    v = _vectors()
    angle = r.rotation_angle(torch.eye(3, dtype=torch.float64), r.axis_angle_to_matrix(v))
    _close(angle, v.norm(dim=1), 2e-15)
    A, B = r.axis_angle_to_matrix(v), r.axis_angle_to_matrix(v.flip(0))
    expected = (Rotation.from_matrix(A.numpy()).inv() * Rotation.from_matrix(B.numpy())).magnitude()
    _close(r.rotation_angle(A, B), torch.tensor(expected), 1e-14)
    tiny = r.rotation_angle(torch.eye(3), r.axis_angle_to_matrix(torch.tensor([1e-6, 0, 0])))          # float32, where arccos says 0
    assert tiny.item() == pytest.approx(1e-6, rel=1e-5)
    assert (r.rotation_angle(A, A) == 0).all()


def test_slerp_agrees_with_scipy_and_takes_the_shorter_way():
    from scipy.spatial.transform import Slerp
    q = torch.randn(50, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = np.linspace(0, 1, 7)
    for q0, q1 in q:
        expected = Slerp([0, 1], Rotation.from_quat(torch.stack([q0, q1]).numpy(), scalar_first=True))(t).as_matrix()
        for sign in (1, -1):
            _close(r.quaternion_to_matrix(r.slerp(q0, sign * q1, torch.tensor(t))), torch.tensor(expected), 1e-13)
    same = r.normalize_quaternion(q[:, 0])
    _close(r.slerp(same, same, 0.7), same, 1e-15)


def test_six_numbers_always_make_a_rotation():
    d = torch.randn(500, 6, generator=torch.Generator().manual_seed(3))
    d[0], d[1], d[2] = 0, torch.tensor([1., 2, 3, 2, 4, 6]), torch.tensor([0., 0, 0, 1, 2, 3])
    d[3], d[4], d[5] = torch.tensor([1., 2, 3, 1, 2, 3.0000005]), d[4] * 1e-30, d[5] * 1e30
    for x, tolerance in ((d, 2e-6), (d.double(), 1e-14)):
        R = r.rotation_6d_to_matrix(x)
        _close(R.mT @ R, torch.eye(3, dtype=x.dtype).expand_as(R), tolerance)
        assert (torch.linalg.det(R) > 0.99).all()
    x = d.clone().requires_grad_()
    assert torch.autograd.grad(r.rotation_6d_to_matrix(x)[6:].sum(), x)[0].isfinite().all()
    R = r.random_rotations(100, 0)
    _close(r.rotation_6d_to_matrix(r.matrix_to_rotation_6d(R)), R, 1e-6)
    _close(r.matrix_to_rotation_6d(R)[:, :3], R[:, :, 0], 0)        # columns, not rows
    assert r.rotation_6d_to_matrix(d)[3:].isfinite().all()


def test_random_rotations_are_uniform_and_reproducible():
    R = r.random_rotations(20_000, 1).double()
    assert torch.equal(r.random_rotations(3, 9), r.random_rotations(3, torch.Generator().manual_seed(9)))
    assert R.mean(0).abs().max() < 0.02
    angle = r.rotation_angle(torch.eye(3, dtype=torch.float64), R).sort().values
    empirical = torch.arange(1, len(R) + 1) / len(R)
    assert ((angle - angle.sin()) / np.pi - empirical).abs().max() < 0.02       # Kolmogorov-Smirnov


def test_shapes_and_empty_batches():
    for shape in ((), (0,), (2, 3)):
        v = torch.zeros(*shape, 3)
        R, q = r.axis_angle_to_matrix(v), r.axis_angle_to_quaternion(v)
        assert R.shape == (*shape, 3, 3) and q.shape == (*shape, 4)
        assert r.matrix_to_quaternion(R).shape == (*shape, 4) and r.matrix_to_axis_angle(R).shape == (*shape, 3)
        assert r.rotation_6d_to_matrix(r.matrix_to_rotation_6d(R)).shape == (*shape, 3, 3)
        assert r.rotation_angle(R, R).shape == shape
    assert r.normalize_quaternion(torch.zeros(4)).tolist() == [1, 0, 0, 0]


def test_a_wrong_shape_is_one_clear_sentence():
    unchecked = r._expect      # the shape checker of the tests speaks first on the public functions
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(…, 3\), found \(2, 4\)"):
        unchecked(torch.zeros(2, 4), 3)

"""The packaged hand: counts, orientation, size, limits, volume, samples, the other side."""
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon import proxy_hand as ph
from handrecon.conventions import FINGERTIP_VERTICES, MANO_JOINT_NAMES, MANO_PARENTS, joint_limits

LIMITS = joint_limits().reshape(45, 2)
FLIP = torch.tensor([-1., 1., 1.])


@pytest.fixture(scope="module")
def hand(): return ph.proxy_hand()


@pytest.fixture(scope="module")
def arrays(): return ph.proxy_hand_arrays()


def generator(seed=0): return torch.Generator().manual_seed(seed)


def half_edges(faces): return torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def boundary_ring(faces):
    edges = {tuple(e) for e in half_edges(faces).tolist()}
    following = {a: b for a, b in edges if (b, a) not in edges}
    ring = [min(following)]
    while following[ring[-1]] != ring[0]: ring.append(following[ring[-1]])
    return ring, len(following)


def closed(vertices, faces):
    "The mesh with a fan over its wrist."
    ring, _ = boundary_ring(faces)
    fan = torch.tensor([[ring[i], ring[i - 1], len(vertices)] for i in range(len(ring))])
    return torch.cat([vertices, vertices[ring].mean(0, keepdim=True)]).double(), torch.cat([faces, fan])


def volume(vertices, faces):
    v, f = closed(vertices, faces)
    a, b, c = (v[f[:, i]] - v[-1] for i in range(3))
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def winding_number(points, vertices, faces):
    "1 inside a closed surface, 0 outside: the solid angle of all triangles over 4π (van Oosterom and Strackee 1983)."
    v, f = closed(vertices, faces)
    a, b, c = (v[f[:, i]][None] - points.double()[:, None] for i in range(3))
    la, lb, lc = (x.norm(dim=-1) for x in (a, b, c))
    top = (a * torch.linalg.cross(b, c)).sum(-1)
    below = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return torch.atan2(top, below).sum(1) / (2 * torch.pi)


def rest(hand): return hand(torch.zeros(1, 45))


def bend(joint, axis, degrees):
    pose = torch.zeros(1, 15, 3)
    pose[0, MANO_JOINT_NAMES.index(joint) - 1, axis] = torch.tensor(degrees).deg2rad()
    return pose.flatten(1)


def test_arrays_have_manos_names_and_shapes(arrays):
    shapes = {"v_template": (778, 3), "shapedirs": (778, 3, 10), "posedirs": (778, 3, 135), "J_regressor": (16, 778), "weights": (778, 16),
              "f": (1538, 3), "kintree_table": (2, 16), "hands_components": (45, 45), "hands_mean": (45,), "texture": (778, 3)}
    for name, shape in shapes.items():
        assert tuple(arrays[name].shape) == shape, name
        assert torch.isfinite(arrays[name].float()).all(), name
    assert tuple(arrays["kintree_table"][0].tolist()) == MANO_PARENTS


def test_file_is_small():
    assert files("handrecon").joinpath("assets/proxy_hand.safetensors").stat().st_size < 2e6


def test_manifold_with_one_ring(arrays):
    faces, E = arrays["f"], half_edges(arrays["f"])
    assert len(torch.unique(E, dim=0)) == len(E)                        # each half-edge once: a manifold of one winding
    edges, count = torch.unique(E.sort(1).values, dim=0, return_counts=True)
    assert int(count.max()) == 2 and 778 - len(edges) + len(faces) == 1
    ring, boundary = boundary_ring(faces)
    assert len(ring) == boundary == 16
    assert len(torch.unique(faces)) == 778


def test_triangles_look_outwards(hand):
    V, F = rest(hand).vertices[0], hand.faces
    centre, normal = V[F].mean(1), torch.linalg.cross(V[F[:, 1]] - V[F[:, 0]], V[F[:, 2]] - V[F[:, 0]])
    normal = normal / normal.norm(dim=1, keepdim=True)
    assert (winding_number(centre + 3e-4 * normal, V, F).round() == 0).all()
    assert (winding_number(centre - 3e-4 * normal, V, F).round() == 1).all()


def test_triangles_are_round(hand):
    V, F = rest(hand).vertices[0], hand.faces
    e = [V[F[:, i]] - V[F[:, i - 1]] for i in range(3)]
    roundness = 2 * 3**.5 * torch.linalg.cross(e[0], e[1]).norm(dim=1) / sum((x * x).sum(1) for x in e)
    assert roundness.min() > .4 and roundness.mean() > .93


def test_size(hand):
    mesh = rest(hand)
    assert .18 < (mesh.joints[0, 12] - mesh.joints[0, 0]).norm() < .20
    at_knuckles = ((mesh.vertices[0, :, 0] - mesh.joints[0, 9, 0]).abs() < .006) & (hand.weights[:, 13:].sum(1) < .1)
    breadth = mesh.vertices[0, at_knuckles, 2]
    assert .070 < breadth.max() - breadth.min() < .095
    assert 250e-6 < volume(mesh.vertices[0], hand.faces) < 400e-6       # m³; adult hands: about 350 ml


def test_joints_inside(hand):
    J = hand.J_regressor @ hand.v_template
    assert (winding_number(J, hand.v_template, hand.faces).round() == 1).all()


def test_weights_and_regressor(arrays):
    for name in ("weights", "J_regressor"):
        assert (arrays[name] >= 0).all() and torch.allclose(arrays[name].sum(1), torch.ones(len(arrays[name])), atol=1e-5)
    assert (arrays["J_regressor"] > 0).sum(1).max() < 64
    assert (arrays["weights"].max(0).values > .8).all()                 # each bone has skin of its own


def test_tip_vertices(hand):
    mesh = rest(hand)
    ends = hand.v_template[:, 0]
    for names, k in (("index", 1), ("middle", 2), ("ring", 3), ("little", 4)):
        tip = FINGERTIP_VERTICES["freihand"][k]
        own = hand.weights[:, MANO_JOINT_NAMES.index(f"{names}3")] > .5
        assert ends[tip] < ends[own].min() + .002                       # the most distal vertex of its finger
    neighbours = {tuple(e) for e in half_edges(hand.faces).tolist()}
    for code in FINGERTIP_VERTICES.values():
        for ours, theirs in zip(FINGERTIP_VERTICES["freihand"], code):
            assert ours == theirs or (ours, theirs) in neighbours or (theirs, ours) in neighbours
    assert mesh.joints.shape == (1, 21, 3)


@pytest.mark.parametrize("finger, tip", [("index", 8), ("middle", 12), ("ring", 16), ("little", 20)])
def test_limits_mean_flexion(hand, finger, tip):
    start = rest(hand).joints[0, tip]
    for k in (1, 2, 3):
        assert hand(bend(f"{finger}{k}", 2, 60.)).joints[0, tip, 1] < start[1] - .01       # to the palm
    assert hand(bend(f"{finger}1", 1, 10.)).joints[0, tip, 2] > start[2] + .005            # to the thumb's side


def test_thumb_opposes(hand):
    start = rest(hand).joints[0, 4]
    assert hand(bend("thumb1", 0, 60.)).joints[0, 4, 1] < start[1] - .03
    for tip, name in ((8, "pinch"), (12, "pinch middle"), (16, "pinch ring"), (20, "pinch little")):
        joints = hand(ph.posture(name)[None]).joints[0]
        assert (joints[4] - joints[tip]).norm() < .022, name
    assert (rest(hand).joints[0, 4] - rest(hand).joints[0, 8]).norm() > .08


@pytest.mark.parametrize("degrees", [(0., 90., 0.), (85., 98., 66.)])
def test_fist_keeps_its_volume(hand, arrays, degrees):
    pose = torch.zeros(1, 15, 3)
    pose[:, :12, 2] = torch.tensor(degrees).deg2rad().repeat(4)
    pose = pose.flatten(1)
    flat = volume(rest(hand).vertices[0], hand.faces)
    plain = ph.HandModel(arrays | {"posedirs": torch.zeros(778, 3, 135)})
    loss = 1 - volume(hand(pose).vertices[0], hand.faces) / flat
    without = 1 - volume(plain(pose).vertices[0], hand.faces) / flat
    assert abs(loss) < .03 and abs(loss) < without / 2


def test_principal_components(arrays):
    C = arrays["hands_components"]
    assert torch.allclose(C @ C.T, torch.eye(45), atol=1e-5)
    spread = ((ph.sample_poses(2000, generator(9)) - arrays["hands_mean"]) @ C.T).var(0)
    assert spread[:6].sum() / spread.sum() > .8                         # the first ones matter most, on fresh poses


def test_pca_hand(arrays):
    pose = ph.sample_poses(8, generator(2))
    small = ph.proxy_hand(n_pca=45, flat_hand_mean=False)
    coefficients = (pose - arrays["hands_mean"]) @ arrays["hands_components"].T
    assert torch.allclose(small(coefficients).vertices, ph.proxy_hand()(pose).vertices, atol=1e-5)


@pytest.mark.parametrize("name", list(ph.POSTURES))
def test_postures_within_limits(name):
    pose = ph.posture(name)
    assert (pose >= LIMITS[:, 0] - 1e-6).all() and (pose <= LIMITS[:, 1] + 1e-6).all()
    assert ph.self_penetration(pose[None]) < .006


@given(st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_samples_are_plausible_and_repeat(seed, n):
    poses = ph.sample_poses(n, generator(seed))
    assert poses.shape == (n, 45) and torch.equal(poses, ph.sample_poses(n, generator(seed)))
    assert (poses >= LIMITS[:, 0]).all() and (poses <= LIMITS[:, 1]).all()
    assert ph.self_penetration(poses).max() <= .004
    shapes = ph.sample_shapes(n, generator(seed))
    assert shapes.shape == (n, 10) and shapes.abs().max() <= 2.5 and torch.equal(shapes, ph.sample_shapes(n, generator(seed)))
    colors = ph.sample_textures(n, generator(seed))
    assert colors.shape == (n, 778, 3) and colors.min() >= 0 and colors.max() <= 1
    assert torch.equal(colors, ph.sample_textures(n, generator(seed)))


def test_samples_differ():
    poses = ph.sample_poses(3000, generator(1))
    assert (poses.std(0).reshape(15, 3)[:12, 2] > .3).all()             # every finger bends and stretches
    shapes = ph.sample_shapes(20000, generator(1))
    assert shapes.mean().abs() < .02 and (shapes.std() - 1).abs() < .06
    tones = ph.sample_textures(500, generator(1)).mean((1, 2))
    assert tones.min() < .3 and tones.max() > .75


def test_shapes_stay_human(hand):
    shapes = ph.sample_shapes(64, generator(5)).clamp(-2, 2)
    mesh = hand(torch.zeros(64, 45), shapes)
    assert min(volume(v, hand.faces) for v in mesh.vertices) > 150e-6
    length = (mesh.joints[:, 12] - mesh.joints[:, 0]).norm(dim=1)
    assert length.min() > .15 and length.max() < .24
    assert (winding_number(mesh.joints[3, :16:5], mesh.vertices[3], hand.faces).round() == 1).all()


def test_first_shape_direction_is_size(hand):
    one = torch.zeros(2, 10)
    one[:, 0] = torch.tensor([2., -2.])
    mesh = hand(torch.zeros(2, 45), one)
    assert (mesh.joints[0] - mesh.joints[0, 0])[1:].norm(dim=1).min() > (mesh.joints[1] - mesh.joints[1, 0])[1:].norm(dim=1).min()
    ratio = (mesh.joints[0, 12] - mesh.joints[0, 0]).norm() / (mesh.joints[1, 12] - mesh.joints[1, 0]).norm()
    assert abs(ratio - 1.11 / .89) < .01


def test_left_is_the_mirror(hand):
    left, poses, shapes = ph.proxy_hand("left"), ph.sample_poses(16, generator(3)), ph.sample_shapes(16, generator(3))
    turn = torch.randn(16, 3, generator=generator(4))
    sign = torch.tensor([1., -1., -1.])
    a = hand(poses, shapes, rotation=turn)
    b = left(poses * sign.repeat(15), shapes, rotation=turn * sign)
    # both turn about their wrists: compare with the wrist at the origin
    for x, y in zip(a, b):
        assert torch.allclose((x - a.joints[:, :1]) * FLIP, y - b.joints[:, :1], atol=1e-5)
    assert volume(rest(left).vertices[0], left.faces) > 0
    assert torch.equal(ph.sample_poses(5, generator(8), side="left"), ph.sample_poses(5, generator(8)) * sign.repeat(15))


def test_palm_and_nails_differ_from_the_back(arrays):
    feature = arrays["skin_features"]
    assert tuple(feature.shape) == (778, 6) and feature.min() >= 0 and feature.max() <= 1
    dark = ph.skin_texture(torch.tensor([.9]), feature)[0].mean(1)
    assert dark[feature[:, 0] > .9].mean() > 1.5 * dark[(feature[:, 0] < .1) & (feature[:, 1] < .1)].mean()
    assert (feature[:, 1] > .6).sum() >= 15                             # three vertices a nail


def test_face_colors(arrays):
    colors = torch.rand(2, 778, 3, generator=generator())
    mean = ph.face_colors(colors, arrays["f"])
    assert torch.allclose(mean[1, 7], colors[1, arrays["f"][7]].mean(0))


@pytest.mark.parametrize("call, words", [(lambda: ph.proxy_hand("both"), "'right' or 'left'"), (lambda: ph.posture("fits"), "fist"),
                                         (lambda: ph.sample_poses(1, generator(), max_penetration=-1.), "zero or more")])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_self_penetration_sees_a_collision():
    pose = torch.zeros(2, 45)
    pose[1, 1], pose[1, 10] = -.6, .6                                  # index and middle cross
    depth = ph.self_penetration(pose)
    assert depth[0] == 0 and depth[1] > .005


def test_callers_cannot_change_the_packaged_hand():
    ph.proxy_hand_arrays()["v_template"].zero_()
    ph.proxy_hand_arrays()["f"].zero_()
    again = ph.proxy_hand_arrays()
    assert np.ptp(again["v_template"].numpy()) > .1 and again["f"].max() == 777

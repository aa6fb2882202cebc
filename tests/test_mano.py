import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mano_fixtures import fabricate
from scipy.spatial.transform import Rotation
from torch.autograd import gradcheck

from handrecon import mano
from handrecon.conventions import FINGERTIP_VERTICES, MANO_PARENTS, MANO_TO_FREIHAND
from handrecon.mano import HandModel
from handrecon.rotation import axis_angle_to_matrix, random_rotations

ARRAYS = fabricate()


def draw(n=3, seed=0, n_pose=45, n_shape=10):
    g = torch.Generator().manual_seed(seed)
    return {"pose": torch.randn(n, n_pose, generator=g) * 0.4, "shape": torch.randn(n, n_shape, generator=g),
            "rotation": torch.randn(n, 3, generator=g), "translation": torch.randn(n, 3, generator=g), "scale": torch.rand(n, generator=g) + 0.5}


def slow_hand(a, pose, shape, rotation, translation, scale, tips=FINGERTIP_VERTICES["freihand"]):
    "One hand, one joint and one vertex at a time, in homogeneous 4 x 4 matrices."
    R = Rotation.from_rotvec(np.concatenate([rotation, pose]).reshape(-1, 3)).as_matrix()
    shaped = a["v_template"] + a["shapedirs"] @ shape
    J = a["J_regressor"] @ shaped
    rest = shaped + a["posedirs"] @ (R[1:] - np.eye(3)).ravel()
    world = []
    for j, parent in enumerate(MANO_PARENTS):
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = R[j], J[j] - (J[parent] if j else 0)
        world.append(world[parent] @ step if j else step)
    back = []
    for M, joint in zip(world, J):
        to_origin = np.eye(4)
        to_origin[:3, 3] = -joint
        back.append(M @ to_origin)
    vertices = np.zeros_like(rest)
    for i, x in enumerate(rest):
        for j in range(16):
            vertices[i] += a["weights"][i, j] * (back[j] @ [*x, 1])[:3]
    joints = np.concatenate([[M[:3, 3] for M in world], vertices[list(tips)]])[list(MANO_TO_FREIHAND)]
    return scale * vertices + translation, scale * joints + translation


def test_against_the_slow_reference():
    params = draw()
    mesh = HandModel(ARRAYS).double()(**{k: x.double() for k, x in params.items()})
    mesh32 = HandModel(ARRAYS)(**params)
    for i in range(3):
        expected = slow_hand(ARRAYS, *(params[k][i].double().numpy() for k in ("pose", "shape", "rotation", "translation", "scale")))
        for got, got32, want in zip(mesh, mesh32, expected):
            assert np.abs(got[i].numpy() - want).max() < 2e-7          # the buffers are rounded to float32
            assert np.abs(got32[i].numpy() - want).max() < 2e-6


def test_principal_components_and_mean():
    coefficients = draw(n_pose=12)["pose"]
    expected = coefficients.double().numpy() @ ARRAYS["hands_components"][:12]
    for flat in (True, False):
        model = HandModel(ARRAYS, n_pca=12, flat_hand_mean=flat)
        full = expected + (0 if flat else ARRAYS["hands_mean"])
        assert np.abs(model.full_pose(coefficients).numpy() - full).max() < 1e-6
        assert torch.allclose(model(coefficients).vertices, HandModel(ARRAYS)(torch.tensor(full).float()).vertices, atol=1e-6)
    all_of_them = HandModel(ARRAYS, n_pca=45)
    pose = draw()["pose"]
    assert torch.allclose(all_of_them.full_pose(pose @ torch.tensor(ARRAYS["hands_components"].T).float()), pose, atol=1e-5)


def test_rest_pose_is_the_template_and_batches_are_independent():
    model, params = HandModel(ARRAYS), draw(5)
    assert np.abs(model(torch.zeros(1, 45)).vertices[0].numpy() - ARRAYS["v_template"]).max() < 1e-6
    together = model(**params)
    for i in range(5):
        alone = model(**{k: x[i:i + 1] for k, x in params.items()})
        assert all(torch.allclose(a[i:i + 1], b, atol=1e-6) for a, b in zip(together, alone))
    assert model(torch.zeros(0, 45)).vertices.shape == (0, 778, 3)


def test_global_rotation_is_about_the_wrist_joint():
    model, params = HandModel(ARRAYS), draw()
    still, turned = (model(params["pose"], params["shape"], r) for r in (None, params["rotation"]))
    R = axis_angle_to_matrix(params["rotation"])
    for a, b in zip(still, turned):
        wrist = still.joints[:, :1]
        assert torch.allclose((a - wrist) @ R.mT + wrist, b, atol=1e-6)


def test_gradients():
    keep = list(range(0, 778, 50))
    few = dict(ARRAYS, f=np.zeros((1, 3), int), J_regressor=ARRAYS["J_regressor"][:, keep] + 0.05,
               **{k: ARRAYS[k][keep] for k in ("v_template", "shapedirs", "posedirs", "weights")})
    for options in ({}, {"n_pca": 6, "flat_hand_mean": False}):
        model = HandModel(few, fingertips=(0, 1, 2, 3, 4), **options).double()
        for factor in (1, 0):                                                  # anywhere, and at rest
            inputs = [(x.double() * factor).requires_grad_() for x in draw(1, n_pose=model.n_pose).values()]
            assert gradcheck(model, inputs)


@given(st.lists(st.integers(0, 15), min_size=15, max_size=15), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_tree(draws, seed):
    parents = (-1, *(d % (j + 1) for j, d in enumerate(draws)))
    R = random_rotations(32, seed).double().unflatten(0, (2, 16))
    J = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(seed)).double()
    G, t = [R[:, 0]], [J[:, 0]]
    for j in range(1, 16):
        p = parents[j]
        t.append(t[p] + torch.einsum("bij,bj->bi", G[p], J[:, j] - J[:, p]))
        G.append(G[p] @ R[:, j])
    got_G, got_t = mano.forward_kinematics(R, J, parents)
    assert torch.allclose(got_G, torch.stack(G, 1)) and torch.allclose(got_t, torch.stack(t, 1))
    assert sorted(sum(mano.kinematic_levels(parents), [])) == list(range(16))


def test_mano_tree_has_four_levels():
    assert [len(level) for level in mano.kinematic_levels(MANO_PARENTS)] == [1, 5, 5, 5]


@pytest.mark.parametrize("options", [{}, {"n_pca": 9}, {"flat_hand_mean": False}, {"n_pca": 9, "flat_hand_mean": False}])
def test_the_left_hand_is_the_mirror_image(options):
    right, left = HandModel(ARRAYS, **options), HandModel(mano.mirror_arrays(ARRAYS), side="left", **options)
    params = draw(n_pose=right.n_pose)
    scale = params.pop("scale")
    mirrored = mano.mirror_params(**params)
    if right.n_pca: mirrored["pose"] = params["pose"]
    for a, b in zip(right(**params, scale=scale), left(**mirrored, scale=scale)):
        assert torch.allclose(a * torch.tensor([-1.0, 1, 1]), b, atol=2e-6)
    again = mano.mirror_arrays(mano.mirror_arrays(ARRAYS))
    assert all(np.array_equal(again[k], np.asarray(ARRAYS[k]).astype(again[k].dtype)) for k in mano.MANO_ARRAYS)
    n = np.cross(*(ARRAYS["v_template"][ARRAYS["f"]][:, [1, 2]] - ARRAYS["v_template"][ARRAYS["f"]][:, :1]).transpose(1, 0, 2))
    L = {k: left.get_buffer(k).numpy() for k in ("v_template", "f")}
    m = np.cross(*(L["v_template"][L["f"]][:, [1, 2]] - L["v_template"][L["f"]][:, :1]).transpose(1, 0, 2))
    assert np.abs(n * [-1, 1, 1] - m).max() < 1e-7                              # normals mirror too: the winding was turned


def test_transform_mesh_is_s_hands_formula():
    model, g = HandModel(ARRAYS), torch.Generator().manual_seed(0)
    mesh, s, R, T = model(draw()["pose"]), torch.rand(3, generator=g), random_rotations(3, 0), torch.randn(3, 3, generator=g)
    moved = mano.transform_mesh(mesh, s, R, T)
    assert torch.allclose(moved.joints[1, 4], s[1] * R[1] @ mesh.joints[1, 4] + T[1], atol=1e-6)
    assert torch.allclose(moved.vertices[2, 7], s[2] * R[2] @ mesh.vertices[2, 7] + T[2], atol=1e-6)


def test_a_checkpoint_carries_no_hand():
    assert HandModel(ARRAYS).state_dict() == {}
    model = HandModel({k: torch.as_tensor(np.asarray(v).astype(float)) for k, v in ARRAYS.items()})
    assert model.n_vertices == 778 and model.n_faces == 1538 and model.n_joints == 21 and model.faces.dtype == torch.int64


def _without(name): return {k: v for k, v in ARRAYS.items() if k != name}
def _with(name, f): return dict(ARRAYS, **{name: f(np.asarray(ARRAYS[name]).astype(float))})


def _put(value):
    def change(a):
        a = a.copy()
        a.flat[-1] = value
        return a
    return change


@pytest.mark.parametrize("arrays, words", [
    (_without("posedirs"), "found no posedirs"), (_with("weights", np.transpose), r"weights: expected shape \(778, 16\)"),
    (_with("v_template", _put(np.nan)), "v_template: expected finite"), (_with("f", _put(778)), "f: expected vertex numbers from 0 to 777"),
    (_with("weights", lambda a: a * 1.1), "weights: expected rows that sum to 1"), (_with("kintree_table", lambda a: a[:, ::-1]), "kintree_table: expected"),
    (_with("hands_mean", lambda a: a[:6]), "hands_mean: expected shape"), (_with("posedirs", lambda a: a[..., :9]), "posedirs: expected shape"),
    (dict(ARRAYS, J_regressor=np.array("hello")), "J_regressor: expected shape"), (dict(ARRAYS, f=np.zeros((4, 3), "U4")), "f: expected finite numbers")])
def test_wrong_arrays_are_one_clear_sentence(arrays, words):
    with pytest.raises(ValueError, match=words) as error:
        HandModel(arrays)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make, words", [
    (lambda: HandModel(ARRAYS, side="up"), "side: expected"), (lambda: HandModel(ARRAYS, n_pca=46), "n_pca: expected"), (lambda: HandModel(ARRAYS, n_pca=0), "n_pca"),
    (lambda: HandModel(ARRAYS, fingertips=(1, 2, 3, 4, 778)), "fingertips: expected"), (lambda: HandModel(ARRAYS)(torch.zeros(2, 30)), r"pose: expected shape \(B, 45\), found \(2, 30\)"),
    (lambda: HandModel(ARRAYS)(torch.zeros(2, 45), torch.zeros(2, 9)), r"shape: expected shape \(2, 10\), found \(2, 9\)")])
def test_wrong_calls_are_one_clear_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()

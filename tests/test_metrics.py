"""Metrics: the official evaluators' numbers, the definitions worked by hand, files good and bad."""
import json
import math
import random
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon import metrics as M
from handrecon.conventions import OPENGL_TO_OPENCV, convert_joints

GOLDENS = Path(__file__).parent / "goldens" / "metrics"
OFFICIAL = json.loads((GOLDENS / "official.json").read_text())
with np.load(GOLDENS / "hands.npz") as file:
    STORED = {k: v / 1e6 for k, v in file.items()}  # stored in micrometres
GT_XYZ, GT_VERTS = STORED["gt_xyz"], STORED["gt_verts"]
seeds = st.integers(0, 2**31 - 1)


def golden(case, dataset="freihand"):
    fabricate = {"perfect": lambda x: x, "zeros": lambda x: 0 * x, "mirror": lambda x: x * [-1, 1, 1],
                 "translate3cm": lambda x: np.round(x + [0.03, 0, 0], 6)}.get(case)
    pred = [fabricate(x) for x in (GT_XYZ, GT_VERTS)] if fabricate else [STORED[f"{case}_xyz"], STORED[f"{case}_verts"]]
    hands = [GT_XYZ, GT_VERTS, *pred]
    if dataset == "freihand":
        return hands
    return [(convert_joints(x, "freihand", "ho3d") if x.shape[1] == 21 else x) * OPENGL_TO_OPENCV for x in hands]


CASES = [(dataset, case) for dataset in OFFICIAL for case in OFFICIAL[dataset]]


def check_against_official(scores, dataset, case):
    expected = OFFICIAL[dataset][case]
    assert list(scores) == list(expected["scores_txt"])
    names = [k[: -len("_mean3d")] for k in scores if k.endswith("_mean3d")]
    for name, m in zip(names, expected["measures"]):
        assert abs(scores[f"{name}_mean3d"] / 100 - m["mean"]) < 1e-9
        assert abs(scores[f"{name}_auc3d"] - m["auc"]) < 1e-9
    for key, value in expected["scores_txt"].items():
        assert abs(scores[key] - value) <= 5.1e-7, key  # six decimals were written


# --- the official numbers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset, case", CASES)
def test_scores_are_the_official_ones(dataset, case):
    check_against_official(M.evaluate_hands(*golden(case, dataset), dataset=dataset), dataset, case)


@pytest.mark.parametrize("case", ["noise5mm", "zeros", "translate3cm"])
def test_medians_are_the_official_ones(case):
    gt_xyz, gt_verts, xyz, verts = golden(case)
    tables = [(xyz, gt_xyz), (M.procrustes_align(xyz, gt_xyz), gt_xyz), (verts, gt_verts), (M.procrustes_align(verts, gt_verts), gt_verts)]
    for (pred, gt), expected in zip(tables, OFFICIAL["freihand"][case]["measures"]):
        m = M.measures(M.point_errors(pred, gt))
        assert np.allclose(m, [expected[k] for k in ("mean", "median", "auc")], atol=1e-9, rtol=0)


def test_blocks_and_tensors_make_no_difference():
    hands = golden("noise5mm")
    whole = M.evaluate_hands(*hands)
    evaluator = M.HandEvaluator()
    for i in range(0, 24, 7):
        evaluator.add(*(torch.from_numpy(x[i:i + 7]) for x in hands))
    assert evaluator.scores() == pytest.approx(whole, abs=1e-12)


def test_numbers_that_are_not_finite_are_refused():
    hands = golden("perfect")
    hands[3] = hands[3].copy()
    hands[3][17, 5, 1] = np.nan
    with pytest.raises(ValueError, match="pred_verts: 1 of 24 hands.*number 17"):
        M.evaluate_hands(*hands)
    with pytest.raises(ValueError, match="'freihand' or 'ho3d', found 'stb'"):
        M.HandEvaluator("stb")


# --- Procrustes ---------------------------------------------------------------------------------------------------

def cloud(seed, n=4, points=21):
    return np.random.default_rng(seed).normal(size=(n, points, 3)) * 0.05


def rotations(seed, n=4):
    q = np.random.default_rng(seed).normal(size=(n, 3, 3))
    Q = np.linalg.qr(q)[0]
    return Q * np.sign(np.linalg.det(Q))[:, None, None]


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.01, 100), st.floats(-10, 10), st.booleans())
def test_alignment_undoes_any_similarity(seed, scale, shift, reflection):
    gt = cloud(seed)
    moved = scale * gt @ rotations(seed) + shift
    np.testing.assert_allclose(M.procrustes_align(moved, gt, reflection), gt, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_aligned_error_does_not_depend_on_the_pose_of_the_prediction(seed):
    gt, pred = cloud(seed), cloud(seed + 1)
    moved = 3 * pred @ rotations(seed) + 1
    for reflection in (True, False):
        assert M.pa_mpjpe(moved, gt, reflection) == pytest.approx(M.pa_mpjpe(pred, gt, reflection), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_alignment_is_the_least_squares_optimum(seed):
    gt, pred = cloud(seed, 1), cloud(seed + 1, 1)
    squares = lambda x: np.square(x - gt).sum()
    proper, best = M.proper_procrustes_align(pred, gt), M.procrustes_align(pred, gt)
    assert squares(best) <= squares(proper) + 1e-12
    rng = np.random.default_rng(seed)
    for _ in range(20):
        wiggle = np.linalg.qr(np.eye(3) + 0.05 * rng.normal(size=(3, 3)))[0]
        wiggle = wiggle * np.sign(np.diag(wiggle))  # near the identity
        other = (proper - proper.mean(1)) @ wiggle * (1 + 0.05 * rng.normal()) + proper.mean(1) + 0.002 * rng.normal(size=3)
        assert squares(other) >= squares(proper) - 1e-9


def test_proper_rotations_do_not_mirror():
    mirrored = GT_XYZ * [-1, 1, 1]
    assert M.pa_mpjpe(mirrored, GT_XYZ) < 1e-7
    assert M.pa_mpjpe(mirrored, GT_XYZ, reflection=False) > 0.01
    assert (np.linalg.det(M.procrustes(mirrored, GT_XYZ, reflection=False).rotation) > 0.99).all()
    assert (np.linalg.det(M.procrustes(mirrored, GT_XYZ).rotation) < -0.99).all()


def test_degenerate_clouds_align_without_nan():
    flat = np.zeros((1, 21, 3))
    flat[0, :, 0] = np.arange(21)
    for source in (np.zeros((1, 21, 3)), np.ones((1, 21, 3)), flat):
        for reflection in (True, False):
            assert np.isfinite(M.procrustes_align(source, GT_XYZ[:1], reflection)).all()


# --- means, curves, F-scores --------------------------------------------------------------------------------------

def test_mpjpe_is_a_mean_of_joint_means():
    errors = np.array([[0.003, 0.010], [0.005, 9.0]])
    gt = np.zeros((2, 2, 3))
    pred = gt.copy()
    pred[..., 1] = errors
    valid = np.array([[True, True], [True, False]])
    assert M.mpjpe(pred, gt, valid) == pytest.approx((0.004 + 0.010) / 2)
    assert M.mpjpe(torch.from_numpy(pred), torch.from_numpy(gt), torch.from_numpy(valid)) == pytest.approx(0.007)
    assert M.mpjpe(pred, gt, valid & [True, False]) == pytest.approx(0.004)  # a joint that is never valid is left out


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 6))
def test_pck_counts_errors_at_or_below_each_threshold(seed, N, P):
    rng = np.random.default_rng(seed)
    thresholds = np.linspace(0, 0.05, 11)
    errors = rng.choice(np.concatenate([thresholds, rng.random(5) * 0.07]), (N, P))  # many exactly on a threshold
    valid = rng.random((N, P)) < 0.7
    valid[0] = True
    expected = [[(errors[valid[:, p], p] <= t).mean() for t in thresholds] for p in range(P)]
    np.testing.assert_allclose(M.pck(errors, thresholds, valid), expected, atol=1e-15)
    area = [np.trapezoid(y, thresholds) / 0.05 for y in expected] if hasattr(np, "trapezoid") else [np.trapz(y, thresholds) / 0.05 for y in expected]
    assert M.auc(errors, thresholds, valid) == pytest.approx(np.mean(area))


def test_a_joint_that_is_never_valid_does_not_spoil_the_auc():
    errors, valid = np.zeros((3, 2)), np.array([[True, False]] * 3)
    assert np.isnan(M.pck(errors, valid=valid)[1]).all() and M.auc(errors, valid=valid) == 1.0


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_nearest_distances_agree_with_brute_force(seed, N, P, Q):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(N, P, 3)), rng.normal(size=(N, Q, 3))
    d = np.sqrt(np.square(a[:, :, None] - b[:, None]).sum(-1))
    to_b, to_a = M.nearest_distances(a, b)
    assert np.array_equal(to_b, d.min(2)) and np.array_equal(to_a, d.min(1))


def test_f_score_by_hand_and_strict():
    gt, pred = np.zeros((1, 4, 3)), np.zeros((1, 2, 3))
    gt[0, :, 0], pred[0, :, 0] = (0, 1, 2, 3), (0, 1.5)
    np.testing.assert_allclose(M.f_score(pred, gt, (0.6, 0.5)), [[6 / 7, 1 / 3]])  # 0.5 itself does not count
    assert (M.f_score(pred + 99, gt) == 0).all()
    assert (M.f_score(GT_VERTS, GT_VERTS) == 1).all()


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_f_score_is_symmetric_and_ignores_the_order_of_vertices(seed):
    rng = np.random.default_rng(seed)
    a, b = GT_VERTS[:2], STORED["noise5mm_verts"][:2]
    reference = M.f_score(a, b)
    np.testing.assert_allclose(M.f_score(b, a), reference)
    np.testing.assert_allclose(M.f_score(a[:, rng.permutation(778)], b[:, rng.permutation(778)]), reference)


# --- other protocols ----------------------------------------------------------------------------------------------

def test_stb_protocol():
    off = GT_XYZ + np.random.default_rng(0).normal(size=(24, 1, 3))  # anywhere: root-relative
    off[:, 1:, 0] += 0.030
    result = M.stb_measures(off, GT_XYZ)
    assert result["auc_20_50"] == pytest.approx((20 * 7.5 / 11 + 1) / 21)
    assert result["mean"] == pytest.approx(0.030 * 20 / 21) and result["median"] == pytest.approx(0.030 * 20 / 21)
    exact = M.stb_measures(GT_XYZ, GT_XYZ)
    assert exact["auc_0_50"] == exact["auc_20_50"] == exact["auc_20_50_fine"] == 1
    assert M.stb_measures(1.3 * GT_XYZ, GT_XYZ, known_scale=True)["mean"] < 1e-12 < M.stb_measures(1.3 * GT_XYZ, GT_XYZ)["mean"]
    hidden = np.ones((24, 21), bool)
    hidden[:, 4] = False
    wild = GT_XYZ.copy()
    wild[:, 4] += 1
    assert M.stb_measures(wild, GT_XYZ, hidden)["auc_20_50"] == 1


def two_hands(n):
    right, left = GT_XYZ[:n], GT_XYZ[n:2 * n]
    to_interhand = lambda x: convert_joints(x, "freihand", "interhand")
    return np.concatenate([to_interhand(right), to_interhand(left)], 1) * 1000


def test_interhand_protocol():
    gt = two_hands(3)
    pred, valid = gt.copy(), np.ones((3, 42), bool)
    pred[0, :20] += [0, 4, 0]
    valid[0, 21:] = False
    pred[1, 21:] += [0, 0, 7]
    valid[2, 41] = False  # no wrist: the left hand of sample 2 does not count
    pred[2, 21:41] += 500
    present = np.array([[0.9, 0.1], [0.9, 0.2], [0.7, 0.6]])
    result = M.interhand_measures(pred, gt, valid, ["right", "interacting", "interacting"], present)
    assert result["mpjpe_single"] == pytest.approx(80 / 21)
    assert result["mpjpe_interacting"] == pytest.approx(0, abs=1e-9)
    assert result["mpjpe"] == pytest.approx(20 * (4 / 3) / 42)
    assert result["mrrpe"] == pytest.approx(7) and result["handedness"] == pytest.approx(2 / 3)
    only = M.interhand_measures(pred, gt, valid, ["right", "interacting", "interacting"], present, np.array([True, False, True]))
    assert only["handedness"] == 1
    assert math.isnan(M.interhand_measures(pred[:1], gt[:1], valid[:1], ["right"])["mrrpe"])
    with pytest.raises(ValueError, match="found 'both'"):
        M.interhand_measures(pred, gt, valid, ["right", "both", "left"])


def test_pck_in_pixels():
    gt = np.zeros((2, 4, 2))
    pred = gt.copy()
    pred[0, :, 0] = 0, 4, 10, 30
    assert M.pck_2d(pred, gt, np.array([3.0, 10.0])).tolist() == [5 / 8, 7 / 8]
    assert M.pck_2d(pred, gt, np.array([0.02]), size=np.array([200.0, 50.0])).tolist() == [6 / 8]
    assert M.pck_2d(pred, gt, np.array([3.0]), valid=np.array([[True] * 4, [False] * 4])).tolist() == [1 / 4]


def test_acceleration():
    t = np.arange(12) / 30
    fall = np.zeros((12, 21, 3))
    fall[..., 1] = (0.5 * 9.81 * t**2)[:, None]
    assert M.acceleration(fall, fps=30.0) == pytest.approx(9.81)
    assert M.acceleration_error(fall + 0.03, fall) == pytest.approx(0, abs=1e-15)
    jitter = fall.copy()
    jitter[..., 0] += 0.001 * (-1.0) ** np.arange(12)[:, None]
    assert M.acceleration_error(jitter, fall) == pytest.approx(0.004)
    valid = np.ones(12, bool)
    valid[6] = False
    spike = fall.copy()
    spike[6] += 100
    assert M.acceleration_error(spike, fall, valid) == pytest.approx(0, abs=1e-12) and M.acceleration_error(spike, fall) > 1
    assert math.isnan(M.acceleration(fall[:2]))


def test_sequence_deviation():
    shapes = torch.zeros(6, 10)
    shapes[:, 0] = torch.tensor([1.0, 3, 1, 3, 1, 3])
    assert M.sequence_deviation(shapes) == pytest.approx(0.1)
    assert M.sequence_deviation(torch.rand(778, 3).expand(5, 778, 3)) < 1e-8


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_the_mean_hand_recovers_the_mould(seed):
    rng = np.random.default_rng(seed)
    mould = GT_XYZ[seed % 24]
    hands = (mould + 0.002 * rng.normal(size=(200, 21, 3))) @ rotations(seed, 200) + rng.normal(size=(200, 1, 3))
    mean = M.mean_hand(hands)
    assert M.pa_mpjpe(mean[None], mould[None], reflection=False) < 0.001
    assert np.abs(mean.mean(0)).max() < 1e-6


# --- files --------------------------------------------------------------------------------------------------------

def write_case(root, dataset, case):
    gt_xyz, gt_verts, xyz, verts = golden(case, dataset)
    (root / "evaluation_xyz.json").write_text(json.dumps(gt_xyz.tolist()))
    (root / "evaluation_verts.json").write_text(json.dumps(gt_verts.tolist(), indent=1))
    (root / "pred.json").write_text(json.dumps([xyz.tolist(), verts.tolist()]))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("files"), "freihand", "noise5mm")


@pytest.mark.parametrize("dataset, case", [("freihand", "noise5mm"), ("ho3d", "other_mesh"), ("ho3d", "zeros")])
def test_files_give_the_official_scores(tmp_path, dataset, case):
    with pytest.warns(UserWarning, match="24 hands where the official"):
        scores = M.evaluate_files(write_case(tmp_path, dataset, case), tmp_path, dataset)
    check_against_official(scores, dataset, case)


def test_report_prints_what_the_official_evaluator_prints():
    text = M.format_report(M.evaluate_hands(*golden("noise5mm")))
    assert text == ("Evaluation 3D KP results:\nauc=0.837, mean_kp3d_avg=0.82 cm\nEvaluation 3D KP ALIGNED results:\nauc=0.848, mean_kp3d_avg=0.76 cm\n\n"
                    "Evaluation 3D MESH results:\nauc=0.839, mean_kp3d_avg=0.80 cm\nEvaluation 3D MESH ALIGNED results:\nauc=0.841, mean_kp3d_avg=0.80 cm\n\n"
                    "F-scores\nF@5.0mm = 0.640 \tF_aligned@5.0mm = 0.653\nF@15.0mm = 0.999 \tF_aligned@15.0mm = 0.999")
    assert "MESH" not in M.format_report(M.evaluate_hands(*golden("other_mesh")))
    assert "SCALE-TRANSLATION" in M.format_report(M.evaluate_hands(*golden("perfect", "ho3d"), dataset="ho3d"))


def sentences(root, pred_xyz, pred_verts, dataset="freihand"):
    gt_xyz, gt_verts = golden("perfect", dataset)[:2]
    scores = M.evaluate_hands(gt_xyz, gt_verts, pred_xyz, pred_verts, dataset)
    return M.suspicions(gt_xyz, pred_xyz, pred_verts, scores, dataset)


@pytest.mark.parametrize("dataset", ["freihand", "ho3d"])
@pytest.mark.parametrize("case", ["noise5mm", "perfect", "translate3cm", "other_mesh"])
def test_healthy_predictions_raise_no_suspicion(root, dataset, case):
    assert sentences(root, *golden(case, dataset)[2:], dataset) == []


def test_suspicions(root):
    _, _, xyz, verts = golden("noise5mm")
    assert "predicted joints are 10" in sentences(root, xyz * 1000, verts)[0] and "millimetres" in sentences(root, xyz * 1000, verts)[0]
    assert len(sentences(root, xyz * 1000, verts * 1000)) == 2
    assert "1000 too often" in sentences(root, xyz / 1000, verts)[0]
    (order,) = sentences(root, convert_joints(xyz, "freihand", "ho3d"), verts)
    assert "times the mesh's" in order and "'ho3d'" in order
    (order,) = sentences(root, convert_joints(xyz, "freihand", "rhd"), STORED["other_mesh_verts"])  # no mesh error to compare with
    assert "'rhd'" in order
    _, _, xyz, verts = golden("noise5mm", "ho3d")
    (axes,) = sentences(root, xyz, verts * OPENGL_TO_OPENCV, "ho3d")
    assert "vertices lie behind the camera" in axes and "OpenGL" in axes


def bad_file(root, text):
    (root / "bad.json").write_text(text) if isinstance(text, str) else (root / "bad.json").write_bytes(text)
    with warnings.catch_warnings(), pytest.raises(ValueError) as error:
        warnings.simplefilter("ignore")
        M.evaluate_files(root, root / "bad.json")
    message = str(error.value)
    assert "bad.json" in message and "\n" not in message and len(message) < 400
    return message


def test_bad_files_get_one_sentence(root):
    _, _, xyz, verts = (x.tolist() for x in golden("noise5mm"))
    good = json.dumps([xyz, verts])
    assert "expected 24 hands in xyz as in evaluation_xyz.json, found 23" in bad_file(root, json.dumps([xyz[:-1], verts]))
    assert "expected 24 hands in verts as in evaluation_xyz.json, found 25" in bad_file(root, json.dumps([xyz, verts + verts[:1]]))
    assert "expected 24 hands in verts as in evaluation_xyz.json, found 20" in bad_file(root, json.dumps([xyz, verts[:20]]))
    assert "truncated" in bad_file(root, good[:-1]) and "truncated" in bad_file(root, good[:9999]) and "truncated" in bad_file(root, "")
    assert "expected [ at the start, found '{'" in bad_file(root, '{"xyz": []}')
    assert "expected nothing more at the end, found 'x'" in bad_file(root, good + " x")
    assert "xyz[0] must be 21 × 3 numbers, found 20 × 3" in bad_file(root, json.dumps([[h[:20] for h in xyz], verts]))
    assert "verts[3] must be 778 × 3 numbers, found 777 × 3" in bad_file(root, json.dumps([xyz, verts[:3] + [verts[3][1:]] + verts[4:]]))
    assert "xyz[0] must be 21 × 3 numbers" in bad_file(root, json.dumps([[[["a", "b", "c"]] * 21] * 24, verts]))
    assert "xyz[2] holds NaN, infinity or" in bad_file(root, json.dumps([xyz[:2] + [[[math.nan] * 3] * 21] + xyz[3:], verts]))
    assert "xyz[0] holds NaN, infinity or" in bad_file(root, json.dumps([xyz, verts]).replace("0.", "1e999", 1).replace("1e99967", "1e999"))
    assert "too many brackets" in bad_file(root, "[[" + "[" * 100_000)
    assert "expected nothing more at the end, found '3'" in bad_file(root, json.dumps([xyz]) + "3")
    assert "expected a list of meshes after the joints" in bad_file(root, json.dumps([xyz, 3]))
    assert "found 0" in bad_file(root, "[[],[]]")
    assert "expected [ at the start" in bad_file(root, b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match="nowhere.json: no such file"):
        M.evaluate_files(root, root / "nowhere.json")


def scored(root, content, name="pred.json"):
    (root / name).write_bytes(content) if isinstance(content, bytes) else (root / name).write_text(json.dumps(content))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return M.evaluate_files(root, root / name), " ".join(str(w.message) for w in said)


@pytest.mark.parametrize("rest", [[], [[]], [None], [[None] * 24], [[[]] * 24]])
def test_joints_alone_have_joint_scores(root, rest):
    _, _, xyz, verts = (x.tolist() for x in golden("noise5mm"))
    whole, _ = scored(root, [xyz, verts])
    alone, told = scored(root, [xyz, *rest])
    assert alone == {k: v for k, v in whole.items() if k.startswith("xyz")} and "no meshes in it" in told
    assert "MESH" not in M.format_report(alone) and "F@" not in M.format_report(alone) and "KP ALIGNED" in M.format_report(alone)


def test_zipped_gzipped_and_marked_predictions(root):
    import gzip
    import io
    import zipfile
    text = json.dumps([x.tolist() for x in golden("noise5mm")[2:]])
    whole, _ = scored(root, text.encode())
    def zipped(**files):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in files.items(): z.writestr(name.replace("_SLASH_", "/").replace("_json", ".json"), content)
        return data.getvalue()
    for name, content in (("pred.zip", zipped(pred_json=text)), ("b.zip", zipped(folder_SLASH_pred_json=text, **{"__MACOSX_SLASH_._pred_json": "x"})),
                          ("pred.json", gzip.compress(text.encode())), ("c.json", text.encode("utf-8-sig")), ("d.json", text.encode("utf-16"))):
        assert scored(root, content, name)[0] == whole
    (root / "pred.json").unlink()
    assert M.evaluate_files(root, root)["xyz_mean3d"] == whole["xyz_mean3d"]                 # a folder that holds pred.zip
    for content, words in ((zipped(a_json="1", b_json="2"), "expected one pred.json in this archive"), (zipped(pred_json=text)[:2000], "archive that cannot be read"),
                           (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"), (gzip.compress(text.encode())[:5000], "cannot be read to its end")):
        with pytest.raises(ValueError, match=words): scored(root, content, "bad.zip")


@pytest.mark.parametrize("dataset", ["freihand", "ho3d"])
def test_every_kind_of_wrong_prediction_has_its_sentence(root, dataset):
    _, _, xyz, verts = golden("noise5mm", dataset)
    hole = lambda x: np.where(np.arange(len(x))[:, None, None] == 2, 0.0, x)
    for words, a, b in (("centimetres instead of metres", 100 * xyz, 100 * verts), ("divided by 100 too often", xyz / 100, verts / 100),
                        ("joint 0 of the predicted hands lies at the origin", xyz - xyz[:, :1], verts - xyz[:, :1]),
                        ("joint 9 of the predicted hands lies at the origin", xyz - xyz[:, 9:10], verts - xyz[:, 9:10]),
                        ("the middle of the predicted hands lies at the origin", xyz - xyz.mean(1, keepdims=True), verts - xyz.mean(1, keepdims=True)),
                        ("mirror images", xyz * [-1, 1, 1], verts * [-1, 1, 1]), ("1 of 24 predicted joints are a single point of zeros, the first is number 2", hole(xyz), hole(verts)),
                        ("24 of 24 predicted meshes are a single point", xyz, 0 * verts)):
        assert sum(words in sentence for sentence in sentences(root, a, b, dataset)) in (1, 2), words


def test_mutated_files_are_scored_or_refused_in_bounded_memory(root):
    xyz, verts = (x[:2].round(3).tolist() for x in golden("noise5mm")[2:])
    small = root / "small"
    small.mkdir()
    for name, x in (("xyz", GT_XYZ[:2]), ("verts", GT_VERTS[:2, :30])):
        (small / f"evaluation_{name}.json").write_text(json.dumps(x.tolist()))
    good = json.dumps([xyz, [v[:30] for v in verts]])
    rng, outcomes = random.Random(0), {"scored": 0, "refused": 0}
    M.evaluate_hands(GT_XYZ[:2], GT_VERTS[:2], GT_XYZ[:2], GT_VERTS[:2])  # compiled before memory is watched
    tracemalloc.start()
    for _ in range(400):
        text = list(good)
        for _ in range(rng.randint(1, 2)):
            i, j = rng.randrange(len(text)), rng.randrange(len(text))
            kind = rng.randrange(5)
            if kind == 0: text[i] = chr(rng.choice([0, 34, 44, 45, 46, 48, 49, 50, 51, 52, 57, 91, 93, 101, 123, 125, 0x20AC, rng.randrange(128)]))
            elif kind == 1: del text[i:i + rng.randint(1, 40)]
            elif kind == 2: text[i:i] = rng.choice(["[", "]", ",", "[[]]", "null", "1e400", "NaN", '"', "9" * 5000, "[" * 3000, "true", "{}", "-"])
            elif kind == 3: text = text[:i + 1]
            else: text[i:i] = text[min(i, j):min(i, j) + 200]
            text = text or ["["]
        (small / "pred.json").write_text("".join(text), encoding="utf-8")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = M.evaluate_files(small, small)
            assert all(math.isfinite(v) for v in scores.values())
            outcomes["scored"] += 1
        except ValueError as error:
            assert "pred.json" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert outcomes["refused"] > 150 and outcomes["scored"] > 5, outcomes


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=3), x, max_size=2)))
def test_any_other_json_is_refused(root, value):
    bad_file(root, json.dumps(value))


# --- writing predictions ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", ["freihand", "ho3d"])
def test_written_predictions_are_read_back_by_the_evaluator(tmp_path, dataset):
    write_case(tmp_path, dataset, "perfect")
    M.write_predictions(tmp_path / "pred.json", torch.from_numpy(STORED["noise5mm_xyz"]), torch.from_numpy(STORED["noise5mm_verts"]), dataset, count=24)
    with pytest.warns(UserWarning, match="24 hands") as caught:
        scores = M.evaluate_files(tmp_path, tmp_path / "pred.json", dataset)
    assert len(caught) == 1
    check_against_official(scores, dataset, "noise5mm")
    xyz, verts = json.loads((tmp_path / "pred.json").read_text())
    assert (len(xyz), len(xyz[0]), len(verts[0])) == (24, 21, 778)
    assert (np.array(verts)[..., 2] < 0).all() == (dataset == "ho3d") == (np.array(xyz)[..., 2] < 0).all()


def test_predictions_that_the_server_would_reject_are_not_written(tmp_path):
    xyz, verts = STORED["noise5mm_xyz"], STORED["noise5mm_verts"]
    path = tmp_path / "pred.json"
    broken = verts.copy()
    broken[3, 5, 1] = np.inf
    for arguments, kwargs, message in [
        ((xyz, verts), {}, "3,960 hands, found 24"),
        ((xyz, verts, "ho3d", "v3"), {}, "20,137 hands, found 24"),
        ((xyz, verts[:23]), {"count": 24}, "verts: .* 24 hands, found 23"),
        ((xyz, broken), {"count": 24}, "verts: 1 of 24 hands.*number 3"),
        ((xyz * 1000, verts), {"count": 24}, "xyz: a hand of .* must be in metres"),
        ((xyz * OPENGL_TO_OPENCV, verts, "ho3d"), {"count": 24}, "xyz: 24 hands lie behind the camera"),
        ((xyz, verts * OPENGL_TO_OPENCV, "ho3d"), {"count": 24}, "verts: 24 hands lie behind the camera"),
        ((xyz, verts, "freihand", "v3"), {"count": 24}, "no evaluation set 'freihand v3'"),
    ]:
        with pytest.raises(ValueError, match=message):
            M.write_predictions(path, *arguments, **kwargs)
    assert list(tmp_path.iterdir()) == []
    M.write_predictions(path, 0 * xyz, 0 * verts, "ho3d", count=24)  # all zeros are legal


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "pred.json"
    path.write_text("old")
    monkeypatch.setattr(M.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        M.write_predictions(path, STORED["noise5mm_xyz"], STORED["noise5mm_verts"], count=24)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch):
    njit = M.numba.njit
    monkeypatch.setattr(M.numba, "njit", lambda cache=False, **options: (_ for _ in ()).throw(RuntimeError("no locator")) if cache else njit(**options))
    assert M._compiled(lambda x: x + 1)(2) == 3

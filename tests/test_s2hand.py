"""S²HAND: what reaches the loss, what the camera moves, what the fit finds."""
import ast
import inspect
import textwrap
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon import s2hand, s2hand_report
from handrecon.camera import project
from handrecon.conventions import Observation, Truth, joint_limits
from handrecon.feeding import Crops
from handrecon.mano import HandMesh
from handrecon.metrics import pa_mpjpe
from handrecon.proxy_hand import POSTURES, posture, proxy_hand, sample_poses, sample_shapes
from handrecon.rotation import axis_angle_to_matrix, matrix_to_axis_angle, random_rotations
from handrecon.s2hand import (
    RECIPES, Pictures, Prediction, S2Hand, S2HandConfig, learn, load, load_real, load_synthetic, loss_terms, _open_split, loss_terms_supervised,
    move_camera, place_translation, predict, save, self_supervised, stages, state_of, supervised)
from handrecon.fit import FitConfig, correct_by_own_joints, detection_box, fit_to_detections, joints_only, reprojection_error, similarity_2d
from handrecon.s2hand_report import predict_mean_pose, report_grid, score
from handrecon.layouts import write_layout
from handrecon.synthetic import SyntheticConfig, make_batch, write_freihand
from handrecon.training import TrainConfig, fit, map_tensors

SMALL = S2HandConfig(backbone="small", image_size=64, rotation="6d", canonical_focal=2.14, z_bias=0.45, bone_length=0.0, head_gain=30.0)
TINY = replace(RECIPES["smoke"], train=TrainConfig(steps=3, batch_size=4), photo=0.5)


@pytest.fixture(scope="module")
def hand():
    return proxy_hand()


@pytest.fixture(scope="module")
def batch():
    return make_batch(8, seed=2, config=SyntheticConfig(image_size=64))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return S2Hand(SMALL, proxy_hand(n_pca=30, flat_hand_mean=False)).eval()


@pytest.fixture(scope="module")
def output(model, batch):
    return model(batch[0].image, batch[0].K)


# ---- what reaches the loss

def test_paper_defaults():
    config = S2HandConfig()
    weights = {name: getattr(config, name) for name in ("w_3d", "w_geo", "w_photo", "w_regu", "w_ori", "w_SSIM", "w_C", "w_s", "w_J")}
    assert weights == dict(w_3d=1, w_geo=0.001, w_photo=0.005, w_regu=0.01, w_ori=100, w_SSIM=0.2, w_C=0.5, w_s=10, w_J=10)
    assert (config.backbone, config.image_size, config.n_pca, config.canonical_focal) == ("efficientnet-b0", 224, 30, 0)
    assert (config.w_2d, config.w_cons) == (0.001, 0.0002)
    recipe = RECIPES["paper"]
    assert (recipe.model.branch_stacks, recipe.model.branch_modules, recipe.model.branch_width) == (2, 2, 256)
    assert (recipe.steps_2d, recipe.steps_joint, recipe.lr_joint, recipe.factor_joint) == (90 * (32560 // 64), 60 * (32560 // 64), 2.5e-4, 1 / 3)
    paper = recipe.train
    assert (paper.batch_size, paper.lr, paper.schedule, paper.factor) == (64, 1e-3, "step", 0.5)
    assert paper.steps == 90 * (32560 // 64) and paper.milestones == (1 / 3, 2 / 3)


def test_terms_carry_the_paper_s_names(output, batch):
    assert set(loss_terms(output, batch[0], SMALL)) == {"E_loc", "E_ori", "E_pixel", "E_SSIM", "E_beta", "E_C", "E_s", "E_J"}
    assert set(loss_terms(output._replace(image=None), batch[0], SMALL)) == {"E_loc", "E_ori", "E_beta", "E_s", "E_J"}


def test_an_observation_has_no_room_for_truth():
    assert {f.name for f in fields(Observation)} == {"image", "K", "keypoints", "confidence"}
    assert not {f.name for f in fields(Observation)} & ({f.name for f in fields(Truth)} - {"keypoints"})


@pytest.mark.parametrize("wrong", [1, (0, 1)])
def test_truth_is_refused(output, batch, wrong):
    with pytest.raises(Exception, match="Observation"):
        loss_terms(output, batch[wrong] if isinstance(wrong, int) else batch, SMALL)


def test_self_supervised_code_never_names_truth():
    for function in (s2hand.self_supervised, s2hand.loss_terms):
        names = {n.id for n in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))) if isinstance(n, ast.Name)}
        assert not names & {"Truth", "truth", "known"}


def test_self_supervised_batches_are_observations(batch):
    _, data = self_supervised(TINY, batch[0], seed=0)
    assert type(data.batch_at(0)) is Observation
    _, data = supervised(TINY, *batch, seed=0)
    seen, known = data.batch_at(0)
    assert type(seen) is Observation and type(known) is Truth


def test_truth_cannot_change_a_self_supervised_run(batch):
    weights = []
    for disturb in (0.0, 1.0):
        torch.manual_seed(0)
        network = S2Hand(SMALL, proxy_hand(n_pca=30, flat_hand_mean=False))
        batch[1].joints.add_(disturb)
        fit(network, *self_supervised(TINY, batch[0], seed=0), TINY.train)
        batch[1].joints.sub_(disturb)
        weights.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert torch.equal(*weights)


def test_weights_scale_terms(output, batch):
    base, heavy = loss_terms(output, batch[0], SMALL), loss_terms(output, batch[0], replace(SMALL, w_geo=0.002, w_J=20.0, w_C=1.0))
    for name, factor in dict(E_loc=2, E_ori=2, E_J=2, E_C=2, E_s=1, E_pixel=1, E_SSIM=1, E_beta=1).items():
        assert torch.allclose(heavy[name], factor * base[name], rtol=1e-5), name


def test_geometric_terms_vanish_on_the_detections(output, batch):
    terms = loss_terms(output._replace(keypoints=batch[0].keypoints), batch[0], SMALL)
    assert terms["E_loc"] == 0 and terms["E_ori"] < 1e-9


def test_missing_joints_do_not_count(output, batch):
    confidence = batch[0].confidence * (torch.arange(21) != 7)
    away = batch[0].keypoints.clone()
    away[:, 7] = 1e4
    a, b = (loss_terms(output, replace(batch[0], confidence=confidence, keypoints=k), SMALL) for k in (batch[0].keypoints, away))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_head_learns(model, batch):
    out = model(batch[0].image, batch[0].K)
    sum(loss_terms(out, batch[0], model.config).values()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    assert not [name for name in silent if "encoder" not in name or "geometry.shape" not in name and "num_batches" not in name], silent


def test_supervised_terms_are_zero_at_the_truth(output, batch):
    seen, known = batch
    exact = output._replace(mesh=HandMesh(known.vertices + 0.3, known.joints + 0.3), keypoints=known.keypoints)   # 0.3: seen from the wrist
    assert all(t < 1e-6 for t in loss_terms_supervised(exact, known, SMALL).values())
    off = output._replace(mesh=HandMesh(known.vertices, known.joints + 0.01 * (torch.arange(21) == 4)[:, None]), keypoints=known.keypoints)
    assert torch.isclose(loss_terms_supervised(off, known, SMALL)["E_joints"], torch.tensor(0.01 / 21), rtol=1e-3)


# ---- cameras

@settings(max_examples=30, deadline=None)
@given(st.floats(100, 500), st.floats(-1, 1), st.floats(-1, 1), st.floats(0.2, 1.5), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
def test_placed_hands_look_the_same(focal, px, py, z, x, y):
    K = torch.tensor([[[focal, 0, 32 + 10 * px], [0, focal, 32 + 10 * py], [0, 0, 1]]])
    reference = torch.tensor([[[2.0 * 64, 0, 32], [0, 2.0 * 64, 32], [0, 0, 1]]])
    placed = place_translation(torch.tensor([[x, y, z]]), K, 64, 2.0, 0.65)
    assert torch.allclose(project(placed[:, None], K), project(torch.tensor([[[x, y, 0.65]]]), reference), atol=1e-2)
    ratio = placed[0, 2] / focal * 128 / 0.65
    assert 0.449 <= ratio <= 2.226   # exp(±0.8)


@settings(max_examples=10, deadline=None)
@given(st.floats(-3.2, 3.2), st.floats(0.5, 2), st.floats(-9, 9), st.floats(-9, 9))
def test_moved_cameras_are_exact(angle, zoom, dx, dy):
    seen, known = make_batch(2, seed=1, config=SyntheticConfig(image_size=64))
    new, truth = move_camera(seen, torch.full((2,), angle), torch.full((2,), zoom), torch.tensor([[dx, dy]] * 2), known)
    assert torch.allclose(project(truth.joints, new.K), truth.keypoints, atol=2e-3)
    shift = (seen.keypoints - known.keypoints).norm(dim=-1) * zoom
    ok = seen.confidence > 0
    assert torch.allclose((new.keypoints - truth.keypoints).norm(dim=-1)[ok], shift[ok], rtol=0.03, atol=1e-2)   # noise moves along; pixels are square to 1 %
    assert (new.keypoints[~ok] == 0).all()


def test_moved_pictures_follow_their_key_points():
    "A bright dot at a key point is found again at the moved key point."
    image = torch.zeros(1, 3, 64, 64)
    image[..., 40, 20] = 1
    K = torch.tensor([[[130.0, 0, 32], [0, 130.0, 32], [0, 0, 1]]])
    seen = Observation(image, K, torch.full((1, 21, 2), 20.5) + torch.tensor([0.0, 20.0]), torch.ones(1, 21))
    new, _ = move_camera(seen, torch.tensor([0.6]), torch.tensor([1.2]), torch.tensor([[3.0, -2.0]]))
    weight = new.image[0, 0]
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    centre = torch.stack([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
    assert torch.allclose(centre, new.keypoints[0, 0], atol=0.2)


def test_batches_depend_on_seed_and_index_only(batch):
    a, b = (Pictures(batch[0], None, 4, seed=1, turn=1.0, zoom=0.1, shift=0.1) for _ in range(2))
    assert torch.equal(a.batch_at(5).image, b.batch_at(5).image)
    assert not torch.equal(a.batch_at(5).image, a.batch_at(6).image)
    assert not torch.equal(a.batch_at(5).image, Pictures(batch[0], None, 4, seed=2, turn=1.0).batch_at(5).image)


# ---- evaluation, checkpoints, data

def test_truth_scores_perfectly_and_noise_scores_as_it_should(batch):
    known = batch[1]
    perfect = score(Prediction(known.joints, known.vertices, known.keypoints), known)
    assert perfect["PA-MPJPE"] < 1e-3 and perfect["AUC"] > 0.99 and perfect["F@5"] == 1
    moved = score(Prediction(known.joints + torch.tensor([0.0, 0, 0.05]), known.vertices, known.keypoints + 3), known)
    assert abs(moved["MPJPE"] - 50) < 1e-2 and moved["MPJPE from wrist"] < 1e-3 and moved["PA-MPJPE"] < 1e-3 and abs(moved["2D"] - 18**0.5) < 1e-3


def test_mean_pose_does_not_look(hand, batch):
    seen, known = batch
    a = predict_mean_pose(hand, known, seen)
    assert a.joints.shape == known.joints.shape and torch.equal(a.joints[0], a.joints[1])


def test_predict_ignores_detections(model, batch):
    a = predict(model, batch[0])
    b = predict(model, replace(batch[0], keypoints=torch.zeros_like(batch[0].keypoints)), batch_size=3)
    assert torch.allclose(a.joints, b.joints, atol=1e-5)


def test_checkpoint_round_trip(tmp_path, model, batch):
    save(tmp_path / "a.safetensors", model)
    again = load(tmp_path / "a.safetensors")
    assert again.config == model.config
    assert torch.equal(predict(again, batch[0]).vertices, predict(model, batch[0]).vertices)
    save(tmp_path / "half.safetensors", model, dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "a.safetensors").stat().st_size


def test_bad_checkpoints_are_one_sentence(tmp_path, model):
    from handrecon.training import save_checkpoint
    save_checkpoint(tmp_path / "other.safetensors", torch.nn.Linear(2, 2), {"system": "binocular"})
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    for name, words in (("other", "'binocular'"), ("broken", "not a whole safetensors"), ("absent", "no such file")):
        with pytest.raises(ValueError, match=words) as problem: load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(problem.value)


def test_shipped_checkpoint():
    network = load("s2hand")
    seen, known = make_batch(200, seed=77, config=replace(RECIPES["cpu"].pictures, image_size=network.config.image_size))
    ours, lazy = score(predict(network, seen), known), score(predict_mean_pose(proxy_hand(), known, seen), known)
    assert ours["PA-MPJPE"] < 0.85 * lazy["PA-MPJPE"] and ours["2D"] < 0.5 * lazy["2D"]


def test_report_grid(model, batch):
    grid = report_grid(model, batch[0], rows=2, side=64)
    assert grid.shape[0] > 2 * 64 and grid.shape[1] > 5 * 64 and grid.dtype.name == "uint8" and grid.std() > 5


def test_synthetic_pictures_are_determined_by_the_seed():
    a, b, c = (load_synthetic(3, seed, SyntheticConfig(image_size=64))[0].image for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/handrecon/crops"


def test_freihand_layout(tmp_path, own_cache):
    write_freihand(tmp_path / "fh", 4, config=SyntheticConfig(image_size=64), evaluation=2, progress=False)
    for held_out, n in ((False, 4), (True, 2)):
        seen, known = load_real("freihand", tmp_path / "fh", 10, held_out, size=64)
        assert len(seen.K) == n and known.vertices.shape == (n, 778, 3) and bool(known.mask.any()) == (not held_out)
        assert torch.allclose(project(known.joints, seen.K), known.keypoints, atol=1e-2)
        assert (seen.keypoints - known.keypoints).norm(dim=-1)[seen.confidence > 0].median() < 5
        assert score(Prediction(known.joints, known.vertices, known.keypoints), known)["PA-MPVPE"] < 1e-3
    assert load_real("freihand", tmp_path / "fh", 3, size=64)[0].image.shape == (3, 3, 64, 64)
    (tmp_path / "fh/training/rgb/00000002.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="00000002.jpg"): load_real("freihand", tmp_path / "fh", 4, size=64)
    (tmp_path / "fh/training_K.json").write_text("[[")
    with pytest.raises(ValueError, match="training_K.json"): load_real("freihand", tmp_path / "fh", 4, size=64)
    with pytest.raises(ValueError, match="no folder of that name"): load_real("ho3d", tmp_path / "nowhere", 4)


def test_crops_are_made_once_and_a_killed_run_goes_on(tmp_path, own_cache, monkeypatch):
    write_freihand(tmp_path / "fh", 130, config=SyntheticConfig(image_size=64), evaluation=1, progress=False)
    read, asked = Crops.__getitems__, []
    def dies(self, indices):
        asked.append(indices[0])
        if len(asked) == 2: raise KeyboardInterrupt
        return read(self, indices)
    monkeypatch.setattr(Crops, "__getitems__", dies)
    with pytest.raises(KeyboardInterrupt): load_real("freihand", tmp_path / "fh", 130, size=32)
    seen, known = load_real("freihand", tmp_path / "fh", 130, size=32)
    assert asked == [0, 64, 64, 128]                                                                          # the first block was not made again
    again, _ = load_real("freihand", tmp_path / "fh", 130, size=32)
    assert len(asked) == 4 and torch.equal(again.image, seen.image) and len(list(own_cache.iterdir())) == 1
    whole = Crops(_open_split("freihand", tmp_path / "fh", False), 32)
    assert torch.equal(seen.image[100].float(), read(whole, [100]).observation().image[0].half().float())
    batches = Pictures(seen, known, 8, turn=0.2)
    assert torch.equal(batches.batch_at(0)[0].image, Pictures(map_tensors(seen, torch.clone), map_tensors(known, torch.clone), 8, turn=0.2).batch_at(0)[0].image)
    load_real("freihand", tmp_path / "fh", 130, size=48)
    assert len(list(own_cache.iterdir())) == 2                                                                # another size is another cache
    (tmp_path / "fh/training/rgb/00000007.jpg").write_bytes((tmp_path / "fh/training/rgb/00000008.jpg").read_bytes())
    assert torch.equal(*load_real("freihand", tmp_path / "fh", 130, size=32)[0].image[7:9])                   # another picture, too


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, own_cache, monkeypatch):
    write_freihand(tmp_path / "fh", 2, config=SyntheticConfig(image_size=64), evaluation=1, progress=False)
    monkeypatch.setattr("handrecon.feeding.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="needs 0.00 GB, 0.00 GB are free; XDG_CACHE_HOME"): load_real("freihand", tmp_path / "fh", 2, size=64)
    assert not list(own_cache.rglob("*.npy"))


def test_ho3d_layout_learns_and_is_scored(tmp_path, own_cache):
    write_layout("ho3d", tmp_path / "ho", 8, evaluation=4, block=4, progress=False)
    seen, known = load_real("ho3d", tmp_path / "ho", 8, size=64)
    assert seen.image.shape[1:] == (3, 64, 64) and not known.mask.any() and known.vertices.isnan().all()      # no masks, no published meshes
    assert torch.allclose(project(known.joints, seen.K), known.keypoints, atol=1e-2)
    inside = (seen.keypoints > 0) & (seen.keypoints < 64)
    assert inside.all(-1)[seen.confidence > 0].float().mean() > 0.95                                          # cropped around the detections
    hand = proxy_hand(flat_hand_mean=True)
    meshes = load_real("ho3d", tmp_path / "ho", 8, size=64, hand=hand)[1]
    assert meshes.vertices.isfinite().all()
    assert (meshes.vertices.mean(1) - meshes.joints.mean(1)).norm(dim=-1).max() < 0.05                        # the mesh is where its joints are
    recipe = replace(TINY, train=TrainConfig(steps=2, batch_size=4))
    network = S2Hand(SMALL, proxy_hand(n_pca=30, flat_hand_mean=False))
    learn(network, stages(recipe, seen, 0), progress=False)
    learn(network, stages(recipe, seen, 0, known), progress=False)                                            # unknown meshes are left out of the supervised loss
    assert all(p.isfinite().all() for p in network.parameters())
    assert set(score(predict(network, seen), known)) == {"PA-MPJPE", "MPJPE", "MPJPE from wrist", "AUC", "2D"}


# ---- the fit

def placed_hands(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    hand = proxy_hand()
    pose, shape, R = sample_poses(n, g), sample_shapes(n, g), matrix_to_axis_angle(random_rotations(n, g))
    mesh = hand(pose, shape, R)
    place = torch.tensor([0.0, 0.0, 0.6]) + 0.05 * torch.randn(n, 1, 3, generator=g)
    mesh = HandMesh(*(x - mesh.joints[:, 9:10] + place for x in mesh))
    K = torch.tensor([[600.0, 0, 160], [0, 600.0, 120], [0, 0, 1]]).expand(n, 3, 3).contiguous()
    return mesh, Observation(torch.zeros(n, 3, 8, 8), K, project(mesh.joints, K) + torch.randn(n, 21, 2, generator=g), torch.ones(n, 21))


def test_joints_only_agrees(hand):
    g = torch.Generator().manual_seed(1)
    pose, shape = sample_poses(5, g), sample_shapes(5, g)
    assert torch.allclose(joints_only(hand)(pose, shape).joints, hand(pose, shape).joints, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(-3.1, 3.1), st.floats(0.1, 10), st.integers(0, 1000))
def test_similarity_is_recovered(angle, size, seed):
    points = torch.randn(1, 21, 2, generator=torch.Generator().manual_seed(seed))
    c, s = size * torch.tensor(angle).cos(), size * torch.tensor(angle).sin()
    moved = points @ torch.tensor([[c, s], [-s, c]]) + 5
    a, left = similarity_2d(points, moved, torch.full((1, 21), 1 / 21))
    assert torch.allclose(a[0, 0], torch.stack([c, s]), atol=1e-4 * size) and left < 1e-6 * size**2 + 1e-8


def test_fit_finds_hands_without_a_network(hand):
    truth, seen = placed_hands(12)
    fitted = fit_to_detections(seen, hand)
    box = detection_box(seen.keypoints, seen.confidence)
    assert (fitted.error_after / box).max() < 0.03 and (fitted.error_after <= fitted.error_before).all()
    assert 1000 * pa_mpjpe(fitted.mesh.joints, truth.joints) < 9
    low, high = (x.flatten() for x in joint_limits().unbind(-1))
    assert ((fitted.pose >= low - 1e-6) & (fitted.pose <= high + 1e-6)).all()
    again = hand(fitted.pose, fitted.shape, fitted.rotation, fitted.translation)
    assert torch.allclose(again.vertices, fitted.mesh.vertices, atol=1e-5)
    assert torch.allclose(project(again.joints, seen.K), fitted.keypoints, atol=1e-2)
    assert torch.allclose(reprojection_error(fitted.keypoints, seen.keypoints, seen.confidence), fitted.error_after)


def test_hands_are_fitted_independently(hand):
    _, seen = placed_hands(3)
    quick = FitConfig(steps=20, starts=4)
    alone = fit_to_detections(Observation(*(getattr(seen, f.name)[1:2] for f in fields(seen))), hand, config=quick)
    assert torch.allclose(fit_to_detections(seen, hand, config=quick).mesh.joints[1], alone.mesh.joints[0], atol=1e-4)


def test_network_answer_is_a_start(model, hand, batch):
    seen = batch[0]
    output = model(seen.image, seen.K)
    fitted = fit_to_detections(seen, hand, state_of(output, joints_only(hand)), FitConfig(steps=60, starts=6))
    assert torch.allclose(fitted.error_before, reprojection_error(output.keypoints, seen.keypoints, seen.confidence), atol=1e-2)
    assert (fitted.error_after < fitted.error_before).all()


def test_a_networks_hand_and_its_own_joints_agree():
    network, (seen, _) = load("s2hand"), make_batch(6, seed=2**30 + 1, config=SyntheticConfig(image_size=64, view_spread=0.5))
    with torch.no_grad(): answer = network(seen.image, seen.K, with_image=False)
    xy, confidence = s2hand.detect_keypoints(network, seen.image)
    assert xy.shape == (6, 21, 2) and torch.equal(confidence, torch.ones(6, 21))
    own = replace(seen, keypoints=xy, confidence=confidence)
    free, pulled = (correct_by_own_joints(own, network.hand, state_of(answer, joints_only(network.hand)), FitConfig(w_network=w)) for w in (0.0, 5.0))
    assert (pulled.pose - answer.pose).norm() < 0.3 * (free.pose - answer.pose).norm()
    assert (free.error_after <= pulled.error_after + 0.2).all() and (free.error_after < free.error_before).all()
    content = replace(seen, keypoints=answer.keypoints, confidence=confidence)      # nothing to correct
    assert reprojection_error(correct_by_own_joints(content, network.hand, state_of(answer, joints_only(network.hand)), FitConfig(w_network=5.0)).keypoints, answer.keypoints, confidence).max() < 0.5


def test_missing_joints_do_not_move_the_fit(hand):
    _, seen = placed_hands(2)
    gone = seen.confidence * (torch.arange(21) != 8)
    quick, wild = FitConfig(steps=20, starts=4), seen.keypoints.clone()
    wild[:, 8] = 0
    a, b = (fit_to_detections(replace(seen, confidence=gone, keypoints=k), hand, config=quick).mesh.joints for k in (seen.keypoints, wild))
    assert torch.allclose(a, b, atol=1e-5)


def test_too_few_joints_are_refused(hand):
    _, seen = placed_hands(2)
    with pytest.raises(ValueError, match="at least 4 detected joints"):
        fit_to_detections(replace(seen, confidence=seen.confidence * (torch.arange(21) < 3)), hand)


@pytest.mark.parametrize("name", ["fist", "thumb up", "point", "flat"])
def test_postures_are_recovered_from_clean_joints(hand, name):
    assert name in POSTURES
    R = axis_angle_to_matrix(torch.tensor([[0.4, 2.2, -1.0]]))
    mesh = hand(posture(name)[None])
    joints = (mesh.joints - mesh.joints[:, 9:10]) @ R.mT + torch.tensor([0.0, 0, 0.5])
    K = torch.tensor([[[700.0, 0, 300], [0, 700.0, 200], [0, 0, 1]]])
    fitted = fit_to_detections(Observation(torch.zeros(1, 3, 8, 8), K, project(joints, K), torch.ones(1, 21)), hand)
    assert 1000 * pa_mpjpe(fitted.mesh.joints, joints) < 9


# ---- two branches, three stages

BOTH = replace(SMALL, branch_stacks=1, branch_modules=1, branch_width=16, branch_depth=1)
STAGED = replace(TINY, model=BOTH, train=TrainConfig(steps=3, batch_size=4, save_every=1), steps_2d=2, steps_joint=2)


def new(config=BOTH):
    torch.manual_seed(0)
    return S2Hand(config, proxy_hand(n_pca=30, flat_hand_mean=False))


def test_the_2d_branch_leaves_the_3d_branch_as_it_was(batch):
    alone, both = new(SMALL).eval(), new().eval()
    a, b = alone(batch[0].image, batch[0].K), both(batch[0].image, batch[0].K, with_branch=True)
    assert torch.equal(a.keypoints, b.keypoints) and a.estimate is None and b.estimate.xy.shape == (8, 21, 2)
    assert set(loss_terms(b, batch[0], BOTH)) - set(loss_terms(a, batch[0], SMALL)) == {"E_2d", "E_cons"}


@pytest.mark.parametrize("weights, gone", [
    (dict(w_ori=0.0), {"E_ori"}), (dict(w_photo=0.0), {"E_pixel", "E_SSIM", "E_C"}), (dict(w_2d=0.0), {"E_2d"}), (dict(w_cons=0.0), {"E_cons"}),
    (dict(w_2d=0.0, w_cons=0.0), {"E_2d", "E_cons"}), (dict(w_regu=0.0), {"E_beta", "E_s", "E_J", "E_C"}), (dict(w_SSIM=0.0), {"E_SSIM"})])
def test_a_weight_of_zero_switches_a_term_off(batch, weights, gone):
    every = {"E_loc", "E_ori", "E_beta", "E_s", "E_J", "E_pixel", "E_SSIM", "E_C", "E_2d", "E_cons"}
    network = new(replace(BOTH, **weights))
    found = loss_terms(network(batch[0].image, batch[0].K, with_branch=True), batch[0], network.config)
    assert set(found) == every - gone
    assert (network.branch is None) == (gone == {"E_2d", "E_cons"}) and (network.encoder.appearance is None) == ("E_pixel" in gone)


def test_losses_of_both_branches_reach_both(batch):
    network = new()
    terms = loss_terms(network(batch[0].image, batch[0].K, with_image=False, with_branch=True), batch[0], BOTH)
    moves = lambda loss, part: any(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True))
    assert moves(terms["E_cons"], network.branch) and moves(terms["E_cons"], network.encoder.geometry)
    assert moves(terms["E_2d"], network.branch) and not moves(terms["E_2d"], network.encoder.geometry)
    assert not moves(terms["E_loc"], network.branch)


def test_stages_are_the_paper_s(batch):
    plan = stages(replace(STAGED, lr_joint=2.5e-4), batch[0], seed=3)
    assert [(s.name, s.part, s.train.steps) for s in plan] == [("branch", "branch", 2), ("hand", "all", 3), ("joint", "all", 2)]
    assert plan[2].train.lr == 2.5e-4 and plan[2].train.factor == 1 / 3 and plan[0].train.factor == plan[1].train.factor == 0.5
    assert [s.name for s in stages(replace(STAGED, model=SMALL), batch[0], 3)] == ["hand", "joint"]              # nothing to train alone
    assert [s.name for s in stages(STAGED, batch[0], 3, batch[1])] == ["hand", "joint"]                          # the supervised baseline has the same budget


@pytest.mark.parametrize("stop_in", ["branch", "hand", "joint"])
def test_resume_across_stages_is_exact(tmp_path, batch, stop_in):
    whole, broken = new(), new()
    learn(whole, stages(STAGED, batch[0], 0), tmp_path / "a", progress=False)

    class Stop(Exception): pass

    def interrupted(stage):
        loss, count = stage.loss, [0]
        def failing(model, data):
            count[0] += 1
            if count[0] == 2: raise Stop
            return loss(model, data)
        return stage._replace(loss=failing) if stage.name == stop_in else stage
    with pytest.raises(Stop): learn(broken, [interrupted(s) for s in stages(STAGED, batch[0], 0)], tmp_path / "b", progress=False)
    again = new()
    learn(again, stages(STAGED, batch[0], 0), tmp_path / "b", resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_what_teaches(batch):
    seen, known = batch
    assert s2hand.training_keypoints(seen, known, TINY) == seen or torch.equal(s2hand.training_keypoints(seen, known, TINY).keypoints, seen.keypoints)
    true = s2hand.training_keypoints(seen, known, replace(TINY, supervision="true-2d", confidence="equal"))
    assert torch.equal(true.keypoints, known.keypoints) and (true.confidence == 1).all()
    equal = s2hand.training_keypoints(seen, known, replace(TINY, confidence="equal"))
    assert torch.equal(equal.confidence, (seen.confidence > 0).float()) and torch.equal(equal.keypoints, seen.keypoints)
    weighted = s2hand.training_keypoints(seen, known, replace(TINY, supervision="true-2d"))
    assert torch.equal(weighted.confidence, seen.confidence) and torch.equal(weighted.keypoints, known.keypoints)
    with pytest.raises(ValueError, match="true-2d or true-3d, found 'magic'"): replace(TINY, supervision="magic")


def test_mixed_precision_leaves_the_hand_alone(batch):
    network = new().eval()
    code, look = network.encoder(batch[0].image)
    exact = network.decode(code, look, batch[0].K, (64, 64))
    with torch.autocast("cpu", torch.bfloat16): mixed = network.decode(code, look, batch[0].K, (64, 64))
    assert torch.equal(exact.mesh.vertices, mixed.mesh.vertices) and torch.equal(exact.image, mixed.image) and torch.equal(exact.keypoints, mixed.keypoints)
    recipe = replace(STAGED, train=replace(STAGED.train, precision="bfloat16"))
    learn(new(), stages(recipe, batch[0], 0), progress=False)


def test_faces_have_colours_too_and_learn(batch):
    network = new(replace(SMALL, texture="face"))
    before = [p.detach().clone() for p in network.encoder.appearance.parameters()]
    learn(network, stages(replace(TINY, model=network.config, photo=1.0), batch[0], 0), progress=False)
    assert network(batch[0].image, batch[0].K).appearance.texture.shape == (8, network.hand.n_faces, 3)
    assert all(not torch.equal(a, b) for a, b in zip(before, network.encoder.appearance.parameters()))


def test_a_branch_can_join_a_network_and_travel_with_it(tmp_path, batch):
    donor, alone = new(), new(replace(SMALL, n_points=0))
    donor.branch.calibration.copy_(torch.tensor([0.3, 0.7]))
    both = s2hand.attach_branch(alone, donor.branch, BOTH)
    save(tmp_path / "both.safetensors", both, dtype=torch.float16)
    again = load(tmp_path / "both.safetensors")
    xy, con = s2hand.detect_keypoints(again, batch[0].image)
    assert torch.allclose(xy, donor.branch.eval()(batch[0].image).xy, atol=0.1) and (con > 0).all() and (con <= 1).all()
    assert torch.allclose(predict(again, batch[0]).joints, predict(alone, batch[0]).joints, atol=2e-3)
    assert s2hand.detect_keypoints(alone, batch[0].image) is None


def test_files_from_before_the_branch_still_load(tmp_path):
    from handrecon.training import load_checkpoint, save_checkpoint
    save(tmp_path / "new.safetensors", new(SMALL))
    meta = load_checkpoint(tmp_path / "new.safetensors").meta
    old = {k: v for k, v in meta["config"].items() if not k.startswith(("branch_", "w_2d", "w_cons"))}
    save_checkpoint(tmp_path / "old.safetensors", new(SMALL), {"system": "s2hand", "config": old})
    assert load(tmp_path / "old.safetensors").branch is None


# ---- what is told about the result

def test_distances_of_the_three_sets_of_key_points(batch):
    seen, known = batch
    found = s2hand_report.keypoint_distances(new().eval(), replace(seen, keypoints=known.keypoints + 3.0), known)
    assert set(found) == {"detections", "projected", "branch"} and len({len(d) for d in found.values()}) == 1
    assert torch.allclose(found["detections"], torch.tensor(3 * 2**0.5 * 224 / 64), rtol=1e-4)


def test_photometric_error_needs_no_texture_branch(batch):
    painted, plain = s2hand_report.photometric_error(new(SMALL), *batch), s2hand_report.photometric_error(new(replace(SMALL, w_photo=0.0)), *batch)
    assert all(abs(painted[name] - plain[name]) < 0.02 for name in ("L1", "1-SSIM", "IoU"))     # untrained: mean skin either way


def test_failures_are_found(batch, hand):
    seen, known = batch
    right = Prediction(known.joints, known.vertices, known.keypoints)
    mirrored = right._replace(joints=(known.joints - known.joints[:, :1]) * torch.tensor([1.0, 1, -1]) + known.joints[:, :1])
    assert not s2hand_report.failure_causes(right, known, seen)["depth flip"].any()
    assert s2hand_report.failure_causes(mirrored, known, seen)["depth flip"][s2hand_report.wrist_error(mirrored, known) > 5].all()
    bad = replace(seen, keypoints=known.keypoints + 30, confidence=torch.ones_like(seen.confidence))
    assert s2hand_report.failure_causes(right, known, bad)["poor detection"].all()
    table = s2hand_report.failure_table(mirrored, known, seen)
    assert set(table) == {"depth flip", "fist", "extreme view", "poor detection", "none of these"} and 0 <= table["fist"]["share"] <= 1
    sheet, words = s2hand_report.failure_gallery(hand.faces, mirrored, known, seen, rows=3, side=48)
    assert len(words) == 3 and "depth flip" in words[0] and sheet.std() > 5


def test_claims_can_be_commanded():
    from handrecon.ledger import expected_config
    metrics = {"loc", "ori", "branch", "all"}
    for claim in s2hand_report.CLAIMS:
        assert {address.split(":")[0] for address in claim.ours.values()} <= {run.name for run in claim.runs}
        for run in claim.runs: assert len(expected_config(claim, run, 0)["hash"]) == 12
    assert {run.name for run in s2hand_report.CLAIMS[1].runs} == metrics

"""Binocular transfer: what the network says in pixels, what fine-tuning may see, what Eq. 10 finds, and that a run is its settings."""
import json
from dataclasses import fields, replace

import pytest
import torch

from handrecon.binocular_report import CLAIMS, score
from handrecon.binocular import (
    RECIPES, BinocularConfig, MeshPixels, MeshRegressor, Reconstruction, TransferBatch, find_in_right, fit_hand, heat_map_loss,
    interpolation_weights, joints_of, learn_prior, load, load_pairs, loss_terms, mesh_from_relief, predict, prepare_transfer, pseudo_edge_lengths,
    prior_targets, prior_terms, PriorBatches, reconstruct_pair, right_camera_at, save, spread_points, stb_pairs, transfer)
from handrecon.camera import project, unproject
from handrecon.layouts import write_layout
from handrecon.proxy_hand import proxy_hand, sample_poses, sample_shapes
from handrecon.reconstruct import reconstruct_stereo
from handrecon.stereo import StereoWeights, disparity_to_depth, edge_lengths
from handrecon.stereo_pairs import STB_RIG, StereoCrops, Views, crop_pair, make_labelled, make_pairs, skin_mask
from handrecon.training import TrainConfig
from handrecon.viz import save_picture, to_picture

TINY = replace(RECIPES["smoke"], model=BinocularConfig(backbone="small", encoder="", image_size=64, channels=16), prior=TrainConfig(steps=2, batch_size=8),
               train=TrainConfig(steps=2, batch_size=4), n_prior=16, n_train=8, n_eval=8)


@pytest.fixture(scope="module")
def hand():
    return proxy_hand()


@pytest.fixture(scope="module")
def model(hand):
    torch.manual_seed(0)
    return MeshRegressor(TINY.model, hand).eval()


@pytest.fixture(scope="module")
def pairs():
    views, truth = make_pairs(6, 3, STB_RIG.scaled(0.4))
    return views, truth, crop_pair(views, 64)


def _true_pixels(vertices, K, edges):
    middle = vertices[..., 2].mean(1, keepdim=True)
    return MeshPixels(project(vertices, K), K[:, :1, 0] * (vertices[..., 2] / middle - 1), edge_lengths(vertices, edges).mean(1))


def test_points_are_spread_and_span_the_mesh(hand):
    points = spread_points(hand.v_template, 98)
    assert len(points.unique()) == 98
    made = lambda seed: hand(sample_poses(60, torch.Generator().manual_seed(seed)), sample_shapes(60, torch.Generator().manual_seed(seed))).vertices
    blend, fresh = interpolation_weights(made(1), points), made(2)
    assert torch.allclose(blend.sum(1), torch.ones(hand.n_vertices), atol=1e-4)
    assert (blend @ fresh[:, points] - fresh).norm(dim=-1).mean() < 0.002


def test_a_peak_in_the_heat_map_is_a_place(model):
    heat = torch.full((2, 98, 16, 16), -40.0)
    heat[0, :, 3, 12] = heat[1, :, 15, 0] = 40.0
    seen = model.read(heat, torch.full_like(heat, 0.25), torch.tensor([0.0, 0.5]), 64)
    assert torch.allclose(seen.uv[0], torch.tensor([50.0, 14.0]), atol=1e-2) and torch.allclose(seen.uv[1], torch.tensor([2.0, 62.0]), atol=1e-2)
    assert torch.allclose(seen.relief, torch.tensor(16.0), atol=1e-2) and torch.allclose(seen.size[1] / seen.size[0], torch.tensor(0.5).exp())


def test_heat_map_loss_is_least_at_the_truth():
    place = torch.tensor([[[5.5, 9.5]]])
    line = torch.arange(16) + 0.5
    target = -((line[:, None] - 9.5) ** 2 + (line - 5.5) ** 2) / (2 * 0.8**2)
    best = heat_map_loss(target[None, None], place)
    assert best < heat_map_loss(target.roll(1, 1)[None, None], place) and best < heat_map_loss(2 * target[None, None], place) and best < heat_map_loss(0.5 * target[None, None], place)


def test_true_pixels_give_the_true_mesh_both_ways(model, pairs):
    _, truth, crops = pairs
    l, r = _true_pixels(truth.vertices, crops.K_left, model.edges), _true_pixels(truth.vertices - right_camera_at(crops.baseline), crops.K_right, model.edges)
    assert (mesh_from_relief(l, crops.K_left, model.edges) - truth.vertices).abs().max() < 1e-4
    z = disparity_to_depth((l.uv - r.uv)[..., 0], crops.focal, crops.baseline, crops.shift)
    assert (unproject(l.uv, z, crops.K_left) - truth.vertices).abs().max() < 1e-4
    assert (joints_of(truth.vertices, model.hand) - truth.joints).norm(dim=-1).mean() < 0.002


def test_left_and_right_mesh_share_x_and_z_in_the_binocular_variant(model, pairs):
    with torch.no_grad(): out = reconstruct_pair(model, pairs[2])
    assert (out.left - out.right)[..., 2].abs().max() < 1e-5 and (out.left - out.right)[..., 0].abs().max() < 1e-4
    with torch.no_grad(): alone = reconstruct_pair(model, pairs[2], "monocular")
    assert (alone.left - alone.right)[..., 2].abs().max() > 1e-4


# --- nothing of the target's truth gets in

def test_batches_hold_pictures_cameras_and_what_was_made_of_them():
    assert [f.name for f in fields(TransferBatch)] == ["crops", "mask_left", "mask_right", "edges_left", "edges_right"]
    assert [f.name for f in fields(StereoCrops)] == ["left", "right", "K_left", "K_right", "baseline"]


def test_fine_tuning_is_the_same_whatever_the_truth_is(hand):
    "Preparation and training read the pictures, boxes and rig of the views; the truth may be anything, or absent."
    views, truth = make_pairs(6, 3, STB_RIG.scaled(0.4))
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        network = MeshRegressor(TINY.model, hand)
        transfer(network, crop_pair(Views(*views), 64), TINY.train, progress=False)
        results.append(torch.cat([p.flatten() for p in network.parameters()]))
        for part in truth: part.zero_()
    assert torch.equal(*results)


def test_masks_come_from_the_pictures_alone(model, pairs):
    crops = pairs[2]
    batch = prepare_transfer(model, crops)
    assert torch.equal(batch.mask_left, skin_mask(crops.left)) and torch.equal(batch.mask_right, skin_mask(crops.right))
    dark = replace(crops, left=crops.left * 0, right=crops.right * 0)
    assert not torch.equal(prepare_transfer(model, dark).mask_left, batch.mask_left)


def test_the_loss_refuses_anything_but_a_transfer_batch(model, pairs):
    with torch.no_grad(): out = reconstruct_pair(model, pairs[2])
    with pytest.raises(Exception, match="TransferBatch"):
        loss_terms(out, pairs[1], model)


# --- the losses

def test_branches_that_disagree_still_feel_photo_consistency(hand, pairs):
    "One view: each branch has a distance of its own. Were the other branch asked what is hidden, two centimetres apart and six would cost the same: nearly all would be hidden."
    _, truth, crops = pairs
    torch.manual_seed(0)
    network = MeshRegressor(replace(TINY.model, variant="monocular"), hand).eval()
    batch, move = prepare_transfer(network, crops), right_camera_at(crops.baseline)
    seen = reconstruct_pair(network, crops)

    def photo(left, right):                                                                      # true meshes, moved along each camera's own rays
        out = Reconstruction(left * truth.vertices, move + right * (truth.vertices - move), seen.seen_left, seen.seen_right)
        with torch.no_grad(): return sum(float(v) for k, v in loss_terms(out, batch, network).items() if k.startswith("photo"))

    there, near, far = (photo(1 + x, 1 - x) for x in (0.0, 0.02, 0.05))
    assert 1.2 * there < near and 1.2 * near < far


def test_every_weight_scales_its_terms_and_zero_leaves_them_out(hand, pairs):
    crops, values = pairs[2], {}
    for factor in (1, 2):
        w = StereoWeights(*(factor * getattr(StereoWeights(), f.name) for f in fields(StereoWeights)))
        torch.manual_seed(0)
        network = MeshRegressor(replace(TINY.model, weights=w), hand).eval()
        with torch.no_grad(): values[factor] = loss_terms(reconstruct_pair(network, crops), prepare_transfer(network, crops), network)
    assert set(values[1]) == {f"{n}_{s}" for n in ("photo", "edge", "lap", "mask") for s in ("left", "right")} | {"chamfer", "normal"}
    assert all(torch.isclose(values[2][k], 2 * values[1][k]) for k in values[1])
    for name in ("photo", "edge", "lap", "mask", "chamfer", "normal"):
        network.config = replace(TINY.model, weights=replace(StereoWeights(), **{name: 0.0}))
        with torch.no_grad(): left = loss_terms(reconstruct_pair(network, crops), prepare_transfer(network, crops), network)
        assert not any(k.split("_")[0] == name for k in left) and len(left) == (8 if name not in ("chamfer", "normal") else 9)


def test_left_right_consistency_alone_finds_the_depth(model):
    views, truth = make_pairs(6, 3, STB_RIG.scaled(0.4))
    crops = crop_pair(views, 64)
    l, r = _true_pixels(truth.vertices, crops.K_left, model.edges), _true_pixels(truth.vertices - right_camera_at(crops.baseline), crops.K_right, model.edges)
    offset = torch.full((6, 1), 2.0, requires_grad=True)
    lengths = edge_lengths(truth.vertices, model.edges)
    batch = TransferBatch(crops, skin_mask(crops.left), skin_mask(crops.right), lengths, lengths)
    optimizer, errors = torch.optim.Adam([offset], lr=0.25), []
    for _ in range(16):
        u_r = r.uv[..., 0] + offset
        z = disparity_to_depth(l.uv[..., 0] - u_r, crops.focal, crops.baseline, crops.shift, farthest=3.0)
        out = Reconstruction(unproject(l.uv, z, crops.K_left), unproject(torch.stack([u_r, r.uv[..., 1]], -1), z, crops.K_right) + right_camera_at(crops.baseline), l, r)
        errors.append(float((z - truth.vertices[..., 2]).detach().abs().mean()))
        optimizer.zero_grad()
        sum(v for k, v in loss_terms(out, batch, model).items() if not k.startswith("edge")).backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


def test_pseudo_labels_have_the_size_that_the_pair_says(model, pairs):
    lengths, _ = pseudo_edge_lengths(model, pairs[2])
    near = replace(pairs[2], baseline=pairs[2].baseline / 2)     # half the baseline, same disparities: half as far, half as large
    assert torch.allclose(pseudo_edge_lengths(model, near)[0], lengths / 2, rtol=1e-3)


# --- the prior

def test_prior_targets_move_with_the_picture(model):
    targets = prior_targets(make_labelled(4, 0, 64), model.edges)
    still = PriorBatches(targets, 4, 0, turn=0.0, zoom=0.0, shift=0.0).batch_at(0)
    order = [int((targets.uv - uv).abs().flatten(1).sum(1).argmin()) for uv in still.uv]
    assert torch.allclose(still.uv, targets.uv[order], atol=1e-3) and torch.allclose(still.image, targets.image[order], atol=1e-4)
    moved = PriorBatches(targets, 4, 0).batch_at(0)
    assert torch.equal(moved.image, PriorBatches(targets, 4, 0).batch_at(0).image) and (moved.uv - still.uv).abs().max() > 1


def test_prior_learns(model, hand):
    torch.manual_seed(0)
    network = MeshRegressor(TINY.model, hand)
    batch = prior_targets(make_labelled(8, 0, 64), network.edges)
    optimizer, totals = torch.optim.Adam(network.parameters(), 3e-3), []
    for _ in range(12):
        total = sum(prior_terms(network, batch).values())
        optimizer.zero_grad(); total.backward(); optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.8 * totals[0]


def test_prior_is_learned_once_and_shared(tmp_path):
    first, second = (learn_prior(TINY, 0, tmp_path, progress=False) for _ in range(2))
    assert not first.reused and second.reused and first.hash == second.hash and first.seconds == second.seconds
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values()))
    assert learn_prior(replace(TINY, n_prior=17), 0, tmp_path, progress=False).hash != first.hash
    ablated = replace(TINY, model=replace(TINY.model, weights=replace(StereoWeights(), photo=0.0), variant="monocular"), n_train=99)
    assert learn_prior(ablated, 0, tmp_path, progress=False).hash == first.hash      # what only fine-tuning uses does not matter


def test_a_prior_goes_on_from_a_smaller_one(tmp_path, monkeypatch):
    "Larger crops, the smaller ones' weights: after one step that moves nothing they are still the same, and the digits tell of both."
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    base = learn_prior(TINY, 0, tmp_path, progress=False)
    still = replace(TINY, model=replace(TINY.model, image_size=2 * TINY.model.image_size), prior=replace(TINY.prior, steps=1, lr=1e-12, warmup=0))
    further, afresh = (learn_prior(replace(still, begin=begin), 0, tmp_path, progress=False) for begin in ("tiny", ""))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(base.model.parameters(), further.model.parameters()))
    assert not torch.allclose(base.model.heat.weight, afresh.model.heat.weight, atol=1e-3) and len({base.hash, further.hash, afresh.hash}) == 3
    with pytest.raises(ValueError, match="begin: expected one of smoke, ledger, .*'lager'"): learn_prior(replace(TINY, begin="lager"), 0, tmp_path)


def test_pairs_are_kept_and_test_pairs_are_the_same_for_every_seed(tmp_path):
    a, b = (load_pairs("synthetic", "", TINY, seed, tmp_path, held_out=True) for seed in (0, 1))
    assert torch.equal(a.crops.left, b.crops.left)
    assert not torch.equal(load_pairs("synthetic", "", TINY, 0, tmp_path).crops.left, load_pairs("synthetic", "", TINY, 1, tmp_path).crops.left)
    wide = load_pairs("synthetic", "", replace(TINY, baseline=0.24), 0, tmp_path, held_out=True)
    assert torch.allclose(wide.crops.baseline, torch.tensor(0.24))


def test_rig_by_name():
    assert replace(TINY, rig="paper", pixels=1.0).cameras().focal == 762.7
    with pytest.raises(ValueError, match="stb, paper"):
        replace(TINY, rig="kinect").cameras()


# --- STB

def test_stb_is_read_mirrored_to_right_hands(tmp_path):
    write_layout("stb", tmp_path, 24, progress=False)
    pairs = stb_pairs(tmp_path, 6, False, 64)
    assert pairs.crops.left.shape == (6, 3, 64, 64) and pairs.joints.shape == (6, 21, 3)
    u_l, u_r = project(pairs.joints, pairs.crops.K_left), project(pairs.joints - right_camera_at(pairs.crops.baseline), pairs.crops.K_right)
    assert ((u_l > 0) & (u_l < 64)).float().mean() > 0.95 and ((u_r > 0) & (u_r < 64)).float().mean() > 0.95
    assert torch.allclose(disparity_to_depth((u_l - u_r)[..., 0], pairs.crops.focal, pairs.crops.baseline, pairs.crops.shift), pairs.joints[..., 2], atol=1e-4)
    on_skin = torch.stack([skin_mask(pairs.crops.left)[i][u_l[i, 9, 1].long(), u_l[i, 9, 0].long()] for i in range(6)])
    assert on_skin.mean() > 0.6
    assert "vertices" not in score(torch.zeros(6, 778, 3), pairs, proxy_hand())


def test_stb_boxes_do_not_tell_the_depth(tmp_path):
    "A predictor that is given boxes and cameras and never a picture is no better than the best constant; around the true key points it was far better."
    write_layout("stb", tmp_path, 40, progress=False)

    def blind_errors(**options):                                                              # metres: by Eq. 1 with one disparity in the crop for all, and a line through the boxes' sizes and shifts
        pairs = stb_pairs(tmp_path, 40, False, 64, **options)
        crops, z = pairs.crops, pairs.joints[..., 2].mean(1)
        uv = [project(pairs.joints - move, K) for move, K in ((0, crops.K_left), (right_camera_at(crops.baseline), crops.K_right))]
        by_shift = crops.focal * crops.baseline / ((uv[0] - uv[1])[..., 0].mean() - crops.shift)
        told = torch.stack([crops.focal, crops.shift / crops.focal], 1).double()
        spread = (told.amax(0) - told.amin(0)) / told.abs().amax(0)
        return float((by_shift - z).abs().mean()), float((z.median() - z).abs().mean()), float(spread.max())

    blind, constant, spread = blind_errors()
    assert blind >= constant - 1e-6 and spread < 1e-4                                          # neither the boxes' size nor their shift differs between pairs
    leaking, constant, spread = blind_errors(boxes="truth")
    assert leaking < 0.6 * constant and spread > 0.1
    with pytest.raises(ValueError, match="prior or truth, found 'exact'"): stb_pairs(tmp_path, 2, False, 64, boxes="exact")


# --- what comes out

def test_checkpoint_round_trip(tmp_path, model, pairs):
    save(tmp_path / "x.safetensors", model, {"seed": 0})
    again = load(tmp_path / "x.safetensors")
    assert torch.equal(predict(again, pairs[2]), predict(model, pairs[2])) and again.config == model.config


def test_hand_model_fits_a_mesh(hand):
    g = torch.Generator().manual_seed(2)
    known = hand(sample_poses(3, g), sample_shapes(3, g), torch.randn(3, 3, generator=g), torch.tensor([[0.0, 0.1, 0.6]]).expand(3, 3))
    fitted = fit_hand(known.vertices, hand)
    again = hand(fitted.pose, fitted.shape, fitted.rotation, fitted.translation)
    assert torch.allclose(again.joints, fitted.mesh.joints) and fitted.error.max() < 0.004
    with pytest.raises(ValueError, match="expected 778"):
        fit_hand(torch.zeros(1, 10, 3), hand)


def test_own_pair_to_files(tmp_path, model, pairs):
    views, truth, _ = pairs
    for name, picture in (("l", views.left[0]), ("r", views.right[0])): save_picture(tmp_path / f"{name}.png", to_picture(picture))
    save(tmp_path / "net.safetensors", model)
    rig, box = views.rig, [max(0.0, v) for v in views.box_left[0].tolist()]
    box[2], box[3] = min(box[2], rig.width), min(box[3], rig.height)
    record = reconstruct_stereo(tmp_path / "l.png", tmp_path / "r.png", (rig.focal, rig.cx, rig.cy, rig.baseline), box, tmp_path / "net.safetensors", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"l.glb", "l.npz", "l.overlay.png", "hands.json"}
    assert json.loads((tmp_path / "out/hands.json").read_text())["depth"] == pytest.approx(record["depth"])
    assert abs(record["depth"] - truth.vertices[0, :, 2].mean()) < 0.3          # an untrained network, but the boxes already say something
    with pytest.raises(ValueError, match="does not lie in"):
        reconstruct_stereo(tmp_path / "l.png", tmp_path / "r.png", (rig.focal, rig.cx, rig.cy, rig.baseline), [0.0, 0, 9999, 50], tmp_path / "net.safetensors", tmp_path / "out")


def test_packaged_network_sees_a_pair_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from handrecon.cli import app
    views, truth = make_pairs(1, 12, STB_RIG.scaled(0.5))
    for name, picture in (("l", views.left[0]), ("r", views.right[0])): save_picture(tmp_path / f"{name}.png", to_picture(picture))
    rig, box = views.rig, views.box_left[0].clamp_min(0).tolist()
    box[2], box[3] = min(box[2], rig.width), min(box[3], rig.height)
    text = lambda numbers: ",".join(f"{v:.3f}" for v in numbers)
    pair = [str(tmp_path / "l.png"), str(tmp_path / "r.png")]
    cameras = ["--stereo", text((rig.focal, rig.cx, rig.cy, rig.baseline)), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, ["reconstruct", *pair, "--box", text(box), *cameras])
    assert answer.exit_code == 0 and "m away" in answer.output, answer.output
    found = torch.tensor(json.loads((tmp_path / "out/hands.json").read_text())["joints"])
    assert float((found - truth.joints[0]).norm(dim=-1).mean()) < 0.06
    for wrong, words in (([*pair[:1], "--box", text(box)], "expects two pictures"), (pair, "--stereo needs --box")):
        answer = CliRunner().invoke(app, ["reconstruct", *wrong, *cameras])
        assert answer.exit_code == 2 and words in answer.output


def test_the_hand_is_found_in_the_right_picture(pairs):
    views, truth, _ = pairs
    for i in range(3):
        box = find_in_right(to_picture(views.left[i]), to_picture(views.right[i]), views.box_left[i], views.rig)
        true = views.rig.focal * views.rig.baseline / truth.vertices[i, :, 2].mean()
        assert abs(float(views.box_left[i, 0] - box[0]) - float(true)) < 8


def test_recipes_and_claims_are_whole():
    assert {"smoke", "ledger", "cpu", "gpu", "paper"} <= set(RECIPES)
    assert RECIPES["paper"].model == BinocularConfig() and RECIPES["paper"].cameras() == STB_RIG
    labels = {c.id: c for c in CLAIMS}
    assert labels["binocular-table1"].paper["test directly, one view, mm"] == 44.54 and len(labels["binocular-table2"].runs) == 7
    from handrecon.runs import resolve
    for claim in CLAIMS:
        for run in claim.runs: resolve("binocular", run.profile, run.overrides)
        assert all(address.split(":")[0] in {r.name for r in claim.runs} for address in claim.ours.values())

"""The single-stage system: maps, heads, losses with and without 3D, matching, scores, drawing."""
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import handrecon.multihand as M
from handrecon.camera import project
from handrecon.multihand import (
    DATASETS, RECIPES, MovedBatches, MultiHand, MultiHandConfig, PaperConfig, PaperRecipe, Predictions, Recipe, draw_hands, joints_known, load, load_pictures, loss_terms,
    match, move_scenes, new_network, predict, render_hands, save, scenes_from_data, split_by_hand, train_network, true_vertices)
from handrecon.multihand_report import average_precision, run_times, score
from handrecon.proxy_hand import proxy_hand
from handrecon.scenes import SceneBatches, SceneConfig, Scenes, compose, make_scenes, synthetic_cutouts
from handrecon.training import TrainConfig, load_checkpoint

TINY = MultiHandConfig(backbone="small", channels=32, head=64, stride=4, shrink=2, n_pca=30, rotation="6d", frame="ray", texture=False, focal=192.0)
PICTURES = SceneConfig(image_size=96, focal=192.0, hands=(0, 3), size=(30.0, 70.0), oversample=1)


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(8, 11, PICTURES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MultiHand(TINY).eval()


def perfect(scenes: Scenes, model: MultiHand) -> Predictions:
    "What a network would answer that knows the truth."
    vertices = torch.zeros(*scenes.valid.shape, 778, 3)
    vertices[scenes.valid] = true_vertices(model, scenes, scenes.valid)
    number = torch.where(scenes.valid, torch.arange(scenes.valid.shape[1]), -1)
    return Predictions(scenes.valid.float(), scenes.valid, scenes.valid, number, scenes.right, scenes.keypoints, scenes.joints, vertices)


def test_shapes_and_consistency_of_what_it_says(model, scenes):
    with torch.no_grad():
        peaks, out = model(scenes.image, scenes.K, max_hands=4, threshold=-1.0)
    assert peaks.kept.all() and out.joints.shape == (8, 4, 21, 3) and out.vertices.shape == (8, 4, 778, 3)
    assert torch.allclose(project(out.joints.flatten(1, 2), scenes.K).view(8, 4, 21, 2), out.keypoints, atol=1e-3)
    assert torch.equal(out.right, out.side[..., 1] > out.side[..., 0])
    for side in ("left", "right"):
        rows = out.right if side == "right" else ~out.right
        if not rows.any(): continue
        rest = proxy_hand(side)(out.pose[rows], out.shape[rows], M.matrix_to_axis_angle(out.rotation[rows]))
        assert torch.allclose(rest.joints - rest.joints[:, :1], out.joints[rows] - out.joints[rows][:, :1], atol=1e-4)


def test_a_hand_moves_with_the_picture(model):
    "Shifted by whole cells of the coarsest map, the same hand is found at the shifted place, turned with its ray."
    picture = torch.zeros(1, 3, 256, 256)
    patch = make_scenes(1, 2, replace(PICTURES, image_size=64, hands=(1, 1), size=(40.0, 50.0))).image
    picture[..., 64:128, 64:128] = patch
    moved = picture.roll(64, -1)
    K = torch.tensor([[[256.0, 0, 128], [0, 256, 128], [0, 0, 1]]])
    index = torch.tensor([[24 * 64 + 24]])
    with torch.no_grad():
        a = model.hands_at(model.maps(picture).features, index, K, torch.tensor([[True]]))
        b = model.hands_at(model.maps(moved).features, index + 16, K, torch.tensor([[True]]))
    assert torch.allclose(a.pose, b.pose, atol=1e-3)
    centre = lambda o: project(o.joints.mean(2), K)[0, 0]
    assert torch.allclose(centre(a) + torch.tensor([64.0, 0]), centre(b), atol=0.1)
    assert not torch.allclose(a.rotation, b.rotation, atol=0.05)


def test_weak_setting_never_looks_at_3d(scenes):
    torch.manual_seed(0)
    weak = MultiHand(replace(TINY, lambda_con=0.1))
    blind = replace(scenes, pose=scenes.pose * torch.nan, shape=scenes.shape * torch.nan, rotation=scenes.rotation * torch.nan,
                    translation=scenes.translation * torch.nan, joints=scenes.joints * torch.nan)
    torch.manual_seed(1)
    a = loss_terms(weak, scenes)
    torch.manual_seed(1)
    weak.load_state_dict({k: v for k, v in weak.state_dict().items()})
    b = loss_terms(weak, blind)
    assert set(a) == set(b) == {"L_cp", "L_lr", "L_kp", "L_rep", "L_edge", "L_pose", "L_shape", "L_con"}
    assert all(torch.isfinite(v) for v in b.values()) and all(torch.allclose(a[k], b[k], rtol=1e-3) for k in a)


def test_switches_turn_terms_on(scenes):
    torch.manual_seed(0)
    every = MultiHand(replace(TINY, texture=True, lambda_3d=1.0, lambda_pho=1.0, lambda_seg=1.0))
    terms = loss_terms(every, scenes)
    assert {"L_joints", "L_vertices", "L_depth", "L_pho", "L_seg"} < set(terms)
    sum(terms.values()).backward()
    silent = [n for n, p in every.named_parameters() if p.grad is None]
    assert not silent, silent


def test_empty_pictures_have_a_loss_too(model):
    terms = loss_terms(model, make_scenes(2, 0, replace(PICTURES, hands=(0, 0))))
    assert "L_cp" in terms and all(torch.isfinite(v) for v in terms.values())


def test_silhouette_term_pulls_a_hand_onto_the_mask(model):
    hand, K = proxy_hand(), torch.tensor([[[128.0, 0, 32], [0, 128, 32], [0, 0, 1]]])
    mesh = hand(torch.zeros(1, 45)).vertices
    mesh = mesh - mesh.mean(1, keepdim=True) + torch.tensor([0, 0, 0.5])
    here = torch.ones(1, 1, dtype=torch.bool)
    picture = lambda v: render_hands(model, v[:, None], torch.zeros(1, 1, 778, 3), here, here, K, (64, 64)).silhouette
    goal, shift = picture(mesh), torch.tensor([0.02, -0.01, 0.0], requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=0.003)
    for _ in range(40):
        S = picture(mesh + shift)
        loss = 1 - (S * goal).sum() / (S + goal - S * goal).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(shift.detach()[:2].norm()) < 0.006 and float(loss) < 0.1


def test_nearer_hand_is_drawn_in_front(model):
    hand, K = proxy_hand(), torch.tensor([[128.0, 0, 32], [0, 128, 32], [0, 0, 1]])
    mesh = hand(torch.zeros(1, 45)).vertices[0]
    mesh = mesh - mesh.mean(0)
    near, far = mesh + torch.tensor([0, 0, 0.5]), mesh + torch.tensor([0, 0, 0.6])
    blank = np.zeros((64, 64, 3), np.uint8)
    a = draw_hands(blank, [("right", near), ("left", far)], K, hand.faces, opacity=1.0)
    b = draw_hands(blank, [("left", far), ("right", near)], K, hand.faces, opacity=1.0)
    assert np.abs(a.astype(int) - b).max() <= 1 and a[32, 32, 2] > a[32, 32, 0]                  # blue: the right hand, whatever the order
    assert (draw_hands(blank, [("right", mesh)], K, hand.faces) == 0).all()                      # reaches behind the camera


def test_perfect_answers_get_perfect_scores(model, scenes):
    result = score(perfect(scenes, model), scenes, model)
    assert result["AP"] == result["precision"] == result["recall"] == result["side accuracy"] == 1
    assert max(result[k] for k in ("EPE", "PA-MPJPE", "PA-MPVPE", "2D", "place", "between hands")) < 1e-3


def test_scores_notice_what_is_wrong(model, scenes):
    good = perfect(scenes, model)
    swapped = score(good._replace(right=~good.right), scenes, model)
    assert swapped["side accuracy"] == 0
    moved = score(good._replace(joints=good.joints + torch.tensor([0.01, 0, 0])), scenes, model)
    assert moved["EPE"] < 1e-3 and moved["place"] == pytest.approx(10, abs=1e-2) and moved["between hands"] < 1e-3
    first = good.true.clone()
    first[first.nonzero()[0][0]] = -1
    half = score(good._replace(true=torch.where(scenes.valid.cumsum(1) > 1, -1, good.true)), scenes, model)
    assert half["recall"] < 1 and half["precision"] < 1 and half["AP"] < 1


def test_hands_without_truth_in_space_are_not_scored_there(model, scenes):
    "Against 21 zeros the aligned error is exactly zero whatever is said: such hands leave the means, and the count says so."
    pasted = compose(synthetic_cutouts(4, 0, 64), 3, 0, 96, (30.0, 60.0), 3)
    number = torch.where(pasted.valid, torch.arange(pasted.valid.shape[1]), -1)
    said = Predictions(pasted.valid.float(), pasted.valid, pasted.valid, number, pasted.right, pasted.keypoints, torch.rand(*pasted.valid.shape, 21, 3), torch.rand(*pasted.valid.shape, 778, 3))
    result = score(said, pasted, model)
    assert result["scored in 3D"] == 0 and result["found"] > 0 and result["AP"] == 1
    assert not {"EPE", "PA-MPJPE", "PA-MPVPE", "place", "between hands"} & set(result)
    half = scenes.in_3d.clone()
    half[::2] = False
    part = replace(scenes, in_3d=half, joints=scenes.joints * half[..., None, None])
    result = score(perfect(scenes, model), part, model)
    assert result["scored in 3D"] == (half & scenes.valid).sum() < result["found"] and result["EPE"] < 1e-3 and result["PA-MPVPE"] < 1e-3


def test_what_a_network_was_told_is_not_scored(model, scenes):
    told = score(predict(model, scenes, known=True), scenes, model)
    assert not {"AP", "precision", "recall", "side accuracy"} & set(told) and told["found"] == scenes.valid.sum() and "PA-MPJPE" in told


def test_supervision_uses_the_truth_that_is_there_and_no_other(scenes):
    torch.manual_seed(0)
    supervised = MultiHand(replace(TINY, lambda_3d=1.0))
    joints_only = replace(scenes, in_3d=torch.zeros_like(scenes.in_3d))
    nothing = replace(joints_only, joints=torch.zeros_like(scenes.joints))
    for part, expected in ((scenes, {"L_joints", "L_vertices", "L_depth"}), (joints_only, {"L_joints", "L_depth"}), (nothing, set())):
        terms = loss_terms(supervised, part)
        assert {"L_joints", "L_vertices", "L_depth"} & set(terms) == expected and all(torch.isfinite(v) for v in terms.values())


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name not in ("synthetic", "composed")])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_real_data_set_is_read_and_has_a_finite_supervised_loss(dataset, held_out):
    "The commands of handbook/reproduction.md, up to their first step, on the samples in data/samples."
    root = M.Path(__file__).parent.parent / "data/samples" / dataset
    small = replace(RECIPES["smoke"], n_train=3, n_eval=3)
    try: some = load_pictures(dataset, root, small, 0, held_out)
    except ValueError as problem:
        assert held_out and str(root) in str(problem)               # a sample without a held-out part says which file is missing
        pytest.skip(str(problem))
    torch.manual_seed(0)
    terms = loss_terms(MultiHand(replace(TINY, lambda_3d=1.0)), M.unpack(some))
    assert some.valid.any() and all(torch.isfinite(v) for v in terms.values())
    assert ("L_joints" in terms) == bool((joints_known(some) & some.valid).any())


def test_freihand_is_split_by_hand():
    "No hand is learned from before one background and tried on before another."
    learned, tried = split_by_hand(1000, 4, False), split_by_hand(1000, 4, True)
    assert not {i % 1000 for i in learned} & {i % 1000 for i in tried} and sorted(learned + tried) == list(range(4000))
    with pytest.raises(ValueError, match="two hands or more"): split_by_hand(1, 4, True)


def test_held_out_freihand_shares_no_hand_with_training(monkeypatch):
    "What `load_pictures` asks the data set for."
    asked = {}
    class Data:
        K, versions = [None] * 60, [0, 1, 2, 3]
        def __len__(self): return 240
    monkeypatch.setattr(M, "open_data", lambda *args, **options: Data())
    monkeypatch.setattr(M, "data_cutouts", lambda data, indices: asked.setdefault(len(asked), [*indices]) and synthetic_cutouts(2, 0, 64))
    for held_out in (False, True): load_pictures("freihand", "nowhere", replace(RECIPES["smoke"], n_train=1, n_eval=1), 0, held_out)
    assert not {i % 60 for i in asked[0]} & {i % 60 for i in asked[1]}


def test_moved_pictures_are_what_another_camera_sees(scenes):
    moved = move_scenes(scenes, torch.linspace(0.75, 1.3, 8), torch.tensor([[7.0, -4]]).expand(8, 2))
    valid = moved.valid
    assert valid.any() and torch.allclose(project(moved.joints.flatten(1, 2), moved.K).view_as(moved.keypoints)[valid], moved.keypoints[valid], atol=1e-2)
    still = move_scenes(scenes, torch.ones(8), torch.zeros(8, 2))
    assert torch.allclose(still.image, scenes.image, atol=1e-4) and torch.equal(still.owner, scenes.owner) and torch.allclose(still.K, scenes.K)
    one = MovedBatches(SceneBatches(scenes, 4, 0, 0.0, 0.0), 0, 0.25, 0.1)
    assert torch.equal(one.batch_at(1).image, one.batch_at(1).image)


def test_what_is_the_papers_alone_leaves_other_records_alone(tmp_path):
    "Digits of the profiles that have records in the ledger; the paper's own settings are fields of classes of their own."
    paper = RECIPES["paper"]
    assert isinstance(paper, PaperRecipe) and isinstance(paper.model, PaperConfig) and paper.zoom and paper.shift and paper.model.shape_norm == "length"
    assert [round(m * 70_000 * 256 / 130_240) for m in paper.train.milestones] == [30, 90, 120]
    for name in ("smoke", "ledger", "cpu", "shipped", "gpu"):
        assert type(RECIPES[name]) is Recipe and "shape_norm" not in asdict(RECIPES[name])["model"] and not {"zoom", "shift"} & set(asdict(RECIPES[name]))
    tiny = PaperConfig(**{k: v for k, v in asdict(TINY).items()})
    save(tmp_path / "net.safetensors", MultiHand(tiny))
    assert load(tmp_path / "net.safetensors").config == tiny


def test_matching_takes_each_true_hand_once():
    found, true = torch.tensor([[[0.0, 0], [1, 0], [50, 0]]]), torch.tensor([[[0.5, 0], [51, 0], [200, 0]]])
    valid, radius = torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), 5.0)
    assert match(found, torch.ones(1, 3, dtype=torch.bool), true, radius, valid).tolist() == [[0, -1, 1]]
    assert match(found, torch.tensor([[False, True, True]]), true, radius, valid).tolist() == [[-1, 0, 1]]


def test_average_precision_of_known_lists():
    assert average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, True, True]), 3) == 1
    assert average_precision(torch.tensor([0.9, 0.8]), torch.tensor([False, True]), 1) == 0.5
    assert average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]), 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 4) == 0


def test_a_second_hand_costs_no_second_pass(model):
    from handrecon.s2hand import load as load_s2hand
    t = run_times(model, load_s2hand(), (1, 4), size=128, repeats=2)
    assert t["hands"] == [1, 4] and all(len(t[k]) == 2 and min(t[k]) > 0 for k in ("all at once", "hand by hand"))


def test_training_lowers_the_loss_and_comes_back_from_a_file(tmp_path, scenes):
    recipe = Recipe(TINY, TrainConfig(steps=12, batch_size=4, lr=2e-3, save_every=6), n_train=8, pictures=PICTURES, first_steps=2, supervised=False)
    network = new_network(recipe, 0)
    logs = train_network(network, recipe, scenes, 0, tmp_path)
    assert list(logs) == ["single hands", "all losses"] and "L_cp" not in logs["single hands"].names
    total = logs["all losses"]["total"]
    assert total[-4:].mean() < total[:4].mean()
    save(tmp_path / "net.safetensors", network, {"note": "x"})
    again = load(tmp_path / "net.safetensors")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items()) and again.config == TINY
    assert load_checkpoint(tmp_path / "net.safetensors").meta["note"] == "x"
    with pytest.raises(ValueError, match="multihand"): load(M.packaged("s2hand"))


def test_recipes_can_be_written_down_and_paper_says_what_the_paper_says():
    for recipe in RECIPES.values(): json.dumps(asdict(recipe))
    paper = RECIPES["paper"]
    assert (paper.model.backbone, paper.model.lambda_3d, paper.model.stride, paper.train.batch_size) == ("resnet50", 0.0, 8, 256)
    assert (paper.pictures.image_size, paper.pictures.focal, paper.pictures.size, paper.pictures.hands) == (512, 512.0, (96.0, 320.0), (1, 10))


@pytest.mark.parametrize("rotation, n_pca, frame", [("6d", 30, "ray"), ("axis-angle", 45, "camera")])
def test_a_mirrored_picture_gets_the_mirrored_answer(scenes, rotation, n_pca, frame):
    "With `mirror`, exactly and whatever the weights: sides change places, everything else is mirrored; without it, not."
    width, flip = scenes.image.shape[-1], torch.tensor([-1.0, 1, 1])
    K = scenes.K.clone()
    K[:, 0, 2] = width - K[:, 0, 2]
    torch.manual_seed(3)
    model = MultiHand(replace(TINY, points=True, mirror=True, rotation=rotation, n_pca=n_pca, frame=frame)).eval()

    def both():
        with torch.no_grad(): return model(scenes.image, scenes.K, 1, -1.0), model(scenes.image.flip(-1), K, 1, -1.0)

    (peaks, a), (again, b) = both()
    columns = width // model.config.stride
    assert torch.allclose(peaks.score, again.score, atol=1e-5) and torch.equal(again.index, peaks.index + columns - 1 - 2 * (peaks.index % columns))
    assert torch.allclose(a.side, b.side.flip(-1), atol=1e-4) and torch.equal(a.right, ~b.right)
    assert torch.allclose(a.vertices * flip, b.vertices, atol=1e-4) and torch.allclose(a.guess * flip[:2] + torch.tensor([width, 0]), b.guess, atol=1e-3)
    model.config = replace(model.config, mirror=False)
    (_, a), (_, b) = both()
    assert not torch.allclose(a.side, b.side.flip(-1), atol=1e-4)


def test_unknown_choices_are_named():
    for name, value in (("rotation", "euler"), ("frame", "world"), ("center", "wrist")):
        with pytest.raises(ValueError, match=name): MultiHand(replace(TINY, **{name: value}))


def test_both_hands_of_a_rhd_picture(tmp_path):
    from handrecon.datasets import open_data
    from handrecon.multihand import picture_groups
    root = M.Path(__file__).parent.parent / "data/samples/rhd"
    if not root.is_dir(): pytest.skip("no RHD sample")
    data = open_data("rhd", root, split="training", hand="both", cache=False)
    s = scenes_from_data(data, picture_groups(data, 2), 128)
    assert len(s.K) >= 1 and s.valid.any() and not s.in_3d.any()
    inside = s.visible[s.valid] > 0
    pixels = project(s.joints.flatten(1, 2), s.K).view_as(s.keypoints)[s.valid]
    assert (pixels - s.keypoints[s.valid])[inside].abs().max() < 1


def test_the_packaged_network_is_that_of_the_cpu_profile():
    recipe = M.RECIPES["cpu"].model
    free = {"weights": "", "threshold": load().config.threshold}                # where it began, and what was chosen afterwards
    assert load().config == replace(recipe, **free)

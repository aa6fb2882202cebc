"""Synthetic pictures: determined by their seed, consistent with their own truth, and FreiHAND's layout on disk."""
import errno
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon import synthetic
from handrecon.camera import project
from handrecon.keypoints import DetectorNoise, read_s2hand_detections
from handrecon.mano import HandModel
from handrecon.proxy_hand import proxy_hand, proxy_hand_arrays
from handrecon.raster import rasterize
from handrecon.render import interpolate, vertex_normals
from handrecon.synthetic import (SyntheticConfig, SyntheticHands, backgrounds, blur, develop, dress, elbow_out_of_sight, forearm, make_batch,
                                 noise_fields, openness, palm_frame, paste_neighbours, resolve, sample_hands, sample_views, superquadrics, tube_faces,
                                 wrist_ring, write_freihand)

SMALL = SyntheticConfig(image_size=48)
BARE = replace(SMALL, forearm=0.0, sleeve=0.0, occluder=0.0, distractor=0.0, blur=0.0, sensor_noise=0.0)
EXACT = DetectorNoise(sigma=0.0, swap=0.0, swap_contact=0.0, outlier=0.0, missing=0.0, missing_occluded=0.0, confidence_jitter=0.0, blur=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def batch():
    return make_batch(64, 7, SMALL)


@pytest.fixture(scope="module")
def hand():
    return proxy_hand()


# the batch ---------------------------------------------------------------------------------------

def test_shapes_and_ranges(batch, hand):
    seen, truth = batch
    assert seen.image.shape == (64, 3, 48, 48) and truth.mask.shape == (64, 48, 48)
    assert truth.vertices.shape == (64, hand.n_vertices, 3) and truth.pose.shape == (64, 45) and truth.shape.shape == (64, 10)
    assert 0 <= seen.image.min() and seen.image.max() <= 1 and torch.allclose(seen.image * 255, (seen.image * 255).round(), atol=1e-4)
    assert 0 <= seen.confidence.min() and seen.confidence.max() <= 1
    for part in batch:
        for field in part.__dataclass_fields__:
            assert torch.isfinite(getattr(part, field)).all() and not getattr(part, field).requires_grad


def test_seed_and_configuration_determine_everything(batch):
    again, other = make_batch(64, 7, SMALL), make_batch(64, 8, SMALL)
    for a, b, c in zip(batch, again, other):
        for field in a.__dataclass_fields__:
            assert torch.equal(getattr(a, field), getattr(b, field)), field
            assert not torch.equal(getattr(a, field), getattr(c, field)), field
    assert not torch.equal(batch[0].image, make_batch(64, 7, replace(SMALL, sensor_noise=0.1))[0].image)


def test_not_moved_by_the_global_generator(batch):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = make_batch(64, 7, SMALL)
    assert torch.equal(batch[0].image, again[0].image) and torch.equal(torch.get_rng_state(), state)


def test_threads_do_not_matter():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = make_batch(8, 3, SMALL)[0].image
        torch.set_num_threads(2)
        two = make_batch(8, 3, SMALL)[0].image
    finally:
        torch.set_num_threads(threads)
    assert (one - two).abs().max() <= 1 / 255 + 1e-6  # sums may be taken in another order


def test_keypoints_are_projected_joints_and_exact_detections(batch):
    seen, truth = batch
    assert torch.equal(truth.keypoints, project(truth.joints, seen.K))
    seen, truth = make_batch(32, 0, replace(SMALL, detector=EXACT))
    found = seen.confidence > 0
    assert found.float().mean() > 0.95
    assert torch.allclose(seen.keypoints[found], truth.keypoints[found], atol=1e-3)
    assert torch.equal(seen.keypoints[~found], torch.zeros(int((~found).sum()), 2))
    inside = ((truth.keypoints >= 0) & (truth.keypoints <= 48)).all(-1)
    assert torch.equal(found, inside)


def test_truth_is_the_models_own_hand(batch, hand):
    _, truth = batch
    posed = hand(truth.pose, truth.shape)
    d = lambda x: torch.cdist(x, x)
    assert torch.allclose(d(posed.joints), d(truth.joints), atol=1e-5)
    centred = lambda x: x - x.mean(1, keepdim=True)
    a, b = centred(posed.vertices), centred(truth.vertices)
    rotation = torch.linalg.lstsq(a, b).solution
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(64), atol=1e-3)   # no reflection
    assert torch.allclose(a @ rotation, b, atol=1e-4)


def test_framing(batch):
    seen, truth = make_batch(256, 1, BARE)
    low, high = truth.keypoints.amin(1), truth.keypoints.amax(1)
    fill = (high - low).amax(1) / 48
    assert 0.4 < fill.quantile(0.02) and fill.quantile(0.98) < 1.05
    z = truth.joints[..., 2].mean(1)
    assert z.min() > 0.3 and z.max() < 1.0
    assert torch.equal(seen.K[:, :2, 2], torch.full((256, 2), 24.0)) and (seen.K[:, 0, 0] / seen.K[:, 1, 1] - 1).abs().max() < 0.02


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_views(spread):
    R = sample_views(4000, seeded(), spread)
    assert torch.allclose(R @ R.mT, torch.eye(3).expand(4000, 3, 3), atol=1e-5) and torch.allclose(torch.linalg.det(R), torch.ones(4000), atol=1e-5)
    z = R[:, 2, 2]
    assert z.abs().min() > 0.99 if spread == 0 else z.abs().min() < 0.9
    if spread == 1:
        assert z.mean().abs() < 0.03 and z.var().item() == pytest.approx(1 / 3, rel=0.05) and R[:, 1, 1].mean().abs() < 0.03


def test_palm_faces_the_camera_upright(hand):
    _, truth = make_batch(32, 0, replace(BARE, view_spread=0.0))
    frame = palm_frame(truth.joints)
    assert torch.allclose(frame[:, 1, 1], torch.ones(32), atol=0.02) and torch.allclose(frame[:, 2, 2].abs(), torch.ones(32), atol=0.02)
    assert (truth.keypoints[:, 0, 1] > truth.keypoints[:, 9, 1]).all()


def test_mask_is_the_silhouette_where_nothing_is_in_the_way(hand):
    seen, truth = make_batch(32, 5, BARE)
    K = seen.K * torch.tensor([4.0, 4.0, 1.0])[:, None]
    silhouette = F.avg_pool2d((rasterize(truth.vertices, hand.f, K, (192, 192)).face_index >= 0).float(), 4)
    assert (silhouette - truth.mask).abs().mean() < 0.008 and (silhouette - truth.mask).abs().max() <= 0.5


def test_other_things_are_not_in_the_mask(batch, hand):
    seen, truth = batch
    K = seen.K * torch.tensor([2.0, 2.0, 1.0])[:, None]
    silhouette = F.avg_pool2d((rasterize(truth.vertices, hand.f, K, (96, 96)).face_index >= 0).float(), 2)
    assert (truth.mask <= silhouette + 1e-6).all() and ((silhouette - truth.mask) > 0.5).any(1).any(1).float().mean() > 0.15


def test_hands_stand_out_from_what_is_behind():
    "A picture is not only noise: the mean colour difference of hand and background is that of photographs, not of camouflage."
    seen, truth = make_batch(128, 2, SMALL)
    inside = (seen.image * truth.mask[:, None]).sum((2, 3)) / truth.mask.sum((1, 2))[:, None]
    outside = (seen.image * (1 - truth.mask)[:, None]).sum((2, 3)) / (1 - truth.mask).sum((1, 2))[:, None]
    assert (inside - outside).norm(dim=1).median() > 0.2
    assert inside.std(0).min() > 0.1 and outside.std(0).min() > 0.1


def test_hidden_joints_are_detected_worse():
    seen, truth = make_batch(300, 4, SMALL)
    error = (seen.keypoints - truth.keypoints).norm(dim=-1) / (truth.keypoints.amax(1) - truth.keypoints.amin(1)).amax(-1)[:, None]
    found = seen.confidence > 0
    sure, unsure = found & (seen.confidence > 0.8), found & (seen.confidence < 0.5)
    assert error[unsure].median() > 2 * error[sure].median() and sure.float().mean() > 0.2 and unsure.float().mean() > 0.05


# the parts ---------------------------------------------------------------------------------------

def test_wrist_ring_is_the_boundary(hand):
    faces = tuple(map(tuple, hand.f.tolist()))
    ring = wrist_ring(faces)
    edges = {frozenset(e) for e in zip(ring, ring[1:] + ring[:1])}
    count = {}
    for f in faces:
        for e in zip(f, f[1:] + f[:1]):
            count[frozenset(e)] = count.get(frozenset(e), 0) + 1
    assert edges == {e for e, n in count.items() if n == 1} and len(ring) == len(set(ring))


@pytest.mark.parametrize("side", ["right", "left"])
def test_arms_and_things_point_outwards(side):
    hand = proxy_hand(side)
    hands = sample_hands(16, seeded(), SMALL, hand)
    scene = dress(hands, seeded(1), replace(SMALL, forearm=1.0, sleeve=1.0, occluder=1.0), hand)
    normals = vertex_normals(scene.vertices, scene.faces)
    ring = len(wrist_ring(tuple(map(tuple, hand.f.tolist()))))
    arm = slice(hand.n_vertices, hand.n_vertices + 7 * ring)
    tube = scene.vertices[:, arm].unflatten(1, (7, ring))
    outward = ((tube - tube.mean(2, keepdim=True)) * normals[:, arm].unflatten(1, (7, ring))).sum(-1)[:, 1:-1] > 0
    assert outward.float().mean() > 0.97
    blob = slice(len(scene.vertices[0]) - 108, None)
    there = scene.vertices[:, blob].abs().sum((1, 2)) > 0
    centred = scene.vertices[:, blob] - scene.vertices[:, blob].mean(1, keepdim=True)
    assert ((centred * normals[:, blob]).sum(-1)[there] >= -1e-6).float().mean() > 0.97


def test_left_hands():
    seen, truth = make_batch(8, 0, SMALL, proxy_hand("left"))
    assert torch.isfinite(seen.image).all() and (truth.mask.sum((1, 2)) > 30).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_back_is_where_the_fingers_do_not_curl(side):
    hand = proxy_hand(side)
    frame = palm_frame(hand(torch.zeros(1, 45)).joints, side)[0]
    fist = hand(synthetic.sample_poses(64, seeded(), side=side))
    tips = fist.joints[:, [8, 12, 16, 20]].mean(1) - fist.joints[:, [5, 9, 13, 17]].mean(1)
    assert (tips @ frame[:, 2] < 0).float().mean() > 0.9 and torch.linalg.det(frame) == pytest.approx(1, abs=1e-4)


def test_a_hand_of_another_mesh_gets_one_colour():
    arrays = {k: np.asarray(v) for k, v in proxy_hand_arrays().items()}
    moved = HandModel(arrays | {"v_template": arrays["v_template"] * 1.1})
    seen, truth = make_batch(4, 0, SMALL, moved)
    assert truth.vertices.shape == (4, moved.n_vertices, 3) and torch.isfinite(seen.image).all()


def test_arms_leave_the_hand(hand):
    mesh = hand(torch.zeros(4, 45))
    ring = mesh.vertices[:, wrist_ring(tuple(map(tuple, hand.f.tolist())))]
    axis = F.normalize(mesh.joints[:, 0] - mesh.joints[:, 9], dim=-1)
    tube = forearm(ring, axis, torch.zeros(4, 3), torch.zeros(4), torch.ones(4)).unflatten(1, (7, -1))
    along = ((tube.mean(2) - mesh.joints[:, :1]) * axis[:, None]).sum(-1)
    assert (along.diff(dim=1) > 0).all() and (along[:, -1] > 0.3).all()
    radius = (tube - tube.mean(2, keepdim=True)).norm(dim=-1).mean(2)
    assert (radius[:, -1] > 1.2 * radius[:, 0]).all() and (radius < 0.1).all()


def test_elbows_are_out_of_sight():
    axis = F.normalize(torch.randn(500, 3, generator=seeded()), dim=-1)
    turned = F.normalize(axis + elbow_out_of_sight(axis), dim=-1)
    assert (turned[:, 2] >= -0.05).all() and torch.equal(turned[axis[:, 2] > 0], F.normalize(axis[axis[:, 2] > 0], dim=-1))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.25, 1.0), st.floats(0.25, 1.0), st.integers(0, 100))
def test_superquadrics_satisfy_their_equation(e1, e2, seed):
    size = torch.rand(1, 3, generator=seeded(seed)) + 0.1
    u = (superquadrics(torch.tensor([[e1, e2]]), size) / size[:, None]).abs()
    value = (u[..., 0] ** (2 / e2) + u[..., 1] ** (2 / e2)) ** (e2 / e1) + u[..., 2] ** (2 / e1)
    assert torch.allclose(value, torch.ones_like(value), atol=5e-3)


def test_tube_of_rings_is_a_manifold_strip():
    faces = tube_faces(4, 6, 10)
    assert faces.shape == (36, 3) and faces.min() == 10 and faces.max() == 10 + 23
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len(torch.unique(edges, dim=0)) == len(edges)  # each directed edge once: consistent winding


def test_openness_by_hand():
    d, zero, up = 0.06, torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0.0, 1.0]]])
    lights = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]])
    sky, arrives = openness(zero, up, torch.tensor([0.0, 0.0, d]).expand(1, 21, 3), lights)
    assert sky.item() == pytest.approx(float(torch.exp(-1.5 * (synthetic._BALL_RADIUS ** 2).sum() / d ** 2)), rel=1e-4)
    assert arrives.flatten().tolist() == [0, 1, 1]
    sky, arrives = openness(zero, -up, torch.tensor([0.0, 0.0, d]).expand(1, 21, 3), lights)
    assert sky.item() == 1 and arrives.flatten().tolist() == [1, 1, 1]


def test_resolve_is_interpolation_and_mean(hand):
    seen, truth = make_batch(2, 0, BARE)
    colours = torch.rand(2, hand.n_vertices, 3, generator=seeded())
    fragments = rasterize(truth.vertices, hand.f, seen.K * torch.tensor([3.0, 3.0, 1.0])[:, None], (144, 144))
    colour, cover, mask = resolve(fragments, hand.f, colours, 100, 3)
    assert torch.allclose(colour, F.avg_pool2d(interpolate(fragments, colours, hand.f), 3), atol=1e-5)
    assert torch.allclose(cover, F.avg_pool2d((fragments.face_index >= 0).float(), 3), atol=1e-6)
    assert torch.allclose(mask, F.avg_pool2d(((fragments.face_index >= 0) & (fragments.face_index < 100)).float(), 3), atol=1e-6)


def test_noise_is_normalised():
    x = noise_fields(8, 2, 40, seeded())
    assert torch.allclose(x.mean((2, 3)), torch.zeros(8, 2), atol=1e-5) and torch.allclose(x.std((2, 3)), torch.ones(8, 2), atol=1e-3)


def test_backgrounds_are_pictures():
    x = backgrounds(40, 32, torch.rand(40, 3), seeded())
    assert x.shape == (40, 3, 32, 32) and 0 <= x.min() and x.max() <= 1
    assert x.std((2, 3)).max() > 0.2 and x.std((2, 3)).min() < 0.05   # busy ones and plain ones


def test_neighbours():
    behind, cover = torch.zeros(16, 3, 32, 32), torch.ones(16, 32, 32)
    paste_neighbours(behind, torch.ones(16, 3, 32, 32), cover, seeded(), 0.5)
    changed = behind.sum((1, 2, 3)) > 0
    assert 2 < changed.sum() < 14
    untouched = torch.zeros(16, 3, 32, 32)
    paste_neighbours(untouched, torch.ones(16, 3, 32, 32), cover, seeded(), 0.0)
    assert not untouched.any()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.8, 3), st.floats(0, 10), st.floats(0, 3.14))
def test_blur_has_the_variances_of_its_kernel(sigma, length, angle):
    point = torch.zeros(1, 1, 65, 65)
    point[..., 32, 32] = 1
    out = blur(point, torch.tensor([sigma]), torch.tensor([length]), torch.tensor([angle]))[0, 0].double()
    y, x = torch.meshgrid(torch.arange(65) - 32.0, torch.arange(65) - 32.0, indexing="ij")
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    assert out.sum().item() == pytest.approx(1, abs=1e-3)
    assert (out * along ** 2).sum().item() == pytest.approx(sigma ** 2 + length ** 2 / 12, abs=0.15)
    assert (out * across ** 2).sum().item() == pytest.approx(sigma ** 2, abs=0.15)


def test_noise_grows_with_light_and_setting():
    grey = torch.stack([torch.full((3, 64, 64), v) for v in (0.15, 0.85)]).repeat(40, 1, 1, 1)
    rough = develop(grey.clone(), seeded(), 0.2).std((1, 2, 3)).view(-1, 2).median(0).values
    assert rough[1] > rough[0] > develop(grey.clone(), seeded(), 0.0)[::2].std((2, 3)).median()


@pytest.mark.parametrize("change, words", [({"image_size": 4}, "image_size"), ({"fill": (0.9, 0.5)}, "fill"), ({"distance": (0.0, 1.0)}, "distance"),
                                           ({"blur": 1.5}, "blur"), ({"forearm": -0.1}, "forearm")])
def test_bad_configurations(change, words):
    with pytest.raises(ValueError, match=words):
        SyntheticConfig(**change)


def test_no_pictures():
    with pytest.raises(ValueError, match="n = 0"):
        make_batch(0, 0)


# without a disk ----------------------------------------------------------------------------------

def test_samples_do_not_depend_on_the_order():
    hands = SyntheticHands(50, 3, SMALL, block=8)
    forwards = [hands[i][0].image for i in range(0, 50, 7)]
    again = SyntheticHands(50, 3, SMALL, block=8)
    backwards = [again[i][0].image for i in reversed(range(0, 50, 7))]
    assert len(hands) == 50 and all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards)))
    assert torch.equal(hands.batch_at(1)[1].pose[2:3], hands[10][1].pose) and torch.equal(hands.batch_at(7)[1].pose, hands.batch_at(1)[1].pose)
    assert not torch.equal(hands[0][1].pose, hands[8][1].pose)
    with pytest.raises(IndexError, match="50"):
        hands[50]
    with pytest.raises(ValueError, match="n = 0"):
        SyntheticHands(0)


# FreiHAND's layout -------------------------------------------------------------------------------

def load(root, name):
    return torch.tensor(json.loads((root / f"{name}.json").read_text()))


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_freihand(tmp_path_factory.mktemp("data") / "FreiHAND_pub_v2", 5, 1, SMALL, evaluation=3, block=2, progress=False)


def test_freihand_files(folder):
    expected = [f"training/{kind}/{i:08d}.jpg" for kind in ("rgb", "mask") for i in range(5)] + [f"evaluation/rgb/{i:08d}.jpg" for i in range(3)]
    expected += [f"training_{n}.json" for n in ("K", "mano", "xyz", "scale", "verts")] + [f"evaluation_{n}.json" for n in ("K", "xyz", "scale", "verts")]
    expected += ["openpose_v2/training/detect_all.json", "openpose/evaluation/detect.json", "synthetic.json"]
    assert set(tree(folder)) == set(expected)
    assert cv2.imread(str(folder / "training/rgb/00000004.jpg")).shape == (48, 48, 3)


def test_freihand_annotations(folder, hand):
    K, xyz, verts, scale, mano = (load(folder, f"training_{n}") for n in ("K", "xyz", "verts", "scale", "mano"))
    assert K.shape == (5, 3, 3) and xyz.shape == (5, 21, 3) and verts.shape == (5, 778, 3) and scale.shape == (5,) and mano.shape == (5, 1, 61)
    assert torch.allclose(scale, (xyz[:, 9] - xyz[:, 10]).norm(dim=-1), atol=1e-6)
    theta, (u, v, s) = mano[:, 0], mano[:, 0, 58:].T
    root = torch.stack([(u - K[:, 0, 2]) / s, (v - K[:, 1, 2]) / s, (K[:, 0, 0] + K[:, 1, 1]) / 2 / s], -1)
    assert torch.allclose(root, xyz[:, 9], atol=1e-5)
    posed = hand(theta[:, 3:48] + hand.hands_mean, theta[:, 48:58], theta[:, :3])
    shift = (root - posed.joints[:, 9])[:, None]
    assert torch.allclose(posed.joints + shift, xyz, atol=1e-5) and torch.allclose(posed.vertices + shift, verts, atol=1e-5)


def test_freihand_detections_and_masks(folder, hand):
    found = read_s2hand_detections(folder / "openpose_v2/training/detect_all.json")
    assert found.names == [f"{i:08d}.jpg" for i in range(5)]
    uv = project(load(folder, "training_xyz"), load(folder, "training_K"))
    error = (found.xy - uv).norm(dim=-1)[found.confidence > 0]
    assert error.median() < 4
    silhouette = rasterize(load(folder, "training_verts"), hand.f, load(folder, "training_K"), (48, 48)).face_index >= 0
    for i in range(5):
        mask = torch.from_numpy(cv2.imread(str(folder / f"training/mask/{i:08d}.jpg"), 0)) > 127
        assert (mask & ~silhouette[i]).float().mean() < 0.02 and mask.any()


def test_freihand_same_call_same_bytes_and_prefixes(folder, tmp_path):
    again = write_freihand(tmp_path / "a", 5, 1, SMALL, evaluation=3, block=2, progress=False)
    assert tree(again) == tree(folder)
    assert write_freihand(again, 5, 1, SMALL, evaluation=3, block=2, progress=False) == again
    training, evaluation = load(folder, "training_xyz"), load(folder, "evaluation_xyz")
    assert not torch.equal(training[:2], evaluation[:2])


def test_freihand_goes_on_after_an_interruption(folder, tmp_path, monkeypatch):
    original, left = synthetic._write_block, [0, 1, 2]

    def interrupted(*arguments):
        if not left: raise KeyboardInterrupt
        left.pop()
        return original(*arguments)

    monkeypatch.setattr(synthetic, "_write_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_freihand(tmp_path / "b", 5, 1, SMALL, evaluation=3, block=2, progress=False)
    assert not json.loads((tmp_path / "b/synthetic.json").read_text())["complete"]
    left.extend([0, 1])  # exactly what is missing
    write_freihand(tmp_path / "b", 5, 1, SMALL, evaluation=3, block=2, progress=False)
    assert tree(tmp_path / "b") == tree(folder) and not left


def test_freihand_four_backgrounds(folder, tmp_path):
    import cv2

    from handrecon.datasets import FreiHAND
    root = write_freihand(tmp_path / "four", 5, 1, SMALL, evaluation=3, block=2, progress=False, versions=4)
    one, four = tree(folder), tree(root)
    assert all(four[name] == one[name] for name in one if name != "synthetic.json") and len(four) == len(one) + 15
    data = FreiHAND(root)
    assert len(data) == 20 and data.label(17).path.endswith("00000017.jpg")
    read = lambda i: cv2.imread(str(root / f"training/rgb/{i:08d}.jpg")).astype(float)
    mask = cv2.imread(str(root / "training/mask/00000002.jpg"), 0)
    inside, outside = cv2.erode(mask, np.ones((5, 5))) > 200, cv2.dilate(mask, np.ones((9, 9))) < 50
    for k in (1, 2, 3):
        difference = np.abs(read(2) - read(2 + 5 * k)).mean(-1)
        assert difference[outside].mean() > 2 * difference[inside].mean() and difference[outside].mean() > 10
    with pytest.raises(ValueError, match="1 to 4 versions"): write_freihand(tmp_path / "five", 1, versions=5)


def test_freihand_full_disk(tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(synthetic, "_write_block", full)
    with pytest.raises(OSError, match="the disk is full; free some space") as error:
        write_freihand(tmp_path / "c", 2, 0, SMALL, progress=False)
    assert error.value.errno == errno.ENOSPC


def test_freihand_refuses_other_recipes_and_strangers(folder, tmp_path):
    with pytest.raises(ValueError, match="another recipe"):
        write_freihand(folder, 6, 1, SMALL, evaluation=3, block=2, progress=False)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="not ours"):
        write_freihand(tmp_path, 2, 0, SMALL, progress=False)
    with pytest.raises(ValueError, match="at least one"):
        write_freihand(tmp_path / "d", 0, 0, SMALL, progress=False)
    assert not (tmp_path / "d").exists()

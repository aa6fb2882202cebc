"""S²HAND(V): the sampler, the terms, the camera, the metrics, the recipes and their claims."""
from dataclasses import replace

import pytest
import torch

from handrecon import s2hand
from handrecon.ledger import expected_config
from handrecon.conventions import Observation
from handrecon.proxy_hand import proxy_hand
from handrecon.runs import resolve
from handrecon.s2hand_video_report import CLAIMS, consistency, film_strip, score, truth_as_prediction
from handrecon.s2hand_video import (
    HELD_OUT_SEED, RECIPES, FilmBatches, Films, S2HandVideo, VideoConfig, VideoPrediction, far_camera, load, load_training_films, loss_terms,
    new_network, predict, real_films, save, self_supervised, synthetic_films, training, video_terms)
from handrecon.sequences import WORLDS
from handrecon.training import TrainConfig, fit

SMALL = replace(s2hand.RECIPES["cpu"].model, n_points=0, branch_stacks=0)
WORLD = replace(WORLDS["studio"], frames=8)
TINY = replace(RECIPES["smoke"], start="", fresh_shape=False, world=WORLD, n_train=4, sequences=9, photo=0.4, train=TrainConfig(steps=2, batch_size=9))


@pytest.fixture(scope="module")
def made():
    return synthetic_films(4, 1, WORLD, 64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return S2HandVideo(SMALL, proxy_hand(n_pca=30, flat_hand_mean=False)).eval()


def test_paper_defaults():
    v, paper = VideoConfig(), RECIPES["paper"]
    assert (v.w_quat, v.w_ts, v.motion, v.n, v.interval, v.camera) == (0.05, 0.01, "quaternion", 3, 3, "perspective")
    assert training(paper, 7).batch_size == 63 and training(paper, 7).seed == 7              # m = 64 // 3 sequences of 3
    assert training(replace(paper, video=VideoConfig(n=6)), 0).batch_size == 60
    assert (paper.train.lr, paper.train.factor, paper.model.texture, paper.model.weights) == (2.5e-4, 1 / 3, "face", "imagenet")


@pytest.mark.parametrize("n, interval", [(3, 1), (3, 3), (4, 2)])
def test_sampler_takes_frames_of_one_clip_in_order(n, interval):
    seen = Observation(torch.zeros(40, 3, 4, 4), torch.eye(3).expand(40, 3, 3), torch.zeros(40, 21, 2), torch.zeros(40, 21))
    films = [Films(seen, [(0, 12), (12, 15), (15, 40)]), Films(seen, [(5, 20)])]
    batches = FilmBatches(films, 6, VideoConfig(n=n, interval=interval), seed=3)
    met = set()
    for index in range(60):
        rows = batches.rows_at(index)
        assert len(rows) == 6 and rows == batches.rows_at(index)
        for film, frames in rows:
            assert [b - a for a, b in zip(frames, frames[1:])] == [interval] * (n - 1)
            clip = next((a, b) for a, b in films[film].clips if a <= frames[0] < b)
            assert frames[-1] < clip[1]
            met.add((film, *clip, frames[0]))
    assert len({m[:3] for m in met}) == (4 if (n - 1) * interval < 3 else 3)                 # every clip that is long enough
    assert {0, 12 - (n - 1) * interval - 1} <= {m[3] for m in met if m[:3] == (0, 0, 12)}    # up to both ends


def test_one_camera_a_sequence(made):
    films, truth, _ = made
    batches = FilmBatches([films], 3, VideoConfig(), 0, turn=3.0, zoom=0.2, shift=0.1)
    batch = batches.batch_at(5)
    assert batch.image.shape == (9, 3, 64, 64)
    for s in range(3):
        own = slice(3 * s, 3 * s + 3)
        there = (batch.confidence[own] > 0)
        turned = [torch.atan2(*(batch.keypoints[i, 9] - batch.keypoints[i, 0]).flip(0)) for i in range(3 * s, 3 * s + 3)]
        assert there.any() and len(turned) == 3
    focal = batch.K[:, 0, 0].view(3, 3)
    order = [r for i in sorted(range(3), key=lambda i: batches.rows_at(5)[i][0]) for r in batches.rows_at(5)[i][1]]
    zoom = focal / films.frames.K[order, 0, 0].view(3, 3)
    assert torch.allclose(zoom, zoom[:, :1].expand(-1, 3), atol=1e-4) and zoom[:, 0].std() > 0.005


def test_terms_are_equation_23(made, model):
    seen = made[0].at([0, 3, 6, 8, 11, 14])
    out = model(seen.image, seen.K)
    terms = loss_terms(out, seen, model)
    plain = s2hand.loss_terms(out, seen, model.config)
    assert set(terms) - set(plain) == {"E_quat", "E_TS"} and all(terms[k] == plain[k] for k in plain)
    with pytest.raises(TypeError, match="Observation"):
        loss_terms(out, made[1], model)
    for motion, name in (("temporal", "E_temporal"), ("smooth", "E_smooth")):
        other = S2HandVideo(SMALL, model.hand, VideoConfig(motion=motion, w_ts=0.0))
        assert set(video_terms(out, other)) == {name}
    assert video_terms(out, S2HandVideo(SMALL, model.hand, VideoConfig(motion="none", w_ts=0.0))) == {}


def test_terms_reach_the_weights_and_see_sequences(made, model):
    seen = made[0].at([0, 3, 6])
    code, appearance = model.encoder(seen.image)
    out = model.decode(code, None, seen.K, (64, 64))._replace(appearance=appearance)
    for name, term in video_terms(out, model).items():
        gradients = torch.autograd.grad(term, [p for p in model.encoder.backbone.parameters()], allow_unused=True, retain_graph=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name
    same = made[0].at([0, 0, 0])
    still = model(same.image, same.K)
    assert sum(video_terms(still, model).values()) < 1e-3                                    # one picture thrice: nothing to smooth
    assert sum(video_terms(out, model).values()) > 10 * sum(video_terms(still, model).values())


def test_orthographic_camera_knows_no_K(made, model):
    far = S2HandVideo(SMALL, model.hand, VideoConfig(camera="orthographic")).eval()
    far.load_state_dict(model.state_dict())
    seen = made[0].at([0, 5])
    a, b = far(seen.image, seen.K), far(seen.image, 3 * seen.K)
    assert torch.equal(a.keypoints, b.keypoints) and torch.equal(a.image, b.image)
    local = a.mesh.joints - a.mesh.joints[:, :1]
    scale = far_camera(2, 64, SMALL.canonical_focal)[:, 0, 0, None, None] / a.mesh.joints[:, :1, 2:]
    assert ((local[..., :2] * scale + a.keypoints[:, :1]) - a.keypoints).abs().max() < 0.05   # parallel rays
    with pytest.raises(ValueError, match="canonical_focal"):
        S2HandVideo(replace(SMALL, canonical_focal=0.0), model.hand, VideoConfig(camera="orthographic"))


def test_consistency_of_known_motions(made):
    films, truth, rotation = made
    perfect = truth_as_prediction(films, truth, rotation)
    said = consistency(perfect, films.clips, truth.joints)
    assert said["ACC-ERR"] == 0 and said["shape S.D."] < 1e-6 and said["texture S.D."] == 0 and 0 < said["quaternion loss"] < 0.03
    noise = 0.002 * torch.randn(truth.joints.shape, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = 0
    shaky = consistency(perfect._replace(joints=truth.joints + noise), films.clips, truth.joints)
    expected = 2 * (6 * 2 / 3.14159) ** 0.5 * 2 * 20 / 21                                    # |Δ² of white noise|: σ √6 · mean of a 3D Gaussian's length
    assert abs(shaky["ACC-ERR"] - expected) < 0.1 * expected
    moved = consistency(perfect._replace(joints=truth.joints + torch.randn(len(truth.joints), 1, 3)), films.clips, truth.joints)
    assert moved["ACC-ERR"] < 1e-3                                                           # seen from the wrist
    two = VideoPrediction(*(x[:14] if k < 6 else x for k, x in enumerate(perfect)))._replace(shape=torch.arange(14.0)[:, None].expand(-1, 10))
    assert abs(consistency(two, [(0, 7), (7, 14)])["shape S.D."] - 2.0) < 1e-6               # within clips, not across


def test_frames_are_answered_alone(made, model):
    films = made[0]
    said = predict(model, films, batch_size=5)
    backwards = Films(Observation(*(getattr(films.frames, f).flip(0) for f in Observation.__dataclass_fields__)), films.clips)
    assert torch.allclose(said.joints, predict(model, backwards, batch_size=7).joints.flip(0), atol=1e-4)
    row = score(said, films.clips, made[1])
    assert {"PA-MPJPE", "PA-MPVPE", "ACC", "ACC-ERR", "texture S.D.", "shape S.D.", "quaternion loss"} <= set(row)


def test_training_runs_resumes_and_is_loaded_again(made, tmp_path):
    films = [made[0]]
    network = new_network(TINY, 0)
    log = fit(network, *self_supervised(TINY, films, 0), training(TINY, 0), progress=False)
    assert {"E_loc", "E_ori", "E_pixel", "E_quat", "E_TS"} <= set(log.names)
    again = new_network(TINY, 0)
    fit(again, *self_supervised(TINY, films, 0), training(TINY, 0), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
    save(tmp_path / "net.safetensors", network)
    loaded = load(tmp_path / "net.safetensors")
    assert loaded.video == network.video and torch.equal(predict(loaded, made[0]).joints, predict(network, made[0]).joints)
    assert film_strip({"net": loaded}, made[0]).ndim == 3


def test_starts(tmp_path):
    ledger = RECIPES["ledger"]
    shipped, fresh = new_network(replace(ledger, fresh_shape=False), 0), new_network(ledger, 0)
    for (name, a), b in zip(shipped.state_dict().items(), fresh.state_dict().values()):
        if not name.startswith("encoder.geometry.shape."): assert torch.equal(a, b), name
    assert not torch.equal(shipped.encoder.geometry.shape[0].weight, fresh.encoder.geometry.shape[0].weight)
    with pytest.raises(ValueError, match="image_size is 128"):
        new_network(replace(ledger, model=replace(ledger.model, image_size=128)), 0)
    with pytest.raises(ValueError, match="no such file"):
        new_network(replace(ledger, start=str(tmp_path / "absent.safetensors")), 0)


def test_extra_videos_need_the_orthographic_camera():
    wild = replace(TINY, n_train=1, extra="wild", n_extra=1)
    with pytest.raises(ValueError, match="video.camera=orthographic"):
        load_training_films("synthetic", "", wild, 0)
    films = load_training_films("synthetic", "", replace(wild, video=VideoConfig(camera="orthographic")), 0)
    assert [len(f.clips) for f in films] == [1, 1]
    with pytest.raises(ValueError, match="expected wild, yt3d:FOLDER or own:FOLDER"):
        load_training_films("synthetic", "", replace(wild, extra="elsewhere"), 0)
    with pytest.raises(ValueError, match="intrinsics"):
        load_training_films("yt3d", "", TINY, 0)


def test_own_videos_become_films(tmp_path):
    import cv2
    import numpy as np

    from handrecon.keypoints import Detections, write_openpose
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 96))
    for i in range(16): writer.write(np.full((96, 96, 3), 10 * i, np.uint8))
    writer.release()
    xy = torch.rand(21, 2, generator=torch.Generator().manual_seed(0)) * 30 + 30
    con = torch.ones(16, 21)
    con[8] = 0
    write_openpose(tmp_path / "det", Detections([f"clip_{i:012d}" for i in range(16)], torch.stack([xy + i for i in range(16)]), con, ["right"] * 16))
    films = real_films("own", tmp_path / "clip.mp4", 32, detections=tmp_path / "det")
    assert films.clips == [(0, 8), (8, 15)] and len(films) == 15
    batch = FilmBatches([films], 2, VideoConfig(), 0).batch_at(0)
    assert batch.image.shape == (6, 3, 32, 32) and (batch.confidence > 0).all()


@pytest.mark.parametrize("wrong, words", [
    (dict(motion="slerp"), "expected one of quaternion, temporal, smooth, none"), (dict(camera="fisheye"), "perspective or orthographic"),
    (dict(n=2), "n >= 3"), (dict(interval=0), "interval >= 1")])
def test_bad_settings(wrong, words):
    with pytest.raises(ValueError, match=words):
        VideoConfig(**wrong)


def test_clips_too_short():
    seen = Observation(torch.zeros(9, 3, 4, 4), torch.eye(3).expand(9, 3, 3), torch.zeros(9, 21, 2), torch.zeros(9, 21))
    with pytest.raises(ValueError, match="need clips of 13 frames, the longest has 9"):
        FilmBatches([Films(seen, [(0, 9)])], 4, VideoConfig(interval=6))
    with pytest.raises(ValueError, match="at least one clip"):
        Films(seen, [])


def test_claims_can_be_run():
    assert len({c.id for c in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        names = {run.name for run in claim.runs}
        assert {address.partition(":")[0] for address in claim.ours.values()} <= names
        for run in claim.runs:
            assert resolve("s2hand_video", run.profile, run.overrides).start == "s2hand"
            assert expected_config(claim, run, 0)["hash"] != expected_config(claim, run, 1)["hash"]
    assert HELD_OUT_SEED > 10**6


def test_averaging_over_time_calms_and_a_narrow_average_changes_nothing(model, made):
    films = made[0]
    said, narrow, wide = predict(model, films), predict(model, films, sigma=1e-3), predict(model, films, sigma=1.5)
    for field in ("joints", "vertices", "shape", "lit"): assert (getattr(narrow, field) - getattr(said, field)).abs().max() < 2e-5, field
    assert (narrow.keypoints - said.keypoints).abs().max() < 0.01
    assert consistency(wide, films.clips)["ACC"] < 0.5 * consistency(said, films.clips)["ACC"]
    bones = lambda p: (p.joints[:, 1] - p.joints[:, 0]).norm(dim=-1)
    assert (bones(wide) / bones(said) - 1).abs().max() < 0.1                                   # rotations were averaged, not points


def test_averaging_keeps_to_a_clip(model, made):
    films = made[0]
    halves = Films(films.frames, [(a, (a + b) // 2) for a, b in films.clips] + [((a + b) // 2, b) for a, b in films.clips])
    a, T = films.clips[0][0], (films.clips[0][1] - films.clips[0][0]) // 2
    alone = Films(films.at(range(a, a + T)), [(0, T)])
    assert torch.allclose(predict(model, halves, sigma=2.0).joints[a:a + T], predict(model, alone, sigma=2.0).joints, atol=1e-5)
    assert not torch.allclose(predict(model, films, sigma=2.0).joints[a:a + T], predict(model, alone, sigma=2.0).joints, atol=1e-5)

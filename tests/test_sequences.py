"""Films of synthetic hands: what stays, what moves, what is measured anew."""
from dataclasses import replace

import pytest
import torch

from handrecon.camera import project
from handrecon.conventions import joint_limits
from handrecon.rotation import axis_angle_to_quaternion, quaternion_angle
from handrecon.sequences import (
    WORLDS, SequenceConfig, average_rotations, continuous_clips, make_sequences, progress, sample_motion, schedule, smooth_in_time)
from handrecon.temporal import detour, hand_quaternions

SMALL = replace(WORLDS["studio"], frames=10, pictures=replace(WORLDS["studio"].pictures, image_size=32))


@pytest.fixture(scope="module")
def films():
    return make_sequences(5, 3, SMALL)


def by_film(x):
    return x.unflatten(0, (5, 10))


def test_same_seed_same_bits_other_seed_other_film(films):
    again, other = make_sequences(5, 3, SMALL), make_sequences(5, 4, SMALL)
    for name in ("image", "K", "keypoints", "confidence"):
        assert torch.equal(getattr(films.observation, name), getattr(again.observation, name))
    assert not torch.equal(films.observation.image, other.observation.image)


def test_shapes_and_ranges(films):
    seen, truth = films.observation, films.truth
    assert seen.image.shape == (50, 3, 32, 32) and 0 <= seen.image.min() and seen.image.max() <= 1
    assert truth.mask.shape == (50, 32, 32) and films.rotation.shape == (50, 3, 3) and films.frames == 10
    assert torch.allclose(project(truth.joints, seen.K), truth.keypoints, atol=1e-3)
    assert truth.mask.flatten(1).sum(1).min() > 20                           # a hand in every frame
    low, high = (x.flatten() for x in joint_limits().unbind(-1))
    assert (truth.pose >= low - 0.02).all() and (truth.pose <= high + 0.02).all()


def test_person_and_room_stay(films):
    shape = by_film(films.truth.shape)
    assert (shape == shape[:, :1]).all() and not torch.equal(shape[0], shape[1])
    image, mask = films.observation.image, (films.truth.mask > 0.9).float()
    colour = by_film((image * mask[:, None]).sum((2, 3)) / mask.sum((1, 2)).clamp(min=1)[:, None])
    assert colour.std(1).mean() < 0.6 * colour.mean(1).std(0).mean()


def test_motion_is_smooth_and_the_detector_is_not(films):
    bend = lambda x: (x[:, :-2] - 2 * x[:, 1:-1] + x[:, 2:]).norm(dim=-1).median()
    assert bend(by_film(films.observation.keypoints)) > 2 * bend(by_film(films.truth.keypoints))


def test_sensor_noise_is_new_in_every_frame():
    still = replace(SMALL, turn=0.0, travel=0.0, move=(1e6, 1e6), lag=0.0,
                    pictures=replace(SMALL.pictures, sensor_noise=0.2, blur=0.0))
    films = make_sequences(3, 1, still)
    a, b = films.observation.image.unflatten(0, (3, 10))[:, [2, 6]].unbind(1)
    assert (films.truth.joints.unflatten(0, (3, 10))[:, 2] - films.truth.joints.unflatten(0, (3, 10))[:, 6]).abs().max() < 1e-5
    assert (a != b).float().mean() > 0.3 and (a - b).abs().median() < 0.1


def test_rotation_is_the_whole_hands(films):
    from handrecon.proxy_hand import proxy_hand
    from handrecon.rotation import matrix_to_axis_angle
    rest = proxy_hand()(films.truth.pose, films.truth.shape, matrix_to_axis_angle(films.rotation))
    centred = lambda x: x - x[:, :1]
    assert torch.allclose(centred(rest.joints), centred(films.truth.joints), atol=1e-4)


def test_a_move_is_one_axis_and_truth_hardly_detours():
    g = torch.Generator().manual_seed(0)
    motion = sample_motion(40, g, replace(SMALL, frames=30))
    q = hand_quaternions(motion.pose, motion.rotation)
    windows = torch.stack([q[:, i:i + 7:3] for i in range(24)], 1)
    assert 0 < detour(windows).mean() < 0.01
    steps = quaternion_angle(q[:, 1:], q[:, :-1])
    assert steps.max() < 0.6 and steps.mean() > 0.005                        # no leaps, no statues


def test_schedule_holds_and_never_goes_back():
    g = torch.Generator().manual_seed(1)
    config = replace(SMALL, pause=1.0)
    start, move = schedule(20, g, config, 6)
    number, phi = progress(torch.arange(40.0)[None, :, None].expand(20, -1, 1), start, move)
    way = number + phi
    assert (way[:, 1:] >= way[:, :-1] - 1e-6).all() and ((way[:, 1:] - way[:, :-1]) == 0).float().mean() > 0.1


def test_smoothing_keeps_constants_and_length():
    x = torch.full((2, 9, 3), 4.0)
    assert torch.allclose(smooth_in_time(x, 2.0), x)
    spike = torch.zeros(1, 21, 1)
    spike[0, 10] = 1
    assert torch.isclose(smooth_in_time(spike, 1.5).sum(), torch.tensor(1.0)) and smooth_in_time(spike, 1.5).max() < 0.3


def test_worlds_differ():
    studio, wild = (make_sequences(6, 2, replace(WORLDS[name], frames=8, pictures=replace(WORLDS[name].pictures, image_size=32))) for name in ("studio", "wild"))
    focal = lambda films: (films.observation.K[:, 0, 0] / 32).median()
    speed = lambda films: (lambda p: (p[:, 1:] - p[:, :-1]).norm(dim=-1).mean())(films.truth.pose.unflatten(0, (6, 8)))
    assert focal(wild) < 0.85 * focal(studio) and speed(wild) > speed(studio)


def test_continuous_clips():
    xy = torch.rand(30, 21, 2, generator=torch.Generator().manual_seed(0)) * 50
    xy[12:] += 200                                                           # a cut
    xy[20:] = (xy[20:] - 200) * 2 + 200                                      # a zoom
    con = torch.ones(30, 21)
    con[4:6, :15] = 0                                                        # too few joints
    assert continuous_clips(xy * 0 + xy.mean(0, keepdim=True), con, shortest=2) == [(0, 4), (6, 30)]
    still = xy[:1].expand(30, -1, -1).clone()
    still[12:] += 200
    still[20:] = (still[20:] - 225) * 2 + 225
    assert continuous_clips(still, con, shortest=2) == [(0, 4), (6, 12), (12, 20), (20, 30)]
    assert continuous_clips(still, con, shortest=7) == [(12, 20), (20, 30)]
    number = torch.arange(30) + 5 * (torch.arange(30) >= 25)
    assert continuous_clips(still, con, number, shortest=2)[-2:] == [(20, 25), (25, 30)]
    assert continuous_clips(still[:0], con[:0]) == []


@pytest.mark.parametrize("wrong, words", [
    (lambda: SequenceConfig(frames=2), "frames: expected at least 3"), (lambda: SequenceConfig(move=(3.0, 2.0)), "move: expected 0 < low <= high"),
    (lambda: make_sequences(0, 1), "at least one film")])
def test_mistakes(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_averaged_rotations_do_not_know_signs_and_stay_on_a_steady_axis():
    axis, angle = torch.tensor([0.0, 0.6, 0.8]), torch.linspace(-1, 2, 40)
    q = axis_angle_to_quaternion(angle[None, :, None] * axis)
    signs = torch.where(torch.rand(1, 40, 1, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    calm = average_rotations(q * signs, 2.0)
    assert (calm.norm(dim=-1) - 1).abs().max() < 1e-6
    assert quaternion_angle(calm, q)[:, 6:-6].max() < 2e-3                                     # the middle of a steady turn is its own average
    assert (calm[..., 1:] - (calm[..., 1:] @ axis)[..., None] * axis).abs().max() < 1e-6       # on the axis everywhere

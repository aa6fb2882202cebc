"""Detection files, and a simulated detector whose statistics are its documented parameters."""
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from handrecon.keypoints import (Detections, DetectorNoise, finger_crowding, read_detections, read_openpose,
                                 read_s2hand_detections, simulate_detections, write_openpose, write_s2hand_detections)

FORMATS = Path(__file__).parent / "goldens" / "formats"


def detections(n=3, seed=0, side="right"):
    g = torch.Generator().manual_seed(seed)
    xy, confidence = torch.rand(n, 21, 2, generator=g) * 500, torch.rand(n, 21, generator=g)
    lost = torch.rand(n, 21, generator=g) < 0.1
    xy[lost], confidence[lost] = 0, 0
    return Detections([f"{i:08d}.jpg" for i in range(n)], xy, confidence, [side] * n if side else None)


# files -------------------------------------------------------------------------------------------

def test_s2hand_file_to_the_byte(tmp_path):
    golden = FORMATS / "s2hand_detect.json"
    write_s2hand_detections(tmp_path / "out.json", read_s2hand_detections(golden))
    assert (tmp_path / "out.json").read_bytes() == golden.read_bytes()


def test_openpose_file_to_the_byte(tmp_path):
    golden = FORMATS / "openpose_keypoints.json"
    found = read_openpose(golden)
    assert found.side == ["right"] and found.names == ["openpose"]
    [path] = write_openpose(tmp_path, found)
    assert path.name == golden.name and path.read_bytes() == golden.read_bytes()


def test_the_two_goldens_are_the_same_hand():
    a, b = read_detections(FORMATS / "s2hand_detect.json"), read_detections(FORMATS / "openpose_keypoints.json")
    assert torch.equal(a.xy, b.xy.round()) and torch.equal(a.confidence, b.confidence)


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.float32, (2, 21), elements=st.floats(0, 1.5, width=32)), hnp.arrays(np.float32, (2, 21, 2), elements=st.floats(-10, 5000, width=32)))
def test_round_trips(tmp_path_factory, confidence, xy):
    folder = tmp_path_factory.mktemp("files")
    confidence[:, 0] = 0.5  # a hand without any joint is no hand
    hands = Detections(["a.png", "b.png"], torch.from_numpy(xy), torch.from_numpy(confidence), ["left", "right"])
    write_openpose(folder, hands)
    again = read_detections(folder)
    assert torch.equal(again.xy, hands.xy) and torch.equal(again.confidence, hands.confidence) and again.side == hands.side
    write_s2hand_detections(folder / "s2hand.json", hands)
    again = read_detections(folder / "s2hand.json")
    assert torch.equal(again.xy, hands.xy.round()) and torch.equal(again.confidence, hands.confidence) and again.side is None


def test_openpose_people_hands_and_empty_frames(tmp_path):
    four = detections(4)
    many = Detections(["a", "a", "a", "b"], four.xy, torch.cat([four.confidence[:3], torch.zeros(1, 21)]), ["left", "right", "right", ""])
    many.xy[3] = 0
    write_openpose(tmp_path, many)
    people = json.loads((tmp_path / "a_keypoints.json").read_text())["people"]
    assert len(people) == 2 and json.loads((tmp_path / "b_keypoints.json").read_text())["people"] == []
    again = read_openpose(tmp_path)
    assert again.names == ["a", "a", "a", "b"] and again.side == ["left", "right", "right", ""]
    assert again.found.tolist() == [True, True, True, False]
    assert again.select(again.found).names == ["a", "a", "a"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "[[], [], [1]]", "{}", '{"people": 3}', '{"people": [{"hand_left_keypoints_2d": [1, 2]}]}', '[[[1]], [[1]], [["a"]]]',
                                  '[[[[1, 2]]], [[[0.5]]], [["a"]]]', "null", "1e999", '{"people": [[]]}', "[" * 5000,
                                  '{"people": [{"hand_right_keypoints_2d": ["x"]}]}', '{"people": [{"hand_right_keypoints_2d": {"a": 1}}]}',
                                  json.dumps({"people": [{"hand_right_keypoints_2d": [float("nan")] * 62 + [1.0]}]}),
                                  json.dumps([[[[0, 0]] * 21], [[[-1.0]] * 21], [["a"]]]), json.dumps([[[[0, 0]] * 21] * 2, [[[1.0]] * 21], [["a"]]])])
def test_bad_files_are_told_in_one_sentence(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_detections(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_binary_missing_and_empty(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="x.json"):
        read_detections(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_detections(tmp_path / "nowhere.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        read_detections(tmp_path / "empty")


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def fail(*_): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_s2hand_detections(tmp_path / "out.json", detections())
    assert list(tmp_path.iterdir()) == []


def test_validation():
    good = detections()
    for change, words in [({"xy": good.xy[:, :20]}, "xy of shape"), ({"confidence": good.confidence[:2]}, "confidence of shape"), ({"confidence": -good.confidence}, "at least 0"),
                          ({"xy": good.xy * torch.nan}, "finite"), ({"side": ["right"]}, "side"), ({"side": ["up"] * 3}, "side")]:
        with pytest.raises(ValueError, match=words):
            replace(good, **change)
    with pytest.raises(ValueError, match="side"):
        write_openpose("unused", detections(side=None))
    assert len(detections(0)) == 0


# the simulated detector --------------------------------------------------------------------------

N, S = 6000, 100.0
BARE = DetectorNoise(contact=0.0, swap=0.0, swap_contact=0.0, outlier=0.0, missing=0.0, missing_occluded=0.0)


def hand():
    "A spread hand: no two fingers near each other."
    angle = torch.tensor([-1.2, -0.6, -0.1, 0.4, 0.9])[:, None]
    reach = torch.tensor([0.4, 0.6, 0.8, 1.0])
    points = torch.stack([reach * angle.sin(), -reach * angle.cos()], -1).reshape(20, 2) * 100
    return torch.cat([torch.zeros(1, 2), points]) + 110


def simulate(noise, visible=1.0, points=None, seed=0, **more):
    points = (hand() if points is None else points).expand(N, -1, -1)
    xy, c = simulate_detections(points, torch.full((N, 21), visible), torch.full((N,), S), seed, noise, **more)
    return xy, c, (xy - points).norm(dim=-1)


def std(noise, **more):
    return (simulate(noise, **more)[0] - hand()).std().item() / S


def test_error_in_sight_hidden_blurred():
    assert std(BARE) == pytest.approx(BARE.sigma, rel=0.02)
    assert std(BARE, visible=0.0) == pytest.approx(BARE.sigma * BARE.occluded, rel=0.02)
    expected = np.hypot(BARE.sigma, BARE.blur * 8 / S)
    assert std(BARE, blur_px=torch.full((N,), 8.0)) == pytest.approx(expected, rel=0.02)


def test_contact_makes_worse():
    touching = hand()
    touching[12] = touching[8]  # middle finger's tip on the index finger's
    noise = replace(BARE, contact=2.0)
    xy, _, _ = simulate(noise, points=touching)
    spread = (xy - touching).std(dim=(0, 2)) / S
    assert spread[12] == pytest.approx(3 * BARE.sigma, rel=0.05)
    assert spread[20] == pytest.approx(BARE.sigma, rel=0.05)
    crowd = finger_crowding(touching[None], torch.tensor([4.0]))[0]
    assert crowd[8] == 1 and crowd[12] == 1 and crowd[0] == 0 and crowd[20] < 0.01


@pytest.mark.parametrize("visible, rate", [(1.0, 0.05), (0.0, 0.3), (0.5, 0.175)])
def test_missing_joints(visible, rate):
    xy, c, _ = simulate(replace(BARE, missing=0.05, missing_occluded=0.3), visible)
    assert (c == 0).float().mean().item() == pytest.approx(rate, rel=0.05)
    assert torch.equal(xy[c == 0], torch.zeros(int((c == 0).sum()), 2)) and (c[xy.abs().sum(-1) > 0] > 0).all()


def test_swapped_fingers():
    noise = replace(BARE, sigma=1e-4, swap=0.2)
    xy, _, error = simulate(noise)
    nearest = torch.cdist(xy, hand().expand(N, -1, -1)).argmin(-1)
    assert torch.equal(nearest.sort(1).values, torch.arange(21).expand(N, -1))            # a permutation
    assert torch.equal(nearest[:, [0, 1, 2, 3, 4, 5, 9, 13, 17]], torch.tensor([0, 1, 2, 3, 4, 5, 9, 13, 17]).expand(N, -1))
    finger = lambda joint: (nearest[:, joint] - 5) // 4
    assert torch.equal(finger(6), finger(8))                                             # PIP to tip together
    assert (finger(8) == 1).float().mean().item() == pytest.approx(0.2, rel=0.1)   # the middle finger in the index finger's place
    close = hand()
    close[9:13] = close[5:9] + 1.0
    _, _, error = simulate(replace(noise, swap=0.0, swap_contact=0.5), points=close)
    assert 0.3 < (error[:, 8] > 1).float().mean() < 0.5


def test_outliers_lie_in_the_box():
    xy, _, error = simulate(replace(BARE, sigma=1e-5, outlier=0.1))
    out = error > 0.1
    assert out.float().mean().item() == pytest.approx(0.1, rel=0.05)
    assert (xy[out] >= hand().amin(0) - 0.1).all() and (xy[out] <= hand().amax(0) + 0.1).all()


def rank_correlation(a, b):
    return torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1].item()


def test_confidence_falls_with_error():
    for knowledge, low, high in [(1.0, -1.0, -0.45), (0.0, -0.05, 0.05)]:
        _, c, error = simulate(replace(BARE, self_knowledge=knowledge))
        assert low < rank_correlation(c.flatten(), error.flatten()) < high
    _, clear, _ = simulate(BARE)
    _, hidden, _ = simulate(BARE, 0.0)
    assert clear.median() > 1.3 * hidden.median()
    assert 0 <= hidden.min() and clear.max() <= 1
    quiet = replace(BARE, confidence_jitter=0.0)
    _, c, error = simulate(quiet)
    expected = torch.exp(-(quiet.self_knowledge * error + (1 - quiet.self_knowledge) * quiet.sigma * S * (torch.pi / 2) ** 0.5) / (S * quiet.confidence_scale))
    assert torch.allclose(c, expected, atol=1e-5)


def test_same_seed_same_detections():
    a, b, c = simulate(DetectorNoise(), seed=1), simulate(DetectorNoise(), seed=1), simulate(DetectorNoise(), seed=2)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])

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

from handrecon.keypoints import (FAINTEST_HAND, Detections, DetectorNoise, check_pixels, finger_crowding, read_detections, read_openpose,
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


# the faults of real files --------------------------------------------------------------------------

XY = [[10.0 * i + 40, 5.0 * i + 60] for i in range(21)]
FLAT = [v for x, y in XY for v in (x, y, 0.9)]
ZEROS, SCORES = [0.0] * 63, [0.9] * 21


def written(path, content, encoding="utf-8"):
    path.write_text(json.dumps(content), encoding=encoding)
    return path


def openpose(**person):
    return {"version": 1.1, "people": [{"pose_keypoints_2d": [1.0, 2.0, 0.9] * 25, **person}]}


@pytest.mark.parametrize("suffix", ["", "_2d"])
def test_both_spellings_of_openpose(tmp_path, suffix):
    file = written(tmp_path / "hand_keypoints.json", openpose(**{f"hand_left_keypoints{suffix}": FLAT, f"hand_right_keypoints{suffix}": ZEROS}))
    found = read_detections(file)
    assert found.side == ["left"] and found.found.all() and torch.equal(found.xy[0], torch.tensor(XY)) and not found.notes


def test_a_body_alone_and_nobody_are_told_apart(tmp_path):
    body = written(tmp_path / "a_keypoints.json", openpose(hand_left_keypoints_2d=[], hand_right_keypoints_2d=[]))
    with pytest.warns(UserWarning, match="a_keypoints.json: a person without hand key points .was OpenPose run with --hand?"):
        assert not read_detections(body).found.any()
    nobody = written(tmp_path / "b_keypoints.json", {"people": []})
    with pytest.warns(UserWarning, match="b_keypoints.json: nobody was found"):
        assert read_detections(nobody).names == ["b"]
    with pytest.warns(UserWarning, match="without hand key points .*, in 1 of 2 pictures, the first is a"):
        assert len(read_detections(tmp_path).notes) == 2


def test_an_empty_frame_among_others_is_noted_but_no_warning(tmp_path, recwarn):
    written(tmp_path / "a_0_keypoints.json", openpose(hand_right_keypoints_2d=FLAT))
    written(tmp_path / "a_1_keypoints.json", {"people": []})
    found = read_detections(tmp_path)
    assert found.found.tolist() == [True, False] and "nobody was found, in 1 of 2 pictures, the first is a_1" in found.notes[0] and not recwarn.list


@pytest.mark.parametrize("confidence, seen", [(0.035, False), (0.09, False), (0.11, True), (0.5, True)])
def test_hopeless_confidence_is_no_hand(tmp_path, confidence, seen):
    numbers = [v for x, y in XY for v in (x, y, confidence)]
    file = written(tmp_path / "x_keypoints.json", openpose(hand_right_keypoints_2d=numbers))
    if seen: assert read_detections(file).found.all()
    else:
        with pytest.warns(UserWarning, match=f"hopeless confidence, below {FAINTEST_HAND}"):
            found = read_detections(file)
        assert not found.found.any() and torch.equal(found.xy[0], torch.tensor(XY))      # the row stays what it was
    few = Detections(["a"], torch.ones(1, 21, 2), torch.tensor([[0.9] * 3 + [0.0] * 18]))
    assert few.found.all()                                                               # a hand at the picture's edge: few joints, well seen


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path, encoding):
    assert read_detections(written(tmp_path / "a.json", openpose(hand_right_keypoints_2d=FLAT), encoding)).found.all()
    assert len(read_detections(written(tmp_path / "b.json", [[XY], [[[0.5]] * 21], [["a.jpg"]]], encoding))) == 1


def test_windows_names_and_hidden_companions(tmp_path):
    assert read_detections(written(tmp_path / "d.json", [[XY], [[[0.5]] * 21], [["imgs\\hand.jpg"]]])).names == ["imgs/hand.jpg"]
    folder = tmp_path / "f"
    folder.mkdir()
    written(folder / "a_keypoints.json", openpose(hand_right_keypoints_2d=FLAT))
    (folder / "._a_keypoints.json").write_bytes(b"\x00\x05\x16\x07")
    for read in (read_openpose, read_detections): assert read(folder).names == ["a"]


HALPE, WHOLE = [0.0] * 3 * 94 + ZEROS + FLAT, [0.0] * 3 * 91 + ZEROS + FLAT
FOREIGN = {
    "mmpose picture": ([{"keypoints": XY, "keypoint_scores": SCORES, "bbox": [[0, 0, 1, 1]]}], "clip", ""),
    "mmpose nested": ([{"keypoints": [XY], "keypoint_scores": [SCORES]}], "clip", ""),
    "mmpose film": ({"meta_info": {}, "instance_info": [{"frame_id": 1, "instances": [{"keypoints": XY, "keypoint_scores": SCORES}]}]}, "clip_000000000000", ""),
    "mmpose inferencer": ([{"frame_id": 0, "instances": [{"keypoints": XY, "keypoint_scores": SCORES}]}], "clip_000000000000", ""),
    "wholebody results": ([{"image_id": 7, "keypoints": [0.0] * 51, "lefthand_kpts": ZEROS, "righthand_kpts": FLAT}], "000000000007", "right"),
    "133 pairs": ([{"keypoints": [[0.0, 0.0]] * 112 + XY, "keypoint_scores": [0.0] * 112 + SCORES}], "clip", "right"),
    "133 flat": ([{"image_id": "x/a.jpg", "keypoints": WHOLE}], "x/a.jpg", "right"),
    "halpe": ([{"image_id": "a.jpg", "keypoints": HALPE}], "a.jpg", "right"),
    "mediapipe tasks": ({"landmarks": [[{"x": x / 640, "y": y / 480, "z": 0.0} for x, y in XY]], "handedness": [[{"score": 0.9, "categoryName": "Right"}]]}, "clip", "right"),
    "mediapipe solutions": ({"multi_hand_landmarks": [{"landmark": [{"x": x / 640, "y": y / 480} for x, y in XY]}],
                             "multi_handedness": [{"classification": [{"label": "Left", "score": 0.9}]}]}, "clip", "right"),
    "mediapipe list": ([[{"x": x / 640, "y": y / 480} for x, y in XY]], "clip", ""),
    "openpose frames": ([openpose(hand_right_keypoints_2d=FLAT)], "clip_000000000000", "right"),
    "cmu": ({"hand_pts": [[x, y, 1] for x, y in XY], "is_left": 1.0}, "clip", "left"),
    "coco annotations": ({"images": [{"id": 3, "file_name": "imgs\\a.jpg"}], "annotations": [{"image_id": 3, "keypoints": [v for x, y in XY for v in (x, y, 2)]}]}, "imgs/a.jpg", ""),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_foreign_forms_by_content(tmp_path, form):
    content, name, side = FOREIGN[form]
    found = read_detections(written(tmp_path / "clip.json", content), size=(640, 480))
    assert found.names == [name] and found.side == [side] and found.found.all() and (found.confidence <= 1).all()
    assert torch.allclose(found.xy[0], torch.tensor(XY), atol=1e-3)


def test_mediapipe_needs_the_pictures_size(tmp_path):
    with pytest.raises(ValueError, match="clip.json: MediaPipe's landmarks are fractions of the picture; read them with its size"):
        read_detections(written(tmp_path / "clip.json", FOREIGN["mediapipe list"][0]))


@pytest.mark.parametrize("content", [[{"keypoints": 3}], [{"keypoints": []}], [{"keypoints": ["a"]}], {"annotations": [{}]}, [{"instances": 3}], [{"keypoints": XY, "keypoint_scores": [1]}],
                                     [{"x": 1}], {"landmarks": 3}, {"instance_info": [3]}, {"hand_pts": {"a": 1}}, [{"keypoints": [[]]}]])
def test_damaged_foreign_forms_in_one_sentence(tmp_path, content):
    file = written(tmp_path / "x.json", content)
    try: found = read_detections(file)
    except ValueError as error: assert str(file) in str(error) and "\n" not in str(error)
    else: assert not found.found.any()


# are these pixels? ---------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(640, 480), (1920, 1080), (480, 640), (1000, 400)]))
def test_a_hand_in_its_picture_passes_and_in_other_units_is_refused(seed, picture):
    g, size = torch.Generator().manual_seed(seed), torch.tensor(picture, dtype=torch.float32)
    middle, radius = (0.3 + 0.4 * torch.rand(2, generator=g)) * size, 0.1 + 0.15 * torch.rand(1, generator=g)
    xy = (middle + radius * size.min() * (2 * torch.rand(1, 21, 2, generator=g) - 1))
    hand = Detections(["a"], xy, torch.rand(1, 21, generator=g) * 0.5 + 0.5)
    check_pixels(hand, *picture)
    for wrong in (xy / size, 2 * xy / size - 1, 100 * xy / size, 0 * xy, 0 * xy + 7, xy * 1000, xy - 3 * size):
        with pytest.raises(ValueError):
            check_pixels(replace(hand, xy=wrong), *picture)
    for wrong in (xy / size, 2 * xy / size - 1, 0 * xy):
        with pytest.raises(ValueError):
            check_pixels(replace(hand, xy=wrong))                       # even without the picture's size


def test_exchanged_axes_are_named():
    hand = Detections(["a"], torch.tensor([[[700.0 + 5 * i, 100.0 + 3 * i] for i in range(21)]]), torch.ones(1, 21))
    check_pixels(hand, 1000, 400)
    with pytest.raises(ValueError, match="x and y exchanged"):
        check_pixels(replace(hand, xy=hand.xy.flip(-1)), 1000, 400)


def test_a_small_hand_in_the_corner_of_a_small_picture_is_only_doubted():
    hand = Detections(["a"], torch.tensor(XY)[None] * 0.3, torch.ones(1, 21))
    with pytest.warns(UserWarning, match="per cent of its size"):
        check_pixels(hand, 224, 224)
    check_pixels(Detections([], torch.zeros(0, 21, 2), torch.zeros(0, 21)), 224, 224)


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

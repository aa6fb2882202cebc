"""From found hands to result files: conventions, choices, empty results."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from handrecon import every_hand
from handrecon.every_hand import Finder, as_hand_3d, choose_finder, draw_found, reconstruct_every_hand
from handrecon.multihand import RECIPES, FoundHand, MultiHand, save
from handrecon.proxy_hand import proxy_hand, sample_poses
from handrecon.reconstruct import InputError
from handrecon.viz import save_picture

K = torch.tensor([[200.0, 0, 64], [0, 200, 48], [0, 0, 1]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MultiHand(replace(RECIPES["smoke"].model, weights="", channels=32, head=64)).eval()


@pytest.fixture
def photo(tmp_path):
    save_picture(tmp_path / "photo.png", np.full((96, 128, 3), 120, np.uint8))
    return tmp_path / "photo.png"


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_formula_for_both_sides(model, side):
    g = torch.Generator().manual_seed(3)
    pose, shape, rotation, place = sample_poses(1, g, side=side), torch.randn(1, 10, generator=g), torch.randn(1, 3, generator=g), torch.tensor([[0.05, -0.02, 0.6]])
    mesh = proxy_hand(side)(pose, shape, rotation, place)
    found = FoundHand(0.7, side, 0.9, torch.zeros(4), torch.zeros(21, 2), mesh.joints[0], mesh.vertices[0], pose[0], shape[0], rotation[0])
    hand = as_hand_3d(found, K, model)
    again = proxy_hand()(hand.pose[None], hand.shape[None], hand.rotation[None], hand.translation[None]).vertices[0]
    assert torch.allclose(again * torch.tensor([-1.0 if side == "left" else 1, 1, 1]), mesh.vertices[0], atol=1e-5)
    assert (hand.side, hand.score, hand.scale) == (side, 0.7, 1.0)


def test_files_and_an_empty_result(model, photo, tmp_path):
    (some,) = reconstruct_every_hand([photo], tmp_path / "some", Finder(model, min_score=0.0, max_hands=2), progress=False)
    assert 1 <= some.hands <= 2
    names = {p.name for p in (tmp_path / "some").iterdir()}
    assert {"hands.json", "photo.glb", "photo.npz", "photo.overlay.png"} <= names
    (none,) = reconstruct_every_hand([photo], tmp_path / "none", Finder(model, min_score=0.999), progress=False)
    assert none.hands == 0 and json.loads((tmp_path / "none/hands.json").read_text())["hands"] == []
    assert (tmp_path / "none/photo.overlay.png").exists()


def test_nothing_is_drawn_where_nothing_was_found(model):
    picture = np.full((64, 64, 3), 50, np.uint8)
    assert (draw_found(picture, [], Finder(model)) == picture).all()


def test_who_looks(model, photo, tmp_path, monkeypatch):
    save(tmp_path / "net.safetensors", model)
    chosen = choose_finder([photo], checkpoint=tmp_path / "net.safetensors", min_score=0.4, max_hands=3)
    assert (chosen.min_score, chosen.max_hands, chosen.name) == (0.4, 3, "net") and chosen.model.config == model.config
    for given in (dict(detections="x"), dict(box=[1, 2, 3, 4]), dict(side="left"), dict(adapt=5)):
        assert choose_finder([photo], checkpoint=tmp_path / "net.safetensors", **given) is None
    monkeypatch.setattr(every_hand, "SHIPPED", tmp_path / "absent.safetensors")
    assert choose_finder([photo]) is None
    with pytest.raises(InputError, match="refine"): choose_finder([photo], refine="mediapipe")
    with pytest.raises(InputError, match="min-score"): choose_finder([photo], side="left", min_score=0.5)

"""The explorers without a browser: what they compute, how fast, and what they say to nonsense."""
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

pytest.importorskip("ipywidgets")
pytest.importorskip("plotly")

from handrecon import explore  # noqa: E402
from handrecon.conventions import MANO_JOINT_NAMES  # noqa: E402
from handrecon.explore import EXPLORERS, LIGHTS, TARGETS, TERMS, TIMES  # noqa: E402
from handrecon.proxy_hand import POSTURES, proxy_hand  # noqa: E402
from handrecon.widgets import HandExplorer, Number, hand_pose, hand_view, limit_bars, load_hand, read_number, still  # noqa: E402

ROOT = Path(__file__).parent.parent


@given(st.text())
def test_a_typed_number_is_read_or_refused_in_one_sentence(text):
    try:
        assert -3 <= read_number(text, -3, 3, "shape 1") <= 3
    except ValueError as error:
        assert str(error).startswith("shape 1: expected a number from -3 to 3, found ") and "\n" not in str(error)


@given(st.floats(-3, 3))
def test_a_number_survives_its_own_text(value):
    assert read_number(repr(value), -3, 3) == value


@pytest.mark.parametrize("text", ["", " ", "nan", "inf", "-inf", "1e999", "3.0001", "two", "0x10", "1;2"])
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError, match="expected a number"):
        read_number(text, -3, 3)


def test_text_and_slider_follow_one_another_and_nonsense_moves_neither():
    number = Number("focal", 100, 500, 240, 1, "px")
    told, said = [], []
    number.listen(lambda: told.append(number.value))
    number.complain = said.append
    number.text.value = "300"
    assert number.slider.value == 300 and told == [300]
    number.slider.value = 123
    assert number.text.value == "123" and told == [300, 123]
    number.text.value = "9999"
    assert number.slider.value == 123 and told == [300, 123] and "9999" in said[-1]
    number.value = 200
    assert told == [300, 123] and number.text.value == "200"


def _shown(explorer):
    arrays = lambda x: x.tolist() if isinstance(x, np.ndarray) else str(x)
    return json.dumps([[t.to_plotly_json() for t in f.data] + [f.layout.to_plotly_json().get("shapes")] for f in explorer.figure], default=arrays) + explorer.caption.value


@pytest.fixture(scope="module")
def pages():
    return {name: page() for name, (page, _) in EXPLORERS.items()}


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_moves_the_picture_within_150_ms(name, pages):
    "Processor time: what an answer takes where nothing else runs."
    explorer = pages[name]
    explorer.refresh()
    took = []
    for key, control in explorer.control.items():
        if key in ("path", "kind") and name == "hand":
            continue
        before, answers = _shown(explorer), explorer.answers
        start = time.process_time()
        if isinstance(control, Number):
            control.slider.value += 3 * control.slider.step * (-1 if control.value > control.high - 3 * control.slider.step else 1)
        elif isinstance(control.value, bool):
            control.widget.value = not control.value
        else:
            control.widget.index = (control.widget.index + 1) % len(control.widget.options)
        took.append(1000 * (time.process_time() - start))
        assert explorer.answers == answers + 1 and not explorer.complaint.value, key
        assert _shown(explorer) != before, f"{key} changes nothing"
    assert np.median(took) < 150, took


@pytest.mark.parametrize("name", EXPLORERS)
def test_extremes_are_drawn_or_explained(name, pages):
    "Every slider at both ends, one after the other and all together: no exception, finite captions."
    explorer = pages[name]
    for end in ("low", "high"):
        for control in explorer.control.values():
            if isinstance(control, Number):
                control.slider.value = getattr(control, end)
        assert not explorer.complaint.value and "nan" not in explorer.caption.value.lower(), explorer.caption.value


def test_hand_starts_again_after_a_bad_file(tmp_path):
    explorer = HandExplorer()
    explorer.refresh()
    before = explorer.space.data[0].x.copy()
    explorer.control["kind"].widget.value = "MANO file"
    assert "found nothing" in explorer.complaint.value
    bad = tmp_path / "MANO_RIGHT.pkl"
    bad.write_bytes(b"no hand")
    for path in ("no/such/file.pkl", str(bad), "a\0b", "x" * 5000):
        explorer.control["path"].widget.value = path
        assert explorer.complaint.value.count("<div") == 1 and "Traceback" not in explorer.complaint.value
        assert np.array_equal(explorer.space.data[0].x, before)
    explorer.control["kind"].widget.value = "proxy hand"
    assert not explorer.complaint.value


def test_markup_in_a_path_is_shown_not_run():
    explorer = HandExplorer()
    explorer.control["kind"].value = "MANO file"
    explorer.control["path"].widget.value = "<img src=x onerror=alert(1)>"
    assert "<img" not in explorer.complaint.value and "&lt;img" in explorer.complaint.value


@pytest.mark.parametrize("side", ["right", "left"])
def test_postures_are_shown_with_their_own_angles(side):
    hand = proxy_hand(side)
    mirror = torch.tensor([1.0, 1, 1] if side == "right" else [1.0, -1, -1])
    for name in POSTURES:
        pose = hand_pose(hand, name, [0] * 6, torch.zeros(15, 3))
        low, span, angle, colors = limit_bars((pose.view(15, 3) * mirror).flatten())
        assert [c == "#d62828" for c in colors] == [bool(a < l - 0.05 or a > l + s + 0.05) for a, l, s in zip(angle, low, span)]


def test_left_view_is_the_mirror_image():
    views = [hand_view(h, hand_pose(h, "pinch", [0.3] * 6, torch.full((15, 3), 0.1)), [1.0] * 10) for h in (proxy_hand(), proxy_hand("left"))]
    assert np.allclose(views[0].vertices * [-1, 1, 1], views[1].vertices, atol=1e-5)


def test_the_official_files_reader_is_what_the_hand_page_uses(tmp_path):
    from handrecon.proxy_hand import proxy_hand_arrays
    arrays = {k: v.numpy() for k, v in proxy_hand_arrays().items() if k in proxy_hand().ARRAYS}
    np.savez(tmp_path / "MANO_RIGHT.npz", **arrays)
    assert load_hand("MANO file", str(tmp_path / "MANO_RIGHT.npz"), "right").n_vertices == 778


@pytest.mark.parametrize("kind", LIGHTS)
def test_gradient_of_a_pixel_is_its_difference_quotient(kind):
    lit = lambda **change: explore.lit_view(**{**dict(kind=kind, texture="per face", tone=0.3, ambient=0.3, lamp=0.8, warmth=0.2, azimuth=-20.0, elevation=30.0, pixel=(70, 100), target="lamp below"), **change})
    here = lit()
    for number in ("ambient", "lamp"):
        assert math.isclose((lit(**{number: here_value(number) + 0.01}).value - here.value) / 0.01, here.gradient[number], rel_tol=0.02)


def here_value(number):
    return {"ambient": 0.3, "lamp": 0.8}[number]


def test_both_lights_agree_where_nine_numbers_suffice():
    "Ambient light alone is band 0."
    pictures = [explore.lit_view(kind, "per vertex", 0.4, 0.6, 0.0, 0.0, 0.0, 0.0, (70, 90), "lamp below").image for kind in LIGHTS]
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_the_targets_own_light_leaves_no_error(target):
    ambient, lamp, warmth, azimuth, elevation = TARGETS[target]
    assert explore.lit_view(LIGHTS[0], "per vertex", 0.7, ambient, lamp, warmth, azimuth, elevation, (0, 0), target).error.max() < 1e-5


@pytest.mark.parametrize("term", TERMS)
def test_a_step_along_the_arrows_lowers_the_term(term):
    view = lambda bend, t: explore.loss_view("relaxed", 1, bend, 20.0, (5.0, -4.0), 1.1, 0.5, 1.0, t)
    here = view(60.0, term)
    assert np.isfinite(here.arrows).all() and np.abs(here.arrows).max() <= 14.01
    guess = explore.Guess(*(x.requires_grad_() for x in explore.wrong_guess("relaxed", 1, 60.0, 20.0, (5.0, -4.0), 1.1, 0.5)))
    image, detected, albedo = explore._photo("relaxed")
    con = explore.finger_confidence(1, 1.0)
    value = explore.loss_terms(guess, image, detected, con, albedo)[0][term]
    slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(guess, torch.autograd.grad(value, list(guess), allow_unused=True))]
    length = torch.cat([g.flatten() for g in slopes]).norm()
    assert length > 0 and math.isclose(here.slope, length.item(), rel_tol=1e-4)
    after = explore.loss_terms(explore.Guess(*(x - 3e-4 / length * g for x, g in zip(guess, slopes))), image, detected, con, albedo)[0][term]
    assert after < value


def test_confidence_belongs_to_the_finger():
    for joint, name in enumerate(MANO_JOINT_NAMES[1:]):
        off = (explore.finger_confidence(joint, 0.0)[0] == 0).nonzero().flatten().tolist()
        assert len(off) == 4 and off[0] == 1 + 4 * ("thumb", "index", "middle", "ring", "little").index(name[:-1])


@given(st.floats(5, 170), st.floats(0, 0.8))
def test_any_speed_along_one_axis_is_no_detour(swing, pause):
    view = explore.time_view(swing, pause, 0.0, 0, 2)
    assert view.whole < 0.2 and view.detours.max() < 0.2
    assert (np.diff(view.phi[0]) > -1e-3).all() and np.isclose(view.phi[0, -1], 1, atol=1e-3)


def test_consistency_takes_the_spread_and_leaves_the_mean():
    shape, skin = explore.noisy_frames(3, 1.0)
    assert shape.shape[0] == skin.shape[0] == TIMES
    spreads = [explore.spread(explore.consistent(shape, skin, weight)[0]) for weight in (0.0, 0.3, 0.6, 1.2)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.6 * spreads[0]
    assert torch.allclose(explore.consistent(shape, skin, 1.2)[1].mean(0), skin.mean(0), atol=1e-3)


@given(st.floats(0.02, 0.3), st.floats(100, 500), st.floats(0.3, 1.5))
def test_disparity_is_focal_times_baseline_over_depth(baseline, focal, depth):
    view = explore.pair_view(baseline, focal, depth, 0.0)
    seen = ~np.isnan(view.depth)
    assert np.allclose(view.disparity[seen] * view.depth[seen], baseline * focal, rtol=1e-3)


def test_the_warp_fits_best_at_the_true_depth():
    losses = {wrong: explore.pair_view(0.12, 240.0, 0.6, wrong).loss for wrong in (-0.06, -0.03, 0.0, 0.03, 0.06)}
    assert min(losses, key=losses.get) == 0.0 and losses[0.06] > losses[0.0]


@pytest.mark.parametrize("kernel, apart", [(3, 16), (5, 24), (7, 32), (9, 40)])
def test_centres_merge_where_the_window_sees_both(kernel, apart):
    distance, found = explore.merge_curve(140.0, 0.3, kernel)
    assert distance[found == 2][0] == apart and (found[distance < apart] == 1).all()


def test_clicks_and_drags_arrive(pages):
    from types import SimpleNamespace
    centers, light = pages["centermap"], pages["texture_lighting"]
    centers._clicked(None, SimpleNamespace(xs=[444.0], ys=[100.0]), None)
    assert (centers["x"], centers["y"]) == (444, 100)
    light._clicked(None, SimpleNamespace(xs=[30.5], ys=[40.5]), None)
    assert (light["column"], light["row"]) == (30, 40)
    light.disc.layout.shapes = [{"type": "circle", "x0": 0.4, "x1": 0.6, "y0": -0.1, "y1": 0.1, "editable": True}]
    assert math.isclose(light["azimuth"], 30, abs_tol=1) and abs(light["elevation"]) < 1
    light.disc.layout.shapes = [{"type": "circle", "x0": 4.0, "x1": 4.2, "y0": 3.0, "y1": 3.2, "editable": True}]      # far outside the disc
    assert math.hypot(*explore.lamp_direction(light["azimuth"], light["elevation"])[0, :2].tolist()) <= 1


@pytest.mark.parametrize("name", EXPLORERS)
def test_stills_are_small_and_in_the_repository(name):
    picture = ROOT / "nbs/explore/pictures" / f"{name}.png"
    assert 5_000 < picture.stat().st_size <= 100 * 1024
    assert len(EXPLORERS[name][1]) > 40 and (ROOT / "nbs/explore" / f"{name}.ipynb").stat().st_size <= 300 * 1024


def test_a_still_shows_what_stands_on_the_page(pages):
    pages["stereo"].control["baseline"].slider.value = 120.0
    a = still(pages["stereo"], 300)
    pages["stereo"].control["baseline"].slider.value = 200.0
    assert a.shape == still(pages["stereo"], 300).shape and (a != still(pages["stereo"], 300)).any()


def test_without_plotly_the_modules_still_import():
    import subprocess
    import sys
    code = ("import sys; sys.modules.update(plotly=None, ipywidgets=None, anywidget=None, matplotlib=None); "
            "import handrecon.widgets, handrecon.explore; handrecon.explore.map_view([(100, 100)], [120.0], 0.3, 5, 0.0)")
    subprocess.run([sys.executable, "-c", code], check=True)

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handrecon import conventions as c

orders = st.sampled_from(sorted(c.JOINT_ORDERS))


@given(orders, orders, st.sampled_from([np.arange(42.0).reshape(21, 2), torch.arange(126.0).reshape(2, 21, 3)]))
def test_round_trip(a, b, x):
    back = c.convert_joints(c.convert_joints(x, a, b), b, a)
    assert type(back) is type(x) and (back == x).all()


@given(orders, orders, orders)
def test_conversions_compose(a, b, d):
    x = np.arange(21)
    via = c.convert_joints(c.convert_joints(x, a, b, axis=-1), b, d, axis=-1)
    assert (via == c.convert_joints(x, a, d, axis=-1)).all()


@pytest.mark.parametrize("name, index_tip, little_mcp, thumb_base", [
    ("freihand", 8, 17, 1), ("ho3d", 17, 7, 13), ("mano", 17, 7, 13), ("s2hand-mano", 4, 9, 17), ("rhd", 5, 20, 4), ("stb", 16, 1, 17),
    ("interhand", 4, 19, 3), ("openpose", 8, 17, 1), ("mediapipe", 8, 17, 1)])
def test_orders_against_the_published_numbers(name, index_tip, little_mcp, thumb_base):
    ours = c.convert_joints(np.arange(21), name, axis=0)
    assert [ours[8], ours[17], ours[1]] == [index_tip, little_mcp, thumb_base]
    assert sorted(ours) == list(range(21))


def test_every_order_keeps_mano_chains_together():
    parents = np.array(c.MANO_PARENTS + (15, 3, 6, 12, 9))
    ours = np.array(c.MANO_TO_FREIHAND)
    assert [ours[p] for p in c.JOINT_PARENTS[1:]] == parents[ours[1:]].tolist()


@pytest.mark.parametrize("make", [
    lambda: c.convert_joints(np.zeros((42, 3)), "rhd"), lambda: c.convert_joints(np.zeros((21, 3)), "ho4d"),
    lambda: c.convert_joints(np.zeros((21, 3)), "ho3d", "Freihand"), lambda: c.convert_joints(np.zeros(21), "ho3d")])
def test_bad_input_is_one_clear_sentence(make):
    with pytest.raises(ValueError, match="expected") as error:
        make()
    assert "\n" not in str(error.value)


def test_limits_hold_the_rest_pose_and_are_radians():
    limits = c.joint_limits()
    assert limits.shape == (15, 3, 2) and (limits[..., 0] <= 0).all() and (limits[..., 1] >= 0).all()
    assert limits.max().item() == pytest.approx(np.radians(100), abs=1e-6)
    little = c.MANO_JOINT_NAMES.index("little1") - 1
    assert limits[little, 0, 0].item() == pytest.approx(np.radians(-20), abs=1e-6)


def test_both_hands_tables():
    x = np.arange(42)
    for name, sides in c.FIRST_JOINT.items():
        halves = [x[s:s + 21] for s in sides.values()]
        assert sorted(np.concatenate(halves)) == list(range(42)), name
    right = c.FIRST_JOINT["interhand"]["right"]
    assert c.convert_joints(x[right:right + 21], "interhand", axis=-1)[0] == 20      # the right wrist, as in the file

"""Pictures and mesh files: positions to a tenth of a pixel, colours, axes, and files that are whole or absent."""
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon import viz
from handrecon.camera import project
from handrecon.proxy_hand import proxy_hand

BLACK = np.zeros((60, 80, 3), np.uint8)
TETRAHEDRON = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1]])
TETRAHEDRON_FACES = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def centre_of_mass(picture):
    mass = picture.max(-1).astype(float)
    rows, columns = np.mgrid[:mass.shape[0], :mass.shape[1]] + 0.5
    return (mass * columns).sum() / mass.sum(), (mass * rows).sum() / mass.sum()


@settings(max_examples=30, deadline=None)
@given(x=st.floats(10, 70), y=st.floats(10, 50))
def test_a_joint_is_drawn_where_it_is(x, y):
    joints, confidence = torch.zeros(21, 2), torch.zeros(21)
    joints[0], confidence[0] = torch.tensor([x, y]), 1
    found = centre_of_mass(viz.draw_skeleton(BLACK, joints, confidence, thickness=4))
    assert np.hypot(found[0] - x, found[1] - y) < 0.12


def test_missing_and_unusable_joints_are_left_out():
    joints = torch.full((21, 2), 30.0)
    assert not viz.draw_skeleton(BLACK, joints, torch.zeros(21)).any()
    assert not viz.draw_skeleton(BLACK, torch.full((21, 2), torch.nan)).any()
    assert not viz.draw_skeleton(BLACK, torch.full((21, 2), 1e30)).any()


def test_fingers_have_different_colors_and_the_picture_stays():
    before = BLACK.copy()
    spread = torch.stack([torch.linspace(5, 75, 21), torch.full((21,), 30.0)], -1)
    drawn = viz.draw_skeleton(BLACK, spread)
    assert (BLACK == before).all() and drawn.any()
    assert len({viz.joint_color(j) for j in range(21)}) == 6


def test_pictures_and_images_round_trip():
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    assert (viz.to_picture(viz.to_image(picture)) == picture).all()


def test_overlay_covers_the_projected_mesh_and_nothing_else():
    hand = proxy_hand()
    mesh = hand(torch.zeros(1, 45), translation=torch.tensor([[0.0, 0, 0.6]]))
    K = torch.tensor([[300.0, 0, 120], [0, 300, 90], [0, 0, 1]])
    drawn = viz.overlay(np.zeros((180, 240, 3), np.uint8), mesh.vertices[0], hand.faces, K, opacity=1.0).max(-1) > 0
    uv = project(mesh.vertices, K[None])[0]
    inside = ((uv >= 0) & (uv < torch.tensor([240.0, 180.0]))).all(-1)
    rows, columns = np.nonzero(drawn)
    assert abs(columns.min() - uv[inside, 0].min()) < 2.5 and abs(columns.max() + 1 - uv[inside, 0].max()) < 2.5
    assert abs(rows.min() - uv[inside, 1].min()) < 2.5 and abs(rows.max() + 1 - uv[inside, 1].max()) < 2.5


def test_overlay_outside_the_picture_changes_nothing_and_behind_the_camera_is_refused():
    K = torch.tensor([[300.0, 0, 40], [0, 300, 30], [0, 0, 1]])
    assert not viz.overlay(BLACK, TETRAHEDRON + torch.tensor([5.0, 0, 1]), TETRAHEDRON_FACES, K).any()
    with pytest.raises(ValueError, match="behind the camera"):
        viz.overlay(BLACK, TETRAHEDRON - 0.05, TETRAHEDRON_FACES, K)


def test_contact_sheet_and_turntable():
    sheet = viz.contact_sheet([np.full((10, 20, 3), i, np.uint8) for i in (10, 20, 30)], ["a", "b", "c" * 80], columns=2, pad=2)
    assert sheet.shape == (2 * (10 + 18 + 2) + 2, 2 * 22 + 2, 3)
    assert (sheet[20:30, 2:22] == 10).all() and (sheet[20:30, 24:44] == 20).all() and (sheet[50:60, 2:22] == 30).all()
    small = viz.contact_sheet([np.zeros((100, 50, 3), np.uint8)], cell=(20, 20), pad=0)
    assert (small == 0).all(-1).sum() == 20 * 10
    assert viz.turntable(TETRAHEDRON, TETRAHEDRON_FACES, n=3, size=32).shape == (32 + 18 + 8, 3 * 36 + 4, 3)
    for wrong in (([],), ([BLACK], ["a", "b"])):
        with pytest.raises(ValueError):
            viz.contact_sheet(*wrong)


@pytest.mark.parametrize("write, ending", [(viz.write_glb, ".glb"), (viz.write_obj, ".obj"), (viz.write_ply, ".ply")])
def test_mesh_files_round_trip(tmp_path, write, ending):
    trimesh = pytest.importorskip("trimesh")
    rgb = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    write(tmp_path / f"m{ending}", TETRAHEDRON, TETRAHEDRON_FACES, rgb)
    again = trimesh.load(tmp_path / f"m{ending}", process=False, force="mesh")
    sign = np.array([1, -1, -1]) if ending == ".glb" else np.ones(3)
    assert np.allclose(again.vertices * sign, TETRAHEDRON.numpy(), atol=1e-6)
    assert (again.faces == TETRAHEDRON_FACES.numpy()).all() and again.volume > 0
    if ending != ".glb":  # its colours have a test of their own
        assert np.allclose(again.visual.vertex_colors[:, :3], 255 * rgb.numpy())
    assert os.listdir(tmp_path) == [f"m{ending}"]


def test_glb_colors_are_linear_and_the_skin_is_not_metal(tmp_path):
    import json
    pytest.importorskip("trimesh")
    viz.write_glb(tmp_path / "m.glb", TETRAHEDRON, TETRAHEDRON_FACES, torch.full((4, 3), 0.5))
    data = (tmp_path / "m.glb").read_bytes()
    header = json.loads(data[20:20 + int.from_bytes(data[12:16], "little")])
    primitive, binary = header["meshes"][0]["primitives"][0], data[28 + int.from_bytes(data[12:16], "little"):]
    accessor = header["accessors"][primitive["attributes"]["COLOR_0"]]
    start = header["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
    assert list(binary[start:start + 4]) == [55, 55, 55, 255]  # 0.2140 of 255
    assert header["materials"][primitive["material"]]["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert "NORMAL" in primitive["attributes"]


def test_missing_extras_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"handrecon\[mesh\]"):
        viz.write_ply(tmp_path / "m.ply", TETRAHEDRON, TETRAHEDRON_FACES)
    with pytest.raises(ImportError, match=r"handrecon\[notebooks\]"):
        viz.plotly_mesh(TETRAHEDRON, TETRAHEDRON_FACES)
    assert os.listdir(tmp_path) == []


def test_failed_writes_leave_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError):
        with viz.atomic_path(tmp_path / "a.txt") as path:
            path.write_text("new")
            raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    for wrong, message in ((lambda: viz.save_picture(tmp_path / "a.doc", BLACK), "cannot save"),
                           (lambda: viz.write_glb(tmp_path / "a.stl", TETRAHEDRON, TETRAHEDRON_FACES), r"\.glb")):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_plotly_figure_is_upright():
    pytest.importorskip("plotly")
    figure = viz.plotly_mesh(TETRAHEDRON, TETRAHEDRON_FACES, torch.rand(4, 3), torch.rand(21, 3))
    assert len(figure.data) == 6 and np.allclose(figure.data[0].z, -TETRAHEDRON[:, 1])

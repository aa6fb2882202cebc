"""Other engines behind our calls: they run where they are importable, PyTorch3D's own pictures stand in where they are not."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mano_fixtures import fabricate

from handrecon import backends
from handrecon.mano import HandModel, mirror_arrays
from handrecon.proxy_hand import proxy_hand, sample_poses
from handrecon.render import light_from_vector
from handrecon.render import render as own_render

GOLDENS = sorted((Path(__file__).parent / "goldens" / "pytorch3d").glob("*.npz"))


def scene(n=2, size=(64, 64), distance=0.45, seed=0):
    "Posed hands, skewed cameras, vertex colours, lights."
    g = torch.Generator().manual_seed(seed)
    model = proxy_hand()
    vertices = model(sample_poses(n, g), rotation=torch.randn(n, 3, generator=g)).vertices
    vertices = vertices - vertices.mean(1, keepdim=True) + torch.tensor([0, 0, distance])
    focal, (H, W) = 2.1 * min(size), size
    K = torch.tensor([[focal, 0.7, W / 2], [0, 1.1 * focal, H / 2], [0, 0, 1]]).repeat(n, 1, 1)
    light = torch.cat([torch.rand(n, 8, generator=g) * 0.6, torch.randn(n, 3, generator=g)], 1)
    return vertices, model.faces, K, torch.rand(n, model.n_vertices, 3, generator=g), light


def away_from_edges(fragments):
    "Pixels whose eight neighbours see the same face or a hand that goes on behind: the shared rule of a z-buffer does not decide them."
    f = torch.nn.functional.pad(fragments.face_index[:, None].float(), (1, 1, 1, 1), value=-2)
    return torch.nn.functional.max_pool2d(f, 3, 1)[:, 0] == -torch.nn.functional.max_pool2d(-f, 3, 1)[:, 0]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_pictures_that_pytorch3d_made(path):
    golden = np.load(path)
    arrays = (torch.from_numpy(golden[k])[None] if k != "faces" else torch.from_numpy(golden[k]) for k in ("verts", "faces", "K"))
    ours = backends.rasterize(*arrays, tuple(golden["size"].tolist()))
    same = ours.face_index[0].numpy() == golden["pix_to_face"]
    hit = same & (golden["pix_to_face"] >= 0)
    assert same.mean() >= 0.995
    assert (np.abs(ours.depth[0].numpy() - golden["depth"])[hit] <= 1e-5 * golden["depth"][hit]).all()


def test_ndc_of_the_corners():
    H, W = 40, 60
    K = torch.tensor([[[50.0, 0, 30], [0, 50, 20], [0, 0, 1]]])
    corners = torch.tensor([[[-0.6, -0.4, 1.0], [0.6, -0.4, 1.0], [0.6, 0.4, 1.0], [0.0, 0.0, 2.0]]])
    assert torch.allclose(backends.to_ndc(corners, K, (H, W))[0, :, :2], torch.tensor([[1.5, 1], [-1.5, 1], [-1.5, -1], [0, 0]]), atol=1e-6)
    behind = backends.to_ndc(torch.tensor([[[0.1, 0.1, -1.0], [0.1, 0.1, 0.0]]]), K, (H, W))
    assert behind.isfinite().all() and behind[0, :, 2].tolist() == [-1, 0]


@pytest.mark.parametrize("per_face, lit, behind", [(False, True, True), (True, True, False), (False, False, True)])
def test_the_composed_picture_is_the_fused_one(per_face, lit, behind):
    vertices, faces, K, texture, light = scene()
    if per_face: texture = texture[:, faces].mean(2)
    light = light_from_vector(light) if lit else None
    background = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) if behind else None
    ours = own_render(vertices, faces, K, (64, 64), texture, light, background)
    from handrecon.render import face_normals, shade, vertex_normals
    colors = texture if light is None else shade(texture, (face_normals if per_face else vertex_normals)(vertices, faces), light)
    parts = backends._compose(ours.fragments, colors, vertices, faces, K, background, 1e-3)
    assert (ours.image - parts.image).abs().max() < 1e-5 and (ours.silhouette - parts.silhouette).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (72, 40)])
def test_pytorch3d_draws_the_same(size):
    pytest.importorskip("pytorch3d._C", reason="PyTorch3D is not installed")
    vertices, faces, K, texture, light = scene(size=size)
    background = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    for colors, lamp in ((texture, light), (texture[:, faces].mean(2), light_from_vector(light)), (texture, None)):
        ours, theirs = (backends.render(vertices, faces, K, size, colors, lamp, background, backend=b) for b in ("handrecon", "pytorch3d"))
        same = ours.fragments.face_index == theirs.fragments.face_index
        assert same.float().mean() > 0.99 and same[away_from_edges(ours.fragments)].float().mean() >= 0.995
        assert ((ours.depth - theirs.depth).abs() <= 1e-5 * theirs.depth)[same].all()
        assert (ours.image - theirs.image).abs().movedim(1, -1)[same].max() <= 1 / 255


def test_pytorch3d_gradients_culling_and_near_plane():
    pytest.importorskip("pytorch3d._C", reason="PyTorch3D is not installed")
    vertices, faces, K, *_ = scene(distance=0.06)                      # the near plane cuts the hands
    weight = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for backend in ("handrecon", "pytorch3d"):
        leaf = vertices.clone().requires_grad_()
        found = backends.rasterize(leaf, faces, K, (64, 64), True, 0.03, backend)
        results.append((found, leaf))
    same = results[0][0].face_index == results[1][0].face_index
    assert same.float().mean() > 0.99 and (results[0][0].face_index >= 0).float().mean() > 0.1
    gradients = [torch.autograd.grad((found.depth * weight * same).sum(), leaf)[0] for found, leaf in results]
    assert (gradients[0] - gradients[1]).abs().max() < 2e-3 * gradients[0].abs().max()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{}, {"n_pca": 9, "flat_hand_mean": False}])
def test_manopth_bends_the_same_hand(side, options):
    pytest.importorskip("manopth", reason="manopth is not installed")
    arrays, before = fabricate(), set(sys.modules)
    model = HandModel(arrays if side == "right" else mirror_arrays(arrays), side, **options)
    theirs = backends.hand_layer(model, "manopth")
    assert not any(name.startswith("mano.") for name in set(sys.modules) - before)
    g = torch.Generator().manual_seed(0)
    call = dict(pose=torch.randn(4, model.n_pose, generator=g) * 0.4, shape=torch.randn(4, 10, generator=g), rotation=torch.randn(4, 3, generator=g),
                translation=torch.randn(4, 3, generator=g), scale=torch.rand(4, generator=g) + 0.5)
    for a, b in zip(theirs(**call), model(**call)): assert (a - b).abs().max() < 3e-6
    for a, b in zip(theirs(call["pose"]), model(call["pose"])): assert (a - b).abs().max() < 3e-6


@pytest.mark.parametrize("options", [{}, {"n_pca": 9, "flat_hand_mean": False}])
def test_manotorch_bends_the_same_hand(options):
    pytest.importorskip("manotorch", reason="manotorch is not installed")
    before = set(sys.modules)
    model, g = HandModel(fabricate(), **options), torch.Generator().manual_seed(0)
    theirs = backends.manotorch_layer(model)
    assert not any(name.startswith("mano.") for name in set(sys.modules) - before)
    pose, shape, rotation = torch.randn(4, model.n_pose, generator=g) * 0.4, torch.randn(4, 10, generator=g), torch.randn(4, 3, generator=g)
    found, expected = theirs(torch.cat([rotation, pose], 1), shape), model(pose, shape, rotation)
    assert (found.verts - expected.vertices).abs().max() < 3e-6
    bones = model.order < len(model.parents)                    # its fingertips are other vertices
    assert (found.joints - expected.joints)[:, bones].abs().max() < 3e-6


@pytest.fixture(scope="module")
def network():
    from handrecon.s2hand import S2Hand, S2HandConfig
    torch.manual_seed(0)
    config = S2HandConfig(backbone="small", image_size=64, rotation="6d", canonical_focal=2.14, z_bias=0.45)
    model = S2Hand(config, proxy_hand(n_pca=30, flat_hand_mean=False)).eval()
    with torch.no_grad():
        for p in model.encoder.geometry.parameters(): p.add_(0.02 * torch.randn_like(p))   # an untrained network says the same of every picture
    return model


def test_what_is_exported_is_what_the_model_says(network):
    image, K = backends.example_input(network, 2)
    with torch.no_grad(): whole, parts = network(image, K, with_image=False), backends.PictureToHand(network)(image, K)
    named = dict(zip(backends.PictureToHand.OUTPUTS, parts, strict=True))
    assert torch.equal(named["vertices"], whole.mesh.vertices) and torch.equal(named["keypoints"], whole.keypoints)
    assert torch.equal(named["shape"], whole.code.shape) and torch.equal(named["translation"], whole.code.translation)


@pytest.fixture
def unchecked():
    "Checking a shape asks for the number of pictures and so ends its life as a symbol."
    from jaxtyping import config
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_the_number_of_pictures_stays_a_symbol(network, unchecked):
    any_number = {0: torch.export.Dim("batch")}
    graph = torch.export.export(backends.PictureToHand(network), backends.example_input(network, 2), dynamic_shapes=(any_number, any_number), strict=False)
    image, K = backends.example_input(network, 5, 3)
    with torch.no_grad(): pairs = zip(graph.module()(image, K), backends.PictureToHand(network)(image, K), strict=True)
    assert all((a - b).abs().max() <= 1e-5 * max(1, b.abs().max()) for a, b in pairs)


def test_onnx_gives_the_same(network, tmp_path, unchecked):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    backends.export_onnx(network, tmp_path / "hand.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["hand.onnx"]
    agreement = backends.onnx_agreement(network, tmp_path / "hand.onnx")
    assert set(agreement) == set(backends.PictureToHand.OUTPUTS) and max(agreement.values()) <= 1e-4
    for batch in (1, 7):                                                # recorded with another number
        assert max(backends.onnx_agreement(network, tmp_path / "hand.onnx", batch).values()) <= 1e-4
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="bad.onnx: not a graph"):
        backends.OnnxHand(tmp_path / "bad.onnx")


def test_a_missing_engine_and_an_unknown_one_are_sentences(monkeypatch):
    vertices, faces, K, texture, _ = scene(1)
    for name in ("pytorch3d", "pytorch3d.renderer.mesh", "manopth", "manotorch", "onnxscript", "onnxruntime"): monkeypatch.setitem(sys.modules, name, None)
    for name in ("pytorch3d", "manopth", "manotorch", "onnx", "onnxruntime"):
        with pytest.raises(ImportError, match=f"{name} cannot be used here.*(INSTALL|pip install)"): backends.engine(name)
    with pytest.raises(ImportError, match="pytorch3d cannot be used here"):
        backends.render(vertices, faces, K, (64, 64), texture, backend="pytorch3d")
    with pytest.raises(ValueError, match="backend: expected one of handrecon, pytorch3d, found 'opengl'"):
        backends.rasterize(vertices, faces, K, (64, 64), backend="opengl")
    with pytest.raises(ValueError, match="backend: expected one of handrecon, manopth, found 'smplx'"):
        backends.hand_layer(proxy_hand(), "smplx")
    with pytest.raises(ValueError, match="texture must have a row"):
        backends.render(vertices, faces, K, (64, 64), texture[:, :5], backend="pytorch3d")

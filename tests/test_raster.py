"""The kernel against the plain torch oracle, against PyTorch3D's own renders, and against itself under other thread counts."""
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handrecon.raster import rasterize, rasterize_reference
from raster_fixtures import soup

GOLDENS = sorted((Path(__file__).parent / "goldens" / "pytorch3d").glob("*.npz"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20))
def test_agrees_with_the_reference(seed):
    scene = soup(seed)
    ours, theirs = rasterize(*scene), rasterize_reference(*scene)
    assert (ours.face_index == theirs.face_index).float().mean() > 0.999
    same = ours.face_index == theirs.face_index
    torch.testing.assert_close(ours.depth[same], theirs.depth[same], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.barycentric[same], theirs.barycentric[same], rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**20))
def test_gradient_agrees_with_autograd_through_the_reference(seed):
    vertices, *rest = soup(seed, faces=25)
    gradients = []
    for function in (rasterize, rasterize_reference):
        leaf = vertices.clone().requires_grad_()
        fragments = function(leaf, *rest)
        weights = torch.rand(*fragments.depth.shape, 4, generator=torch.Generator().manual_seed(seed)).double()
        if function is rasterize: index = fragments.face_index
        weights = weights * (fragments.face_index == index)[..., None]
        loss = (weights[..., 0] * fragments.depth).sum() + (weights[..., 1:] * fragments.barycentric).sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[1].abs().max().item())


def test_gradient_against_finite_differences():
    vertices = torch.tensor([[[-0.2, -0.15, 0.5], [0.22, -0.1, 0.7], [0.01, 0.21, 0.6]]]).double().requires_grad_()
    K = torch.tensor([[[20.0, 0, 8], [0, 21, 8], [0, 0, 1]]]).double()
    inner = (slice(None), slice(5, 9), slice(6, 9))         # pixels that stay covered under the differences
    def outputs(v):
        fragments = rasterize(v, torch.tensor([[0, 1, 2]]), K, (16, 16))
        assert (fragments.face_index[inner] == 0).all()
        return fragments.depth[inner], fragments.barycentric[inner]
    assert torch.autograd.gradcheck(outputs, vertices, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_agrees_with_pytorch3d(path):
    golden = np.load(path)
    vertices, faces, K = (torch.from_numpy(golden[k])[None] if k != "faces" else torch.from_numpy(golden[k]) for k in ("verts", "faces", "K"))
    ours = rasterize(vertices, faces, K, tuple(golden["size"].tolist()))
    same = ours.face_index[0].numpy() == golden["pix_to_face"]
    assert same.mean() > 0.9995                              # all but pixels whose centre lies within rounding of an edge
    hit = same & (golden["pix_to_face"] >= 0)
    assert (np.abs(ours.depth[0].numpy() - golden["depth"])[hit] <= 1e-5 * golden["depth"][hit]).all()
    assert np.abs(ours.barycentric[0].numpy() - golden["barycentric"])[hit].max() < 1e-3


def test_goldens_are_there(): assert len(GOLDENS) == 5


def test_watertight_and_no_double_cover():
    "A fan whose centre lies exactly on a pixel centre: every pixel of the disc belongs to exactly one sliver."
    n = 64
    angle = torch.arange(n) * (2 * torch.pi / n)
    rim = torch.stack((0.2 * angle.cos(), 0.2 * angle.sin(), torch.full_like(angle, 0.5)), -1)
    vertices = torch.cat((torch.tensor([[0.0, 0, 0.5]]), rim))[None]
    faces = torch.stack((torch.zeros(n).long(), torch.arange(n) + 1, torch.arange(n).roll(-1) + 1), -1)
    K = torch.tensor([[[75.0, 0, 32.5], [0, 75, 32.5], [0, 0, 1]]])
    together = rasterize(vertices, faces, K, (65, 65)).face_index[0] >= 0
    alone = sum((rasterize(vertices, f[None], K, (65, 65)).face_index[0] >= 0).long() for f in faces)
    assert torch.equal(alone, together.long()) and together[12:53, 12:53].all()


def test_ties_go_to_the_lower_face_for_any_number_of_threads():
    vertices, faces, K, size = soup(3)
    twice, threads = torch.cat((faces, faces)), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(rasterize(vertices[:1], twice, K[:1], (256, 256)))
    finally: torch.set_num_threads(threads)
    assert results[0].face_index.max() < len(faces)
    for other in results[1:]: assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_near_plane_degenerate_faces_and_culling():
    K = torch.tensor([[[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]])
    triangle = torch.tensor([[[-0.2, -0.2, 0.5], [0.2, -0.2, 0.5], [0.0, 0.2, 0.5]]])
    face = torch.tensor([[0, 1, 2]])
    assert (rasterize(triangle, face, K, (16, 16)).face_index >= 0).any()
    for z in (0.0, -1.0, 1e-4):
        straddling = triangle.clone()
        straddling[:, 2, 2] = z
        assert (rasterize(straddling, face, K, (16, 16)).face_index < 0).all()
    flat = triangle.clone()
    flat[:, 2] = (flat[:, 0] + flat[:, 1]) / 2
    fragments = rasterize(flat.requires_grad_(), face, K, (16, 16))
    assert (fragments.face_index < 0).all() and torch.autograd.grad(fragments.depth.sum(), flat)[0].abs().sum() == 0
    nan = triangle.clone()
    nan[:, 0, 0] = torch.nan
    assert (rasterize(nan, face, K, (16, 16)).face_index < 0).all()
    seen = [(rasterize(triangle, f, K, (16, 16), cull_back_faces=True).face_index >= 0).any().item() for f in (face, face.flip(1))]
    normal = torch.linalg.cross(triangle[0, 1] - triangle[0, 0], triangle[0, 2] - triangle[0, 0])
    assert seen == [normal[2].item() < 0, normal[2].item() > 0]   # kept when the outward normal faces the camera


def test_empty_mesh_and_int32_faces():
    vertices, faces, K, size = soup(1)
    assert (rasterize(vertices, faces[:0], K, size).face_index == -1).all()
    a, b = rasterize(vertices, faces, K, size), rasterize(vertices.float(), faces.int(), K.float(), size)
    assert b.depth.dtype == torch.float32 and (a.face_index == b.face_index).float().mean() > 0.99


def test_bad_input_is_refused():
    vertices, faces, K, size = soup(1)
    for arguments, words in (((vertices[0], faces, K, size), "vertices must be"), ((vertices, faces.float(), K, size), "integer tensor"),
                             ((vertices, faces + 1, K, size), "must index"), ((vertices, faces, K[:1], size), "one for each mesh")):
        with pytest.raises(ValueError, match=words): rasterize(*arguments)


def test_concurrent_calls():
    scenes = [soup(seed, size=64) for seed in range(8)]
    expected, results = [rasterize(*s) for s in scenes], [None] * 8
    def work(i): results[i] = rasterize(*scenes[i])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    for a, b in zip(expected, results): assert torch.equal(a.face_index, b.face_index) and torch.equal(a.depth, b.depth)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_after_fork():
    "A data loader forks after the parent has used its threads; the child must neither hang nor crash."
    code = ("import torch, os, sys; sys.path.insert(0, 'tests'); from raster_fixtures import soup; from handrecon.raster import rasterize; "
            "a = rasterize(*soup(0)); pid = os.fork(); b = rasterize(*soup(0)); assert torch.equal(a.depth, b.depth); "
            "os._exit(0) if pid == 0 else sys.exit(os.waitpid(pid, 0)[1])")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, timeout=120).returncode == 0

"""Drawing on a graphics card, seen on the processor: Triton's kernels in its interpreter, and the contour as tensor operations, against the Numba kernels."""
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from handrecon import kernels, raster
from handrecon.batch_contour import antialias_batch, edge_table, find_pairs_batch, find_pieces_batch, neighbours
from handrecon.camera import project
from handrecon.contour import FADE, antialias, find_contour, soft_silhouette
from handrecon.cuda_raster import need_triton, paint_cuda, project_batch, rasterize_cuda, soft_silhouette_cuda, to_camera_batch
from handrecon.kernels import host
from handrecon.proxy_hand import proxy_hand
from handrecon.raster import project_vertices, rasterize, rasterize_reference
from handrecon.render import light_from_vector, render
from handrecon.rotation import axis_angle_to_matrix
from raster_fixtures import soup

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with PyTorch for CUDA, or as handrecon[cuda])")
HAND = proxy_hand()
SIZES = st.sampled_from([(24, 31), (40, 33), (64, 64)])


@pytest.fixture
def in_place(monkeypatch):
    "Tensors of the processor count as a graphics card's."
    monkeypatch.setattr(kernels, "KERNEL_DEVICES", {"cpu", "cuda"})


def hands(seed, size, dtype=torch.float64, batch=2):
    "Posed hands from random sides, as large as the picture."
    g = torch.Generator().manual_seed(seed)
    vertices = HAND(0.4 * torch.randn(batch, 45, generator=g)).vertices @ axis_angle_to_matrix(torch.randn(batch, 3, generator=g)).mT
    vertices = vertices - (vertices.amin(1, keepdim=True) + vertices.amax(1, keepdim=True)) / 2 + torch.tensor([0, 0, 0.5])
    height, width = size
    K = torch.tensor([[2.6 * width, 0.3, width / 2], [0, 2.5 * height, height / 2 + 1], [0, 0, 1]]).repeat(batch, 1, 1)
    return vertices.to(dtype), HAND.faces, K.to(dtype), size


def random(seed, *shape, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def gradients(function, leaves, seed=0):
    "Outputs of function(*leaves), and the gradients of a random weighted sum of them."
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    total = sum(((random(seed + i, *o.shape) - 0.5).to(o) * o).sum() for i, o in enumerate(outputs))
    return [o.detach() for o in outputs], torch.autograd.grad(total, leaves)


# ---------------------------------------------------------------- geometry in torch

def test_projection_is_the_kernels():
    vertices, _, K, _ = hands(0, (40, 40))
    vertices[0, :5, 2] = torch.tensor([0.0, -1, 1e-3, 1e-4, 2e-3])
    assert (project_batch(vertices, K).numpy() == project_vertices(host(vertices), host(K), raster.NEAR)).all()


def test_way_back_to_the_camera_is_the_projections_derivative():
    vertices, _, K, _ = hands(1, (40, 40))
    pull = random(0, *vertices.shape[:2], 2)
    vertices.requires_grad_()
    theirs, = torch.autograd.grad((pull * project(vertices, K)).sum(), vertices)
    torch.testing.assert_close(to_camera_batch(pull, project_batch(vertices, K), vertices, K).detach(), theirs)


# ---------------------------------------------------------------- contours

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**20), SIZES, st.booleans(), st.booleans())
def test_contour_is_that_of_the_loops(seed, size, single, triangles):
    vertices, faces, K, size = soup(seed, depth=2.2) if triangles else hands(seed, size)
    if single: vertices, K = vertices.float(), K.float()
    fragments = rasterize(vertices, faces, K, size)
    screen = project_vertices(host(vertices), host(K), raster.NEAR)
    loops = find_contour(screen, host(faces), host(fragments.face_index), host(fragments.depth))
    pieces = find_pieces_batch(torch.from_numpy(screen).double(), edge_table(faces, vertices.device), fragments.face_index, fragments.depth)
    pairs = find_pairs_batch(pieces, fragments.face_index, fragments.depth)
    for b, (n, m) in enumerate(loops.counts):
        kept = loops.pieces[b, :n][loops.shares[b, :n, 0] > 0]
        mine = torch.stack([c[pieces.picture == b] for c in (pieces.inside, pieces.outside, pieces.at, pieces.low, pieces.high)], 1)
        assert sorted(map(tuple, kept[:, :5].tolist())) == sorted(map(tuple, mine.tolist()))
        mine = {(int(p), int(q)): float(w) for i, p, q, w in zip(*pairs) if i == b}
        assert mine == pytest.approx({(int(p), int(q)): w for (p, q), w in zip(loops.pairs[b, :m], loops.weights[b, :m])}, abs=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_antialiasing_and_its_gradients_are_those_of_the_loops(dtype, tolerance):
    vertices, faces, K, size = hands(2, (48, 57), dtype)
    fragments, image = rasterize(vertices, faces, K, size), random(5, 2, 4, *size, dtype=dtype)
    results = [gradients(lambda i, v: [function(i, fragments, v, faces, K)], [image, vertices]) for function in (antialias_batch, antialias)]
    for ours, theirs in zip(*(outputs + list(grads) for outputs, grads in results)): assert relative(ours, theirs) < tolerance


def test_nothing_in_view_stays_as_it_is():
    vertices, faces, K, size = hands(3, (24, 24))
    fragments, image = rasterize(vertices + 5, faces, K, size), random(0, 2, 3, *size)
    (same,), (to_image, to_vertices) = gradients(lambda i, v: [antialias_batch(i, fragments, v, faces, K)], [image, vertices + 5])
    assert (same == image).all() and (to_vertices == 0).all() and to_image.abs().min() > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 40))
def test_neighbours_are_all_pairs_within_one_row_and_column(seed, n):
    place = torch.randint(0, 60, (n,), generator=torch.Generator().manual_seed(seed))
    found = sorted(zip(*(x.tolist() for x in neighbours(place, 10))))
    offsets = {10 * r + c for r in (-1, 0, 1) for c in (-1, 0, 1)}
    assert found == [(i, k) for i in range(n) for k in range(n) if int(place[k] - place[i]) in offsets]


def test_antialias_on_the_device_refuses_a_second_derivative():
    vertices, faces, K, size = hands(4, (24, 24))
    fragments, image = rasterize(vertices, faces, K, size), random(0, 2, 1, *size).requires_grad_()
    first, = torch.autograd.grad(antialias_batch(image, fragments, vertices, faces, K).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"): first.sum().backward()


# ---------------------------------------------------------------- kernels

@needs_triton
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**20), SIZES)
def test_every_pixel_sees_the_same_face(seed, size):
    scene = hands(seed, size)
    ours, theirs = rasterize_cuda(*scene), rasterize(*scene)
    assert (ours.face_index == theirs.face_index).all()
    torch.testing.assert_close(ours.depth, theirs.depth, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.barycentric, theirs.barycentric, rtol=0, atol=1e-10)


@needs_triton
def test_in_single_precision_faces_differ_only_by_rounding_at_edges():
    differ = total = 0
    for seed in range(6):
        vertices, faces, K, size = hands(seed, (64, 64), torch.float32)
        ours, theirs = rasterize_cuda(vertices, faces, K, size), rasterize(vertices, faces, K, size)
        same = ours.face_index == theirs.face_index
        differ, total = differ + int((~same).sum()), total + same.numel()
        assert (theirs.barycentric[~same].amin(-1).abs() < 1e-3).all(), "only pixels on an edge may change their face"
        torch.testing.assert_close(ours.depth[same], theirs.depth[same], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.barycentric[same], theirs.barycentric[same], rtol=0, atol=1e-3)
    assert differ <= 1e-3 * total


@needs_triton
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**20), st.booleans())
def test_soup_of_triangles(seed, cull):
    scene = soup(seed, depth=2.2)
    (ours, mine), (theirs, other) = (gradients(lambda v: function(v, *scene[1:], cull)[1:], [scene[0]]) for function in (rasterize_cuda, rasterize))
    assert (rasterize_cuda(*scene, cull).face_index == rasterize(*scene, cull).face_index).all()
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert relative(mine[0], other[0]) < 1e-8


@needs_triton
def test_agrees_with_plain_torch():
    vertices, faces, K, size = soup(11, faces=25, depth=2.2)
    vertices[..., 2].clamp_(min=0.3)
    (ours, mine), (theirs, other) = (gradients(lambda v: function(v, faces, K, size)[1:], [vertices]) for function in (rasterize_cuda, rasterize_reference))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert relative(mine[0], other[0]) < 1e-4


@needs_triton
def test_no_cracks_and_no_doubles():
    angle = torch.arange(31) * (2 * torch.pi / 31)
    rim = torch.stack((0.2 * angle.cos(), 0.2 * angle.sin(), torch.full_like(angle, 0.5)), -1)
    fan = torch.cat((torch.tensor([[0.0, 0, 0.5]]), rim))[None]
    slivers = torch.stack((torch.zeros(31).long(), torch.arange(31) + 1, torch.arange(31).roll(-1) + 1), -1)
    K = torch.tensor([[[37.5, 0, 16.5], [0, 37.5, 16.5], [0, 0, 1]]])      # the hub lies on a pixel's centre
    seen = rasterize_cuda(fan, slivers, K, (33, 33)).face_index[0] >= 0
    alone = sum((rasterize_cuda(fan, slivers[i : i + 1], K, (33, 33)).face_index[0] >= 0).long() for i in range(31))
    assert alone.max() == 1 and ((alone == 1) == seen).all() and seen[8:25, 8:25].all()


@needs_triton
def test_equal_depths_go_to_the_lower_face():
    triangle = torch.tensor([[[-0.2, -0.2, 0.5], [0.2, -0.2, 0.5], [0.0, 0.2, 0.5]]])
    K = torch.tensor([[[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]])
    seen = rasterize_cuda(triangle, torch.tensor([[0, 1, 2]] * 5), K, (16, 16)).face_index
    assert set(seen.unique().tolist()) == {-1, 0}


@needs_triton
def test_mesh_without_faces_or_out_of_view():
    vertices, faces, K, size = hands(5, (16, 24))
    for scene in ((vertices, faces[:0], K, size), (vertices - torch.tensor([0, 0, 3.0]), faces, K, size)):
        (depth, weights), (to_vertices,) = gradients(lambda v: rasterize_cuda(v, *scene[1:])[1:], [scene[0]])
        assert (rasterize_cuda(*scene).face_index == -1).all() and (depth == 0).all() and (weights == 0).all() and (to_vertices == 0).all()


def plain_soft(vertices, faces, K, size, sigma):
    "Every pixel against every face."
    uv = project(vertices, K)[:, faces]
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    p, a, b = torch.stack((x, y), -1).to(uv)[None, :, :, None, None], uv[:, None, None], uv.roll(-1, 2)[:, None, None]
    s = (((p - a) * (b - a)).sum(-1) / (b - a).square().sum(-1)).clamp(0, 1)
    d = (p - a - s[..., None] * (b - a)).square().sum(-1).amin(-1)
    turn = (b - a)[..., 0] * (p - a)[..., 1] - (b - a)[..., 1] * (p - a)[..., 0]
    x = torch.where((turn > 0).all(-1) | (turn < 0).all(-1), d, -d) / sigma
    return 1 - torch.where(x > -FADE, F.logsigmoid(-x), 0).sum(-1).exp()


@needs_triton
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_soft_silhouette(sigma):
    vertices, faces, K, size = hands(6, (24, 20), batch=1)
    (ours, mine), (theirs, other), (plain, exact) = (gradients(lambda v: [function(v, faces, K, size, sigma)], [vertices])
                                                     for function in (soft_silhouette_cuda, soft_silhouette, plain_soft))
    assert (ours[0] - theirs[0]).abs().max() < 1e-5 and (ours[0] - plain[0]).abs().max() < 1e-5
    assert relative(mine[0], exact[0]) < 1e-4           # closer than the loops, which leave the smallest shares out:
    assert relative(mine[0], other[0]) < 5e-3


@needs_triton
@pytest.mark.parametrize("per_face", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_whole_render_stays_on_the_device(in_place, monkeypatch, per_face, dtype, tolerance):
    vertices, faces, K, size = hands(7, (40, 47), dtype)
    leaves = [vertices, random(1, 2, len(faces) if per_face else HAND.n_vertices, 3, dtype=dtype), 0.1 + random(2, 2, 11, dtype=dtype), random(3, 2, 3, *size, dtype=dtype)]
    def drawn(v, texture, light, background):
        picture = render(v, faces, K, size, texture, light_from_vector(light), background)
        return picture.image, picture.silhouette, picture.depth, picture.fragments.barycentric
    ours, mine = gradients(drawn, leaves)
    monkeypatch.setattr(kernels, "KERNEL_DEVICES", {"cuda"})
    theirs, other = gradients(drawn, leaves)
    for a, b in zip((*ours, *mine), (*theirs, *other)): assert relative(a, b) < tolerance


@needs_triton
def test_painting_needs_no_light_and_no_background():
    vertices, faces, K, size = hands(8, (32, 32))
    fragments, image = paint_cuda(vertices, faces, K, size, torch.ones_like(vertices))
    torch.testing.assert_close(image, (fragments.face_index >= 0).to(image)[:, None].expand_as(image))


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that any operation made."
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, torch.Tensor): self.elements = max(self.elements, t.numel())
        return made


@needs_triton
def test_memory_grows_with_pixels_plus_faces_not_with_their_product(in_place):
    vertices, faces, K, size = hands(9, (64, 64), torch.float32, batch=1)
    vertices.requires_grad_()
    with Largest() as seen:
        drawn = render(vertices, faces, K, size, torch.ones_like(vertices))
        (drawn.image.sum() + drawn.silhouette.sum() + soft_silhouette(vertices, faces, K, size).sum()).backward()
    assert seen.elements <= 16 * (size[0] * size[1] + len(faces)) < 0.02 * size[0] * size[1] * len(faces)


@needs_triton
@pytest.mark.parametrize("function", [rasterize, soft_silhouette])
def test_kernels_refuse_a_second_derivative(in_place, function):
    vertices, faces, K, size = hands(10, (16, 16))
    vertices.requires_grad_()
    made = function(vertices, faces, K, size)
    first, = torch.autograd.grad((made if torch.is_tensor(made) else made.depth).sum(), vertices, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"): first.sum().backward()


def test_processor_tensors_are_drawn_by_the_processor():
    assert not kernels.drawn_in_place(torch.zeros(1))


def test_a_missing_triton_is_one_sentence(monkeypatch):
    monkeypatch.setattr("handrecon.cuda_raster.triton", None)
    with pytest.raises(ImportError, match=r"needs Triton, found none: pip install 'handrecon\[cuda\]'"): need_triton()


COMPILE = """
import warnings; warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from handrecon import cuda_raster as c
I, L, S, D = "*i32", "*i64", "*fp32", "*fp64"
numbers = dict(F="i32", V="i32", height="i32", width="i32")
blocks, soft = dict(N=4, SIDE=4), dict(screen=D, faces=I, sigma="fp32", reach="fp32", limit="fp32", **numbers)
mesh = dict(screen=D, faces=I, face_index=I, depth=S, barycentric=S, **numbers)
paint, no_paint = dict(colors=S, background=S, image=S), dict(colors=None, background=None, image=None)
for kernel, types, constants in [
    (c._nearest_kernel, dict(screen=D, faces=I, nearest=L, **numbers), dict(CULL=True, **blocks)),
    (c._resolve_kernel, dict(nearest=L, **mesh), dict(PER_FACE=False, P=64, **no_paint)),
    (c._resolve_kernel, dict(nearest=L, **mesh, **paint), dict(PER_FACE=True, P=64)),
    (c._backward_kernel, dict(vertices=S, K=D, grad_vertices=D, grad_depth=S, grad_barycentric=S, **mesh),
     dict(PER_FACE=False, colors=None, grad_image=None, grad_colors=None, **blocks)),
    (c._backward_kernel, dict(vertices=S, K=D, grad_vertices=D, colors=S, grad_image=S, grad_colors=D, **mesh),
     dict(PER_FACE=False, grad_depth=None, grad_barycentric=None, **blocks)),
    (c._soft_kernel, dict(total=S, **soft), blocks),
    (c._soft_backward_kernel, dict(rest=S, pull=D, **soft), blocks),
]:
    source = ASTSource(fn=kernel, signature={n: types.get(n, "constexpr") for n in kernel.arg_names},
                       constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=c.LAUNCH)
    assert len(made.asm["cubin"]) > 1000, kernel
"""


@needs_triton
def test_kernels_compile_to_machine_code_of_a_graphics_card():
    "For compute capability 9.0 (an H100), with the assembler that Triton brings along; no card is needed."
    done = subprocess.run([sys.executable, "-c", COMPILE], env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


ON_A_CARD = """
import torch
from handrecon.bench import render_scene
from handrecon.contour import soft_silhouette
from handrecon.render import light_from_vector, render
found = []
for device in ("cpu", "cuda"):
    vertices, faces, K, texture, light = (t.to(device) for t in render_scene(128, 4))
    leaves = [t.requires_grad_() for t in (vertices, texture, light)]
    drawn = render(vertices, faces, K, (128, 128), texture, light_from_vector(light))
    parts = drawn.image, drawn.silhouette, drawn.depth, soft_silhouette(vertices, faces, K, (128, 128))
    assert drawn.image.device.type == device
    gradients = torch.autograd.grad(sum((p * torch.linspace(-1, 1, 128, device=device)).sum() for p in parts), leaves)
    found.append([*(p.detach() for p in parts), *gradients])
for a, b in zip(*found):
    error = (a - b.cpu()).abs()
    assert error.mean() < 1e-3 * a.abs().mean() and (error > 1e-2 * a.abs().max()).float().mean() < 1e-3, error.max()
"""


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graphics_card_draws_what_the_processor_draws():
    done = subprocess.run([sys.executable, "-c", ON_A_CARD], env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

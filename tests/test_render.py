"""Pictures and gradients: the fused renderer against its parts, closed forms, finite differences and a supersampled oracle."""
import pytest
import torch

from handrecon.contour import antialias, edges_of, find_contour, soft_silhouette
from handrecon.proxy_hand import proxy_hand
from handrecon.raster import project_vertices, rasterize, strips_of
from handrecon.render import (Light, face_normals, interpolate, light_from_vector, render, shade, silhouette, vertex_normals)


def hand_scene(size, seed=0, batch=1):
    "Bent proxy hands seen obliquely, so that fingers hide one another; float64."
    g = torch.Generator().manual_seed(seed)
    model, pose = proxy_hand(), torch.zeros(batch, 15, 3)
    pose[:, :12, 2] = torch.rand(batch, 12, generator=g) * 0.9
    a = torch.tensor(0.5)
    axes = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]) @ torch.tensor([[a.cos(), 0, a.sin()], [0, 1, 0], [-a.sin(), 0, a.cos()]])
    vertices = model(pose.flatten(1)).vertices @ axes
    vertices = vertices - (vertices.amin(1, keepdim=True) + vertices.amax(1, keepdim=True)) / 2 + torch.tensor([0, 0, 0.5])
    K = torch.tensor([[2.3 * size, 0, size / 2], [0, 2.3 * size, size / 2], [0, 0, 1]]).repeat(batch, 1, 1)
    return vertices.double(), model.faces, K.double()


def appearance(vertices, faces, size, per_face, seed=0):
    g, b = torch.Generator().manual_seed(seed), len(vertices)
    texture = torch.rand(b, len(faces) if per_face else vertices.shape[1], 3, generator=g).double()
    light = light_from_vector(torch.tensor([[0.4, 1, 0.9, 0.8, 0.6, 1, 0.8, 0.9, 0.3, -0.5, -1.0]]).double().repeat(b, 1))
    return texture, light, torch.rand(b, 3, size, size, generator=g).double()


def plain(vertices, faces, K, size, texture, light, background):
    fragments, per_face = rasterize(vertices, faces, K, (size, size)), texture.shape[1] == len(faces)
    lit = shade(texture, face_normals(vertices, faces) if per_face else vertex_normals(vertices, faces), light)
    if per_face:
        index = fragments.face_index.clamp_min(0).long().flatten(1)
        painted = lit.gather(1, index[..., None].expand(-1, -1, 3)).mT.unflatten(2, (size, size))
    else: painted = interpolate(fragments, lit, faces)
    image = torch.where((fragments.face_index >= 0)[:, None], painted, background)
    return antialias(image, fragments, vertices, faces, K), silhouette(fragments, vertices, faces, K), fragments.depth, fragments.barycentric


@pytest.mark.parametrize("per_face", [False, True])
def test_fused_equals_its_parts(per_face):
    vertices, faces, K = hand_scene(48, batch=2)
    texture, light, background = appearance(vertices, faces, 48, per_face)
    leaves, results = [t.requires_grad_() for t in (vertices, texture, background, *light)], []
    for fused in (True, False):
        v, t, b, *l = leaves
        if fused:
            r = render(v, faces, K, (48, 48), t, Light(*l), b)
            outputs = r.image, r.silhouette, r.depth, r.fragments.barycentric
        else: outputs = plain(v, faces, K, 48, t, Light(*l), b)
        g = torch.Generator().manual_seed(1)
        loss = sum((torch.rand(o.shape, generator=g).double() * o).sum() for o in outputs)
        results.append((outputs, torch.autograd.grad(loss, leaves)))
    for a, b in zip(results[0][0], results[1][0]): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1]): torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * b.abs().max().item())


def test_one_job_equals_strips():
    vertices, faces, K = hand_scene(256)
    texture, light, background = appearance(vertices, faces, 256, False)
    leaves, threads, results = [t.requires_grad_() for t in (vertices, texture, background, *light)], torch.get_num_threads(), []
    try:
        for n, strips in ((1, 1), (2, 2), (5, 2)):
            torch.set_num_threads(n)
            assert strips_of(1, (256, 256)) == strips
            drawn = render(leaves[0], faces, K, (256, 256), leaves[1], Light(*leaves[3:]), leaves[2])
            results.append((drawn.image, drawn.silhouette, drawn.depth, *torch.autograd.grad((drawn.image.square().sum() + drawn.silhouette.sum()), leaves)))
    finally: torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[:3], results[0][:3]))
        for a, b in zip(other[3:], results[0][3:]): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item())


def test_contours_longer_than_their_memory():
    g, size = torch.Generator().manual_seed(4), 20
    centre = torch.tensor([0, 0, 1.0]) + (torch.rand(2, 900, 1, 3, generator=g) - 0.5) * torch.tensor([0.9, 0.9, 0.5])
    vertices = (centre + 0.12 * (torch.rand(2, 900, 3, 3, generator=g) - 0.5)).flatten(1, 2).double()
    vertices[1, 30:, 2] = -1                                    # behind the camera: the second contour is short
    faces, K = torch.arange(2700).view(-1, 3), torch.tensor([[[20.0, 0, 10], [0, 20, 10], [0, 0, 1]]]).double().repeat(2, 1, 1)
    texture, light, background = appearance(vertices, faces, size, False)
    drawn = render(vertices, faces, K, (size, size), texture, light, background)
    screen = project_vertices(vertices.numpy(), K.numpy(), 1e-3)
    counts = find_contour(screen, faces.numpy(), drawn.fragments.face_index.numpy(), drawn.depth.numpy()).counts
    assert counts[0, 0] > 6 * 2 * size > counts[1, 0]           # what is set aside for a picture at first
    for a, b in zip((drawn.image, drawn.silhouette), plain(vertices, faces, K, size, texture, light, background)): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outputs", [("image",), ("silhouette",), ("depth",), ("image", "depth")])
def test_any_subset_of_outputs_may_have_gradients(outputs):
    vertices, faces, K = hand_scene(32)
    texture, light, background = appearance(vertices, faces, 32, False)
    def gradient(function):
        leaf = vertices.clone().requires_grad_()
        return torch.autograd.grad(sum(o.square().sum() for o in function(leaf)), leaf)[0]
    names = ("image", "silhouette", "depth")
    ours = gradient(lambda v: [getattr(render(v, faces, K, (32, 32), texture, light, background), n) for n in outputs])
    theirs = gradient(lambda v: [plain(v, faces, K, 32, texture, light, background)[names.index(n)] for n in outputs])
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())


@pytest.mark.parametrize("per_face", [False, True])
def test_gradcheck_of_light_texture_and_background(per_face):
    vertices, faces, K = hand_scene(12)
    texture, light, background = appearance(vertices, faces, 12, per_face)
    vector = torch.cat([part.reshape(1, -1) for part in light], 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: render(vertices, faces, K, (12, 12), texture, light_from_vector(x), background).image.sum((2, 3)), vector)
    tint = torch.ones(1, 1, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: render(vertices, faces, K, (12, 12), texture * t, light, background * t.view(1, 3, 1, 1)).image.sum((2, 3)), tint)


def test_gradient_inside_the_mesh_against_finite_differences():
    "A triangle that fills the picture has no contour in it: the picture is smooth in the vertices."
    vertices = torch.tensor([[[-2.0, -2, 0.5], [2.2, -2, 0.7], [0.1, 3, 0.6]]]).double().requires_grad_()
    K = torch.tensor([[[10.0, 0, 4], [0, 10, 4], [0, 0, 1]]]).double()
    texture, light = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(0)).double(), appearance(vertices, torch.zeros(9, 3), 4, False)[1]
    light = light._replace(direction=torch.tensor([[0.1, 0.2, 1.0]]).double())
    assert torch.autograd.gradcheck(lambda v: render(v, torch.tensor([[0, 1, 2]]), K, (8, 8), texture, light).image, vertices)


def sphere(radius, distance, rings=48):
    theta, phi = torch.meshgrid(torch.linspace(0, torch.pi, rings + 1).double(), torch.arange(2 * rings).double() * torch.pi / rings, indexing="ij")
    points = torch.stack((theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()), -1).view(1, -1, 3)
    m = 2 * rings
    r, c = torch.meshgrid(torch.arange(rings), torch.arange(m), indexing="ij")
    a, b, d, e = r * m + c, (r + 1) * m + c, (r + 1) * m + (c + 1) % m, r * m + (c + 1) % m
    return radius * points + torch.tensor([0.003, -0.002, distance]).double(), torch.cat((torch.stack((a, b, d), -1).view(-1, 3), torch.stack((a, d, e), -1).view(-1, 3)))


def test_silhouette_of_a_sphere():
    K = torch.tensor([[[200.0, 0, 32], [0, 200, 32], [0, 0, 1]]]).double()
    vertices, faces = sphere(0.05, 0.5)
    cover = silhouette(rasterize(vertices, faces, K, (64, 64)), vertices, faces, K)
    assert abs(cover.sum() / (torch.pi * 200**2 * 0.05**2 / (0.5**2 - 0.05**2)) - 1) < 3e-3
    assert cover.min() >= 0 and cover.max() <= 1


@pytest.mark.parametrize("degrees", [0, 7, 30, 45, 77])
def test_area_and_its_gradient_of_a_turned_square(degrees):
    a = torch.deg2rad(torch.tensor(float(degrees))).double()
    turn = torch.stack((a.cos(), -a.sin(), torch.zeros_like(a), a.sin(), a.cos(), torch.zeros_like(a), a * 0, a * 0, a * 0 + 1)).view(3, 3)
    corners = torch.tensor([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]]).double() @ turn
    K, faces = torch.tensor([[[100.0, 0, 20], [0, 100, 20], [0, 0, 1]]]).double(), torch.tensor([[0, 1, 2], [0, 2, 3]])
    side, centre = torch.tensor(0.1).double().requires_grad_(), torch.tensor([0.0017, 0.0041, 0.5]).double().requires_grad_()
    vertices = (side * corners + centre)[None]
    cover = silhouette(rasterize(vertices, faces, K, (40, 40)), vertices, faces, K)
    area = cover.sum()
    by_side, by_centre = torch.autograd.grad(area, (side, centre))
    assert abs(area - 400) < 1 and abs(by_side / 8000 - 1) < 0.035   # tips thinner than a pixel are lost
    assert by_centre[:2].abs().max() < 0.02 * 8000 and abs(by_centre[2] / (-2 * 400 / 0.5) - 1) < 0.035


def test_triangle_with_background_and_colours():
    "A vertical edge at x = 8.3: pixel 8 is 30 % triangle, 70 % background; moving the edge moves the mixture."
    x = torch.tensor((8.3 - 8) / 100 * 0.5).double().requires_grad_()
    zero = torch.zeros_like(x)
    vertices = torch.stack((torch.stack((x, zero - 1, zero + 0.5)), torch.stack((x, zero + 1, zero + 0.5)), torch.stack((zero - 2, zero, zero + 0.5))))[None]
    K = torch.tensor([[[100.0, 0, 8], [0, 100, 8], [0, 0, 1]]]).double()
    texture, background = torch.full((1, 3, 3), 0.8).double(), torch.full((1, 3, 16, 16), 0.2).double()
    result = render(vertices, torch.tensor([[0, 1, 2]]), K, (16, 16), texture, None, background)
    torch.testing.assert_close(result.image[0, :, 5, 7:10], torch.tensor([0.8, 0.2 + 0.3 * 0.6, 0.2]).double().expand(3, 3))
    torch.testing.assert_close(result.silhouette[0, 5, 7:10], torch.tensor([1, 0.3, 0]).double())
    gradient, = torch.autograd.grad(result.image[0, 0, 5].sum(), x)
    torch.testing.assert_close(gradient, torch.tensor(0.6 * 200).double())


def test_gradient_on_hands_against_a_supersampled_oracle():
    """Outline, self-occlusion and shading at once: smooth colours on bent hands, central differences of 16 x 16 samples a pixel,
    many smooth random images as gradients. A silhouette has only the outline; colours tell fingers from palm."""
    size, samples, step, rows = 80, 16, 5e-4, {"colour": [], "outline": []}
    for seed in (0, 1, 2):
        vertices, faces, K = hand_scene(size, seed)
        fine = torch.tensor([samples, samples, 1.0]).double()[:, None] * K
        texture = 0.5 + 0.4 * torch.sin(proxy_hand()(torch.zeros(1, 45)).vertices.double() * torch.tensor([60, 90, 120]) + torch.tensor([0, 1, 2]))
        def exact(v):
            fragments = rasterize(v, faces, fine, (size * samples,) * 2)
            layers = torch.cat((interpolate(fragments, texture, faces), (fragments.face_index >= 0).double()[:, None]), 1)
            return layers.view(4, size, samples, size, samples).mean((2, 4))
        unit, centred = torch.eye(3).double(), vertices - vertices.mean(1, keepdim=True)
        directions = [unit[0].expand_as(vertices), unit[1].expand_as(vertices), centred / 0.1, torch.sin(60 * vertices[..., [1, 0, 1]])]
        changes = [(exact(vertices + step * d) - exact(vertices - step * d)) / (2 * step) for d in directions]
        leaf = vertices.clone().requires_grad_()
        result = render(leaf, faces, K, (size, size), texture)
        for g in torch.nn.functional.interpolate(torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(seed)).double(), size=(size, size), mode="bicubic"):
            for name, loss, part in (("colour", (g[:3] * result.image[0]).sum(), slice(0, 3)), ("outline", (g[3] * result.silhouette[0]).sum(), slice(3, 4))):
                gradient, = torch.autograd.grad(loss, leaf, retain_graph=True)
                rows[name] += [torch.stack(((gradient * d).sum(), (g[part] * c[part]).sum())) for d, c in zip(directions, changes)]
    for name, pairs in rows.items():
        ours, theirs = torch.stack(pairs).T
        print(name, "mean size", (ours * theirs).sum() / theirs.square().sum(), "rms", ((ours - theirs).square().mean() / theirs.square().mean()).sqrt())
        assert abs((ours * theirs).sum() / theirs.square().sum() - 1) < 0.06, name
        assert ((ours - theirs).square().mean() / theirs.square().mean()).sqrt() < {"colour": 0.16, "outline": 0.1}[name], name


def test_silhouette_gradient_pulls_a_hand_into_place():
    vertices, faces, K = hand_scene(48)
    vertices, K = vertices.float(), K.float()
    target = render(vertices, faces, K, (48, 48), torch.ones(1, vertices.shape[1], 3)).silhouette
    offset = torch.tensor([[0.006, -0.008, 0.0]]).requires_grad_()
    optimiser = torch.optim.Adam([offset], lr=1e-3)
    for _ in range(40):
        loss = (render(vertices + offset[:, None], faces, K, (48, 48), torch.ones(1, vertices.shape[1], 3)).silhouette - target).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    assert offset.detach().norm() < 1e-3


def test_shading_closed_forms():
    light = light_from_vector(torch.tensor([[0.3, 1, 0.5, 0, 0.7, 0, 1, 1, 0, 0, -3.0]]))
    normals = torch.tensor([[[0, 0, -1.0], [0, 0, 1], [0, -0.6, -0.8]]])
    lit = shade(torch.ones(1, 3, 3), normals, light)[0]
    ambient = torch.tensor([0.3, 0.15, 0])
    torch.testing.assert_close(lit, ambient + torch.tensor([1.0, 0, 0.8])[:, None] * torch.tensor([0, 0.7, 0.7]))


def test_vertex_normals_point_out_of_the_hand():
    hand = proxy_hand()
    vertices = hand(torch.zeros(1, 45)).vertices
    normals, faces = vertex_normals(vertices, hand.faces), face_normals(vertices, hand.faces)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(1, hand.n_vertices))
    assert ((normals[:, hand.faces].mean(2) * faces).sum(-1) > 0).float().mean() > 0.99
    volume = (vertices[:, hand.faces[:, 0]] * torch.linalg.cross(vertices[:, hand.faces[:, 1]], vertices[:, hand.faces[:, 2]])).sum() / 6
    assert volume > 0


def test_edges():
    hand = proxy_hand()
    edges = edges_of(hand.faces.numpy())
    assert hand.n_vertices - len(edges) + hand.n_faces == 1 and (edges[:, 3] < 0).sum() == 2 * hand.n_vertices - 2 - hand.n_faces


def test_float32_in_float32_out_and_bad_textures():
    vertices, faces, K = hand_scene(16)
    vertices, K = vertices.float(), K.float()
    result = render(vertices, faces, K, (16, 20), torch.rand(1, vertices.shape[1], 3))
    assert result.image.shape == (1, 3, 16, 20) and {t.dtype for t in result[:3]} == {torch.float32}
    with pytest.raises(ValueError, match="texture must have a row"): render(vertices, faces, K, (16, 16), torch.rand(1, 5, 3))


def test_a_hand_out_of_sight():
    vertices, faces, K = hand_scene(16)
    vertices = (vertices + torch.tensor([5.0, 0, 0]).double()).requires_grad_()
    result = render(vertices, faces, K, (16, 16), torch.ones(1, vertices.shape[1], 3).double(), None, torch.full((1, 3, 16, 16), 0.25).double())
    assert (result.image == 0.25).all() and (result.silhouette == 0).all()
    gradient, = torch.autograd.grad(result.image.sum() + result.silhouette.sum(), vertices)
    assert (gradient == 0).all()


def test_soft_silhouette_gradient_and_limit():
    "Equation (3) by hand for one triangle, gradcheck on a hand, and the hard silhouette as sigma goes to 0."
    K = torch.tensor([[[100.0, 0, 8], [0, 100, 8], [0, 0, 1]]]).double()
    triangle = torch.tensor([[[-0.02, -0.02, 0.5], [0.02, -0.02, 0.5], [-0.02, 0.02, 0.5]]]).double()   # corners (4,4) (12,4) (4,12)
    alpha = soft_silhouette(triangle, torch.tensor([[0, 1, 2]]), K, (16, 16), 2.0)[0]
    torch.testing.assert_close(alpha[6, 2], torch.sigmoid(torch.tensor(-1.5**2 / 2).double()), rtol=1e-5, atol=1e-6)     # centre (2.5, 6.5): 1.5 outside
    torch.testing.assert_close(alpha[6, 5], torch.sigmoid(torch.tensor(1.5**2 / 2).double()), rtol=1e-5, atol=1e-6)      # centre (5.5, 6.5): 1.5 inside
    assert alpha[15, 15] == 0
    vertices, faces, K = hand_scene(32)
    direction, weights = vertices - vertices.mean(1, keepdim=True) + 0.05, torch.linspace(0, 1, 32).double()
    leaf = vertices.clone().requires_grad_()
    gradient, = torch.autograd.grad((soft_silhouette(leaf, faces, K, (32, 32), 1.0) * weights).sum(), leaf)
    value = lambda t: (soft_silhouette(vertices + t * direction, faces, K, (32, 32), 1.0) * weights).sum()
    h = 1e-3
    assert abs((value(h) - value(-h)) / (2 * h) / (gradient * direction).sum() - 1) < 0.05
    hard = (rasterize(vertices, faces, K, (32, 32)).face_index >= 0).double()
    assert ((soft_silhouette(vertices, faces, K, (32, 32), 1e-4) > 0.5).double() == hard).double().mean() > 0.99


def _drawn(name, v, faces, K, size):
    if name == "rasterize": return rasterize(v, faces, K, (size, size)).depth
    if name == "soft_silhouette": return soft_silhouette(v, faces, K, (size, size))
    if name == "antialias": return silhouette(rasterize(v.detach(), faces, K, (size, size)), v, faces, K)
    texture, light, background = appearance(v, faces, size, False)
    return render(v, faces, K, (size, size), texture, light, background).image


@pytest.mark.parametrize("name", ["rasterize", "soft_silhouette", "antialias", "render"])
@pytest.mark.parametrize("upstream", ["plain", "with a graph"])
def test_a_second_derivative_is_refused_and_never_a_zero(name, upstream):
    v, faces, K = hand_scene(24)
    v.requires_grad_()
    drawn = _drawn(name, v, faces, K, 24)
    first, = torch.autograd.grad((drawn if upstream == "plain" else drawn.square()).sum(), v, create_graph=True)
    assert first.requires_grad and first.abs().max() > 0
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(first.sum(), v)
    without, = torch.autograd.grad(_drawn(name, v, faces, K, 24).sum(), v)
    assert not without.requires_grad                      # nobody who does not ask pays for a graph


def test_a_second_derivative_along_another_input_is_refused_too():
    v, faces, K = hand_scene(24)
    texture, light, background = appearance(v, faces, 24, False)
    texture.requires_grad_()
    first, = torch.autograd.grad(render(v, faces, K, (24, 24), texture, light, background).image.sum(), texture, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["soft_silhouette", "antialias", "render"])
def test_vertices_changed_in_place_are_noticed(name):
    v, faces, K = hand_scene(24)
    v.requires_grad_()
    moved = v * 1
    total = _drawn(name, moved, faces, K, 24).sum()
    moved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()

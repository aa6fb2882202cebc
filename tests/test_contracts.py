"""What PyTorch promises for its own operations, asked of every operation here that has a kernel and a derivative."""
import importlib
import pkgutil
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import grad
from torch.func import jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import handrecon
from handrecon import kernels
from handrecon.batch_contour import antialias_batch
from handrecon.contour import antialias, soft_silhouette
from handrecon.cuda_hand import cuda_hand
from handrecon.cuda_hand import triton as has_triton
from handrecon.cuda_raster import paint_cuda, rasterize_cuda, soft_silhouette_cuda
from handrecon.fast_hand import fast_hand
from handrecon.losses import ssim
from handrecon.proxy_hand import proxy_hand
from handrecon.raster import Fragments, rasterize
from handrecon.render import render, silhouette

HAND, PLAIN, SIZE = proxy_hand(), proxy_hand(), (16, 16)
PLAIN.fast = False
GENERATOR = torch.Generator().manual_seed(0)
VERTICES = HAND(0.3 * torch.randn(2, 45, generator=GENERATOR), translation=torch.tensor([[0.0, 0, 0.5], [0.01, 0, 0.6]])).vertices.detach()
CAMERA = torch.tensor([[[60.0, 0, 8], [0, 60, 8], [0, 0, 1]]]).expand(2, 3, 3)
SHOWN = rasterize(VERTICES, HAND.faces, CAMERA, SIZE)


def random(*shape): return torch.rand(shape, generator=GENERATOR)


def fragments(batch): return Fragments(*(t[:1].expand(batch, *t.shape[1:]) for t in SHOWN))


def cameras(x): return CAMERA[:1].expand(len(x), 3, 3).to(x.dtype)


def layer(hand): return lambda *x: tuple(hand(*x)), (0.3 * random(2, 45), random(2, 10), random(2, 3), random(2, 3), 1 + random(2))


# name -> a function of tensors whose first axis is the batch, and tensors that it accepts; each answers with a tensor or several
CASES = {
    "hand": layer(HAND),
    "plain hand": layer(PLAIN),
    "fast_hand": (lambda *x: fast_hand(HAND, *x), layer(HAND)[1]),
    "rasterize": (lambda v: rasterize(v, HAND.faces, cameras(v), SIZE)[1:], (VERTICES,)),
    "silhouette": (lambda v: silhouette(fragments(len(v)), v, HAND.faces, cameras(v)), (VERTICES,)),
    "antialias": (lambda i, v: antialias(i, fragments(len(v)), v, HAND.faces, cameras(v)), (random(2, 3, *SIZE), VERTICES)),
    "antialias_batch": (lambda i, v: antialias_batch(i, fragments(len(v)), v, HAND.faces, cameras(v)), (random(2, 3, *SIZE), VERTICES)),
    "soft_silhouette": (lambda v: soft_silhouette(v, HAND.faces, cameras(v), SIZE), (VERTICES,)),
    "render": (lambda v, c, lamp, b: render(v, HAND.faces, cameras(v), SIZE, c, lamp, b)[:3], (VERTICES, random(2, 778, 3), random(2, 11), random(2, 3, *SIZE))),
    "ssim": (ssim, (random(2, 3, *SIZE), random(2, 3, *SIZE))),
}
TRITON = {
    "cuda_hand": (lambda *x: cuda_hand(HAND, *x), layer(HAND)[1]),
    "rasterize_cuda": (lambda v: rasterize_cuda(v, HAND.faces, cameras(v), SIZE)[1:], (VERTICES,)),
    "paint_cuda": (lambda v, c: paint_cuda(v, HAND.faces, cameras(v), SIZE, c)[1], (VERTICES, random(2, 778, 3))),
    "soft_silhouette_cuda": (lambda v: soft_silhouette_cuda(v, HAND.faces, cameras(v), SIZE), (VERTICES,)),
}
NEEDS_TRITON = {"CudaHand", "_Draw", "_SoftCuda"}
RUN = CASES | (TRITON if has_triton else {})
case = pytest.mark.parametrize("name", RUN)


def answers(made): return made if isinstance(made, tuple) else (made,)


def scalar(made): return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in answers(made))


def leaves(inputs, wanted=None): return [t.clone().requires_grad_(wanted is None or i in wanted) for i, t in enumerate(inputs)]


def gradients(function, inputs, upstream=scalar):
    mine = leaves(inputs)
    return grad(upstream(function(*mine)), mine)


def same(a, b, tolerance=1e-4):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.shape == y.shape
        torch.testing.assert_close(x.to(y.dtype), y, rtol=tolerance, atol=tolerance * max(float(y.detach().abs().max()), 1e-6))


def functions_of_the_library():
    "Every autograd.Function that a module of handrecon defines, `kernels`' own aside."
    modules = [importlib.import_module(f"handrecon.{m.name}") for m in pkgutil.iter_modules(handrecon.__path__) if not m.ispkg and m.name != "notebooks"]
    return {v for m in modules for v in vars(m).values()
            if isinstance(v, type) and issubclass(v, torch.autograd.Function) and v.__module__ == m.__name__ != "handrecon.kernels"}


def test_every_function_is_an_operation_that_refuses_in_words_and_is_reached_by_a_case(monkeypatch):
    found, reached = functions_of_the_library(), set()
    assert len(found) >= 9
    assert not [f.__name__ for f in found if not issubclass(f, kernels.Operation)], "derive it from kernels.Operation"
    assert not [f.__name__ for f in found if not hasattr(f.backward, "__wrapped__")], "decorate its backward with kernels.only_once"
    apply = kernels.Operation.apply.__func__
    monkeypatch.setattr(kernels.Operation, "apply", classmethod(lambda cls, *a: (reached.add(cls), apply(cls, *a))[1]))
    for function, inputs in RUN.values(): function(*inputs)
    unproved = {f.__name__ for f in found - reached} - (set() if has_triton else NEEDS_TRITON)
    assert not unproved, f"add a case to tests/test_contracts.py that reaches {unproved}"


@case
def test_checkpointing_gives_the_same_gradient(name):
    function, inputs = RUN[name]
    same(gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs), gradients(function, inputs), 1e-6)


@case
def test_saved_tensors_are_unpacked_once_each(name):
    function, inputs = RUN[name]
    unpacked, kept = [], []
    def pack(t): kept.append(t.detach()); return len(kept) - 1
    def unpack(i): unpacked.append(i); return kept[i]
    mine = leaves(inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack): made = scalar(function(*mine))
    grad(made, mine)
    assert len(unpacked) == len(set(unpacked))


@case
def test_vmap(name):
    function, inputs = RUN[name]
    one = lambda *x: tuple(t[0] for t in answers(function(*(t[None] for t in x))))
    same(vmap(one)(*inputs), tuple(torch.stack(parts) for parts in zip(*(one(*x) for x in zip(*inputs)))), 1e-5)


@case
def test_func_grad_and_vmap_of_it(name):
    function, inputs = RUN[name]
    loss, every = lambda *x: scalar(function(*x)), tuple(range(len(inputs)))
    same(torch.func.grad(loss, every)(*inputs), gradients(function, inputs))
    one = lambda *x: loss(*(t[None] for t in x))
    want = [torch.stack(parts) for parts in zip(*(gradients(function, [t[None] for t in x]) for x in zip(*inputs)))]
    same(vmap(torch.func.grad(one, every))(*inputs), [w[:, 0] for w in want])


@case
def test_jacrev_batched_gradients_and_vectorised_jacobians_agree(name):
    function, inputs = RUN[name]
    few = lambda *x: torch.stack([t.flatten()[::max(t.numel() // 3, 1)].sum() for t in answers(function(*x))] + [scalar(function(*x))])
    mine = leaves(inputs)
    made = few(*mine)
    rows = [grad(row, mine, retain_graph=True) for row in made]
    want = [torch.stack(parts) for parts in zip(*rows)]
    same(grad(made, mine, torch.eye(len(made)), is_grads_batched=True, retain_graph=True), want)
    same(vmap(lambda g: grad(made, mine, g, retain_graph=True))(torch.eye(len(made))), want)
    same(jacrev(few, tuple(range(len(mine))))(*inputs), want)
    same(torch.autograd.functional.jacobian(few, tuple(inputs), vectorize=True), want)


@case
def test_forward_mode_is_right_or_refused_in_words(name):
    function, inputs = RUN[name]
    along = lambda s: scalar(function(*(t + s * 0.01 for t in inputs)))
    try: made = jacfwd(along)(torch.zeros(()))
    except RuntimeError as error: assert str(error) == kernels.FORWARD_MODE
    else: same((made,), (torch.func.grad(along)(torch.zeros(())),), 1e-3)
    if name in ("hand", "plain hand", "ssim"): assert made is not None


@case
def test_a_second_derivative_is_right_or_refused_in_words(name):
    function, inputs = RUN[name]
    mine = leaves(inputs)
    first = grad(scalar(function(*mine)), mine, create_graph=True)
    try: grad(sum(g.sum() for g in first) + sum(x.sum() for x in mine), mine)
    except RuntimeError as error: assert "no second derivative" in str(error)
    else: assert name == "plain hand"


@case
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_sixteen_bits_are_computed_in_32(name, kind, autocast):
    function, inputs = RUN[name]
    rough = [t.to(kind) for t in inputs]
    want, wanted = function(*(t.float() for t in rough)), gradients(function, [t.float() for t in rough])
    with torch.autocast("cpu", kind) if autocast else nullcontext(): made = function(*rough)
    assert all(t.dtype == torch.float32 for t in answers(made))
    same(answers(made), answers(want), 1e-6)
    mine = leaves(rough)
    with torch.autocast("cpu", kind) if autocast else nullcontext(): made = function(*mine)
    back = grad(scalar(made), mine)
    assert all(g.dtype == kind for g in back)
    same([g.float() for g in back], wanted, 1e-2)


@case
def test_autocast_changes_nothing(name):
    function, inputs = RUN[name]
    with torch.autocast("cpu", torch.bfloat16): made = function(*inputs)
    same(answers(made), answers(function(*inputs)), 1e-6)


@case
def test_float64_stays_float64(name):
    function, inputs = RUN[name]
    made = function(*(t.double() for t in inputs))
    assert all(t.dtype == torch.float64 for t in answers(made))
    same(answers(made), tuple(t.double() for t in answers(function(*inputs))), 2e-2 if "ssim" in name else 1e-3)


@case
def test_an_empty_batch_has_an_empty_answer(name):
    function, inputs = RUN[name]
    none = leaves([t[:0] for t in inputs])
    made, whole = function(*none), function(*inputs)
    assert [t.shape for t in answers(made)] == [(0, *t.shape[1:]) for t in answers(whole)]
    assert all(g.shape == x.shape for g, x in zip(grad(scalar(made), none), none))


@case
def test_strides_do_not_matter(name):
    function, inputs = RUN[name]
    want, back = answers(function(*inputs)), gradients(function, inputs)
    scattered = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    assert not any(t.is_contiguous() for t in scattered)
    same(answers(function(*scattered)), want, 1e-6)
    mine = [t.detach().requires_grad_() for t in scattered]
    same(grad(scalar(function(*mine)), mine), back)
    def swapped(t): return t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t
    same(answers(function(*map(swapped, inputs))), want, 1e-6)


@case
def test_expanded_inputs(name):
    function, inputs = RUN[name]
    first = leaves([t[:1] for t in inputs])
    made = function(*(t.expand(3, *t.shape[1:]) for t in first))
    same(answers(made), answers(function(*(t[:1].repeat(3, *[1] * (t.ndim - 1)) for t in inputs))), 1e-6)
    repeated = leaves([t[:1].repeat(3, *[1] * (t.ndim - 1)) for t in inputs])
    same(grad(scalar(made), first), [g.sum(0, keepdim=True) for g in grad(scalar(function(*repeated)), repeated)])


@case
def test_any_subset_may_want_gradients(name):
    function, inputs = RUN[name]
    want = gradients(function, inputs)
    for subset in range(1, 2 ** len(inputs)):
        wanted = [i for i in range(len(inputs)) if subset >> i & 1]
        mine = leaves(inputs, wanted)
        same(grad(scalar(function(*mine)), [mine[i] for i in wanted]), [want[i] for i in wanted], 1e-5)
    assert not any(t.requires_grad for t in answers(function(*inputs)))
    with torch.inference_mode(): function(*inputs)


def test_a_light_by_name_lights_an_empty_batch():
    from handrecon.render import light_from_vector
    none = VERTICES[:0]
    assert render(none, HAND.faces, CAMERA[:0], SIZE, none, light_from_vector(torch.zeros(0, 11))).image.shape == (0, 3, *SIZE)


def test_a_hand_in_float64_is_exact_although_its_constants_are_float32():
    pose, double = random(1, 45).double(), proxy_hand().double()
    torch.testing.assert_close(HAND(pose).vertices, double(pose).vertices, rtol=1e-5, atol=1e-9)
    assert HAND(pose.float(), translation=torch.ones(1, 3).double()).joints.dtype == torch.float64
    assert proxy_hand().bfloat16()(pose.bfloat16()).vertices.dtype == torch.float32


def test_forward_mode_without_functorch_takes_the_plain_path():
    from torch.autograd import forward_ad
    with forward_ad.dual_level():
        pose = forward_ad.make_dual(random(1, 45), torch.ones(1, 45))
        assert forward_ad.unpack_dual(HAND(pose).vertices).tangent.abs().max() > 1e-3
        with pytest.raises(RuntimeError, match="no forward-mode"): soft_silhouette(forward_ad.make_dual(VERTICES, VERTICES), HAND.faces, CAMERA, SIZE)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mano_fixtures import fabricate

from handrecon.fast_hand import LANES, fast_hand, pack_hand, runs_of, suits
from handrecon.mano import HandModel, mirror_arrays

ARRAYS = fabricate()
NAMES = ("pose", "shape", "rotation", "translation", "scale")


def draw(n=3, seed=0, n_pose=45, angle=0.4, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    sizes = {"pose": (n, n_pose), "shape": (n, 10), "rotation": (n, 3), "translation": (n, 3)}
    out = {k: torch.randn(*s, generator=g) * (angle if k == "pose" else 1) for k, s in sizes.items()} | {"scale": torch.rand(n, generator=g) + 0.5}
    return {k: v.to(dtype).requires_grad_() for k, v in out.items()}


def with_gradients(function, inputs, seed=0):
    "Outputs, and the gradient of a random weighted sum of all of them."
    g = torch.Generator().manual_seed(seed)
    out = function(**inputs)
    total = sum((x * torch.randn(x.shape, generator=g)).sum() for x in out)
    return [*out, *torch.autograd.grad(total, list(inputs.values()))]


def assert_same(found, expected, tolerance, least=1e-3):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), least)


@pytest.mark.parametrize("options", [{}, {"n_pca": 9}, {"flat_hand_mean": False, "n_pca": 30}])
@pytest.mark.parametrize("side", ["right", "left"])
def test_same_numbers_as_the_plain_path(side, options):
    model = HandModel(ARRAYS if side == "right" else mirror_arrays(ARRAYS), side, **options)
    inputs = draw(20, n_pose=model.n_pose)
    fast = model(**inputs)
    plain = model.plain(**inputs)
    assert type(fast) is type(plain)
    for a, b in zip(fast, plain):
        assert (a - b).abs().max() < 1e-6 * max(1, b.abs().max().item())
    assert fast.vertices.grad_fn.name().startswith("FastHand")


@pytest.mark.parametrize("n", [1, 33, 140])          # one thread's share, and several
def test_gradients_are_those_of_double_precision(n):
    model, exact = HandModel(ARRAYS), HandModel(ARRAYS).double()
    found, expected = with_gradients(model, draw(n)), with_gradients(exact.plain, draw(n, dtype=torch.float64))
    assert_same(found, expected, 3e-6)


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-4, 3e-3, 0.05, 1.0, 3.1, 6.4]))
@settings(max_examples=25, deadline=None)
def test_any_angle(seed, angle):
    model, exact = HandModel(ARRAYS), HandModel(ARRAYS).double()
    assert_same(with_gradients(model, draw(2, seed, angle=angle), seed), with_gradients(exact.plain, draw(2, seed, angle=angle, dtype=torch.float64), seed), 5e-6)


@given(st.lists(st.integers(0, 15), min_size=15, max_size=15), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_any_tree_and_dense_weights(draws, seed):
    rng = np.random.default_rng(seed)
    weights = rng.random((778, 16))
    tree = np.array([[0, *(d % (j + 1) for j, d in enumerate(draws))], list(range(16))])
    arrays = dict(ARRAYS, kintree_table=tree, weights=weights / weights.sum(1, keepdims=True), J_regressor=rng.random((16, 778)) / 389)
    model, exact = HandModel(arrays), HandModel(arrays).double()
    assert_same(with_gradients(model, draw(2, seed)), with_gradients(exact.plain, draw(2, seed, dtype=torch.float64)), 5e-6,
                least=1.0)   # the terms of dL/dscale, of the order of ten, may cancel


def test_weights_that_do_not_quite_sum_to_one():
    model = HandModel(dict(ARRAYS, weights=np.asarray(ARRAYS["weights"]) * 1.0009))
    inputs = draw(2) | {"translation": torch.full((2, 3), 5.0)}
    for a, b in zip(model(**inputs), model.plain(**inputs)):
        assert (a - b).abs().max() < 2e-6


def test_one_output_alone_and_inputs_that_want_no_gradient():
    model, exact = HandModel(ARRAYS), HandModel(ARRAYS).double()
    for k in range(2):
        inputs, double = draw(), draw(dtype=torch.float64)
        wanted = [inputs["pose"], inputs["scale"]]
        for name in ("shape", "rotation", "translation"): inputs[name].requires_grad_(False)
        found = torch.autograd.grad(model(**inputs)[k].square().sum(), wanted)
        assert_same(found, torch.autograd.grad(exact(**double)[k].square().sum(), [double["pose"], double["scale"]]), 3e-6)


def test_backward_twice_needs_retain_graph_and_gives_the_same():
    model, inputs = HandModel(ARRAYS), draw()
    total = model(**inputs).vertices.square().sum()
    first = torch.autograd.grad(total, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(total, list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, list(inputs.values()))


def test_an_input_changed_in_place_is_noticed():
    model, inputs = HandModel(ARRAYS), draw()
    pose = inputs["pose"] * 1
    total = model(pose, inputs["shape"]).vertices.sum()
    pose.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_second_derivative_is_refused_and_the_plain_path_gives_it():
    model = HandModel(ARRAYS)
    for weight in (1.0, torch.ones((), requires_grad=True)):       # whether or not the upstream gradient carries a graph
        pose = draw()["pose"]
        gradient, = torch.autograd.grad((model(pose).vertices.square() * weight).sum(), pose, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()
    model.fast = False
    pose = draw()["pose"]
    gradient, = torch.autograd.grad(model(pose).vertices.square().sum(), pose, create_graph=True)
    gradient.square().sum().backward()
    assert pose.grad.abs().max() > 0


def test_changed_constants_are_packed_again():
    model, inputs = HandModel(ARRAYS), draw()
    model(**inputs)
    packed = pack_hand(model)
    assert pack_hand(model) is packed
    model.v_template += 0.01
    for a, b in zip(model(**inputs), model.plain(**inputs)):
        assert (a - b).abs().max() < 2e-6
    assert pack_hand(model) is not packed


def test_everything_else_takes_the_plain_path():
    model, x = HandModel(ARRAYS), {k: v.detach() for k, v in draw().items()}
    assert suits(model, *x.values()) and suits(model, x["pose"], None)
    assert not suits(model, x["pose"].double()) and not suits(HandModel(ARRAYS).double(), x["pose"].double())
    assert model.double()(**{k: v.double() for k, v in x.items()}).vertices.dtype == torch.float64
    model = HandModel(ARRAYS)
    model.v_template.requires_grad_()
    assert not suits(model, x["pose"])
    model(**x).vertices.sum().backward()
    assert model.v_template.grad.abs().max() > 0


def test_empty_batch_strided_inputs_and_autocast():
    model = HandModel(ARRAYS)
    assert model(torch.zeros(0, 45)).joints.shape == (0, 21, 3)
    wide = torch.randn(3, 90) * 0.3
    strided = wide[:, ::2].requires_grad_()
    assert not strided.is_contiguous() and torch.allclose(model(strided).vertices, model(strided.contiguous()).vertices)
    with torch.autocast("cpu", torch.bfloat16):
        vertices = model(strided).vertices
    assert vertices.dtype == torch.float32 and torch.equal(vertices, model(strided).vertices)


def test_a_nan_stays_a_nan_in_its_own_hand():
    pose = torch.zeros(3, 45)
    pose[1, 7] = torch.nan
    seen = HandModel(ARRAYS)(pose).vertices.isnan().flatten(1).any(1)
    assert seen.tolist() == [False, True, False]


def test_threads_do_not_change_the_result():
    model, inputs, n = HandModel(ARRAYS), draw(130), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(model, inputs)
        torch.set_num_threads(4)
        four = with_gradients(model, inputs)
    finally:
        torch.set_num_threads(n)
    assert_same(four, one, 1e-6)


@pytest.mark.parametrize("name, size", [("pose", (3, 44)), ("shape", (2, 10)), ("shape", (3, 9)), ("rotation", (3, 4)), ("translation", (1, 3)), ("scale", (3, 1))])
def test_shapes_never_reach_the_kernels_unchecked(name, size):
    inputs = draw() | {name: torch.zeros(size)}
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        fast_hand(HandModel(ARRAYS), **inputs)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 90), st.sampled_from([0.0, 0.02, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_runs_cover_all_that_is_touched_and_little_else(seed, rows, vertices, share):
    touched = np.random.default_rng(seed).random((rows, vertices)) < share
    runs, first = runs_of(touched)
    assert first[0] == 0 and first[-1] == len(runs) and (runs % LANES == 0).all()
    for row in range(rows):
        own = runs[first[row]:first[row + 1]]
        covered = np.zeros(-(-vertices // LANES) * LANES, bool)
        for start, stop in own:
            assert start < stop <= len(covered)
            covered[start:stop] = True
        assert covered[:vertices][touched[row]].all()
        assert (own[1:, 0] - own[:-1, 1] > LANES).all()                     # neither touching nor a block apart
        assert not len(own) or touched[row, own[0, 0]:own[0, 0] + LANES].any()


@pytest.mark.parametrize("n", [1, 3, 16, 17, 18, 35])
def test_hands_do_not_depend_on_their_neighbours_in_the_batch(n):
    model, inputs = HandModel(ARRAYS), draw(n)
    together = with_gradients(model, inputs)[0]
    for b in {0, n // 2, n - 1}:
        alone = model(**{k: v[b:b + 1] for k, v in inputs.items()}).vertices
        assert torch.allclose(together[b:b + 1], alone, atol=1e-6)


@pytest.mark.parametrize("n_shape", [1, 2, 9])
def test_any_number_of_shape_directions(n_shape):
    arrays = dict(ARRAYS, shapedirs=np.asarray(ARRAYS["shapedirs"])[..., :n_shape])
    model, exact = HandModel(arrays), HandModel(arrays).double()
    inputs, double = ({k: v[:, :n_shape].detach().requires_grad_() if k == "shape" else v for k, v in d.items()} for d in (draw(2), draw(2, dtype=torch.float64)))
    assert_same(with_gradients(model, inputs), with_gradients(exact.plain, double), 5e-6)

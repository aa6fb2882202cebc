"""The GPU's kernels of the hand layer: on a GPU where there is one, else in Triton's interpreter on CPU tensors."""
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mano_fixtures import fabricate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu": os.environ["TRITON_INTERPRET"] = "1"      # before any kernel is defined

from handrecon import cuda_hand as module  # noqa: E402
from handrecon import fast_hand  # noqa: E402
from handrecon.cuda_hand import cuda_hand, device_hand, paths_to  # noqa: E402
from handrecon.mano import HandModel, mirror_arrays  # noqa: E402

needs_triton = pytest.mark.skipif(module.triton is None, reason="Triton is not installed (pip install 'handrecon[cuda]')")
ARRAYS = fabricate()
SMALL, TIPS = fabricate(1, 131), (64, 5, 63, 130, 0)      # two tiles and three vertices: quick in the interpreter


def small(arrays=SMALL, **options):
    return HandModel(arrays, fingertips=TIPS, **options).to(DEVICE)


def draw(model, n=2, seed=0, angle=0.4, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    sizes = {"pose": (n, model.n_pose), "shape": (n, model.n_shape), "rotation": (n, 3), "translation": (n, 3)}
    out = {k: torch.randn(*s, generator=g) * (angle if k == "pose" else 1) for k, s in sizes.items()} | {"scale": torch.rand(n, generator=g) + 0.5}
    return {k: v.to(DEVICE, dtype).requires_grad_() for k, v in out.items()}


def with_gradients(function, inputs):
    "Outputs, and the gradient of a random weighted sum of all of them."
    g, out = torch.Generator().manual_seed(0), function(**inputs)
    total = sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in out)
    return [*out, *torch.autograd.grad(total, list(inputs.values()))]


def assert_same_as_double(model, tolerance=5e-6, **drawn):
    "`model`'s results within a micrometre of `plain` in double precision, and all gradients."
    def plain(**inputs):
        try: return model.double().plain(**inputs)
        finally: model.float()
    found, expected = with_gradients(model, draw(model, **drawn)), with_gradients(plain, draw(model, **drawn, dtype=torch.float64))
    for a, b in zip(found[:2], expected[:2]): assert (a - b).abs().max() < 1e-6 * max(1, b.abs().max().item())
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3)


@pytest.fixture(autouse=True)
def _demand_the_gpu_path(monkeypatch):
    if DEVICE == "cpu": monkeypatch.setattr(fast_hand, "kernels_for", partial(fast_hand.kernels_for, device="cuda"))


@needs_triton
@pytest.mark.parametrize("side, options", [("right", {}), ("left", {"n_pca": 9, "flat_hand_mean": False})])
def test_a_whole_hand_and_its_gradients_are_those_of_double_precision(side, options):
    model = HandModel(ARRAYS if side == "right" else mirror_arrays(ARRAYS), side, **options).to(DEVICE)
    assert model(**draw(model, 1)).vertices.grad_fn.name().startswith("CudaHand")
    assert_same_as_double(model, n=3)


@needs_triton
@pytest.mark.parametrize("n", [1, 3, 33])
def test_any_batch(n):
    assert_same_as_double(small(), n=n)


@needs_triton
@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-4, 3e-3, 0.05, 0.0577, 1.0, 3.1, 6.4])
def test_any_angle_zero_included(angle):
    assert_same_as_double(small(), angle=angle, seed=3)


@needs_triton
def test_no_rotation_at_all_has_finite_gradients():
    model = small()
    inputs = {k: torch.zeros_like(v, requires_grad=True) for k, v in draw(model).items() if k in ("pose", "shape", "rotation")}
    found = with_gradients(model, inputs)
    expected = with_gradients(model.plain, inputs)
    for a, b in zip(found, expected): assert a.isfinite().all() and torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


@needs_triton
@pytest.mark.parametrize("tree", ["chain", "star", "random"])
def test_any_tree_and_dense_weights(tree):
    rng = np.random.default_rng(5)
    parents = {"chain": [0, *range(15)], "star": [0] * 16, "random": [0, *(int(rng.integers(j)) for j in range(1, 16))]}[tree]
    weights = rng.random((131, 16))
    assert_same_as_double(small(dict(SMALL, kintree_table=np.array([parents, range(16)]), weights=weights / weights.sum(1, keepdims=True),
                                     J_regressor=rng.random((16, 131)) / 65)), tolerance=1e-5)


@needs_triton
def test_weights_that_do_not_quite_sum_to_one():
    assert_same_as_double(small(dict(SMALL, weights=np.asarray(SMALL["weights"]) * 1.0009)))


@needs_triton
@pytest.mark.parametrize("n_shape", [1, 4])
def test_any_number_of_shape_directions(n_shape):
    assert_same_as_double(small(dict(SMALL, shapedirs=np.asarray(SMALL["shapedirs"])[..., :n_shape])))


@needs_triton
def test_a_vertex_can_be_two_fingertips():
    model = HandModel(SMALL, fingertips=(7, 7, 64, 64, 130)).to(DEVICE)
    assert_same_as_double(model)


@needs_triton
@pytest.mark.parametrize("given", [(), ("scale",), ("translation",)])
@pytest.mark.parametrize("output", [0, 1])
def test_what_is_not_given_needs_no_tensor_and_one_output_is_enough(given, output):
    model = small()
    inputs = {k: v for k, v in draw(model).items() if k in ("pose", *given)}
    found = torch.autograd.grad(model(**inputs)[output].square().sum(), list(inputs.values()))
    zeros = {"shape": torch.zeros(2, 10, device=DEVICE), "rotation": torch.zeros(2, 3, device=DEVICE)}
    expected = torch.autograd.grad(model.plain(**zeros, **inputs)[output].square().sum(), list(inputs.values()))
    for a, b in zip(found, expected, strict=True): assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


@needs_triton
def test_a_second_derivative_is_refused_and_the_plain_path_gives_it():
    model = small()
    for weight in (1.0, torch.ones((), device=DEVICE, requires_grad=True)):
        pose = draw(model)["pose"]
        gradient, = torch.autograd.grad((model(pose).vertices.square() * weight).sum(), pose, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()
    model.fast, pose = False, draw(model)["pose"]
    gradient, = torch.autograd.grad(model(pose).vertices.square().sum(), pose, create_graph=True)
    gradient.square().sum().backward()
    assert pose.grad.abs().max() > 0


@needs_triton
def test_backward_twice_gives_the_same_and_a_change_in_place_is_noticed():
    model, inputs = small(), draw(small())
    total = model(**inputs).vertices.square().sum()
    first, second = (torch.autograd.grad(total, list(inputs.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    pose = inputs["pose"] * 1
    total = model(pose).vertices.sum()
    pose.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@needs_triton
def test_changed_constants_are_packed_again():
    model = small()
    inputs = {k: v.detach() for k, v in draw(model).items()}
    packed, before = device_hand(model), model(**inputs).vertices
    assert device_hand(model) is packed
    model.v_template += 0.01
    assert device_hand(model) is not packed and (model(**inputs).vertices - before).abs().max() > 5e-3
    assert torch.allclose(model(**inputs).vertices, model.plain(**inputs).vertices, atol=2e-6)


@needs_triton
def test_empty_batch_strided_inputs_and_autocast():
    model = small()
    assert model(torch.zeros(0, 45, device=DEVICE)).joints.shape == (0, 21, 3)
    strided = (torch.randn(2, 90, generator=torch.Generator().manual_seed(0)) * 0.3).to(DEVICE)[:, ::2].requires_grad_()
    assert not strided.is_contiguous()
    (of_strided, of_plain) = (with_gradients(f, {"pose": strided, "shape": torch.zeros(2, 10, device=DEVICE, requires_grad=True),
                                                 "rotation": torch.zeros(2, 3, device=DEVICE, requires_grad=True)}) for f in (model, model.plain))
    for a, b in zip(of_strided, of_plain): assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())
    with torch.autocast(DEVICE, torch.bfloat16): vertices = model(strided).vertices
    assert vertices.dtype == torch.float32 and torch.equal(vertices, of_strided[0])


@needs_triton
def test_a_nan_stays_a_nan_in_its_own_hand():
    model = small()
    pose = torch.zeros(3, 45, device=DEVICE)
    pose[1, 7] = torch.nan
    assert model(pose).vertices.isnan().flatten(1).any(1).tolist() == [False, True, False]


@needs_triton
@pytest.mark.parametrize("name, size", [("pose", (2, 44)), ("shape", (1, 10)), ("shape", (2, 9)), ("rotation", (2, 4)), ("translation", (1, 3)), ("scale", (2, 1))])
def test_shapes_never_reach_the_kernels_unchecked(name, size):
    model = small()
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        cuda_hand(model, **(draw(model) | {name: torch.zeros(size, device=DEVICE)}))


@needs_triton
def test_who_takes_which_path(monkeypatch):
    model = small()
    pose = torch.zeros(1, 45, device=DEVICE)
    assert fast_hand.kernels_for(model, pose, device="cuda") is cuda_hand
    assert fast_hand.kernels_for(model, pose, device="mps") is None and fast_hand.kernels_for(model, pose.double(), device="cuda") is None
    monkeypatch.setattr(module, "triton", None)
    assert fast_hand.kernels_for(model, pose, device="cuda") is None
    with pytest.raises(RuntimeError, match="expects Triton"): cuda_hand(model, pose, torch.zeros(1, 10), torch.zeros(1, 3))


def test_without_triton_the_library_imports_and_takes_the_plain_path():
    code = ("import sys; sys.modules['triton'] = None\nimport torch, handrecon.cuda_hand\nfrom handrecon.fast_hand import kernels_for\n"
            "from handrecon.proxy_hand import proxy_hand\nprint(kernels_for(proxy_hand(), torch.zeros(1, 45), device='cuda'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(Path(module.__file__).parent.parent)))
    assert done.stdout.strip() == "None", done.stderr


def test_paths_and_constants_follow_the_tree():
    model = small()
    paths, hand = paths_to(model.parents), device_hand(model)
    for j in range(16):
        line = [level[j] for level in paths if level[j] >= 0]
        assert line[0] == 0 and line[-1] == j and all(model.parents[b] == a for a, b in zip(line, line[1:]))
        assert hand.below[:, j].nonzero().flatten().tolist() == sorted(line)
        assert torch.allclose(hand.steps[:, :, line].sum(2), hand.joints[:, :, j], atol=1e-6)
    assert all(s % 4 == 0 for s in (*hand.directions.shape, hand.template.shape[1]))
    assert sorted([*hand.bone_rows.tolist(), *hand.tip_rows.tolist()]) == list(range(21))


COMPILE = """
import os, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from handrecon import cuda_hand as c
sizes = dict(SHAPES=10, WIDTH=16, ROWS=148, BONES=16, JOINTS=21, LEVELS=4, V=778, W=780, TIPS=5, BLOCK=c.BLOCK)
for kernel, warps in ((c.pose_bones, 1), (c.skin_vertices, 4), (c.skin_backward, 4), (c.bones_backward, 1)):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in sizes else "*i32" if n in ("paths", "bone_rows", "tips", "tip_rows") else "*fp32" for n in names}
    built = triton.compile(ASTSource(kernel, signature, {(i,): sizes[n] for i, n in enumerate(names) if n in sizes},
                                     {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in sizes}),
                           target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        print(subprocess.run([Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout)
"""


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu_that_is_not_there_and_fit_its_registers(capability):
    "The interpreter accepts more than the compiler does; and a kernel that spills its registers is slow."
    version = tuple(map(int, module.triton.__version__.split(".")[:2]))
    if version < (3, 3): pytest.skip(f"compiling without a GPU expects Triton 3.3 or later, found {module.triton.__version__}")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(Path(module.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", COMPILE.replace("CAPABILITY", str(capability))], capture_output=True, text=True, env=env)
    used = [(name, int(stack)) for name, stack in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", done.stdout)]
    assert [name for name, _ in used] == ["pose_bones", "skin_vertices", "skin_backward", "bones_backward"], done.stderr[-2000:]
    assert all(stack <= 32 for _, stack in used), used        # 32 bytes: sines of huge angles

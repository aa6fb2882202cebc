"""No step allocates more than three times its outputs: the peak of the process's memory, measured by the kernel."""
import ctypes
import gc
import os

import pytest
import torch

from handrecon.contour import soft_silhouette
from handrecon.proxy_hand import proxy_hand
from handrecon.raster import rasterize
from handrecon.render import light_from_vector, render

REFS = "/proc/self/clear_refs"
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
pytestmark = pytest.mark.skipif(TRIM is None or not os.access(REFS, os.W_OK), reason="only Linux tells a process its peak")


def _status(key):
    with open("/proc/self/status") as file: return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def peak(call):
    "Bytes that the process grew by at its largest, while `call` ran."
    gc.collect()
    TRIM(0)                                                # what was freed goes back, or it would be used again unseen
    with open(REFS, "w") as file: file.write("5")          # the high-water mark begins here
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def test_the_measurement_sees_what_is_allocated():
    grown, x = peak(lambda: torch.ones(40_000_000) + 1)
    assert 310e6 < grown < 340e6 and x[0] == 2             # two of 160 MB


def hand(n):
    model = proxy_hand()
    g = torch.Generator().manual_seed(0)
    leaves = [(s * torch.randn(n, k, generator=g)).requires_grad_() for s, k in ((0.4, 45), (1, 10), (1, 3))]
    return leaves, lambda: tuple(model(*leaves))


def scene(n, size):
    model = proxy_hand()
    vertices = model(torch.zeros(n, 45)).vertices.detach() @ torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    vertices = vertices - (vertices.amin(1, keepdim=True) + vertices.amax(1, keepdim=True)) / 2 + torch.tensor([0, 0, 0.5])
    K = torch.tensor([[2.5 * size, 0, size / 2], [0, 2.5 * size, size / 2], [0, 0, 1]]).repeat(n, 1, 1)
    return vertices.requires_grad_(), model.faces, K, torch.full((n, model.n_vertices, 3), 0.6).requires_grad_()


def rasterizing(n, size=128):
    vertices, faces, K, _ = scene(n, size)
    return [vertices], lambda: tuple(rasterize(vertices, faces, K, (size, size)))


def rendering(n, size=128):
    vertices, faces, K, texture = scene(n, size)
    light = torch.tensor([[0.5, 1, 1, 1, 0.5, 1, 0.95, 0.9, 0.3, -0.4, -1]]).repeat(n, 1).requires_grad_()
    def draw():
        drawn = render(vertices, faces, K, (size, size), texture, light_from_vector(light))
        return drawn.image, drawn.silhouette, drawn.depth, *drawn.fragments[::2]
    return [vertices, texture, light], draw


def blurring(n, size=224):
    vertices, faces, K, _ = scene(n, size)
    return [vertices], lambda: (soft_silhouette(vertices, faces, K, (size, size), 0.25),)


@pytest.mark.parametrize("work, few, many", [(hand, 40, 6000), (rasterizing, 2, 160), (rendering, 2, 96), (blurring, 2, 130)])
def test_a_step_allocates_at_most_three_times_its_outputs(work, few, many):
    leaves, call = work(few)                               # compiles, and fills the caches that stay
    def whole(leaves, call, upstream=None):
        outputs = call()
        wanted = [x for x in outputs if x.requires_grad]
        upstream = [torch.ones_like(x) for x in wanted] if upstream is None else upstream
        return torch.autograd.grad(wanted, leaves, upstream, allow_unused=True)
    whole(leaves, call)
    leaves, call = work(many)
    outputs = call()
    size, upstream = sum(x.nbytes for x in outputs), [torch.ones_like(x) for x in outputs if x.requires_grad]
    del outputs
    assert size > 25e6                                     # far more than the noise of the measurement
    with torch.no_grad(): forward, _ = peak(call)
    both, _ = peak(lambda: whole(leaves, call, upstream))
    print(f"{work.__name__}: {forward / size:.2f} forward, {both / size:.2f} forward and backward")
    assert forward < 3 * size and both < 3 * size

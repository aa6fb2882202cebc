"""Every function of the library is checked against its written shapes while the tests run."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: two test workers share two cores
os.environ.setdefault("TRITON_INTERPRET", "1")  # where Triton is installed, kernels for graphics cards run in NumPy

from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

UNCHECKED = {"kernels", "raster", "contour", "fused", "cuda_raster", "fast_hand", "cuda_hand", "cli", "_modidx"}  # compiled kernels, and signatures that typer reads


def _modules():
    from pathlib import Path
    package = Path(__file__).parent.parent / "handrecon"
    return [f"handrecon.{p.stem}" for p in package.glob("*.py") if p.stem not in UNCHECKED | {"__init__"}]


install_import_hook(_modules(), "beartype.beartype")
# No deadline: how long an example takes depends on what else the machine does. Derandomised: everybody's run tries the same examples.
settings.register_profile("patient", deadline=None, derandomize=True)
settings.load_profile("patient")

"""The book, built once for every test that looks at it."""
import fcntl
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "handbook"))
import equations  # noqa: E402, F401
import reference  # noqa: E402, F401
import stage  # noqa: E402


def build_book(base):
    "Built once for all workers that share this session's folder."
    place = base / "handbook"
    with open(base / "handbook.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "done.json").exists():
            began, before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
            stage.stage(place / "source")
            command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "handbook", place / "source", place / "html"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            (place / "done.json").write_text(json.dumps({"failed": done.returncode, "said": done.stderr, "seconds": time.process_time() - began + after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}))
    return place


def built_book(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    return build_book(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)

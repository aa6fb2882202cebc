"""Files are whole or absent, and look like any other file."""
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handrecon import files
from handrecon.files import atomic_path, leftovers, write_bytes, write_json, write_npz, write_text


def test_what_is_written_is_read(tmp_path):
    write_bytes(tmp_path / "new/folder/a.bin", b"\x00\r\n")
    write_text(tmp_path / "a.txt", "ü\r\n")
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    write_npz(tmp_path / "a.npz", x=np.arange(3))
    assert (tmp_path / "new/folder/a.bin").read_bytes() == b"\x00\r\n"
    assert (tmp_path / "a.txt").read_bytes() == "ü\r\n".encode()
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1.5,\n  null\n ],\n "b": 1\n}\n'
    assert np.load(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npz", "a.txt", "new"]


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=9))
def test_json_round_trip(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert json.loads(path.read_text()) == value


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3)])
def test_a_stopped_writer_leaves_what_was_there(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(type(error)):
        with atomic_path(tmp_path / "a.txt") as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".txt" and temporary.name.startswith(".")
            temporary.write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, mask):
    import torch

    from handrecon.training import save_checkpoint
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "")
        (tmp_path / "plain").write_text("")
        save_checkpoint(tmp_path / "net.safetensors", torch.nn.Linear(2, 2), {"system": "test"})
    finally: os.umask(before)
    assert len({os.stat(tmp_path / name).st_mode for name in ("a", "plain", "net.safetensors")}) == 1


def test_full_disk_keeps_the_old_file(tmp_path):
    script = ("import resource, signal, sys\nfrom pathlib import Path\nfrom handrecon.files import write_bytes\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
              "write_bytes(Path(sys.argv[1]), b'old')\ntry: write_bytes(Path(sys.argv[1]), bytes(5000))\nexcept OSError as e: print(e.errno)")
    answer = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.strip().isdigit(), answer.stderr
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_many_writers_one_whole_file(tmp_path):
    path = tmp_path / "a"
    threads = [threading.Thread(target=lambda i=i: [write_bytes(path, bytes([i]) * 50_000) for _ in range(20)]) for i in range(4)]
    for thread in threads: thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 50_000 and len(set(data)) == 1
    for thread in threads: thread.join()
    assert os.listdir(tmp_path) == ["a"]


def test_long_names_and_taken_folders(tmp_path):
    write_text(tmp_path / ("n" * 250), "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError): write_text(tmp_path / "file/inside", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError): write_text(tmp_path / "folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "n" * 250]


def test_what_a_killed_writer_leaves_is_found_and_nothing_else(tmp_path):
    script = "import os, sys\nfrom handrecon.files import atomic_path\nwith atomic_path(sys.argv[1]) as path: os.kill(os.getpid(), 9)"
    for name in ("a.json", "sub/no-ending", "sub/two.ends.jpg"): subprocess.run([sys.executable, "-c", script, tmp_path / name], check=False)
    for name in (".gitignore", ".mine-deadbee.txt", "seen-deadbeef.txt", "a.json"): (tmp_path / name).write_text("mine")
    assert len(leftovers(tmp_path)) == 3 and {path.suffix for path in leftovers(tmp_path)} == {".json", "", ".jpg"}


@pytest.mark.parametrize("layout", ["freihand", "rhd"])
def test_a_killed_synth_goes_on(tmp_path, layout):
    "SIGKILL in the middle of a write; the same command makes the same folder as if nothing had been."
    from handrecon.layouts import write_layout
    script = ("import os, sys\nfrom pathlib import Path\nfrom handrecon import files, layouts\nreplace, calls = os.replace, []\n"
              "def killed(a, b):\n    calls.append(b)\n    if len(calls) == int(sys.argv[3]): os.kill(os.getpid(), 9)\n    replace(a, b)\n"
              "os.replace = killed\nlayouts.write_layout(sys.argv[1], sys.argv[2], 2, 1, progress=False)")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for at in (1, 4): assert subprocess.run([sys.executable, "-c", script, layout, parts, str(at)], check=False).returncode == -9
    assert leftovers(parts)
    for folder in (whole, parts): write_layout(layout, folder, 2, 1, progress=False)
    content = lambda root: {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert content(whole) == content(parts)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_text_is_read_as_its_mark_says(tmp_path, encoding):
    data = ("\ufeff" if encoding == "utf-16-le" else "") + "[1, \"é\"]"
    (tmp_path / "a.json").write_bytes(data.encode(encoding))
    assert files.read_text(tmp_path / "a.json") == "[1, \"é\"]"


def test_visible_files_are_what_a_person_sees(tmp_path):
    for name in ("b.JPG", "a.jpg", "._a.jpg", ".DS_Store", "Thumbs.db"): (tmp_path / name).touch()
    (tmp_path / "c.jpg").mkdir()
    assert [p.name for p in files.visible_files(tmp_path, ".jpg", ".jpeg")] == ["a.jpg", "b.JPG"]
    assert files.posix_name("a\\b/c.jpg") == "a/b/c.jpg"

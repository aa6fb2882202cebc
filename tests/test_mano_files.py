import base64
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mano_fixtures import _DTYPES, _INTERNED, Python2Pickler, fabricate, fresh, py2_array, py2_ch, py2_csc, py2_select, python2_pickle
from safetensors.numpy import save as save_safetensors

from handrecon import mano_files as mf
from handrecon.mano import MANO_ARRAYS, HandModel, mirror_arrays

ARRAYS = fabricate()
GOLDEN = json.loads((Path(__file__).parent / "data" / "python2_chumpy.json").read_text())
POSE = 0.3 * torch.randn(2, 45, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, content):
    path.write_bytes(content)
    return path


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def small_python2(protocol):
    "The dictionary that Python 2.7 and chumpy pickled for the golden file, by our writer."
    _DTYPES.clear(), _INTERNED.clear()
    M = np.zeros((2, 3))
    M[0, 1], M[1, 2] = 0.25, 0.5
    return Python2Pickler(protocol).dumps({
        "f": py2_array(np.arange(6, dtype=np.uint32).reshape(2, 3)), "J_regressor": py2_csc(M), "posedirs": py2_array(np.asfortranarray(np.arange(6.0).reshape(2, 3))),
        "v_template": py2_ch(np.arange(6.0).reshape(2, 3)), "shapedirs": py2_select(np.arange(12.0).reshape(2, 2, 3), np.s_[:, :, :2]), "bs_type": fresh("lrotmin")})


@pytest.mark.parametrize("protocol", [0, 2])
def test_the_fixture_writer_is_byte_true_to_python2_and_chumpy(protocol):
    assert small_python2(protocol) == base64.b64decode(GOLDEN[f"p{protocol}"])


@pytest.mark.parametrize("name", ["p0", "p2", "c0", "c2"])
def test_real_python2_chumpy_pickles(name):
    tree = mf.read_pickle(base64.b64decode(GOLDEN[name]))
    assert tree["bs_type"] == "lrotmin"
    expected = {"f": np.arange(6).reshape(2, 3), "J_regressor": [[0, .25, 0], [0, 0, .5]], "posedirs": np.arange(6.0).reshape(2, 3),
                "v_template": np.arange(6.0).reshape(2, 3), "shapedirs": np.arange(12.0).reshape(2, 2, 3)[..., :2]}
    for key, value in expected.items():
        assert np.array_equal(mf.array_of(tree[key]), value), key


FORMS = {
    "chumpy 0": lambda: python2_pickle(ARRAYS, 0), "chumpy 2": lambda: python2_pickle(ARRAYS, 2), "plain python 2": lambda: python2_pickle(ARRAYS, 2, chumpy=False),
    **{f"pickle {p}": (lambda p=p: pickle.dumps(ARRAYS, p)) for p in range(6)},
    **{f"scipy {kind}": (lambda kind=kind: pickle.dumps(dict(ARRAYS, J_regressor=getattr(scipy.sparse, kind)(ARRAYS["J_regressor"]))))
       for kind in ("csc_matrix", "csr_matrix", "coo_matrix", "csc_array", "coo_array")},
    "fortran order": lambda: pickle.dumps({k: np.asfortranarray(v) for k, v in ARRAYS.items()}, 2),
    "big endian": lambda: pickle.dumps({k: v.astype(v.dtype.newbyteorder(">")) for k, v in ARRAYS.items()}, 2),
    "npz": lambda: npz(**ARRAYS),
    "safetensors": lambda: save_safetensors({k: np.ascontiguousarray(v) for k, v in ARRAYS.items()}),       # it writes memory as it lies
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(form, tmp_path):
    expected = HandModel(ARRAYS, n_pca=None, flat_hand_mean=False)(POSE)
    path = write(tmp_path / "MANO_RIGHT.pkl", FORMS[form]())
    for _ in range(2):                                                      # from the file, then from the cache
        model = HandModel.from_mano(path, flat_hand_mean=False)
        assert all(torch.equal(a, b) for a, b in zip(model(POSE), expected))
        assert (model.source.side, model.source.flat_hand_mean, len(model.source.sha256)) == ("right", False, 64)
    assert model.source.kind == ("pickle with chumpy arrays" if "chumpy" in form else form if form in ("npz", "safetensors") else "pickle")


def test_the_second_load_is_fast_and_the_cache_follows_the_content(tmp_path):
    path = write(tmp_path / "MANO_RIGHT.pkl", python2_pickle(ARRAYS))
    mf.load_mano(path)

    def seconds():
        start = time.perf_counter()
        mf.load_mano(path)
        return time.perf_counter() - start
    assert min(seconds() for _ in range(20)) < 0.02
    changed = dict(ARRAYS, v_template=ARRAYS["v_template"] + 0.001)
    write(path, python2_pickle(changed))
    assert torch.allclose(mf.load_mano(path).v_template, torch.tensor(changed["v_template"]).float())
    folder = tmp_path / "cache" / "handrecon"
    assert len(list(folder.iterdir())) == 2 and not list(folder.glob("*.part"))
    for cached in folder.iterdir():
        cached.write_bytes(cached.read_bytes()[:1000])                     # a broken cache is written again
    assert torch.equal(mf.load_mano(path)(POSE).vertices, HandModel(changed)(POSE).vertices)
    assert max(f.stat().st_size for f in folder.iterdir()) > 10_000


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    path = write(tmp_path / "hand.pkl", pickle.dumps(ARRAYS))
    not_a_folder = write(tmp_path / "file", b"")
    assert mf.load_mano(path, cache=not_a_folder).n_vertices == 778
    assert mf.load_mano(path, cache=False).n_vertices == 778 and not (tmp_path / "cache").exists()


def sized(arrays, factor=0.05):
    "Arrays whose first shape component is size, as of the official files."
    shapedirs = arrays["shapedirs"].copy()
    shapedirs[..., 0] = factor * arrays["v_template"]
    return dict(arrays, shapedirs=shapedirs)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("factor", [0.05, -0.05])
def test_the_left_hands_shapedirs(beside, factor, tmp_path):
    right = sized(ARRAYS, factor)
    good = mirror_arrays(right)
    bad = dict(good, shapedirs=right["shapedirs"])
    if beside: write(tmp_path / "MANO_RIGHT.pkl", pickle.dumps(right))
    path = tmp_path / "MANO_LEFT.pkl"
    for arrays, notes in ((good, 0), (bad, 1)):
        write(path, pickle.dumps(arrays))
        model = mf.load_mano(path)
        assert len(model.source.notes) == notes and model.source.side == "left"
        assert torch.equal(model.shapedirs, torch.tensor(good["shapedirs"]).float())
    kept = mf.load_mano(path, mend_shapedirs=False)
    assert torch.equal(kept.shapedirs, torch.tensor(bad["shapedirs"]).float()) and "left as they are" in kept.source.notes[0]
    assert mf.load_mano(write(tmp_path / "x.pkl", pickle.dumps(right))).source.notes == ()


def test_without_evidence_nothing_is_mended(tmp_path):
    for seed in range(20):
        left = mirror_arrays(fabricate(seed))
        assert not mf.has_shapedirs_error(left) or abs(np.corrcoef(left["v_template"][:, 0], left["shapedirs"][:, 0, 0])[0, 1]) > 0.5
    right = fabricate(3)                                                    # no size component, but the right file lies beside it
    assert mf.has_shapedirs_error(dict(mirror_arrays(right), shapedirs=right["shapedirs"]), right)
    assert not mf.has_shapedirs_error(mirror_arrays(right), right)


def test_folders_and_sides(tmp_path):
    write(tmp_path / "MANO_RIGHT.pkl", pickle.dumps(ARRAYS))
    write(tmp_path / "MANO_LEFT.pkl", pickle.dumps(mirror_arrays(ARRAYS)))
    assert [mf.load_mano(tmp_path, side).side for side in (None, "right", "left")] == ["right", "right", "left"]
    turned = dict(ARRAYS, v_template=ARRAYS["v_template"][:, [2, 1, 0]])
    path = write(tmp_path / "turned.pkl", pickle.dumps(turned))
    with pytest.raises(mf.ManoFileError, match="name the side"):
        mf.load_mano(path)
    assert mf.load_mano(path, "right").source.side == "right"


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def evil_files(flag):
    inside = pickle.dumps({"v_template": Evil(flag)}, 2)
    objects = np.empty(1, object)
    objects[0] = Evil(flag)
    by_module = lambda module, name: b"c" + module + b"\n" + name + b"\n(S'" + str(flag).encode() + b"'\ntR."
    return {
        "reduce": inside, "protocol 4": pickle.dumps(Evil(flag), 4), "object array": pickle.dumps(dict(ARRAYS, v_template=objects)), "npz of objects": npz(**dict(ARRAYS, v_template=objects)),
        "posix": by_module(b"posix", b"mkdir"), "eval": by_module(b"__builtin__", b"eval"), "chumpy attribute": by_module(b"chumpy.ch", b"os.mkdir"),
        "dotted": by_module(b"numpy", b"core.multiarray.os.mkdir"), "inst": b"(S'" + str(flag).encode() + b"'\niposix\nmkdir\n.", "obj": b"(cposix\nmkdir\nS'" + str(flag).encode() + b"'\no.",
        "extension": b"\x80\x02\x82\x01.", "persistent": b"Pid\n.", "build": b"\x80\x02}(U\x01aNub.", "reduce a text": b"S'print'\n(S'x'\ntR.",
        "newobj_ex": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93)}\x92.", "set of tuples": b"\x80\x04\x8f(\x8c\x01a\x90.",
    }


def test_hostile_files_run_nothing(tmp_path):
    flag = tmp_path / "was run"
    for name, content in evil_files(flag).items():
        path = write(tmp_path / "x.pkl", content)
        with pytest.raises(mf.ManoFileError) as error:
            mf.load_mano(path)
        assert not flag.exists() and str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400, name
    with pytest.raises(mf.ManoFileError, match="nothing was run"):
        mf.load_mano(write(tmp_path / "x.pkl", evil_files(flag)["posix"]))


def _bytes(n): return n.to_bytes(8, "little")


def greedy_files():
    "Small files that ask for a lot."
    array = pickle.dumps({"v_template": np.zeros((2, 3))}, 2)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**5)})
    huge_npy, bomb = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(huge_npy, "w") as z: z.writestr("v_template.npy", header.getvalue())
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("v_template.npy", bytes(10**8))
    sparse = scipy.sparse.csc_matrix((2, 2))
    sparse._shape = (10**9, 10**9)
    repeat = scipy.sparse.csc_matrix(np.eye(2))
    repeat.indptr = np.array([0, 10**9, 2])
    return {
        "declared shape": array.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"), "memo": b"\x80\x02}r\xff\xff\xff\xff.", "bytes8": b"\x80\x04\x8e" + _bytes(2**40) + b"x.",
        "bytearray8": b"\x80\x05\x96" + _bytes(2**40) + b"x.", "unicode8": b"\x80\x04\x8d" + _bytes(2**62) + b"x.", "frame": b"\x80\x04\x95" + _bytes(2**50) + b"N.", "long4": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
        "dicts": b"\x80\x02(" + b"}" * 3_000_000 + b"t.", "tuple hash": b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns.",
        "protocol-0 tuple hash": b"(()" + b"".join(b"p%d\ng%d\n\x86" % (i, i) for i in range(60)) + b"Nd.", "deep": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
        "digits": b"I" + b"9" * 5_000_000 + b"\n.", "npy header": huge_npy.getvalue(), "zip bomb": bomb.getvalue(), "sparse shape": pickle.dumps(dict(ARRAYS, J_regressor=sparse)),
        "sparse columns": pickle.dumps(dict(ARRAYS, J_regressor=repeat)), "safetensors": _bytes(2**40) + b"{}", "safetensors shape": _bytes(70) + b'{"f":{"dtype":"F64","shape":[1000000,1000000],"data_offsets":[0,8]}}  ',
    }


def test_files_that_ask_for_a_lot_get_nothing(tmp_path):
    code = """if True:
        import re, sys, pathlib
        from handrecon import mano_files as mf
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            try: mf.read_mano(path, cache=False); print("accepted", path)
            except mf.ManoFileError as error: assert "\\n" not in str(error), error
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())  # ru_maxrss would count the parent that forked us
        print(int(peak[1]) // 1024)
    """
    (tmp_path / "files").mkdir()
    for name, content in greedy_files().items(): write(tmp_path / "files" / name, content)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "files")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accepted" not in done.stdout and int(done.stdout) < 1000, done.stdout       # megabytes, torch included
    assert time.perf_counter() - start < 60


SEEDS = {"golden": base64.b64decode(GOLDEN["c2"]), "golden text": base64.b64decode(GOLDEN["p0"]), "python 3": pickle.dumps({"f": np.arange(6), "a": [1, (2.5, None)], "b": {"c": True}}, 4),
         "evil": pickle.dumps({"v_template": Evil("never")}, 2), "sparse": pickle.dumps({"J_regressor": scipy.sparse.csc_matrix(np.eye(3))}, 2),
         "npz": npz(f=np.arange(6)), "safetensors": save_safetensors({"f": np.arange(6)})}


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(st.sampled_from(sorted(SEEDS)), st.integers(0, 2**32), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(min_size=1, max_size=6)), min_size=1, max_size=6))
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_fuzz(name, seed, edits):
    data = bytearray(SEEDS[name])
    for where, what, new in edits:
        i = int(where * len(data))
        if what == 0: data[i:i + len(new)] = new                           # overwrite
        elif what == 1: data[i:i] = new                                    # insert
        elif what == 2: del data[i:i + len(new)]                           # delete
        elif what == 3: data[i:i] = data[max(0, i - 20):i]                 # repeat
        else: data[i:] = b""                                               # cut
    before = set(sys.modules)
    try:
        arrays, _ = mf._read_any(bytes(data))
        assert all(isinstance(a, np.ndarray) for a in arrays.values())
    except Exception as error:
        _documented(error, bytes(data))
    new = {module.split(".")[0] for module in set(sys.modules) - before}
    assert not os.path.exists("never") and new <= {"handrecon", "encodings", "beartype", "wadler_lindig"}   # text, and the words of failed checks


def _documented(error, data):
    "Whatever stops the reader, read_mano says in one sentence."
    import tempfile
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(mf.ManoFileError) as told:
            mf.read_mano(file.name, cache=False)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_fuzz_instructions(data):
    for content in (data, b"\x80\x02" + data + b"."):
        try: mf.read_pickle(content)
        except mf.ManoFileError as error: assert "\n" not in str(error)


WHOLE = pickle.dumps(ARRAYS, 2)


@pytest.mark.parametrize("content, words", [
    (b"", "not a pickle"), (b"hello", "not a pickle"), (WHOLE[:200_000], "cut off"), (WHOLE[:-1], "cut off"), (b"\n<!DOCTYPE html><html>", "found a web page"), (pickle.dumps([1, 2]), "found a pickle of 'list'"),
    (pickle.dumps(dict(ARRAYS, v_template=np.zeros((6890, 3)), kintree_table=np.zeros((2, 24), int))), r"found an SMPL body \(or SMPL\+H\) \(6890 vertices, 24 joints\)"),
    (npz(**dict(ARRAYS, v_template=np.zeros((10475, 3)), kintree_table=np.zeros((2, 55), int))), "found an SMPL-X body"), (pickle.dumps({k: v for k, v in ARRAYS.items() if k != "posedirs"}), "found no posedirs"),
    (pickle.dumps(dict(ARRAYS, weights=ARRAYS["weights"] * np.nan)), "weights: expected finite numbers"), (pickle.dumps(dict(ARRAYS, weights="heavy")), "holds 'str' where an array belongs"),
    (pickle.dumps(dict(ARRAYS, f=np.array(["a"]))), "expected plain numbers"), (save_safetensors({"f": np.arange(6)}), "found no v_template"), (npz(x=np.arange(3)), "found no v_template"),
    (python2_pickle(ARRAYS).replace(b"chumpy.reordering\nSelect", b"chumpy.ch_ops\nadd_____Sel"), "computation and not data")])
def test_wrong_files_are_one_clear_sentence(content, words, tmp_path):
    path = write(tmp_path / "x.pkl", content)
    with pytest.raises(mf.ManoFileError, match=words) as error:
        HandModel.from_mano(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value) and not (tmp_path / "cache").exists()


def test_more_wrong_calls(tmp_path):
    path = write(tmp_path / "MANO_LEFT.pkl", pickle.dumps(ARRAYS))          # a right hand under the left one's name
    with pytest.raises(mf.ManoFileError, match="expected a left hand, found a right one"):
        mf.load_mano(path, side="left")
    with pytest.raises(mf.ManoFileError, match="no such file"):
        mf.load_mano(tmp_path / "nowhere.pkl")
    with pytest.raises(mf.ManoFileError, match="MANO_RIGHT.pkl: no such file"):
        mf.load_mano(tmp_path)
    with pytest.raises(mf.ManoFileError, match="fingertips: expected"):
        few = fabricate(n_vertices=600)
        mf.load_mano(write(path, pickle.dumps(few)))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as z: z.writestr("mano_v1_2/models/MANO_RIGHT.pkl", b"")
    with pytest.raises(mf.ManoFileError, match="unpack it first"):
        mf.load_mano(write(tmp_path / "mano_v1_2.zip", zipped.getvalue()))
    with open(tmp_path / "large.pkl", "wb") as file: file.truncate(300 * 2**20)
    with pytest.raises(mf.ManoFileError, match="found 300 MB"):
        mf.load_mano(tmp_path / "large.pkl")


def test_neither_scipy_nor_chumpy_is_imported(tmp_path):
    path = write(tmp_path / "MANO_RIGHT.pkl", python2_pickle(ARRAYS))
    code = "import sys; from handrecon.mano import HandModel; HandModel.from_mano(sys.argv[1]); sys.exit(any(m in sys.modules for m in ('scipy', 'chumpy')))"
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=120).returncode == 0


def test_report(tmp_path):
    from handrecon.proxy_hand import proxy_hand_arrays
    arrays = {k: v.numpy() for k, v in proxy_hand_arrays("left").items() if k in MANO_ARRAYS}
    report = mf.check_mano(write(tmp_path / "MANO_LEFT.pkl", pickle.dumps(arrays)))
    assert "a left hand (pickle" in report.lines[0] and "778 vertices, 1538 faces" in report.lines[1] and "normals outwards" in report.lines[3]
    from handrecon.viz import turntable
    picture = turntable(report.vertices, report.faces)
    assert picture.ndim == 3 and picture.std() > 10
    inside_out = dict(arrays, f=arrays["f"][:, ::-1], v_template=1000 * arrays["v_template"])
    lines = mf.check_mano(write(tmp_path / "x.pkl", pickle.dumps(inside_out))).lines
    assert "INWARDS" in lines[3] and "are these metres?" in lines[2]


def test_mano_layer_is_manopths(tmp_path):
    write(tmp_path / "MANO_RIGHT.pkl", python2_pickle(ARRAYS))
    write(tmp_path / "MANO_LEFT.pkl", pickle.dumps(mirror_arrays(ARRAYS)))
    g = torch.Generator().manual_seed(1)
    betas, trans = torch.randn(2, 10, generator=g), torch.randn(2, 3, generator=g)
    for side, tips in (("right", (745, 317, 444, 556, 673)), ("left", (745, 317, 445, 556, 673))):
        arrays = ARRAYS if side == "right" else mirror_arrays(ARRAYS)
        for use_pca, n in ((True, 12), (False, 45)):
            coefficients = 0.3 * torch.randn(2, 3 + n, generator=g)
            layer = mf.ManoLayer(mano_root=str(tmp_path), side=side, use_pca=use_pca, ncomps=12, flat_hand_mean=False, center_idx=9)
            model = HandModel(arrays, side, n_pca=12 if use_pca else None, flat_hand_mean=False, fingertips=tips)
            mesh = model(coefficients[:, 3:], betas, coefficients[:, :3])
            moved = layer(coefficients, betas, trans)
            centred = layer(coefficients, betas)
            for got, centre, want in zip(moved, centred, (mesh.vertices, mesh.joints)):
                assert torch.allclose(got, 1000 * (want + trans[:, None]), atol=1e-2)
                assert torch.allclose(centre, 1000 * (want - mesh.joints[:, 9:10]), atol=1e-2)
            assert all(torch.equal(a, b) for a, b in zip(centred, layer(coefficients, betas, torch.zeros(1))))
            assert torch.allclose(layer(coefficients)[0], layer(coefficients, torch.zeros(1))[0])
            assert torch.allclose(layer(coefficients, betas, share_betas=torch.ones(1))[0], layer(coefficients, betas.mean(0).expand(2, -1))[0], atol=1e-2)
            palm = layer(coefficients, betas, trans, root_palm=torch.ones(1))
            assert torch.allclose(palm[1][:, 0], palm[0][:, [22, 95]].mean(1), atol=1e-2) and torch.equal(palm[1][:, 1:], moved[1][:, 1:])
    assert layer.th_faces.shape == (1538, 3) and layer.th_v_template.shape == (1, 778, 3) and layer.th_J_regressor.shape == (16, 778) and layer.th_weights.shape == (778, 16)
    with pytest.raises(ValueError, match="rotation modes"):
        mf.ManoLayer(mano_root=tmp_path, root_rot_mode="euler")


def test_the_rendered_mirror_image(tmp_path):
    from handrecon.mano import mirror_params
    from handrecon.proxy_hand import proxy_hand, proxy_hand_arrays
    from handrecon.render import render
    g = torch.Generator().manual_seed(3)
    right, left = proxy_hand("right"), proxy_hand("left")
    params = {"pose": 0.2 * torch.randn(3, 45, generator=g), "shape": torch.randn(3, 10, generator=g), "rotation": torch.randn(3, 3, generator=g),
              "translation": 0.02 * torch.randn(3, 3, generator=g) + torch.tensor([0, 0, 0.6])}
    size = 96
    K = torch.tensor([[200.0, 0, 41], [0, 210, 50], [0, 0, 1]]).expand(3, 3, 3)
    mirrored_K = K.clone()
    mirrored_K[:, 0, 2] = size - K[:, 0, 2]
    texture = proxy_hand_arrays()["texture"].expand(3, -1, -1)
    ours = render(right(**params).vertices, right.faces, K, (size, size), texture)
    theirs = render(left(**mirror_params(**params)).vertices, left.faces, mirrored_K, (size, size), texture)
    different = (ours.image.flip(-1) - theirs.image).abs().amax(1) > 0.02
    assert ours.silhouette.mean() > 0.05 and different.float().mean() < 2e-3       # pixels whose centre lies on an edge may fall either way
    assert (ours.silhouette.flip(-1) - theirs.silhouette).abs().mean() < 1e-3


def test_manopth_s_matrices_and_six_numbers_bend_as_angles_do(tmp_path):
    from handrecon.rotation import axis_angle_to_matrix, matrix_to_rotation_6d
    write(tmp_path / "MANO_RIGHT.pkl", python2_pickle(ARRAYS))
    rotation, trans = torch.tensor([[0.3, -0.2, 0.9], [0.0, 0.1, 0.0]]), torch.tensor([[0.1, 0.0, 0.5], [0.0, 0.0, 0.4]])
    layer = lambda **options: mf.ManoLayer(mano_root=tmp_path, **options)
    angles = layer(use_pca=False)(torch.cat([rotation, POSE], 1), th_trans=trans)
    matrices = axis_angle_to_matrix(torch.cat([rotation, POSE], 1).unflatten(1, (16, 3)))
    for scale in (1.0, 1.1):                                     # a matrix that is no rotation stands for the nearest one
        for a, b in zip(angles, layer(use_pca=False, joint_rot_mode="rotmat", flat_hand_mean=False)(scale * matrices, th_trans=trans)):
            assert torch.allclose(a, b, atol=0.05)               # millimetres
    six = torch.cat([matrix_to_rotation_6d(matrices[:, 0]), POSE], 1)
    for mode in ("rot6d", "rotmat"):                             # manopth reads six numbers in both
        for a, b in zip(angles, layer(use_pca=False, root_rot_mode=mode)(six, th_trans=trans)): assert torch.allclose(a, b, atol=0.05)
    with pytest.raises(ValueError, match=r"expected rotation matrices of shape \(B, 16, 3, 3\), found \(2, 48\)"):
        layer(use_pca=False, joint_rot_mode="rotmat")(torch.zeros(2, 48))


def test_a_model_in_the_wrong_wrapping_is_told_what_it_is(tmp_path):
    import collections
    import gzip
    plain = pickle.dumps({k: np.asarray(v) for k, v in ARRAYS.items()}, 2)
    torch.save({"v_template": torch.zeros(3)}, tmp_path / "saved.pth")
    np.save(tmp_path / "dict.npy", np.zeros(3))
    wrong = {"gzip": gzip.compress(plain), "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "binary mode": plain.replace(b"\n", b"\r\n"),
             "PyTorch tensors": pickle.dumps({"v_template": torch.zeros(3)}), "torch.save": (tmp_path / "saved.pth").read_bytes(), "numpy.savez": (tmp_path / "dict.npy").read_bytes()}
    for word, data in wrong.items():
        with pytest.raises(mf.ManoFileError, match=word): mf.load_mano(write(tmp_path / "MANO_RIGHT.pkl", data), "right", cache=False)
    ordered = pickle.dumps(collections.OrderedDict((k, np.asarray(v)) for k, v in ARRAYS.items()), 2)
    assert mf.load_mano(write(tmp_path / "ordered.pkl", ordered), "right", cache=False).source.kind == "pickle"
    with pytest.raises(mf.ManoFileError): mf.read_pickle(b"\x80\x02ccollections\nOrderedDict\n](]K\x01K\x02eetR.")      # keys that are not texts

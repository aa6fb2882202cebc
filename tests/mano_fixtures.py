"MANO-shaped arrays made of smooth noise: the sizes and structure of the official files, nobody's data."
import numpy as np

from handrecon.conventions import MANO_PARENTS


def fabricate(seed=0, n_vertices=778, n_faces=1538):
    "A right hand: an ellipsoid about the joints of a flat hand, weights from distances, low-frequency fields."
    g = np.random.default_rng(seed)
    joints = np.zeros((16, 3))
    joints[0] = (0.095, 0.006, 0.006)
    for finger, (x, z) in enumerate(((0.008, 0.027), (0.002, 0.003), (0.02, -0.04), (0.01, -0.02), (0.07, 0.03))):
        for k in range(3):
            joints[1 + 3 * finger + k] = (x - 0.03 * k, 0.001 * k, z)
    v = g.normal(size=(n_vertices, 3))
    v = v / np.linalg.norm(v, axis=1, keepdims=True) * (0.09, 0.02, 0.045)
    waves = np.sin(v @ g.normal(0, 30, (3, 24)) + g.uniform(0, 6, 24))          # smooth fields over the surface
    distance = np.linalg.norm(v[:, None] - joints, axis=-1)
    weights = np.exp(-(distance / 0.02) ** 2) + 1e-9
    near = np.exp(-(distance.T / 0.012) ** 2) * (distance.T < 0.05) + 1e-7
    return {
        "v_template": v, "f": g.integers(0, n_vertices, (n_faces, 3)).astype(np.uint32),
        "shapedirs": (waves @ g.normal(0, 1, (24, 30)) * 4e-4).reshape(n_vertices, 3, 10),
        "posedirs": (waves @ g.normal(0, 1, (24, 405)) * 3e-4).reshape(n_vertices, 3, 135),
        "weights": weights / weights.sum(1, keepdims=True), "J_regressor": near / near.sum(1, keepdims=True),
        "kintree_table": np.array([(2**32 - 1,) + MANO_PARENTS[1:], range(16)], np.int64),
        "hands_components": np.linalg.qr(g.normal(size=(45, 45)))[0], "hands_mean": g.normal(0, 0.3, 45),
        "hands_coeffs": g.normal(size=(20, 45)),
    }


# ---- Python 2 pickles, byte for byte, without Python 2, scipy or chumpy ----

class Name(str):
    "'module name' of a class or function."


class Rebuilt:
    "An object as Python 2 pickles it: how to make it, and what to hand to its __setstate__."
    def __init__(self, make, args, state=None, new=False):
        self.make, self.args, self.state, self.new = make, args, state, new


_INTERNED = {}


def interned(text):
    "Python 2 keeps one object for each identifier-like literal, and its pickles refer back to it."
    return _INTERNED.setdefault(text, text.encode("latin1"))


class Text(bytes):
    "Each instance is an object of its own; plain one-byte `bytes` are shared."


def fresh(text):
    "A string that Python 2 made while running: equal to others, the same as none."
    return Text(text.encode("latin1"))


class Python2Pickler:
    "The byte stream of Python 2.7's pickle.py for None, bool, int, bytes (its str), tuple, list, dict, Name and Rebuilt."

    def __init__(self, protocol):
        self.protocol, self.out, self.memo, self.keep = protocol, bytearray(), {}, []

    def dumps(self, obj):
        if self.protocol: self.out += b"\x80" + bytes([self.protocol])
        self.save(obj)
        return bytes(self.out) + b"."

    def remember(self, obj):
        n = len(self.memo)
        self.memo[self.key(obj)] = n
        self.keep.append(obj)
        self.out += b"p%d\n" % n if not self.protocol else b"q" + bytes([n]) if n < 256 else b"r" + n.to_bytes(4, "little")

    @staticmethod
    def key(obj):
        return ("name", str(obj)) if isinstance(obj, Name) else id(obj)

    def save(self, obj):
        binary = self.protocol > 0
        if self.key(obj) in self.memo and not (isinstance(obj, tuple) and not obj):
            n = self.memo[self.key(obj)]
            self.out += b"g%d\n" % n if not binary else b"h" + bytes([n]) if n < 256 else b"j" + n.to_bytes(4, "little")
        elif obj is None: self.out += b"N"
        elif isinstance(obj, bool): self.out += (b"\x88" if obj else b"\x89") if binary else b"I0%d\n" % obj
        elif isinstance(obj, int): self.save_int(obj)
        elif isinstance(obj, bytes): self.save_str(obj)
        else: {Name: self.save_name, tuple: self.save_tuple, list: self.save_list, dict: self.save_dict, Rebuilt: self.save_rebuilt}[type(obj)](obj)

    def save_int(self, n):
        if not self.protocol: self.out += b"I%d\n" % n
        elif 0 <= n < 256: self.out += b"K" + bytes([n])
        elif 0 <= n < 65536: self.out += b"M" + n.to_bytes(2, "little")
        else: self.out += b"J" + n.to_bytes(4, "little", signed=True)

    def save_str(self, s):
        if not self.protocol: self.out += b"S" + repr(bytes(s))[1:].encode() + b"\n"
        elif len(s) < 256: self.out += b"U" + bytes([len(s)]) + s
        else: self.out += b"T" + len(s).to_bytes(4, "little") + s
        self.remember(s)

    def save_name(self, name):
        self.out += b"c" + name.replace(" ", "\n").encode() + b"\n"
        self.remember(name)

    def save_tuple(self, items):
        if not items and self.protocol:
            self.out += b")"
            return
        short = self.protocol and len(items) <= 3
        if not short: self.out += b"("
        for item in items: self.save(item)
        self.out += b"\x85\x86\x87"[len(items) - 1:len(items)] if short else b"t"
        if items: self.remember(items)

    def save_list(self, items):
        self.out += b"]" if self.protocol else b"(l"
        self.remember(items)
        many = self.protocol and len(items) > 1
        if many: self.out += b"("
        for item in items:
            self.save(item)
            if not many: self.out += b"a"
        if many: self.out += b"e"

    def save_dict(self, items):
        self.out += b"}" if self.protocol else b"(d"
        self.remember(items)
        many = self.protocol and len(items) > 1
        if many: self.out += b"("
        for key, value in items.items():
            self.save(interned(key) if isinstance(key, str) else key)
            self.save(value)
            if not many: self.out += b"s"
        if many: self.out += b"u"

    def save_rebuilt(self, obj):
        if obj.new and self.protocol:
            self.save(obj.make)
            self.out += b")\x81"
        elif obj.new:
            self.save(Name("copy_reg _reconstructor"))
            self.save((obj.make, Name("__builtin__ object"), None))
            self.out += b"R"
        else:
            self.save(obj.make)
            self.save(obj.args)
            self.out += b"R"
        self.remember(obj)
        if obj.state is not None:
            self.save(obj.state)
            self.out += b"b"


_DTYPES = {}


def py2_dtype(dtype):
    code = dtype.str[1:]
    if code not in _DTYPES:
        _DTYPES[code] = Rebuilt(Name("numpy dtype"), (fresh(code), 0, 1), (3, fresh("<"), None, None, None, -1, -1, 0))
    return _DTYPES[code]


def py2_array(a):
    fortran = a.flags.f_contiguous and not a.flags.c_contiguous
    zero = tuple([0])       # noqa: C409  a literal would be one shared object, and become a reference in the stream
    return Rebuilt(Name("numpy.core.multiarray _reconstruct"), (Name("numpy ndarray"), zero, interned("b")),
                   (1, a.shape, py2_dtype(a.dtype), fortran, a.tobytes("A" if fortran else "C")))


def _chumpy_state(dirty, **more):
    return {fresh("_make_sparse"): False, "_dirty_vars": Rebuilt(Name("__builtin__ set"), (dirty,)), "_itr": None,
            "_depends_on_deps": {}, fresh("_make_dense"): False, **more}


def py2_ch(a, status=False):
    more = {"x": py2_array(a)} | ({"_status": fresh("new")} if status else {})
    return Rebuilt(Name("chumpy.ch Ch"), (), _chumpy_state([] if status else [interned("x")], **more), new=True)


def py2_select(whole, key):
    "chumpy's `Ch(whole)[key]`."
    numbers = np.arange(whole.size).reshape(whole.shape)[key]
    state = _chumpy_state([interned("idxs"), interned("a"), interned("preferred_shape")], preferred_shape=numbers.shape, idxs=py2_array(numbers.ravel()))
    return Rebuilt(Name("chumpy.reordering Select"), (), {"a": py2_ch(whole, status=True), **state}, new=True)


def py2_csc(dense):
    columns, rows = np.nonzero(dense.T)
    indptr = np.concatenate([[0], np.cumsum((dense != 0).sum(0))]).astype(np.int32)
    state = {"indices": py2_array(rows.astype(np.int32)), "data": py2_array(dense.T[columns, rows]), "maxprint": 50,
             "_shape": dense.shape, "indptr": py2_array(indptr)}
    return Rebuilt(Name("scipy.sparse.csc csc_matrix"), (), state, new=True)


def python2_pickle(arrays, protocol=2, chumpy=True):
    "The official file's form: shapedirs a chumpy selection of more columns, v_template a chumpy array, J_regressor sparse."
    plain = {k: py2_array(v) for k, v in arrays.items()}
    if chumpy:
        wide = np.concatenate([arrays["shapedirs"], arrays["shapedirs"][..., :3]], -1)
        plain |= {"shapedirs": py2_select(wide, np.s_[:, :, :arrays["shapedirs"].shape[-1]]), "v_template": py2_ch(arrays["v_template"]),
                  "J_regressor": py2_csc(arrays["J_regressor"])}
    return Python2Pickler(protocol).dumps(plain | {"bs_style": fresh("lbs"), "bs_type": fresh("lrotmin")})

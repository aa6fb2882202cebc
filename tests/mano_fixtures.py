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

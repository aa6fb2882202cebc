#!/usr/bin/env bash
# glTF's COLOR_0 is linear light; the colours of a PLY file are, by custom, sRGB. trimesh 5.2.0 writes the same eight-bit numbers into both: a mesh of
# mid grey (188) is half as bright as white in a glTF viewer (188/255 = 0.74 linear, where sRGB 188 means 0.50), so GLB and PLY of one mesh differ on screen.
# Way out: turn sRGB into linear numbers before exporting GLB.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 numpy==2.2.6
cat > "$work/try.py" <<'PY'
import json, struct, numpy as np, trimesh
mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], vertex_colors=[[188, 188, 188, 255]] * 3, process=False)
glb, ply = mesh.export(file_type="glb"), mesh.export(file_type="ply", encoding="ascii").decode()
length = struct.unpack("<I", glb[12:16])[0]
tree, body = json.loads(glb[20:20 + length]), glb[28 + length:]
a = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
v = tree["bufferViews"][a["bufferView"]]
stored = np.frombuffer(body, np.uint8, 4, v.get("byteOffset", 0) + a.get("byteOffset", 0))
in_ply = [int(x) for x in ply.split("end_header\n")[1].splitlines()[0].split()[3:6]]
linear = ((188 / 255 + 0.055) / 1.055) ** 2.4
print(f"trimesh {trimesh.__version__}: GLB stores {stored[:3].tolist()} (component type {a['componentType']}), PLY {in_ply}; as linear light 188 should be {255 * linear:.0f}")
assert stored[:3].tolist() == [188] * 3 and in_ply == [188] * 3 and a["componentType"] == 5121
PY
"$work/env/bin/python" "$work/try.py"

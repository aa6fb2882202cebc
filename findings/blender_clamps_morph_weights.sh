#!/usr/bin/env bash
# glTF allows any number as a morph target's weight, also in an animation. Blender's importer (bpy 5.0.1) makes a shape key of each target, sets its
# slider's range from the weight of the FIRST key frame (never less than 0 to 1), and Blender clamps to that range: here the weight runs from 0 to -1,
# the vertex should move from 0 to -1, and stays at 0. No warning. Way out: write targets and rest shape so that all weights lie in 0 to 1.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env" 2>/dev/null || python3 -m venv "$work/env"      # bpy 5.0 is built for Python 3.11 alone
"$work/env/bin/pip" install --quiet --disable-pip-version-check bpy==5.0.1
cat > "$work/try.py" <<'PY'
import base64, json, sys, numpy as np, bpy
parts = [np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.float32([[1, 0, 0]] * 3), np.float32([0, 1]), np.float32([0, -1])]
views, at = [], 0
for p in parts: views.append({"buffer": 0, "byteOffset": at, "byteLength": p.nbytes}); at += p.nbytes
accessor = lambda view, count, kind, p: {"bufferView": view, "componentType": 5126, "count": count, "type": kind,
                                         "min": np.atleast_1d(p.min(0)).tolist(), "max": np.atleast_1d(p.max(0)).tolist()}
tree = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "targets": [{"POSITION": 1}]}], "weights": [0]}],
        "animations": [{"samplers": [{"input": 2, "output": 3, "interpolation": "LINEAR"}], "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}]}],
        "accessors": [accessor(0, 3, "VEC3", parts[0]), accessor(1, 3, "VEC3", parts[1]), accessor(2, 2, "SCALAR", parts[2]), accessor(3, 2, "SCALAR", parts[3])],
        "bufferViews": views,
        "buffers": [{"byteLength": at, "uri": "data:application/octet-stream;base64," + base64.b64encode(b"".join(p.tobytes() for p in parts)).decode()}]}
path = sys.argv[1] + "/morph.gltf"
open(path, "w").write(json.dumps(tree))
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.import_scene.gltf(filepath=path)
shape = next(o for o in bpy.data.objects if o.type == "MESH")
key = shape.data.shape_keys.key_blocks[1]
scene, seen = bpy.context.scene, []
last = round(scene.render.fps / scene.render.fps_base)                          # one second
for frame in (0, last):
    scene.frame_set(frame)
    made = shape.evaluated_get(bpy.context.evaluated_depsgraph_get()).to_mesh()
    seen.append(made.vertices[0].co.x)
print(f"Blender {bpy.app.version_string}: slider {key.slider_min:g} to {key.slider_max:g}; vertex 0 at x = {seen[0]:g} and, at weight -1, {seen[1]:g} (expected -1)")
assert key.slider_min == 0 and abs(seen[1]) < 1e-6
PY
"$work/env/bin/python" "$work/try.py" "$work" 2>/dev/null | grep "^Blender"

#!/usr/bin/env bash
# A glTF skin may name eight joints for a vertex (JOINTS_0/WEIGHTS_0 and JOINTS_1/WEIGHTS_1; their weights sum to one). three.js 0.187's GLTFLoader
# keeps the second set as attributes that no shader and no getVertexPosition reads, and rescales the first four weights so that they sum to one: the
# vertex lands elsewhere, without a warning. Here a vertex hangs to 50 % on a joint in the second set that moves by 1: expected 0.5, three.js says 0.
# Way out: write the four largest weights, renormalised.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"; npm init -y >/dev/null; npm install --silent --no-audit --no-fund three@0.187.0 >/dev/null
cat > try.mjs <<'JS'
import * as THREE from 'three';
import { GLTFLoader } from 'three/addons/loaders/GLTFLoader.js';
globalThis.self = globalThis;
globalThis.ProgressEvent = class {};    // a browser has it; the loader of data addresses wants it
const positions = new Float32Array([0, 0, 0, 0, 1, 0, 0, 0, 1]);
const joints0 = new Uint8Array(12), joints1 = new Uint8Array(12).map((_, i) => (i % 4 === 0 ? 1 : 0));
const weights0 = new Float32Array(12).map((_, i) => (i % 4 === 0 ? 0.5 : 0)), weights1 = new Float32Array(12).map((_, i) => (i % 4 === 0 ? 0.5 : 0));
const eye = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1], inverse = new Float32Array([...eye, ...eye]);
const parts = [positions, joints0, joints1, weights0, weights1, inverse].map(a => Buffer.from(a.buffer));
let at = 0;
const views = parts.map(p => { const v = { buffer: 0, byteOffset: at, byteLength: p.length }; at += p.length; return v; });
const accessor = (bufferView, componentType, count, type, more = {}) => ({ bufferView, componentType, count, type, ...more });
const tree = { asset: { version: '2.0' }, scene: 0, scenes: [{ nodes: [0, 1, 2] }],
  nodes: [{ mesh: 0, skin: 0 }, { name: 'still' }, { name: 'moved', translation: [1, 0, 0] }],
  skins: [{ joints: [1, 2], inverseBindMatrices: 5 }],
  meshes: [{ primitives: [{ attributes: { POSITION: 0, JOINTS_0: 1, JOINTS_1: 2, WEIGHTS_0: 3, WEIGHTS_1: 4 } }] }],
  accessors: [accessor(0, 5126, 3, 'VEC3', { min: [0, 0, 0], max: [0, 1, 1] }), accessor(1, 5121, 3, 'VEC4'), accessor(2, 5121, 3, 'VEC4'),
              accessor(3, 5126, 3, 'VEC4'), accessor(4, 5126, 3, 'VEC4'), accessor(5, 5126, 2, 'MAT4')],
  bufferViews: views, buffers: [{ byteLength: at, uri: 'data:application/octet-stream;base64,' + Buffer.concat(parts).toString('base64') }] };
const gltf = await new GLTFLoader().parseAsync(JSON.stringify(tree), '');
gltf.scene.updateMatrixWorld(true);
let mesh; gltf.scene.traverse(o => { if (o.isSkinnedMesh) mesh = o; });
const point = mesh.getVertexPosition(0, new THREE.Vector3());
console.log(`three.js ${THREE.REVISION}: vertex 0 at x = ${point.x}, expected 0.5; weight kept ${mesh.geometry.attributes.skinWeight.getX(0)} of 0.5; second set read: ${'skinWeight1' in mesh.geometry.attributes}`);
if (!(Math.abs(point.x) < 1e-6 && mesh.geometry.attributes.skinWeight.getX(0) === 1)) process.exit(1);
JS
node try.mjs

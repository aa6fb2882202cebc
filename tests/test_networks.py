"""Backbones, their weights, and heads that start in the right place."""
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from handrecon import networks
from handrecon.resnet import ResNet
from handrecon.networks import BACKBONES, FRONT_LIGHT, MEAN_SKIN, HandEncoder, begin_as, make_backbone, mlp

COUNTS = {"efficientnet-b0": 4_007_548, "efficientnet-b3": 10_696_232, "resnet18": 11_176_512, "resnet50": 23_508_032, "medium": 4_330_400}  # torchvision's, less classifier; medium is ours


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Small networks on shared cores: threads would only wait for one another."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return make_backbone("small").eval()


def published(backbone, tmp_path, suffix, change=None):
    "The backbone's weights in the form in which the library's classifiers are published."
    family = BACKBONES[backbone.name].family
    tensors = {f"{family}.{k}": v.contiguous() for k, v in backbone.body.state_dict().items() if "num_batches" not in k}
    tensors["classifier.1.weight"] = torch.zeros(10, backbone.feature_dim)
    tensors |= change or {}
    path = tmp_path / f"weights{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", list(BACKBONES))
def test_geometry(name):
    backbone = make_backbone(name).eval()
    parameters = sum(p.numel() for p in backbone.parameters())
    assert parameters == COUNTS[name] if name in COUNTS else parameters < 1.5e6
    with torch.no_grad():
        features, low = backbone(torch.rand(2, 3, 96, 64))
    assert features.shape == (2, backbone.feature_dim) and low.shape == (2, backbone.low_dim, 24, 16)
    facts = {"efficientnet-b0": (1280, 24), "efficientnet-b3": (1536, 32)}  # the paper's text and the authors' code
    assert (backbone.feature_dim, backbone.low_dim) == facts.get(name, (backbone.feature_dim, backbone.low_dim))
    assert backbone.low_stride == 4 and backbone.weights_source == "random"
    assert {layer.momentum for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("name", ["efficientnet-b0", "small"])
def test_training_mode_is_deterministic(name):
    backbone, image = make_backbone(name).train(), torch.rand(4, 3, 64, 64)
    assert torch.equal(backbone(image)[0], backbone(image)[0])


def test_momentum_is_the_callers():
    assert all(m.momentum == 0.03 for m in make_backbone("small", bn_momentum=0.03).modules() if isinstance(m, nn.BatchNorm2d))


def test_colours_are_normalised(small):
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(1, 3, 64, 64)
    with torch.no_grad():
        inside = small.body(torch.zeros(1, 3, 64, 64))
        assert torch.allclose(small(mean)[0], inside.pooler_output.flatten(1), atol=1e-5)


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_weights_from_a_file(small, tmp_path, suffix):
    path = published(small, tmp_path, suffix)
    copy = make_backbone("small", path).eval()
    image = torch.rand(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(small(image), copy(image)))
    assert copy.weights_source == path.name and str(tmp_path) not in copy.weights_source


def test_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")
    torch.save({"a": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="bomb.pt: neither safetensors nor a plain PyTorch state dict"):
        make_backbone("small", tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_files_that_do_not_fit(small, tmp_path):
    path = published(small, tmp_path, ".bin")
    with pytest.raises(ValueError, match=r"expected 'embedder.* of shape \(64, 3, 7, 7\), found \(32, 3, 7, 7\)"):
        make_backbone("resnet18", path)
    with pytest.raises(ValueError, match="of efficientnet-b0, found no such tensor"):
        make_backbone("efficientnet-b0", path)
    with pytest.raises(ValueError, match="no such file"):
        make_backbone("small", tmp_path / "absent.safetensors")
    for name, content in (("empty.pt", b""), ("text.pt", b"hello"), ("text.safetensors", b"hello, world, hello"), ("torn.bin", path.read_bytes()[:1000])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: neither") as error:
            make_backbone("small", tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a dictionary of tensors"):
        make_backbone("small", tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected one of efficientnet-b0, .*, found 'vgg'"):
        make_backbone("vgg")


def test_imagenet_weights_that_cannot_be_had_are_recorded(monkeypatch):
    with pytest.warns(UserWarning, match="nobody publishes any for 'small'"):
        assert make_backbone("small", "imagenet").weights_source.startswith("random (no imagenet weights")
    def offline(*_, **__):
        raise networks.urllib.request.URLError("Name or service not known")
    monkeypatch.setattr(networks.urllib.request, "urlopen", offline)
    monkeypatch.setenv("HF_HUB_CACHE", "nowhere")
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="Name or service not known"):
        backbone = make_backbone("resnet18", "somebody/that-does-not-exist")
    assert backbone.weights_source.startswith("random (no somebody/that-does-not-exist weights") and time.perf_counter() - began < 20


def test_imagenet_weights_from_the_hub(small, tmp_path, monkeypatch):
    torch.manual_seed(3)
    source = make_backbone("resnet18").eval()
    path = published(source, tmp_path, ".safetensors")
    asked = []
    monkeypatch.setattr(networks, "_hub_file", lambda repository: asked.append(repository) or path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = make_backbone("resnet18", "imagenet").eval()
    assert asked == ["microsoft/resnet-18"] and copy.weights_source == "hub microsoft/resnet-18"
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(source(image)[0], copy(image)[0])


# ---------------------------------------------------------------- heads

def test_mlp_starts_at_its_bias_and_learns():
    torch.manual_seed(0)
    head = mlp((8, 16, 3), (1.0, 2.0, 3.0))
    out = head(torch.randn(100, 8))
    assert torch.allclose(out, torch.tensor([1.0, 2.0, 3.0]), atol=0.05)
    out.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("rotation", ["axis-angle", "6d"])
def test_first_prediction_is_the_mean_hand_in_front(rotation):
    torch.manual_seed(0)
    encoder = HandEncoder("small", n_pose=12, n_shape=10, n_texture=50, image_size=64, z_bias=0.5, scale_bias=1.1, rotation=rotation)
    code, appearance = encoder(torch.rand(8, 3, 64, 64))
    assert [tuple(c.shape) for c in code[:5]] == [(8, 12), (8, 10), (8, 1), (8, 3), (8, 3)]
    assert max(c.abs().max() for c in (code.pose, code.shape, code.rotation)) < 0.1
    assert torch.allclose(code.scale, torch.tensor(1.1), atol=0.02) and torch.allclose(code.translation, torch.tensor([0, 0, 0.5]), atol=0.02)
    assert appearance.texture.shape == (8, 50, 3) and torch.allclose(appearance.texture, torch.tensor(MEAN_SKIN).tanh(), atol=0.05)
    assert torch.allclose(appearance.light, torch.tensor(FRONT_LIGHT), atol=0.05)
    sum(c.square().sum() for c in (*code[:5], *appearance)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("name, size", [("efficientnet-b0", 224), ("efficientnet-b3", 224), ("small", 224), ("small", 128), ("small", 96), ("small", 64),
                                        ("small", 48), ("small", 32), ("resnet50", 64)])
def test_texture_branch_at_every_size(name, size):
    encoder = HandEncoder(name, n_texture=10, image_size=size).eval()
    if size == 224:
        first = encoder.appearance.features[0]
        assert (first.kernel_size, first.stride) == ((10, 10), (4, 4))
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, size, size))[1].texture.shape == (1, 10, 3)


def test_without_texture_any_size_goes():
    encoder = HandEncoder("small").eval()
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, 40, 72))[1] is None


def test_heads_stay_in_float32_under_autocast():
    encoder = HandEncoder("small", n_texture=5, image_size=64).eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        exact, _ = encoder(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert encoder.backbone(image)[0].dtype == torch.bfloat16
            code, appearance = encoder(image)
    assert all(t.dtype == torch.float32 for t in (*code[:5], *appearance))
    assert (code.translation - exact.translation).abs().max() < 5e-4  # metres; bfloat16 heads would round z by up to 2e-3


def test_wrong_pictures_and_options():
    encoder = HandEncoder("small", n_texture=5, image_size=64).eval()
    with pytest.raises(ValueError, match="expected 64 × 64 pixels .* found 96 × 80"):
        encoder(torch.zeros(1, 3, 80, 96))
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, H, W\) with H and W at least 32, found \(1, 3, 1, 1\)"):
        HandEncoder("small")(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="'axis-angle' or '6d', found 'euler'"):
        HandEncoder("small", rotation="euler")


def test_the_import_is_light():
    code = "import sys, handrecon.networks; assert not {'transformers', 'matplotlib', 'huggingface_hub'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- growing

@pytest.mark.parametrize("training", [False, True])
def test_a_deeper_network_begins_as_the_shallow_one(small, training):
    deep, image = make_backbone("medium"), torch.rand(3, 3, 96, 64)
    assert not torch.equal(deep.eval().pyramid(image)[1][-1], small.pyramid(image)[1][-1])
    shallow = make_backbone("small")
    shallow.load_state_dict(small.state_dict())
    begin_as(deep, shallow.state_dict())
    for a, b in zip(deep.train(training).pyramid(image)[1], shallow.train(training).pyramid(image)[1], strict=True):
        assert torch.equal(a, b)


def test_the_same_network_takes_over_all(small):
    other = make_backbone("small")
    begin_as(other, small.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), small.state_dict().values(), strict=True))


@pytest.mark.parametrize("name, change", [("resnet18", {}), ("efficientnet-b0", {}), ("medium", {"body.embedder.embedder.convolution.weight": None})])
def test_what_does_not_fit_is_told(small, name, change):
    given = {k: v for k, v in small.state_dict().items() if k not in change}
    with pytest.raises(ValueError, match=f"backbone {name}: expected weights of a ResNet of the same widths .* found that '.+' does not fit"):
        begin_as(make_backbone(name), given)


@pytest.mark.parametrize("name", ["small", "medium", "resnet18", "resnet50"])
def test_our_resnet_is_the_library_s(name):
    "Names, random draws and answers, bit for bit: records of runs and published weights depend on it."
    transformers = pytest.importorskip("transformers")
    geometry = BACKBONES[name].geometry
    torch.manual_seed(3)
    theirs, their_next = transformers.ResNetModel(transformers.ResNetConfig(**geometry)), torch.rand(1)
    torch.manual_seed(3)
    ours, our_next = ResNet(**geometry), torch.rand(1)
    a, b = theirs.state_dict(), ours.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a) and torch.equal(their_next, our_next)
    picture = torch.rand(2, 3, 64, 64)
    for training in (True, False):
        x, y = theirs.train(training)(picture, output_hidden_states=True), ours.train(training)(picture)
        assert torch.equal(x.pooler_output, y.pooler_output) and all(map(torch.equal, x.hidden_states, y.hidden_states))


def test_a_packaged_network_runs_without_transformers():
    code = ("import sys; sys.modules['transformers'] = sys.modules['huggingface_hub'] = None\n"
            "import handrecon, torch; network = handrecon.load('s2hand'); handrecon.load('multihand')\n"
            "from handrecon.networks import make_backbone\n"
            "try: make_backbone('efficientnet-b0')\n"
            "except ImportError as problem: print(problem)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "handrecon[efficientnet]" in done.stdout, done.stderr


def test_pictures_of_another_range_are_scaled_or_refused(small):
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        bytes_ = (255 * image).round().to(torch.uint8)
        assert torch.equal(small.eval().pyramid(bytes_)[0], small.pyramid(bytes_.float() / 255)[0])
        for wrong in (255 * image, 2 * image - 1, 100 * image):
            with pytest.raises(ValueError, match="colours from 0 to 1"): small(wrong)
        small(1.2 * image - 0.1)                     # what a sharp resampling filter leaves beyond the range

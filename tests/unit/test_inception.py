"""FID's Inception network: its keys, its first step, its borders, and weights read from files."""

import hashlib
import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from sdn.features.inception import NETWORK, Inception, _pool, open_inception, resized


def lively(network):
    """Random weights under which a signal reaches the end."""
    random = torch.Generator().manual_seed(0)
    for key, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=random)
        elif key.endswith(("bn.bias", "running_mean")):
            value.normal_(0, 0.1, generator=random)
        elif key.startswith("fc."):
            value.normal_(0, 0.05, generator=random)
    return network


@pytest.fixture(scope="module")
def network():
    """One network with random weights."""
    return lively(Inception("0123"))


@pytest.fixture(scope="module")
def state(network):
    """Its tensors as the published file names them: without counts of training steps."""
    return {k: v for k, v in network.state_dict().items() if "num_batches" not in k}


def drawn(n, size=64, seed=0):
    """Random pixels."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=random)


def write(path, tensors):
    torch.save(tensors, path)
    return str(path)


class TestShape:
    def test_the_convolutions_of_the_published_file(self, state):
        """94 convolutions, each with batch norm and no bias, and one linear layer: 472 tensors."""
        convolutions = [key for key in state if key.endswith(".conv.weight")]
        assert len(convolutions) == 94
        parts = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        expected = {"fc.weight", "fc.bias"}
        for key in convolutions:
            stem = key.removesuffix("conv.weight")
            expected |= {key} | {stem + part for part in parts}
            assert all(state[stem + part].shape == state[key].shape[:1] for part in parts)
        assert set(state) == expected
        assert len(state) == 472

    @pytest.mark.parametrize(
        ("key", "shape"),
        [
            ("Conv2d_1a_3x3.conv", (32, 3, 3, 3)),
            ("Conv2d_2a_3x3.conv", (32, 32, 3, 3)),
            ("Conv2d_2b_3x3.conv", (64, 32, 3, 3)),
            ("Conv2d_3b_1x1.conv", (80, 64, 1, 1)),
            ("Conv2d_4a_3x3.conv", (192, 80, 3, 3)),
            ("Mixed_5b.branch1x1.conv", (64, 192, 1, 1)),
            ("Mixed_5b.branch5x5_2.conv", (64, 48, 5, 5)),
            ("Mixed_5b.branch_pool.conv", (32, 192, 1, 1)),
            ("Mixed_5c.branch_pool.conv", (64, 256, 1, 1)),
            ("Mixed_5d.branch3x3dbl_3.conv", (96, 96, 3, 3)),
            ("Mixed_6a.branch3x3.conv", (384, 288, 3, 3)),
            ("Mixed_6b.branch7x7_2.conv", (128, 128, 1, 7)),
            ("Mixed_6b.branch7x7_3.conv", (192, 128, 7, 1)),
            ("Mixed_6c.branch7x7dbl_4.conv", (160, 160, 7, 1)),
            ("Mixed_6d.branch7x7dbl_5.conv", (192, 160, 1, 7)),
            ("Mixed_6e.branch_pool.conv", (192, 768, 1, 1)),
            ("Mixed_7a.branch3x3_2.conv", (320, 192, 3, 3)),
            ("Mixed_7a.branch7x7x3_4.conv", (192, 192, 3, 3)),
            ("Mixed_7b.branch3x3_2a.conv", (384, 384, 1, 3)),
            ("Mixed_7b.branch3x3dbl_1.conv", (448, 1280, 1, 1)),
            ("Mixed_7c.branch3x3dbl_3b.conv", (384, 384, 3, 1)),
            ("Mixed_7c.branch1x1.conv", (320, 2048, 1, 1)),
            ("fc", (1008, 2048)),
        ],
    )
    def test_shapes_of_the_published_file(self, state, key, shape):
        """One layer of each kind has the shape that torch-fidelity's network has."""
        assert state[f"{key}.weight"].shape == shape

    def test_batch_norm_adds_what_tensorflow_adds(self, network):
        """Every batch norm has eps 0.001, not torch's."""
        found = {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
        assert found == {0.001}

    def test_pixels_at_each_step(self, network):
        """From 299 px the layers see 149, 147, 147, 73, 71, 35, 17 and 8."""
        sizes = {}
        hooks = [
            module.register_forward_hook(
                lambda _module, _in, out, name=name: sizes.update({name: out.shape[-1]})
            )
            for name, module in network.named_modules()
            if name.endswith(".bn")
        ]
        network(drawn(1))
        for hook in hooks:
            hook.remove()
        names = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1"]
        names += ["Conv2d_4a_3x3", "Mixed_5b.branch1x1", "Mixed_6b.branch1x1"]
        names += ["Mixed_7a.branch3x3_2", "Mixed_7c.branch1x1"]
        assert [sizes[f"{n}.bn"] for n in names] == [149, 147, 147, 73, 71, 35, 17, 8, 8]
        assert len(sizes) == 94

    def test_where_averages_and_maxima_stand(self):
        """Averages of 3x3 in 5b to 5d, 6b to 6e and 7b; a maximum in 7c, as in the FID graph."""
        kinds = {s.name: s.branches[-1][0] for s in NETWORK if hasattr(s, "branches")}
        averages = ["5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"]
        assert {n for n, kind in kinds.items() if kind == "average"} == {
            f"Mixed_{a}" for a in averages
        }
        assert {n for n, kind in kinds.items() if kind == "halve"} == {"Mixed_6a", "Mixed_7a"}
        assert kinds["Mixed_7c"] == "maximum"


class TestPools:
    def test_an_average_counts_only_what_is_inside(self):
        """At a corner four pixels are averaged, not nine: a constant image stays constant."""
        x = torch.arange(9.0).view(1, 1, 3, 3)
        assert torch.equal(_pool("average", torch.ones(1, 1, 3, 3)), torch.ones(1, 1, 3, 3))
        assert _pool("average", x)[0, 0].tolist() == [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]

    def test_a_maximum_keeps_the_size_and_a_halving_does_not(self):
        """The maximum of 7c is over the neighbours; the other is over every second window."""
        x = torch.arange(25.0).view(1, 1, 5, 5)
        assert _pool("maximum", x)[0, 0, 0].tolist() == [6, 7, 8, 9, 9]
        assert _pool("halve", x)[0, 0].tolist() == [[12, 14], [22, 24]]


class TestResize:
    def test_growing_is_tensorflows(self):
        """2 to 4 px: the corner pixel stays where it is, and the last one is repeated."""
        image = torch.tensor([[0.0, 100], [20, 120]]).view(1, 1, 2, 2)
        assert resized(image, 4)[0, 0].tolist() == [
            [0, 50, 100, 100],
            [10, 60, 110, 110],
            [20, 70, 120, 120],
            [20, 70, 120, 120],
        ]

    def test_growing_by_a_fraction_is_tensorflows(self):
        """2 to 3 px: the rows lie at 0, 2/3 and 4/3 of the old ones."""
        image = torch.tensor([[0.0, 90]]).view(1, 1, 1, 2)
        expected = torch.tensor([0.0, 60, 90]).expand(1, 1, 3, 3)
        assert torch.allclose(resized(image, 3), expected, atol=1e-4)

    def test_shrinking_takes_points_and_does_not_smooth(self):
        """4 to 2 px: every second pixel, whatever lies between."""
        image = torch.tensor([[7.0, 255, 9, 255]]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
        assert resized(image, 2)[0, 0].tolist() == [[7, 9], [7, 9]]

    def test_it_is_not_torchs(self):
        """With half pixels, as torch has it, a step edge would lie elsewhere."""
        image = torch.tensor([[0.0, 100]]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
        torchs = functional.interpolate(image, (4, 4), mode="bilinear", align_corners=False)
        assert not torch.allclose(resized(image, 4), torchs)

    def test_rows_and_columns_have_scales_of_their_own(self):
        """A wide image becomes square; both its directions are stretched by themselves."""
        image = torch.arange(8.0).view(1, 1, 2, 4)
        assert resized(image, 4)[0, 0, :, 0].tolist() == [0, 2, 4, 4]
        assert resized(image, 4)[0, 0, 0].tolist() == [0, 1, 2, 3]

    def test_an_image_of_that_size_stays(self):
        """What has 299 px already is not touched."""
        image = torch.rand(1, 3, 299, 299)
        assert resized(image, 299) is image


class TestForward:
    def test_what_comes_out(self, network):
        """2,048 features, none below 0, and 1,008 logits without the bias, in float32."""
        features, logits = network(drawn(2))
        assert (features.shape, features.dtype) == ((2, 2048), torch.float32)
        assert (logits.shape, logits.dtype) == ((2, 1008), torch.float32)
        assert features.min() >= 0
        assert features.std() > 0.01
        assert torch.allclose(logits, features @ network.fc.weight.T, rtol=1e-4, atol=1e-5)
        assert network.fc.bias.abs().max() > 0.01

    def test_what_the_first_convolution_sees(self, network):
        """(pixels - 128) / 128 at 299 px: 0 is -1, 128 is 0 and 255 is just below 1; RGB stays."""
        seen = []
        hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        colours = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
        network(colours.expand(1, 3, 20, 30))
        hook.remove()
        expected = torch.tensor([-1, 0, 127 / 128]).view(1, 3, 1, 1).expand(1, 3, 299, 299)
        assert torch.equal(seen[0], expected)

    def test_neighbours_in_the_batch_change_nothing(self, network):
        """An image gives the same bits beside other images, and nearly the same alone."""
        image = drawn(1)
        beside = network(torch.cat([image, drawn(2, seed=1)]))
        others = network(torch.cat([image, drawn(2, seed=2)]))
        for a, b, alone in zip(beside, others, network(image), strict=True):
            assert torch.equal(a[0], b[0])
            assert not torch.equal(a[1], b[1])
            assert torch.allclose(a[0], alone[0], rtol=1e-4, atol=1e-5)

    def test_it_is_deterministic(self, network):
        """The same pixels give the same bits."""
        assert all(
            torch.equal(a, b) for a, b in zip(network(drawn(2)), network(drawn(2)), strict=True)
        )

    def test_it_stays_frozen(self, network):
        """Neither `train()` nor autocast around it changes what comes out; no gradients."""
        before = network(drawn(1))
        network.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            after = network(drawn(1))
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    @pytest.mark.parametrize(
        "pixels",
        [
            torch.rand(1, 3, 8, 8),
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        ],
    )
    def test_what_are_no_pixels_is_refused(self, network, pixels):
        """Floats, a single image and grey ones are named with what was expected."""
        with pytest.raises(ValueError, match=r"expected pixels \(B, 3, H, W\) of uint8, got \("):
            network(pixels)


class TestOpen:
    def test_weights_come_back_with_their_digest(self, tmp_path, network, state):
        """The published keys, without counts of steps, give the network and the file's SHA-256."""
        path = tmp_path / "weights.pth"
        write(path, state)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        opened = open_inception(str(path), digest[:8].upper())
        assert opened.digest == digest
        assert all(torch.equal(v, opened.state_dict()[k]) for k, v in state.items())
        for ours, theirs in zip(opened(drawn(1)), network(drawn(1)), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_counts_of_steps_are_no_hindrance(self, tmp_path, network):
        """A conversion that holds `num_batches_tracked` is accepted."""
        state = network.state_dict()
        assert any("num_batches_tracked" in name for name in state)
        opened = open_inception(write(tmp_path / "weights.pth", state), None).state_dict()
        assert opened.keys() == state.keys()
        assert all(torch.equal(v, opened[name]) for name, v in state.items())

    def test_wrong_digest(self, tmp_path, state):
        """Another digest than the expected one names the file and both."""
        path = write(tmp_path / "weights.pth", {"fc.bias": state["fc.bias"]})
        with pytest.raises(
            ValueError, match=r"weights\.pth has SHA-256 [0-9a-f]{64}, expected 6726825d"
        ):
            open_inception(path)

    def test_damaged_file(self, tmp_path, state):
        """A file cut in half is named."""
        path = tmp_path / "weights.pth"
        write(path, {"fc.weight": state["fc.weight"]})
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"weights\.pth is not a readable weight file"):
            open_inception(str(path), None)

    def test_code_is_refused_and_does_not_run(self, tmp_path):
        """A .pth that would run a command is refused, and the command never runs."""
        trace = tmp_path / "ran"

        class Code:
            def __reduce__(self):
                return os.mkdir, (str(trace),)

        path = tmp_path / "weights.pth"
        path.write_bytes(pickle.dumps({"fc.bias": Code()}, protocol=2))
        with pytest.raises(ValueError, match="not a readable weight file"):
            open_inception(str(path), None)
        assert not trace.exists()

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"fc.weight": torch.zeros(1000, 2048)}, r"fc\.weight has shape \(1000, 2048\)"),
            (
                {"Mixed_7c.branch1x1.conv.weight": None},
                r"Mixed_7c\.branch1x1\.conv\.weight is missing, expected \(320, 2048, 1, 1\)",
            ),
            (
                {"AuxLogits.fc.bias": torch.zeros(1000)},
                r"AuxLogits\.fc\.bias of shape \(1000,\) is not one of its",
            ),
        ],
        ids=["shape", "missing", "strange"],
    )
    def test_weights_of_another_network(self, tmp_path, state, change, text):
        """The first key that does not fit is named, with its shape and the expected one."""
        tensors = {k: v for k, v in (state | change).items() if v is not None}
        path = write(tmp_path / "weights.pth", tensors)
        with pytest.raises(ValueError, match=rf"does not hold FID's Inception: key {text}"):
            open_inception(path, None)

    def test_the_first_of_several_is_named(self, tmp_path):
        """Of an empty table the first layer's weight is missed, with its expected shape."""
        path = write(tmp_path / "weights.pth", {})
        with pytest.raises(
            ValueError, match=r"key Conv2d_1a_3x3\.conv\.weight is missing, expected \(32, 3, 3, 3"
        ):
            open_inception(path, None)

    def test_no_such_file(self, tmp_path):
        """A path without a file is named."""
        with pytest.raises(FileNotFoundError, match=r"no weight file at .*absent\.pth"):
            open_inception(str(tmp_path / "absent.pth"), None)

    def test_a_url_needs_a_digest(self):
        """A URL without a digest is refused before anything is fetched."""
        with pytest.raises(ValueError, match=r"example\.invalid.*without a SHA-256"):
            open_inception("https://example.invalid/weights.pth", None)

    def test_a_url_is_fetched_once_and_kept(self, tmp_path, monkeypatch, state):
        """What is fetched is kept in torch.hub's folder and used when the URL is gone."""
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        path = tmp_path / "weights.pth"
        write(path, state)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(ValueError, match="could not fetch"):
            open_inception(path.as_uri(), "0123456789ab")
        open_inception(path.as_uri(), digest[:8])
        url = path.as_uri()
        path.unlink()
        assert open_inception(url, digest[:8]).digest == digest

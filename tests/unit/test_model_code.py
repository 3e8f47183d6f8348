"""What the registered model makes of what it is given, without a registry."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image
from registered_model import CAPTIONS, CONFIG, write_small_model

from pipelines.model_code import TextToImage
from sdn.config import StudentConfig
from sdn.sampling import encode_png, open_synthesizer

TWO = ["a red house", "two dogs: dark"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    model = TextToImage()
    model.load_context(SimpleNamespace(artifacts={"model": str(folder)}))
    return model


@pytest.fixture(scope="module")
def wanted(folder):
    return [encode_png(pixels) for pixels in open_synthesizer(folder)(TWO)]


@pytest.mark.parametrize(
    "given",
    [
        TWO,
        tuple(TWO),
        np.array(TWO),
        np.array(TWO, dtype=object),
        np.array(TWO).reshape(2, 1),
        pd.Series(TWO),
        pd.DataFrame(TWO),
        pd.DataFrame({"caption": TWO}),
        pd.DataFrame({"number": [1, 2], "caption": TWO}),
        pd.DataFrame({"caption": [TWO]}),
        {"caption": TWO},
        {"caption": np.array(TWO)},
        [np.array(caption) for caption in TWO],
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_form_of_input_draws_the_same(loaded, wanted, given):
    """Lists, arrays, frames and tables of captions give one PNG file each, in their order."""
    assert loaded.predict(None, given) == wanted


def test_one_text_is_one_caption(loaded, wanted):
    """A text alone is not taken for a list of letters."""
    for given in (TWO[0], {"caption": TWO[0]}, pd.DataFrame({"caption": [TWO[0]]})):
        assert loaded.predict(None, given) == wanted[:1]


def test_a_seed_is_taken(loaded, wanted):
    """This model has no noise: any seed draws the same, as without parameters."""
    for params in (None, {}, {"seed": 7}, {"seed": np.int64(7), "scale": np.int64(1)}):
        assert loaded.predict(None, TWO, params) == wanted


def test_scale_repeats_pixels(loaded, wanted):
    """With scale 3 each drawn pixel is a square of 3 by 3, unchanged."""
    (large,) = loaded.predict(None, TWO[:1], {"scale": 3})
    small, large = (np.asarray(Image.open(io.BytesIO(png))) for png in (wanted[0], large))
    assert large.shape == (96, 96, 3)
    assert np.array_equal(large, small.repeat(3, 0).repeat(3, 1))


def test_the_noise_scale_is_that_of_the_model_or_of_the_parameter(tmp_path):
    """Without one, or with null, it is the model's own."""
    config = dataclasses.replace(CONFIG, student=StudentConfig(init="he", noise=4, noise_scale=2))
    noisy = TextToImage()
    folder = write_small_model(tmp_path / "noisy", config)
    noisy.load_context(SimpleNamespace(artifacts={"model": str(folder)}))
    own = noisy.predict(None, TWO)
    for scale in (None, 2.0, np.float64(2)):
        assert noisy.predict(None, TWO, {"noise_scale": scale}) == own
    assert noisy.predict(None, TWO, {"noise_scale": 1.0}) != own
    for scale in (4.0, -1.0, float("nan")):
        with pytest.raises(MlflowException, match=rf"noise_scale must be 0\.\.3, not {scale}"):
            noisy.predict(None, TWO, {"noise_scale": scale})


@pytest.mark.parametrize("scale", [0, -1, 17])
def test_impossible_scale(loaded, scale):
    """Other sizes are refused with the range."""
    with pytest.raises(MlflowException, match=r"scale must be 1\.\.16"):
        loaded.predict(None, TWO, {"scale": scale})


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("", "no letter or digit"),
        (" -- ", "no letter or digit"),
        ("y" * 41, "41 characters, the encoder reads at most 40"),
        (3, "must be text, not int"),
        (None, "must be text, not NoneType"),
        (float("nan"), "must be text, not NoneType"),
        (b"a cat", "must be text, not bytes"),
        (["a cat", "a dog"], "must be text, not list"),
    ],
)
def test_bad_captions_are_named(loaded, bad, text):
    """A caption that cannot be drawn is an error of the caller that names its position."""
    with pytest.raises(MlflowException, match=f"caption number 2 of 3: .*{text}") as caught:
        loaded.predict(None, [CAPTIONS[0], bad, CAPTIONS[1]])
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "at least one caption"),
        ([""], "no letter or digit"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "expected the column caption, found: a, b"),
        ({"text": ["x"]}, "expected the entry caption, found: text"),
    ],
)
def test_no_captions_at_all(loaded, given, text):
    """Nothing to draw, and tables without captions, say what was expected."""
    with pytest.raises(MlflowException, match=text) as caught:
        loaded.predict(None, given)
    assert caught.value.get_http_status_code() == 400

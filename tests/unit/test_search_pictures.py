"""Pictures of a search: there where they can be drawn, a reason where they cannot."""

from __future__ import annotations

import json
import math
import re

import pytest
from PIL import Image

from pipelines.search_pictures import HISTORY, IMPORTANCE, PARALLEL, PICTURES, write_pictures
from pipelines.suggesting import suggestion
from pipelines.trials import Trial
from sdn.config import with_overrides
from sdn.recipes import recipe

pytestmark = pytest.mark.timeout(300)
NAMES = (HISTORY, PARALLEL, IMPORTANCE)
SPACE = {"conv1": {}, "image": {}}
CONFIG = with_overrides(recipe("tiny"), {"search.space": json.dumps(SPACE)})
REMOTE = re.compile(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)\s*=", re.IGNORECASE)


def trial(number, state="finished", images=320, **more):
    values = suggestion(CONFIG, [], number)
    score = sum(math.log(value) ** 2 for value in values.values())
    points = [
        {"images_seen": seen, "value": score, "low": 0.0, "high": 9.0, "seconds": 1.0}
        for seen in (36, 108, 320)
        if seen <= images
    ]
    return Trial(number=number, values=values, state=state, points=points, **more)


def names(folder):
    return sorted(path.name for path in (folder / PICTURES).iterdir())


def check_files(folder, drawn):
    """Each picture as a page that needs no network, and as a print."""
    assert names(folder) == sorted(f"{name}.{kind}" for name in drawn for kind in ("html", "png"))
    for name in drawn:
        page = (folder / PICTURES / f"{name}.html").read_text()
        assert "Plotly.newPlot" in page
        assert REMOTE.findall(page) == []
        with Image.open(folder / PICTURES / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 200
            low, high = picture.convert("L").getextrema()
            assert high - low > 100


def test_all_pictures_of_six_trials(tmp_path):
    """With six trials, ended early or failed some of them, all three are drawn in both forms."""
    trials = [trial(n) for n in range(4)] + [trial(4, "stopped", 36, reason="behind the others")]
    trials.append(trial(5, "failed", 0, reason="LossNotFiniteError: step 3"))
    assert write_pictures(tmp_path, trials, CONFIG) == {}
    assert (tmp_path / PICTURES).name == "pictures"
    assert NAMES == ("history", "parallel-coordinates", "importance")
    check_files(tmp_path, NAMES)
    page = (tmp_path / PICTURES / f"{PARALLEL}.html").read_text()
    assert "KID" in page
    assert "conv1" in page
    history = (tmp_path / PICTURES / f"{HISTORY}.html").read_text()
    assert '"x":[0,1,2,3]' in history, "a score after few images is no best one"
    assert write_pictures(tmp_path, trials, CONFIG) == {}  # begun again on the same folder


def test_the_pictures_of_one_trial(tmp_path):
    """Of one trial no importance can be told: it is missing with its reason, the others not."""
    missing = write_pictures(tmp_path, [trial(0)], CONFIG)
    assert missing == {IMPORTANCE: "importance needs 4 trials with a score, there are 1"}
    check_files(tmp_path, (HISTORY, PARALLEL))


def test_trials_that_do_not_differ(tmp_path):
    """Where all scores are equal nothing is said of importance, and nothing fails."""
    trials = [trial(n) for n in range(5)]
    for one in trials:
        one.points[-1]["value"] = 0.5
    missing = write_pictures(tmp_path, trials, CONFIG)
    assert set(missing) <= {IMPORTANCE}
    assert all(missing.values())
    check_files(tmp_path, [name for name in NAMES if name not in missing])


@pytest.mark.parametrize("score", ["kid", "retrieval"])
def test_the_score_is_named(tmp_path, score):
    """The axis has the name of the score that trials are ranked on."""
    config = with_overrides(CONFIG, {"search.score": score})
    write_pictures(tmp_path, [trial(0), trial(1)], config)
    page = (tmp_path / PICTURES / f"{HISTORY}.html").read_text()
    label = {"kid": "KID", "retrieval": "reciprocal rank"}[score]
    assert f'"title":{{"text":"{label}"}}' in page


def test_failed_trials_tell_nothing_of_importance(tmp_path):
    """Only trials with a score count: of three and many that failed no importance is drawn."""
    trials = [trial(n) for n in range(3)] + [trial(n, "failed", 0) for n in range(3, 9)]
    missing = write_pictures(tmp_path, trials, CONFIG)
    assert missing == {IMPORTANCE: "importance needs 4 trials with a score, there are 3"}
    check_files(tmp_path, (HISTORY, PARALLEL))

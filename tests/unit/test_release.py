"""What is decided about a registered version: once, whatever is killed, and what a rerun says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from registered_versions import NAME, aliases, registered

from pipelines.release import COMPARED, DECISION, _decide
from pipelines.run import Done
from pipelines.succession import Succession
from sdn.evaluation import UNTRAINED

GAIN = {"value": 0.1, "low": 0.05, "high": 0.15, "count": 9, "interval": "x", "withheld": ""}


class Killed(BaseException):
    """Nothing of a killed process goes on; so nothing may catch this."""


class Killing:
    """A client whose process is killed after k requests."""

    def __init__(self, client, requests):
        self.client, self.left = client, requests

    def __getattr__(self, name):
        request = getattr(self.client, name)

        def killing(*args, **values):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return request(*args, **values)

        return killing


def done(name, result):
    return Done(name=name, key=f"key of {name}", folder=name, result=result, seconds=1, fresh=True)


class Release:
    """One flow that has registered a version; asks who is better of a table."""

    def __init__(self, client, version, *, better=True, manifest="m"):
        self.client, self.version, self.better = client, str(version), better
        self.stages = {"prepare": done("prepare", {"manifest": manifest})}
        self.asked = []

    def compare(self, champion):
        self.asked.append(champion)
        kid = {"gain": GAIN, "p_value": 0.01, "needed": 5, "error": 0.01}
        reason = f"{'better' if self.better else 'not better'} than {champion.title}"
        decision = {"promoted": self.better, "reason": reason, "kid": kid, "match": None}
        return done("compare", {"champion": champion.title, "decision": decision})

    def decide(self, client=None):
        tracked = SimpleNamespace(tracker=SimpleNamespace(client=client or self.client))
        version = {"name": NAME, "version": self.version}
        return _decide(SimpleNamespace(settings=None), tracked, self.stages, version, self.compare)


@pytest.fixture
def client(tmp_path):
    return registered(tmp_path, versions=3)


def test_the_first_must_beat_untrained_weights(client):
    """Without a champion the comparison is with untrained weights; tags keep what was decided."""
    flow = Release(client, 1)
    found = flow.decide()
    assert found["champion"]
    assert [one.title for one in flow.asked] == [UNTRAINED]
    assert aliases(client) == {"champion": "1"}
    tags = client.get_model_version(NAME, "1").tags
    assert json.loads(tags[DECISION])["kid"] == {
        **{k: GAIN[k] for k in ("value", "low", "high", "count")}, "p_value": 0.01, "needed": 5,
    }  # fmt: skip
    assert json.loads(tags[COMPARED]) == {}


def test_a_rejected_version_stays_challenger(client):
    """The champion stays, and the same flow again says the same without asking anew."""
    Release(client, 1).decide()
    flow = Release(client, 2, better=False)
    first = flow.decide()
    again = Release(client, 2, better=False).decide()
    assert first == again
    assert first["champion"] is False
    assert first["reason"] == "not better than version 1"
    assert aliases(client) == {"champion": "1", "challenger": "2"}


def test_a_rerun_says_what_became_of_a_champion(client):
    """Replaced or rolled back from, a version's own flow tells so, and changes nothing."""
    Release(client, 1).decide()
    Release(client, 2).decide()
    assert Release(client, 1).decide()["reason"].startswith("was champion; now version 2 is")
    Succession(client, NAME).roll_back(lambda _: None, "it drew nonsense")
    again = Release(client, 2).decide()
    assert again["champion"] is False
    assert "it drew nonsense" in again["reason"]
    assert aliases(client)["champion"] == "1"


def test_other_data_are_told(client):
    """A champion that was trained on another version of the data is compared, with a note."""
    client.set_model_version_tag(NAME, "1", "sdn.manifest", "old")
    Release(client, 1).decide()
    flow = Release(client, 2)
    flow.decide()
    assert "another version of the data" in flow.asked[0].note


def test_a_champion_in_an_earlier_format_does_not_block(client):
    """What this code cannot open is told, and untrained weights take its place."""
    Release(client, 1).decide()
    flow = Release(client, 2)
    whole = flow.compare

    def compare(champion):
        if champion.title == "version 1":
            raise FileNotFoundError("student.safetensors is missing")
        return whole(champion)

    flow.compare = compare
    assert flow.decide()["champion"]
    assert "version 1 cannot be opened" in flow.asked[0].note


@pytest.mark.parametrize("better", [pytest.param(True, marks=pytest.mark.rest), False])
def test_killed_between_any_two_requests(tmp_path, better):
    """The champion is whole at every moment, and the same flow again comes to the same end."""
    ended = None
    for requests in range(60):
        place = tmp_path / str(requests)
        place.mkdir()
        client = registered(place, versions=2)
        Release(client, 1).decide()
        try:
            ended = Release(client, 2, better=better).decide(Killing(client, requests))
        except Killed:
            assert aliases(client)["champion"] in {"1", "2"}
            found = Release(client, 2, better=better).decide()
            assert found["champion"] is better
            assert found["reason"].endswith("better than version 1")
            tags = client.get_model_version(NAME, "2").tags
            assert json.loads(tags[DECISION])["promoted"] is better
            expected = {"champion": "2", "previous": "1"} if better else {
                "champion": "1", "challenger": "2",
            }  # fmt: skip
            assert aliases(client) == expected
        else:
            break
    assert ended is not None
    assert requests > 5

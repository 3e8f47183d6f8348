"""Who is the champion: terms claimed once, aliases that follow them, and the way back."""

import itertools
import json
import logging
import re
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from registered_versions import aliases, registered
from typer.testing import CliRunner

from pipelines import rolling_back as module
from pipelines.cli import app
from pipelines.registry import SHA256, DamagedModelError, RegistryError
from pipelines.rolling_back import check_files, roll_back
from pipelines.settings import Settings
from pipelines.succession import ROLLED_BACK, Succession

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store for all tests: MLflow takes seconds to make the tables of a new one."""
    return tmp_path_factory.mktemp("store")


def fresh(place, versions=4):
    """The succession of a model that nobody has used yet."""
    name = f"sdn-{next(NUMBERS)}"
    client = registered(place, versions=versions, name=name)
    return Succession(client, name, lambda: datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC))


@pytest.fixture
def succession(place):
    return fresh(place)


@pytest.fixture
def client(succession):
    return succession.client


def better(_):
    return True, "better"


def shown(succession):
    return aliases(succession.client, succession.name)


def champions(succession):
    return [term.champion for term in succession.terms()]


def tag(succession, version, name=ROLLED_BACK):
    return succession.version(version).tags.get(name)


def test_the_first_and_the_next_champion(client, succession):
    """Each promotion is a term; the aliases name the champion and the one before."""
    assert succession.settle() is None
    client.set_registered_model_alias(succession.name, "challenger", "1")
    assert succession.succeed("1", lambda holder: (holder is None, "there was none")).champion
    assert shown(succession) == {"champion": "1"}
    client.set_registered_model_alias(succession.name, "challenger", "2")
    outcome = succession.succeed("2", lambda holder: (holder == "1", "0.5 against 0.4"))
    assert outcome.champion
    assert outcome.reason == outcome.term.why == "0.5 against 0.4"
    assert shown(succession) == {"champion": "2", "previous": "1"}
    assert [(t.number, t.champion, t.previous) for t in succession.terms()] == [
        (1, "1", None),
        (2, "2", "1"),
    ]
    assert succession.terms()[1].at == "2026-03-04T05:06:07+00:00"


def test_a_rejected_challenger_changes_nothing(client, succession):
    """Log and champion stay; the rejected version keeps the alias challenger."""
    succession.succeed("1", better)
    client.set_registered_model_alias(succession.name, "challenger", "2")
    outcome = succession.succeed("2", lambda _: (False, "not better"))
    assert (outcome.champion, outcome.reason) == (False, "not better")
    assert outcome.term.champion == "1"
    assert shown(succession) == {"champion": "1", "challenger": "2"}
    assert champions(succession) == ["1"]


def test_the_champion_is_not_asked_about_itself(succession):
    """The same registration again: no comparison, no term."""
    succession.succeed("1", better)
    outcome = succession.succeed("1", lambda _: pytest.fail("compared with itself"))
    assert (outcome.champion, outcome.reason) == (True, "already the champion")
    assert champions(succession) == ["1"]


def test_a_loser_is_compared_with_the_winner(client, succession):
    """Somebody else is first while the challenger is compared: it is asked again, and may lose."""
    succession.succeed("1", better)
    asked = []

    def beaten_to_it(holder):
        asked.append(holder)
        if holder == "1":
            assert Succession(client, succession.name).succeed("3", better).champion
        return holder == "1", f"against {holder}"

    outcome = succession.succeed("2", beaten_to_it)
    assert asked == ["1", "3"]
    assert (outcome.champion, outcome.reason) == (False, "against 3")
    assert champions(succession) == ["1", "3"]
    assert shown(succession) == {"champion": "3", "previous": "1"}


def test_a_term_is_claimed_once(client, succession):
    """A second claim of the same term is refused, with the same words in the same second too."""
    first = succession.claim(None, "1", "same")
    assert first.number == 1
    assert Succession(client, succession.name, succession._now).claim(None, "1", "same") is None
    assert succession.claim(None, "2", "other") is None
    assert champions(succession) == ["1"]


def test_a_claim_whose_answer_was_lost_is_won(client, succession, monkeypatch):
    """The entry was written, but the answer did not arrive: the log says that it was."""
    log = client.log_param

    def lost(*args):
        log(*args)
        raise MlflowException("the connection broke")

    monkeypatch.setattr(client, "log_param", lost)
    assert succession.claim(None, "1", "why").champion == "1"
    assert shown(succession) == {"champion": "1"}


def test_a_claim_that_was_not_written_raises(client, succession, monkeypatch):
    """A failure of MLflow is neither victory nor defeat."""

    def gone(*args):
        raise MlflowException("gone")

    monkeypatch.setattr(client, "log_param", gone)
    with pytest.raises(MlflowException, match="gone"):
        succession.claim(None, "1", "why")
    assert champions(succession) == []


def test_a_champion_from_before_the_log(client, succession):
    """Its alias becomes term 1, so that the next promotion has something to go back to."""
    client.set_registered_model_alias(succession.name, "champion", "2")
    assert succession.settle().champion == "2"
    assert succession.succeed("3", lambda holder: (holder == "2", "better")).champion
    assert champions(succession) == ["2", "3"]
    assert succession.roll_back(lambda _: None, "why").champion == "2"


def test_aliases_follow_the_log(client, succession, caplog):
    """An alias that was set by hand is set back, with a warning; the log is the truth."""
    for version in ("1", "2"):
        succession.succeed(version, better)
    client.set_registered_model_alias(succession.name, "champion", "4")
    client.delete_registered_model_alias(succession.name, "previous")
    with caplog.at_level(logging.WARNING):
        succession.settle()
    assert "named version 4; by the log it is version 2" in caplog.text
    assert shown(succession) == {"champion": "2", "previous": "1"}


def test_rolling_back_twice_returns(client, succession):
    """The first goes back, the second undoes it; the version left behind says so, the other not."""
    for version in ("1", "2"):
        succession.succeed(version, better)
    checked = []
    term = succession.roll_back(checked.append, "drew nothing")
    assert checked == ["1"]
    assert (term.number, term.champion, term.previous, term.why) == (3, "1", "2", "drew nothing")
    assert shown(succession) == {"champion": "1", "previous": "2"}
    assert tag(succession, "2") == "2026-03-04T05:06:07+00:00 drew nothing"
    assert tag(succession, "1") is None
    assert succession.roll_back(checked.append, "it did draw").number == 4
    assert shown(succession) == {"champion": "2", "previous": "1"}
    assert tag(succession, "1").endswith("it did draw")
    assert tag(succession, "2") is None


def test_a_run_done_again_does_not_undo_a_rollback(client, succession):
    """A version rolled back from is no challenger any more, until a person brings it back."""
    for version in ("1", "2"):
        succession.succeed(version, better)
    succession.roll_back(lambda _: None, "drew nothing")
    outcome = succession.succeed("2", better)
    assert not outcome.champion
    assert "drew nothing" in outcome.reason
    assert shown(succession)["champion"] == "1"
    assert succession.succeed("3", better).champion
    assert not succession.succeed("2", better).champion
    assert champions(succession) == ["1", "2", "1", "3"]


def test_a_version_brought_back_may_challenge_again(succession):
    """Rolled back from, back again, then beaten: it is a version like any other."""
    for version in ("1", "2"):
        succession.succeed(version, better)
    for _ in range(2):
        succession.roll_back(lambda _: None, "why")
    assert succession.succeed("3", better).champion
    assert succession.succeed("2", better).champion


def test_nothing_to_roll_back_to(client, succession):
    """No champion, a first one, a deleted predecessor: each is refused with its reason."""
    with pytest.raises(RegistryError, match="no champion"):
        succession.roll_back(pytest.fail, "why")
    succession.succeed("1", better)
    with pytest.raises(RegistryError, match="version 1 alone"):
        succession.roll_back(pytest.fail, "why")
    succession.succeed("2", better)
    client.delete_model_version(succession.name, "1")
    with pytest.raises(RegistryError, match=r"version 2 to version 1, but that was deleted"):
        succession.roll_back(pytest.fail, "why")
    assert shown(succession) == {"champion": "2"}


def test_the_log_outlives_the_version_it_began_with(client, succession):
    """The oldest version is deleted: another process still finds all terms."""
    for version in ("1", "2", "3"):
        succession.succeed(version, better)
    client.delete_model_version(succession.name, "1")
    again = Succession(client, succession.name)
    assert champions(again) == ["1", "2", "3"]
    assert again.roll_back(lambda _: None, "why").champion == "2"


def test_a_deleted_champion_does_not_block(client, succession):
    """Nobody is compared with it, and one can still go back to the one before."""
    for version in ("1", "2"):
        succession.succeed(version, better)
    client.delete_model_version(succession.name, "2")
    assert succession.settle().champion == "2"
    assert succession.succeed("3", lambda holder: (holder is None, "deleted")).champion
    assert shown(succession) == {"champion": "3"}
    succession.succeed("4", better)
    client.delete_model_version(succession.name, "4")
    assert succession.roll_back(lambda _: None, "why").champion == "3"
    assert shown(succession) == {"champion": "3"}


def test_two_rollbacks_at_once_are_one(client, succession):
    """Two people ask in the same moment: the second is told, and does not undo the first."""
    for version in ("1", "2"):
        succession.succeed(version, better)

    def somebody_else(_):
        Succession(client, succession.name).roll_back(lambda _: None, "first")

    with pytest.raises(RegistryError, match=r"version 1 .* in the meantime \(first\)"):
        succession.roll_back(somebody_else, "second")
    assert shown(succession) == {"champion": "1", "previous": "2"}
    assert champions(succession) == ["1", "2", "1"]


def test_who_is_not_there(client, succession):
    """An unknown version and an unknown model are named."""
    with pytest.raises(RegistryError, match="no version 9"):
        succession.succeed("9", better)
    with pytest.raises(RegistryError, match="no-such"):
        Succession(client, "no-such").settle()
    assert champions(succession) == []


@pytest.mark.parametrize("why", ["x" * 20_000, "\u0000\n\"'\U0001f600" * 3000, "a\ud800b", ""])
def test_any_reason_is_kept(succession, why):
    """However long or odd a text, it fits into the log and is read again."""
    won = succession.claim(None, "1", why)
    assert succession.terms() == [won]
    assert won.why[:1] == why[:1].strip()
    assert len(won.why) <= 1000


def test_a_log_that_cannot_be_read(client, succession, tmp_path):
    """An entry of somebody else's is named, and nothing is changed."""
    succession.succeed("1", better)
    client.log_param(client.get_model_version(succession.name, "1").run_id, "champion-000002", "7")
    with pytest.raises(RegistryError, match="champion-000002, but found '7'"):
        succession.succeed("2", better)
    assert shown(succession) == {"champion": "1"}


CALLS = (
    "delete_model_version_tag",
    "delete_registered_model_alias",
    "get_model_version",
    "get_registered_model",
    "get_run",
    "log_param",
    "search_model_versions",
    "set_model_version_tag",
    "set_registered_model_alias",
    "set_registered_model_tag",
)


class Killed(BaseException):
    """Nothing of a killed process goes on; so nothing may catch this."""


class Killing:
    """A client whose process is killed after k requests."""

    def __init__(self, client, requests):
        self.client, self.left = client, requests

    def __getattr__(self, name):
        assert name in CALLS
        request = getattr(self.client, name)

        def killing(*args):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return request(*args)

        return killing


OPERATIONS = {
    "first": (0, lambda s: s.succeed("1", better)),
    "adopts": (0, lambda s: s.succeed("2", better)),
    "succeeds": (2, lambda s: s.succeed("3", better)),
    "rolls back": (2, lambda s: s.roll_back(lambda _: None, "why")),
    "undoes": (3, lambda s: s.roll_back(lambda _: None, "why")),
}


@pytest.mark.parametrize(
    "what",
    [
        what if what == "succeeds" else pytest.param(what, marks=pytest.mark.rest)
        for what in OPERATIONS
    ],
)
def test_killed_between_any_two_steps(place, what):
    """After any number of requests: a whole champion, and the next operation completes it."""
    terms, operation = OPERATIONS[what]
    for requests in itertools.count():
        one = fresh(place)
        for version in ("1", "2")[:terms]:
            one.succeed(version, better)
        if terms == 3:
            one.roll_back(lambda _: None, "once")
        if what == "adopts":
            one.client.set_registered_model_alias(one.name, "champion", "1")
        one.client.set_registered_model_alias(one.name, "challenger", "3")
        held = shown(one).get("champion")
        try:
            operation(Succession(Killing(one.client, requests), one.name))
        except Killed:
            completed(one, held)
        else:
            break
    assert requests > 8


def completed(one, held):
    """Whole right after the kill, and after what comes next as if there had been none."""
    found = shown(one).get("champion")
    log = champions(Succession(one.client, one.name))
    assert found == held or found in log
    if found is not None:
        assert tag(one, found, SHA256)
    newest = Succession(one.client, one.name).settle()
    if newest is None:
        assert (found, log) == (None, [])
    else:
        expected = {"champion": newest.champion}
        expected |= {"previous": newest.previous} if newest.previous else {}
        expected |= {"challenger": "3"} if newest.champion != "3" else {}
        assert shown(one) == expected
        if newest.rollback:
            assert tag(one, newest.previous).endswith(newest.why)
            assert tag(one, newest.champion) is None
    assert Succession(one.client, one.name).succeed("4", better).champion
    numbers = [term.number for term in Succession(one.client, one.name).terms()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert shown(one)["champion"] == "4"


@pytest.fixture
def store(place, monkeypatch):
    """A store whose registry has two champions with files behind them, and their succession."""
    for name in ("SDN_STORE", "SDN_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    found = fresh(place, versions=2)
    for version in ("1", "2"):
        found.succeed(version, better)
    return place, found


def weights(succession, version):
    """Where the registry keeps the weights of a version."""
    source = succession.version(version).source
    return Path(urlsplit(source).path) / "artifacts" / "model" / "student.safetensors"


def test_the_command_rolls_back(store, monkeypatch):
    """`sdn rollback` says what it did and in what time, and tells people; again, it is undone."""
    folder, succession = store
    told = []
    monkeypatch.setattr(module, "notify", lambda *said, key: told.append((*said[1:4], key)))
    called = ["rollback", "--store", str(folder), "--reason", "drew nothing"]
    done = CliRunner().invoke(app, [*called, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["name"], said["before"], said["after"], said["term"]) == (
        succession.name,
        "2",
        "1",
        3,
    )
    assert said["reason"] == "drew nothing"
    assert said["sha256"] == tag(succession, "1", SHA256)
    print(f"\nrollback: {said['seconds']} s")
    assert said["seconds"] < 30
    assert shown(succession) == {"champion": "1", "previous": "2"}
    title = f"{succession.name} version 1 is champion again"
    text = "By hand, in place of version 2: drew nothing"
    assert told == [("promotion", title, text, f"term-{succession.name}-3")]
    done = CliRunner().invoke(app, [*called[:1], succession.name, *called[1:]])
    assert "version 2 is the champion again, in place of version 1" in done.stdout
    assert shown(succession) == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize("damage", ["bit", "lost", "all"])
def test_damaged_files_are_refused(store, damage):
    """A changed bit, a lost file, no files: nothing changes, and the text says what is wrong."""
    folder, succession = store
    path = weights(succession, "1")
    if damage == "bit":
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
        if damage == "all":
            (path.parent / "config.json").unlink()
    done = CliRunner().invoke(app, ["rollback", succession.name, "--store", str(folder)])
    assert done.exit_code == 1
    assert "nothing was changed" in done.stderr
    if damage != "all":
        with pytest.raises(DamagedModelError) as refused:
            check_files(succession.client, succession.name, "1")
        assert tag(succession, "1", SHA256) in str(refused.value)
        assert len(set(re_digests(str(refused.value)))) == 2
    assert shown(succession) == {"champion": "2", "previous": "1"}
    assert champions(succession) == ["1", "2"]


def re_digests(text):
    return re.findall(r"\b[0-9a-f]{64}\b", text)


def test_a_version_without_a_digest(store, caplog):
    """Registered before digests were kept: gone back to if its files are there, with a warning."""
    folder, succession = store
    succession.client.delete_model_version_tag(succession.name, "1", SHA256)
    with caplog.at_level(logging.WARNING):
        found = roll_back(Settings(store=str(folder)), succession.name)
    assert (found["after"], found["sha256"]) == ("1", None)
    assert SHA256 in caplog.text


def test_stores_without_a_champion(tmp_path, store):
    """An empty store is not given a database; a model that is not there is named."""
    folder, _ = store
    empty = tmp_path / "empty"
    with pytest.raises(RegistryError, match="nothing is registered"):
        roll_back(Settings(store=str(empty)))
    assert not empty.exists()
    with pytest.raises(RegistryError, match="no-such"):
        roll_back(Settings(store=str(folder)), "no-such")


def test_a_broken_registry_is_one_clear_line(store, monkeypatch):
    """What MLflow throws becomes an error with a remedy."""
    folder, succession = store

    def broken(*args):
        raise MlflowException("no such table")

    monkeypatch.setattr(mlflow.MlflowClient, "get_run", broken)
    done = CliRunner().invoke(app, ["rollback", succession.name, "--store", str(folder)])
    assert done.exit_code == 1
    assert "no such table" in done.stderr
    assert "sdn doctor" in done.stderr

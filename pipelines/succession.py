"""Who is the champion of a registered model: a log of numbered terms, each claimed by one alone.

MLflow sets an alias in one step, but knows no "only if it is still what I compared with". A
parameter of a run, though, is written once: whoever writes `champion-000007` first has term 7, and
everybody else is told. So the terms are the truth; the aliases `champion` and `previous` only show
the newest one, and whatever was interrupted between a claim and its aliases is completed by the
next operation.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException

from pipelines.registry import CHALLENGER, CHAMPION, RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

PREVIOUS = "previous"
ROLLED_BACK = "sdn.rolled_back"
"""Tag of a version that was rolled back from: when and why."""
FORCED = "sdn.forced"
"""Tag of a version that a person made the champion whatever the gate said: when and why."""
_LOG_TAG = "sdn.succession"
"""Tag of the registered model: the run that holds its terms."""
_TERM = re.compile(r"champion-(\d{6,})")
_LONGEST_WHY = 1000
"""Characters; MLflow cuts a parameter at 6000."""
_TRIES = 5
"""Of a request that sets an alias or a tag, where another one did so in the same moment."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One entry of the log."""

    number: int
    """From 1, without gaps."""
    champion: str
    """Version that was the champion in this term."""
    previous: str | None
    """Version that was it before; what a rollback goes back to."""
    why: str
    at: str = ""
    """When it was claimed, ISO 8601 in UTC."""
    rollback: bool = False
    """Whether `previous` was rolled back from."""
    forced: bool = False
    """Whether a person has overruled the gate."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a challenger."""

    champion: bool
    """Whether it is the champion now."""
    reason: str
    term: Term | None
    """The newest term when that was decided; None where there is no champion."""


class Succession:
    """The terms of one registered model. Any number of processes may work on them at once.

    Every method may be interrupted between any two requests and simply called again.

    Args:
        client: of the registry and of the tracking server beside it.
        name: of the registered model.
        now: the clock.
    """

    def __init__(
        self,
        client: MlflowClient,
        name: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.client, self.name, self._now = client, name, now
        self._log: str | None = None

    def terms(self) -> list[Term]:
        """All terms, the newest last.

        Raises:
            RegistryError: no such model, or an entry that cannot be read.
        """
        run = self._log_run()
        if run is None:
            return []
        params = self.client.get_run(run).data.params
        found = ((_TERM.fullmatch(key), value) for key, value in params.items())
        terms = [_parsed(int(key[1]), value) for key, value in found if key is not None]
        return sorted(terms, key=lambda term: term.number)

    def settle(self) -> Term | None:
        """Make the aliases show the newest term; every other operation begins with this.

        A registry whose champion is older than the log gets it as term 1.

        Returns:
            The newest term; None where there has been no champion yet.

        Raises:
            RegistryError: no such model, or an entry that cannot be read.
        """
        while True:
            terms = self.terms()
            if terms:
                self._show(terms[-1])
                # Aliases that were set late, for a term no longer the newest, are set again: of all
                # who settle at once, whoever writes last has read the log after its last claim.
                if self.terms()[-1] == terms[-1]:
                    return terms[-1]
            else:
                holder = self._aliases().get(CHAMPION)
                if holder is None:
                    return None
                self._write(None, holder, "had the alias champion before there was a log")

    def claim(self, after: Term | None, champion: str, why: str) -> Term | None:
        """Make a version the champion if `after` is still the newest term.

        Args:
            after: the term whose champion it was compared with; None for none.
            champion: a registered version.
            why: for people; cut at 1000 characters.

        Returns:
            The new term, settled; None if somebody else had its number first.
        """
        return self._claim(after, champion, why)

    def succeed(
        self, challenger: str, better_than: Callable[[str | None], tuple[bool, str]]
    ) -> Outcome:
        """Make the challenger the champion if it is better than whoever is champion at that moment.

        Args:
            challenger: a registered version.
            better_than: told the champion's version (None where there is none, or where it was
                deleted), says whether the challenger takes over and why. Asked again whenever
                somebody else has become champion in the meantime.

        Raises:
            RegistryError: no such model or version.
        """
        if self.version(challenger) is None:
            raise RegistryError(
                f"expected a version of {self.name} to become its champion, but there is no "
                f"version {challenger}: register it first"
            )
        while True:
            newest = self.settle()
            if newest is not None and newest.champion == challenger:
                return Outcome(champion=True, reason="already the champion", term=newest)
            undone = self._undone(challenger)
            if undone is not None:
                # Else the next run of an unchanged recipe would undo the rollback.
                reason = (
                    f"version {challenger} was rolled back from at {undone.at} ({undone.why}) and "
                    "does not come back by itself; a version trained anew may"
                )
                return Outcome(champion=False, reason=reason, term=newest)
            there = newest is not None and self.version(newest.champion) is not None
            better, why = better_than(newest.champion if newest is not None and there else None)
            if not better:
                return Outcome(champion=False, reason=why, term=newest)
            won = self._claim(newest, challenger, why)
            if won is not None:
                return Outcome(champion=True, reason=why, term=won)

    def roll_back(self, verify: Callable[[str], None], why: str) -> Term:
        """Make the champion's predecessor the champion again; once more, and that is undone.

        Args:
            verify: told the version to go back to; raises where it must not be used. Nothing has
                changed by then.
            why: for people; kept in the log and as a tag of the version rolled back from.

        Raises:
            RegistryError: there is no predecessor, it was deleted, or somebody else changed the
                champion in the meantime.
        """
        newest = self.settle()
        if newest is None or newest.previous is None:
            holder = "no champion" if newest is None else f"version {newest.champion} alone"
            raise RegistryError(
                f"expected a predecessor to roll {self.name} back to, but it has had {holder}: "
                "nothing was changed"
            )
        if self.version(newest.previous) is None:
            raise RegistryError(
                f"expected to roll {self.name} back from version {newest.champion} to version "
                f"{newest.previous}, but that was deleted: nothing was changed. Train and register "
                "a better one with `sdn run`"
            )
        verify(newest.previous)
        won = self._claim(newest, newest.previous, why, rollback=True)
        if won is None:
            raise RegistryError(self._meanwhile("rolled back"))
        return won

    def overrule(self, champion: str, after: Term | None, why: str) -> Term:
        """Make a version the champion because a person says so.

        Args:
            champion: a registered version whose files were checked.
            after: the newest term that the person knew of; None for none.
            why: theirs; kept in the log and as a tag of the version.

        Raises:
            RegistryError: somebody else changed the champion in the meantime.
        """
        won = self._claim(after, champion, why, forced=True)
        if won is None:
            raise RegistryError(self._meanwhile("promoted"))
        return won

    def version(self, number: str) -> Any | None:
        """A version as MLflow knows it; None where there is none, or none any more."""
        try:
            return self.client.get_model_version(self.name, number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _meanwhile(self, done: str) -> str:
        now = self.terms()[-1]
        return (
            f"version {now.champion} of {self.name} became the champion in the meantime "
            f"({now.why}): nothing was {done}. If you still want that, ask again"
        )

    def _claim(self, after: Term | None, champion: str, why: str, **marks: bool) -> Term | None:
        won = self._write(after, champion, why, **marks)
        if won is not None:
            self.settle()
        return won

    def _write(self, after: Term | None, champion: str, why: str, **marks: bool) -> Term | None:
        """Write the term after `after`; None if somebody else has."""
        run = self._log_run()
        if run is None:
            raise RegistryError(
                f"expected a version of {self.name} with the run that made it, but it has none: "
                "register one with `sdn run`"
            )
        number = 1 if after is None else after.number + 1
        entry = {
            "champion": champion,
            "previous": None if after is None else after.champion,
            "why": _plain(why),
            "at": self._now().isoformat(timespec="seconds"),
            # MLflow takes the same value twice; so no two claims may be the same.
            "claim": uuid.uuid4().hex,
            **marks,
        }
        value = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
        key = f"champion-{number:06d}"
        try:
            self.client.log_param(run, key, value)
        except MlflowException:
            # Refused, or written although the answer was lost: the log says which.
            there = self.client.get_run(run).data.params.get(key)
            if there is None:
                raise
            if there != value:
                return None
        return _parsed(number, value)

    def _show(self, term: Term) -> None:
        """Set aliases and tags that differ from what the term says.

        `champion` comes first: until then it names the champion before, from then on the new one.
        It is never taken away, so it names a whole version at every moment.
        """
        aliases = self._aliases()
        if self._point(CHAMPION, term.champion, aliases) and aliases.get(CHAMPION) not in {
            None,
            term.champion,
            term.previous,
        }:
            logger.warning(
                "the alias champion of %s named version %s; by the log it is version %s (%s), and "
                "is again. `sdn rollback` goes back; setting the alias by hand does not last",
                *(self.name, aliases.get(CHAMPION), term.champion, term.why),
            )
        pointed = term.previous is not None and self._point(PREVIOUS, term.previous, aliases)
        if not pointed and PREVIOUS in aliases:
            _insist(self.client.delete_registered_model_alias, self.name, PREVIOUS)
        if aliases.get(CHALLENGER) == term.champion:
            _insist(self.client.delete_registered_model_alias, self.name, CHALLENGER)
        if term.rollback and term.previous is not None:
            self._mark(term, term.previous)
        if term.forced:
            self._mark_forced(term)

    def _point(self, alias: str, version: str, aliases: dict[str, str]) -> bool:
        """Let an alias name a version; False where the version was deleted."""
        if aliases.get(alias) == version:
            return True
        try:
            _insist(self.client.set_registered_model_alias, self.name, alias, version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _mark(self, term: Term, left: str) -> None:
        """The version that was rolled back from says so, the one that is back no longer."""
        text = f"{term.at} {term.why}"
        old, new = self.version(left), self.version(term.champion)
        if old is not None and old.tags.get(ROLLED_BACK) != text:
            _insist(self.client.set_model_version_tag, self.name, left, ROLLED_BACK, text)
        if new is not None and ROLLED_BACK in new.tags:
            _insist(self.client.delete_model_version_tag, self.name, term.champion, ROLLED_BACK)

    def _mark_forced(self, term: Term) -> None:
        """The version says that a person overruled the gate, and no longer that it was undone."""
        text, held = f"{term.at} {term.why}", self.version(term.champion)
        if held is None:
            return
        if held.tags.get(FORCED) != text:
            _insist(self.client.set_model_version_tag, self.name, term.champion, FORCED, text)
        if ROLLED_BACK in held.tags:
            _insist(self.client.delete_model_version_tag, self.name, term.champion, ROLLED_BACK)

    def _undone(self, version: str) -> Term | None:
        """The rollback from this version, unless it has been champion since."""
        for term in reversed(self.terms()):
            if term.champion == version:
                return None
            if term.rollback and term.previous == version:
                return term
        return None

    def _aliases(self) -> dict[str, str]:
        """Alias -> version."""
        return {alias: str(found) for alias, found in self._model().aliases.items()}

    def _model(self) -> Any:
        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise RegistryError(
                f"expected a registered model {self.name}, but there is none: `sdn run` registers "
                "one; MLflow's page lists those there are"
            ) from error

    def _log_run(self) -> str | None:
        """The run that holds the terms: that of the oldest version; None before there is one.

        All find the same one, for it is there before any promotion. A tag keeps it from then on, so
        that the log is not lost when that version is deleted.
        """
        if self._log is None:
            self._log = self._model().tags.get(_LOG_TAG)
        if self._log is None:
            found = self.client.search_model_versions(f"name = '{self.name}'")
            runs = {int(version.version): version.run_id for version in found if version.run_id}
            if runs:
                self._log = str(runs[min(runs)])
                _insist(self.client.set_registered_model_tag, self.name, _LOG_TAG, str(self._log))
        return self._log


def _insist(request: Callable[..., Any], *args: str) -> None:
    """Set or take away, where somebody else may do the same in the same moment.

    MLflow reads a row before it writes it; of two writers one may be refused by the database.
    """
    for left in reversed(range(_TRIES)):
        try:
            request(*args)
        except MlflowException as error:
            if left == 0 or error.error_code not in {"BAD_REQUEST", "TEMPORARILY_UNAVAILABLE"}:
                raise
        else:
            return


def _plain(why: str) -> str:
    """A text on one line that every database takes."""
    return " ".join(why.encode("utf-8", "replace").decode().split())[:_LONGEST_WHY]


def _parsed(number: int, value: str) -> Term:
    try:
        entry = json.loads(value)
        previous = entry["previous"]
        return Term(
            number=number,
            champion=str(entry["champion"]),
            previous=None if previous is None else str(previous),
            why=str(entry["why"]),
            at=str(entry["at"]),
            rollback=bool(entry.get("rollback", False)),
            forced=bool(entry.get("forced", False)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"expected JSON with champion, previous, why and at in the parameter "
            f"champion-{number:06d}, but found {value[:200]!r}: nobody but `pipelines.succession` "
            "may write parameters of this name"
        ) from error

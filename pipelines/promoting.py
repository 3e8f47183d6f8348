"""`sdn promote`: a version of the registry becomes the champion, through the gate or over it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from pipelines.masking import masked
from pipelines.notifying import notify_of_version
from pipelines.preparing import place
from pipelines.registry import RegistryError
from pipelines.release import COMPARED, DECISION, champion_of, opponent_of, short_decision
from pipelines.report import REPORT
from pipelines.rolling_back import registered_name
from pipelines.run import perform
from pipelines.scoring import open_scoring, score
from pipelines.settings import Settings
from pipelines.store import StoreError
from pipelines.succession import Outcome, Succession
from pipelines.tracking import TRACKING_ERRORS, client
from pipelines.tracking_place import shown_uri, version_page
from sdn.data.manifest import read_versions
from sdn.data.sources import PREPARED

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.run import Done, Job, Run
    from pipelines.scoring import Scored, Scoring


def open_promotion(
    name: str,
    version: int,
    store: str | None,
    progress: Callable[[str, float, str], None] = lambda stage, share, text: None,
) -> Scoring:
    """A registered version, its files checked, and the config that it is compared with.

    Args:
        name: of the registered model; empty for the one whose champion is the latest.
        version: its number.
        store: in place of the configured one.
        progress: see `pipelines.run.Run.progress`.

    Raises:
        RegistryError: no such version, or its files are not those registered.
    """
    settings = Settings() if store is None else Settings(store=store)
    return open_scoring(f"models:/{registered_name(settings, name)}/{version}", store, {}, progress)


def promote(
    scoring: Scoring,
    *,
    force: bool = False,
    reason: str = "",
    do: Callable[[Run, Job], Done] = perform,
) -> dict[str, Any]:
    """Make a version the champion if the paired test says so, or if a person overrules it.

    The version is compared with the champion on the same captions, as after a run. `roll_back`
    undoes a promotion. People are told of either outcome.

    Args:
        scoring: the version, see `open_promotion`.
        force: overrule the gate.
        reason: why; kept in the log of champions and as a tag. Needed to overrule.
        do: does a stage.

    Returns:
        `name`, `version`, `champion` (whether it is now), `before` (the champion before), `reason`,
        `forced`, `term`, `compared_with`, `decision`, `report` (None where nothing was compared),
        `seconds`.

    Raises:
        ValueError: force without a reason.
        RegistryError: MLflow cannot be reached, or the champion changed while a person overruled.
        StoreError: the data that the version is scored on are not in the store.
    """
    began = time.monotonic()
    check_reason(reason, force=force)
    settings, found = scoring.run.settings, scoring.found
    reached = client(settings)
    succession, gate = Succession(reached, found.name), Gate(reached, scoring, do)
    try:
        before = succession.settle()
        if force:
            outcome = _overrule(succession, gate, found.version, reason.strip())
        else:
            outcome = succession.succeed(found.version, gate.better_than)
        if gate.said:
            gate.keep(outcome, forced=force)
    except TRACKING_ERRORS as error:
        raise RegistryError(
            f"{shown_uri(settings)} failed in the promotion of {found.title} ({error}): see "
            "`sdn doctor`, then ask for it again; what was begun is completed then"
        ) from error
    hint = "" if outcome.champion else ". With force and a reason a person overrules this"
    told = {
        "name": found.name,
        "version": found.version,
        "champion": outcome.champion,
        "before": before.champion if before else None,
        "reason": f"{outcome.reason}{hint}",
        "forced": force and bool(gate.said),
        "term": outcome.term.number if outcome.term else None,
        "compared_with": gate.compared.result["champion"] if gate.compared else None,
        "decision": gate.decision(outcome, forced=force),
        "report": gate.report,
        "seconds": round(time.monotonic() - began, 2),
    }
    if gate.said or not outcome.champion:  # not where it was the champion already
        tell(settings, told)
    return told


def check_reason(reason: str, *, force: bool) -> None:
    """Refuse to overrule the gate without a reason.

    Raises:
        ValueError: there is none.
    """
    if force and not reason.strip():
        raise ValueError("force overrules the comparison: say why in the reason, it is kept")


class Gate:
    """The paired test on the same captions, and what it said.

    Args:
        reached: client of the registry.
        scoring: the version that is to be promoted.
        do: does a stage.
    """

    def __init__(self, reached: Any, scoring: Scoring, do: Callable[[Run, Job], Done]) -> None:
        self._client, self._scoring, self._do = reached, scoring, do
        self._scored: Scored | None = None
        self._opponent: dict[str, str] = {}
        self.compared: Done | None = None
        self.said = ""
        """Its reason; "" until it was asked."""

    def better_than(self, champion: str | None) -> tuple[bool, str]:
        """Whether the version is better than the champion of this number, and why.

        Raises:
            RegistryError: the champion's model cannot be had or opened.
            StoreError: what it is scored with is not in the store.
        """
        run, name = self._scoring.run, self._scoring.found.name
        if self._scored is None:
            self._scored = score(self._scoring, self._do)
        stages = {"prepare": self._scored.inputs["data"]}
        opponent = opponent_of(self._client, name, champion, stages, data_versions(run))
        try:
            self.compared = self._scored.against(champion_of(run, name, opponent), self._do)
        except FileNotFoundError as error:  # of an earlier format
            raise RegistryError(
                f"version {champion} of {name} cannot be opened by this code ({error}), so that "
                "nothing can be compared with it: force and a reason overrule that"
            ) from error
        self._opponent = opponent
        decision = self.compared.result["decision"]
        self.said = str(decision["reason"])
        return bool(decision["promoted"]), self.said

    def keep(self, outcome: Outcome, *, forced: bool) -> None:
        """The decision as tags of the version, where a rerun of its pipeline reads it."""
        found = self._scoring.found
        tags = {
            DECISION: json.dumps(self.decision(outcome, forced=forced)),
            COMPARED: json.dumps(self._opponent),
        }
        if self.compared is not None:
            tags["sdn.key.compare"] = self.compared.key
        for name, value in tags.items():
            self._client.set_model_version_tag(found.name, found.version, name, value)

    def decision(self, outcome: Outcome, *, forced: bool) -> dict[str, Any]:
        """What was decided, with the numbers of the comparison where there was one."""
        numbers: dict[str, Any] = {"kid": None, "match": None}
        if self.compared is not None:
            numbers = short_decision(self.compared.result["decision"])
        decided = numbers | {"promoted": outcome.champion, "reason": outcome.reason}
        return decided | ({"forced": True} if forced else {})

    @property
    def report(self) -> str | None:
        """File of the report of the comparison; None where nothing was compared."""
        if self.compared is None:
            return None
        return str(self._scoring.run.store.fetch(self.compared.folder) / REPORT)


def data_versions(run: Run) -> frozenset[str]:
    """Digests of the versions of the data set that a run is on; empty where that does not grow."""
    data = run.config.data
    if data.source != PREPARED or data.path is None:
        return frozenset()
    return frozenset(one.digest for one in read_versions(place(data.path, run.settings)))


def tell(settings: Settings, found: dict[str, Any]) -> None:
    """Tell people what was decided by hand.

    Args:
        settings: where to.
        found: see `promote`.
    """
    name, version, promoted = found["name"], found["version"], found["champion"]
    with_whom = found["compared_with"]
    notify_of_version(
        settings,
        name,
        version,
        f"By hand. {f'Compared with {with_whom}. ' if with_whom else ''}{found['reason']}",
        version_page(settings, name, version) or found["report"],
        promoted=promoted,
        key=f"term-{name}-{found['term']}" if promoted else None,
    )


def _overrule(succession: Succession, gate: Gate, version: str, reason: str) -> Outcome:
    """Make a version the champion whatever the gate says; what it says is kept."""
    newest = succession.settle()
    if newest is not None and newest.champion == version:
        return Outcome(champion=True, reason="already the champion", term=newest)
    there = newest is not None and succession.version(newest.champion) is not None
    try:
        gate.better_than(newest.champion if newest is not None and there else None)
    except (StoreError, RegistryError, ValueError, OSError) as error:
        gate.said = f"could not be asked ({masked(str(error))})"
    why = f"{reason} (by hand; the gate: {gate.said})"
    term = succession.overrule(version, newest, why)
    return Outcome(champion=True, reason=term.why, term=term)

"""Models in MLflow's registry: checked in a fresh process, registered once, found again."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.exceptions import MlflowException

from pipelines.digests import folder_digest
from pipelines.masking import masked
from pipelines.model_check import model_folder_in
from pipelines.tracking import KEY_TAG, client
from pipelines.tracking_place import shown_uri, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.settings import Settings
    from pipelines.tracking import Tracker

logger = logging.getLogger(__name__)

CHAMPION, CHALLENGER = "champion", "challenger"
SHA256, CODE, MANIFEST, KEY = "sdn.sha256", "sdn.code", "sdn.manifest", "sdn.key"
"""Tags of a version: digest of its model folder, what code made it, data version, stage keys."""
_NEEDED = ("torch", "numpy", "pillow", "safetensors", "mlflow")
_CHECK_S = 600.0
_ROOT = Path(__file__).parents[1]


class RegistryError(RuntimeError):
    """No such model, or it cannot be registered or reached; the text says what to do.

    It is masked, for MLflow's own texts repeat the address that was asked, and tables, artifacts
    and notices repeat this one.
    """

    def __init__(self, text: str) -> None:
        super().__init__(masked(text))


class DamagedModelError(RegistryError):
    """The files of a registered model are not those that were registered."""


def register(
    tracker: Tracker,
    run: str,
    folder: Path,
    *,
    name: str,
    caption: str,
    card: str,
    tags: Mapping[str, str],
    key: str,
    samples: Path,
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """Register a model folder as a new version, once for each key, if it draws what it drew.

    Args:
        tracker: of the recipe.
        run: the parent run, whose artifact the model becomes.
        folder: with student and caption encoder.
        name: of the registered model.
        caption: an example of its input.
        card: the version's description, markdown.
        tags: of the version, beside those that are set here.
        key: stage key of the registration.
        samples: folder with `samples.json` and the PNG files it lists, of the evaluation.
        packages: that the model needs beside torch, numpy, Pillow and safetensors.

    Returns:
        `name`, `version`, `uri`.

    Raises:
        RegistryError: a fresh process cannot load the logged model, or does not draw the samples
            with it bit for bit; nothing is registered then.
    """
    found = tracker.client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'")
    if found:
        number = str(found[0].version)
        return {"name": name, "version": number, "uri": f"models:/{name}/{number}"}
    info = _log_model(tracker, run, folder, caption, packages)
    digest = folder_digest(folder)
    _check(tracker.settings, info.model_uri, samples, digest, packages)
    with _existing(name):
        tracker.client.create_registered_model(name, description="Text-to-image, see the versions.")
    own = {KEY_TAG: key, SHA256: digest, CODE: code_version()}
    made = tracker.client.create_model_version(
        name,
        source=info.model_uri,
        run_id=run,
        tags={**tags, **own},
        description=card,
        model_id=info.model_id,  # a server refuses a source that no id answers for
    )
    number = str(made.version)
    tracker.client.set_registered_model_alias(name, CHALLENGER, number)
    return {"name": name, "version": number, "uri": f"models:/{name}/{number}"}


@contextmanager
def _existing(name: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        logger.debug("registered model %s is there already", name)


def requirements(packages: Sequence[str] = ()) -> list[str]:
    """What the model needs, in the versions with which its samples are drawn again here.

    Without what stands behind a `+`: no index but PyTorch's own has builds of that name.
    """
    return [f"{name}=={version(name).partition('+')[0]}" for name in (*_NEEDED, *packages)]


def code_version() -> str:
    """Version of this project, and the revision where it lies in a git checkout."""
    try:
        found = version("sdn")
    except PackageNotFoundError:
        found = "not installed"
    if not (_ROOT / ".git").exists():
        return found
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],  # noqa: S607
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("no git revision: %s", error)
        return found
    return f"{found} {revision}"


def _log_model(
    tracker: Tracker, run: str, folder: Path, caption: str, packages: Sequence[str]
) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    import sdn

    signature = ModelSignature(
        # Not `string`: by that, MLflow's server makes the texts "3" and "None" of 3 and null, and
        # the model never learns that they were no captions. It checks them itself.
        inputs=Schema([ColSpec(AnyType())]),  # type: ignore[no-untyped-call]
        outputs=Schema([ColSpec(DataType.binary)]),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("scale", DataType.long, 1),
                ParamSpec("noise_scale", DataType.double, None),  # the model's own
            ]
        ),
    )
    mlflow.set_experiment(experiment_id=tracker.experiment)
    with mlflow.start_run(run_id=run, log_system_metrics=False):
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("model_code.py")),
            artifacts={"model": str(folder)},
            code_paths=[str(Path(sdn.__file__).parent)],
            signature=signature,
            input_example=([caption], {"seed": 1}),
            pip_requirements=requirements(packages),
        )


def _check(
    settings: Settings, uri: str, samples: Path, digest: str, packages: Sequence[str]
) -> None:
    """Let a fresh process load the logged model and draw the samples.

    Raises:
        RegistryError: see `register`.
    """
    with tempfile.TemporaryDirectory(prefix="sdn-check-") as folder:
        # Fetched here: there, what fetches from S3 is absent.
        place = mlflow.artifacts.download_artifacts(uri, dst_path=folder)
        # The project may lie on no path but this process's.
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        addresses = {"MLFLOW_TRACKING_URI": tracking_uri(settings), "PYTHONPATH": path}
        words = ("-m", "pipelines.model_check", place, str(samples.resolve()), *packages)
        try:
            done = subprocess.run(  # noqa: S603 (our own module)
                [sys.executable, *words],
                env=os.environ | addresses,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_CHECK_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RegistryError(
                f"a fresh process did not draw the samples with {uri} within {_CHECK_S:.0f} s; "
                "nothing is registered"
            ) from error
    if done.returncode != 0:
        raise RegistryError(
            f"a fresh process cannot use {uri}, so that nothing is registered; it said: "
            f"{done.stderr.strip()[-2000:]}"
        )
    problems = _problems(json.loads(done.stdout.splitlines()[-1]), digest)
    if problems:
        raise RegistryError(
            f"a fresh process that loads {uri} does not draw the samples in {samples} as the "
            f"evaluation did, so that nothing is registered: {'; '.join(problems)}. Evaluate the "
            "model again on this machine, or look for what changed in the code since"
        )


def _problems(found: dict[str, Any], digest: str) -> list[str]:
    """What keeps a model from being registered."""
    problems = list(found["different"][:5])
    if len(found["different"]) > len(problems):
        problems.append(f"and {len(found['different']) - len(problems)} more")
    if found["sha256"] != digest:
        problems.append(f"its folder has SHA-256 {found['sha256']}, expected {digest}")
    if found["loaded"]:
        problems.append(f"it loads {', '.join(found['loaded'])}")
    if found["code"] != str(Path("code", "sdn")):
        problems.append(f"its code came from {found['code']}, not from what was logged with it")
    return problems


def find_version(settings: Settings, uri: str) -> Any:
    """MLflow's version of `models:/name/version`, `models:/name@alias` or `name` (its champion).

    Raises:
        RegistryError: no such model, version or alias.
    """
    reached = client(settings)
    plain = uri.removeprefix("models:/")
    try:
        if "/" in plain:
            name, _, number = plain.partition("/")
            return reached.get_model_version(name, number)
        name, _, alias = plain.partition("@")
        return reached.get_model_version_by_alias(name, alias or CHAMPION)
    except MlflowException as error:
        raise RegistryError(
            f"no model {uri} in {shown_uri(settings)} ({error}); `sdn run` registers one, "
            "--model takes models:/NAME@champion, models:/NAME/VERSION or a model folder"
        ) from error


def champion_version(settings: Settings, name: str) -> Any | None:
    """MLflow's version that is the champion of a registered model; None where there is none.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    try:
        return client(settings).get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            return None
        raise RegistryError(
            f"MLflow at {shown_uri(settings)} cannot be asked who the champion of {name} is "
            f"({error}): see `sdn doctor`"
        ) from error


def versions_of(settings: Settings, condition: str) -> list[Any]:
    """MLflow's versions that meet a condition, the newest first.

    Args:
        settings: where the registry is.
        condition: in MLflow's language, such as `name = 'sdn-openmoji'`.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    try:
        reached = client(settings)
        found = reached.search_model_versions(condition)
        # Asked for again, one by one: a search leaves the aliases out.
        whole = [reached.get_model_version(one.name, one.version) for one in found]
    except MlflowException as error:
        raise RegistryError(
            f"MLflow at {shown_uri(settings)} cannot be asked ({error}): see `sdn doctor`"
        ) from error
    return sorted(whole, key=lambda one: -(one.creation_timestamp or 0))


def runs_of(settings: Settings, run: str) -> list[dict[str, str]]:
    """A parent run and those nested in it: `id`, `name`, `status`, `url` ("" without a server).

    Raises:
        RegistryError: MLflow cannot be reached, or has no such run.
    """
    try:
        reached = client(settings)
        parent = reached.get_run(run)
        nested = reached.search_runs(
            [parent.info.experiment_id],
            f"tags.`mlflow.parentRunId` = '{run}'",
            order_by=["attributes.start_time ASC"],
        )
    except MlflowException as error:
        raise RegistryError(
            f"run {run} in {shown_uri(settings)} cannot be read ({error})"
        ) from error
    server = tracking_uri(settings)
    page = f"{server.rstrip('/')}/#/experiments/" if server.startswith("http") else ""
    return [
        {
            "id": one.info.run_id,
            "name": one.data.tags.get("mlflow.runName", ""),
            "status": one.info.status,
            "url": page and f"{page}{one.info.experiment_id}/runs/{one.info.run_id}",
        }
        for one in (parent, *nested)
    ]


def model_folder(settings: Settings, uri: str) -> tuple[Path, str, str]:
    """A local folder with the model of `models:/name/version` or `models:/name@alias`.

    Returns:
        (folder, name, version)

    Raises:
        RegistryError: no such model, version or alias, or its files are not those registered.
    """
    found = find_version(settings, uri)
    exact = f"models:/{found.name}/{found.version}"
    try:
        folder = model_folder_in(Path(mlflow.artifacts.download_artifacts(exact)))
    except (MlflowException, OSError, ValueError) as error:
        raise RegistryError(
            f"{exact} is registered, but its files cannot be fetched ({error}): see `sdn lineage "
            f"{exact}`, or register it again with `sdn run`"
        ) from error
    expected = found.tags.get(SHA256)
    if expected is not None and (came := folder_digest(folder)) != expected:
        raise DamagedModelError(
            f"{exact} is damaged: its folder {folder} has SHA-256 {came}, registered was "
            f"{expected}; put the files back or name another version"
        )
    return folder, str(found.name), str(found.version)


def champions(settings: Settings) -> list[str]:
    """Names of the registered models that have a champion, the latest first.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    try:
        found = client(settings).search_registered_models()
    except MlflowException as error:
        raise RegistryError(
            f"MLflow at {shown_uri(settings)} cannot be asked ({error}): see `sdn doctor`, or "
            "name a model folder with --model"
        ) from error
    named = [m for m in found if CHAMPION in (m.aliases or {})]
    return [m.name for m in sorted(named, key=lambda m: -(m.last_updated_timestamp or 0))]

"""The import contracts are not kept by accident: each breaks where its rule is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the packages and their contracts."""
    folder = tmp_path_factory.mktemp("contracts")
    for package in ("sdn", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder):
    """What lint-imports says of the packages in `folder`."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            # `-c` puts the working folder first on the path: the copies are what is read.
            "import sys; from importlinter.cli import lint_imports_command; "
            "sys.argv = ['lint-imports', '--no-cache']; lint_imports_command()",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_copy_keeps_every_contract(copied):
    """Unchanged, the copy keeps every contract: what breaks below breaks by the change."""
    done = lint(copied)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("sdn/stages.py", "import ray", "The method knows nothing of what operates it"),
        ("sdn/data/plan.py", "import pipelines.points", "The method knows nothing"),
        ("pipelines/worker.py", "import pipelines.tracking", "Workers know Ray alone"),
        ("pipelines/store.py", "import prefect", "Workers know Ray alone"),  # through a helper
        ("pipelines/launch.py", "import mlflow", "MLflow stands behind tracking"),
        ("sdn/taps.py", "import sdn.data.records", "The mathematics knows no data"),
        ("pipelines/worker.py", "import pipelines.launch", "From the command to the workers"),
        ("pipelines/launch.py", "import pipelines.cli", "From the command to the workers"),
        ("sdn/losses.py", "import sdn.stages", "From the loop to the tables"),
        ("sdn/config/run.py", "import sdn.losses", "From the loop to the tables"),
    ],
)
def test_a_broken_rule_is_found(copied, module, line, contract):
    """One import against a rule breaks the contract of that rule, indirect imports included."""
    path = copied / module
    text = path.read_text()
    path.write_text(f"{text}\n\ndef _later() -> None:\n    {line}\n")
    try:
        done = lint(copied)
    finally:
        path.write_text(text)
    assert done.returncode != 0, done.stdout + done.stderr
    broken = [row for row in done.stdout.splitlines() if " BROKEN" in row]
    assert any(row.startswith(contract) for row in broken), done.stdout

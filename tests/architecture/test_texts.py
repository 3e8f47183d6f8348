"""What no file of the project may hold: paths of one machine, secrets, markers of a lost merge."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).name

FORBIDDEN = {
    # `~` and settings name homes; an absolute one works on one machine only.
    "home folder": re.compile(r"(?<![\w.])/(?:home|Users)/\w|\b[A-Za-z]:\\+Users\\"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "access key": re.compile(
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{30,}|\bhf_[A-Za-z]{30,}"
    ),
    "address with a password": re.compile(r"\b(?:https?|s3)://[^\s/:@'\"{}$]+:[^\s/@'\"{}$]+@"),
    "merge marker": re.compile(r"^(?:<{7} |={7}$|>{7} )", re.MULTILINE),
}


def project_files():
    """Tracked files as text; those that are no text are left out."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: nothing tells the project's files from others")
    found = {}
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.name == HERE or not path.is_file():
            continue
        try:
            found[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    assert "pyproject.toml" in found
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    """No tracked file holds a home folder, a secret or what a merge left behind."""
    pattern = FORBIDDEN[what]
    hits = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in project_files().items()
        for match in pattern.finditer(text)
    ]
    assert hits == []


def test_no_file_names_this_checkout():
    """No tracked file holds the absolute path at which the project happens to lie."""
    place = re.compile(re.escape(str(ROOT)) + r"(?![\w-])")
    assert [name for name, text in project_files().items() if place.search(text)] == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("home folder", "data = '/home/" + "anna/data'"),
        ("home folder", "C:" + "\\Users\\anna"),
        ("access key", "AKIA" + "ABCDEFGHIJKLMNOP"),
        ("address with a password", "https://anna:" + "secret@example.org"),
        ("private key", "-----BEGIN RSA " + "PRIVATE KEY-----"),
        ("merge marker", "a\n" + "<" * 7 + " HEAD\nb"),
    ],
)
def test_the_patterns_find_what_they_are_for(what, text):
    """Each pattern finds an example of what it forbids."""
    assert FORBIDDEN[what].search(text)

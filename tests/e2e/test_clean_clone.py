"""The README's first command in a clean clone, with a virtual environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from places import ROOT, place


@pytest.mark.rest  # installs all packages once more; the chain itself runs in test_chain
def test_make_run_in_a_clean_clone(tmp_path):
    """`make run RECIPE=tiny` installs, runs the chain and says where everything is."""
    clone = tmp_path / "sdn"
    if (ROOT / ".git").exists():
        git = ["git", "-c", f"safe.directory={ROOT}", "-c", f"safe.directory={ROOT / '.git'}"]
        subprocess.run([*git, "clone", "--quiet", str(ROOT), str(clone)], check=True)
    else:  # a checkout without its history
        made = shutil.ignore_patterns(".venv", "runs", "*_cache", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, clone, ignore=made)
        subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
        subprocess.run(["git", "add", "--all"], cwd=clone, check=True)
    env = place(tmp_path).env
    for name in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS"):
        env.pop(name, None)
    # Without the environment that these tests run in.
    own = str(Path(sys.executable).parent)
    env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if p != own)
    done = subprocess.run(
        ["make", "run", "RECIPE=tiny"],
        env=env, cwd=clone, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout
    assert re.search(r"^top 1 on unseen compositions: \d+\.\d%$", said, re.MULTILINE)
    assert re.search(r"^model: sdn-tiny version 1 \(champion", said, re.MULTILINE)
    for what in ("contact sheet", "report"):
        (path,) = re.findall(rf"^{what}: (.+)$", said, re.MULTILINE)
        assert Path(path).is_file()
        assert Path(path).is_relative_to(clone / "runs")
    assert "sdn ui" in said
    (caption,) = re.findall(r'^generate: sdn generate "(.+)"$', said, re.MULTILINE)
    drawn = subprocess.run(
        [clone / ".venv" / "bin" / "sdn", "generate", caption, "--out", "drawn.png"],
        env=env, cwd=clone, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(clone / "drawn.png") as image:
        assert image.size == (32, 32)
    left = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    )
    untracked = [line[3:] for line in left.stdout.splitlines() if line.startswith("??")]
    assert untracked == ["drawn.png"], "a run leaves nothing that git would take"
    shutil.rmtree(clone / ".venv")  # gigabytes

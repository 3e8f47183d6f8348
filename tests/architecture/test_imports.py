import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORTS = """
import json, os, re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

allowed, unread = set(), ["torch", "numpy", "pillow"]
while unread:
    name = re.sub(r"[-_.]+", "-", unread.pop()).lower()
    if name in allowed:
        continue
    allowed.add(name)
    try:
        needs = requires(name) or []
    except PackageNotFoundError:
        continue
    unread += [re.match(r"[\\w.-]+", n).group() for n in needs if "extra ==" not in n]

blocked = {
    module
    for module, owners in packages_distributions().items()
    if not allowed & {re.sub(r"[-_.]+", "-", o).lower() for o in owners} and module != "sdn"
}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None


sys.meta_path.insert(0, Blocker())
changes, watching = [], False
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
           "os.truncate", "shutil.copyfile", "socket.connect", "subprocess.Popen", "os.fork",
           "os.posix_spawn", "os.system", "_thread.start_new_thread"}


def hook(event, args):
    if not watching:
        return
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes and path != os.devnull:
            changes.append(f"open {path} {mode}")
    elif event in CHANGES:
        changes.append(f"{event} {args}")


sys.addaudithook(hook)
import numpy, PIL.Image, torch  # what they do when imported is theirs

import importlib, pkgutil, threading

threads, environment = threading.active_count(), dict(os.environ)
cores, seed = torch.get_num_threads(), torch.initial_seed()
watching = True
import sdn

names = ["sdn"] + [m.name for m in pkgutil.walk_packages(sdn.__path__, "sdn.")]
for name in names:
    importlib.import_module(name)
watching = False
print(json.dumps({
    "names": names,
    "blocked": sorted(blocked),
    "loaded": sorted(blocked & {name.split(".")[0] for name in sys.modules}),
    "changes": changes,
    "threads": threading.active_count() - threads,
    "environment": environment != dict(os.environ),
    "torch": [cores, seed] != [torch.get_num_threads(), torch.initial_seed()],
}))
"""


def test_import_contracts():
    """Every contract of `[tool.importlinter]` in pyproject.toml is kept."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_method_needs_torch_numpy_and_pillow_only(tmp_path):
    """With everything else blocked all of `sdn` imports; it changes, starts and asks nothing."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORTS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    files = [p for p in (ROOT / "sdn").rglob("*.py") if p.name != "__init__.py"]
    assert len(found["names"]) >= len(files)
    assert {"sdn.training", "sdn.data.shards", "sdn.data.sources.openmoji"} <= set(found["names"])
    assert {"ray", "prefect", "mlflow", "boto3", "webdataset", "pyarrow", "pipelines"} <= set(
        found["blocked"]
    )
    assert found["loaded"] == []
    assert found["changes"] == []
    assert found["threads"] == 0
    assert not found["environment"]
    assert not found["torch"]
    assert list(tmp_path.iterdir()) == []

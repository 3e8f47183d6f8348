"""Importing the method leaves the process as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

STATE = """
import json, locale, logging, random, signal, sys, warnings
import numpy, PIL.Image, torch
import multiprocessing


def state():
    torch_state = torch.get_rng_state()
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "benchmark": torch.backends.cudnn.benchmark,
        "flush": str(torch.tensor(1e-40) * 1),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "sharing": torch.multiprocessing.get_sharing_strategy(),
        "torch random": torch_state.sum().item(),
        "numpy random": str(numpy.random.get_state()[1].sum()),
        "random": hash(random.getstate()),
        "numpy errors": numpy.geterr(),
        "largest image": PIL.Image.MAX_IMAGE_PIXELS,
        "log handlers": [repr(h) for h in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "filters": len(warnings.filters),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "path": sys.path[:],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "locale": locale.setlocale(locale.LC_ALL),
        "recursion": sys.getrecursionlimit(),
        "except hook": sys.excepthook is sys.__excepthook__,
        "cuda": torch.cuda.is_initialized(),
    }


before = state()
import importlib, pkgutil
import sdn

for module in pkgutil.walk_packages(sdn.__path__, "sdn."):
    importlib.import_module(module.name)
after = state()
print(json.dumps({k: [str(before[k]), str(after[k])] for k in before if before[k] != after[k]}))
"""


def test_importing_the_method_changes_no_global_setting(tmp_path):
    """Every module of `sdn` imported: torch, numpy, Pillow, logging, signals, seeds as before."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", STATE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    assert done.stderr == ""

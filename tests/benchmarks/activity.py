"""How much of a student is alive: channels that no caption wakes, and units that are above 0.

    python tests/benchmarks/activity.py --data FOLDER --model FOLDER [--model FOLDER]...

For each tap but the image, over 96 test captions: the share of its channels that are nowhere above
0 for any of them, and of its values that are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sdn.data.loader import load_split
from sdn.noise import coded
from sdn.sampling import open_synthesizer

CAPTIONS = 96


def activity(model: Path, captions: list[str]) -> dict[str, tuple[float, float]]:
    """Tap -> (share of channels never above 0, share of values above 0), both 0..1."""
    synthesizer = open_synthesizer(model)
    student = synthesizer.student
    with torch.no_grad():
        text = synthesizer.encoder.encode(captions)
        taps = student(coded(text, student.noise, captions, seed=0))
    found = {}
    for name, tap in taps.items():
        if name != "image":
            awake = (tap > 0).sum((0, 2, 3)) > 0
            found[name] = (1 - awake.float().mean().item(), (tap > 0).float().mean().item())
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, action="append", required=True)
    given = parser.parse_args()
    captions = [found[0] for found in load_split(given.data, "test").captions[:CAPTIONS]]
    for model in given.model:
        print(model)
        for name, (dead, above) in activity(model, captions).items():
            print(f"  {name:8} {dead:6.1%} of its channels never active, {above:6.1%} above 0")


if __name__ == "__main__":
    main()

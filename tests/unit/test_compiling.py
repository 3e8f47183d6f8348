"""What is compiled, and what happens where it cannot be."""

import pytest
import torch

from sdn import compiling
from sdn.compiling import compiled

CPU = torch.device("cpu")


def double(x):
    return x * 2


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_a_cpu_runs_plainly_unless_told_otherwise(wanted):
    """auto and off leave the function as it is on a CPU."""
    assert compiled(double, wanted, CPU) is double


def test_what_lacks_is_said(monkeypatch, caplog):
    """Without a compiler, or without Triton, it runs plainly and says what to install."""
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert compiled(double, "on", CPU) is double
    assert "no C++ compiler" in caplog.text
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert compiled(double, "auto", torch.device("cuda")) is double
    assert "Triton" in caplog.text


def test_a_compiler_that_fails_is_fallen_back_from(monkeypatch, caplog):
    """The first call that cannot be compiled computes plainly, says why, and so do all others."""

    def broken(function):
        def call(*values):
            raise RuntimeError("no such header\nand more")

        return call

    monkeypatch.setattr(compiling.torch, "compile", broken)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/usr/bin/" + name)
    found = compiled(double, "on", CPU)
    assert [float(found(torch.tensor(n))) for n in (1.0, 2.0)] == [2.0, 4.0]
    assert caplog.text.count("not compiled: no such header") == 1
    assert "and more" not in caplog.text


def test_errors_of_the_function_are_its_own(monkeypatch):
    """Once it has worked, what the function raises is raised, not computed again."""
    monkeypatch.setattr(compiling.torch, "compile", lambda function: function)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/usr/bin/" + name)
    calls = []

    def picky(x):
        calls.append(x)
        if x > 1:
            raise ValueError("too large")
        return x

    found = compiled(picky, "on", CPU)
    assert found(1) == 1
    with pytest.raises(ValueError, match="too large"):
        found(2)
    assert calls == [1, 2]

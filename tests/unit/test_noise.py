"""Random numbers of a sample."""

from __future__ import annotations

import torch

from sdn.noise import coded, normal_rows, uniform_rows


def test_a_row_is_a_function_of_name_seed_and_purpose():
    """Neither of the rows beside it nor of their order, so the same on any rank."""
    rows = normal_rows(["a", "b", "c"], 5, seed=1, of="noise")
    assert torch.equal(normal_rows(["c", "a"], 5, seed=1, of="noise"), rows[[2, 0]])
    assert torch.equal(normal_rows([b"b"], 5, seed=1, of="noise"), rows[1:2])
    for other in (
        normal_rows(["a"], 5, seed=2, of="noise"),
        normal_rows(["a"], 5, seed=1, of="shift"),
        rows[1:2],
    ):
        assert (other != rows[:1]).all()


def test_rows_are_of_their_distribution():
    """Mean and deviation of many, within five standard errors; the rows are not alike."""
    names = [str(n) for n in range(2_000)]
    normal, uniform = (
        draw(names, 8, seed=0, of="x").double() for draw in (normal_rows, uniform_rows)
    )
    error = 5 / normal.numel() ** 0.5
    assert abs(normal.mean()) < error
    assert abs(normal.std() - 1) < error
    assert abs(uniform.mean() - 0.5) < error
    assert 0 <= uniform.min() < uniform.max() < 1
    between = torch.corrcoef(normal.T) - torch.eye(8)
    assert between.abs().max() < 5 / len(names) ** 0.5
    assert len(torch.unique(normal, dim=0)) == len(names)


def test_the_student_reads_text_and_noise():
    """The text stands first and is unchanged; without noise it is all that is read."""
    text, names = torch.randn(3, 4), ["a", "b", "c"]
    assert coded(text, 0, names, seed=0) is text
    code = coded(text, 6, names, seed=0)
    assert torch.equal(code[:, :4], text)
    assert torch.equal(code[:, 4:], normal_rows(names, 6, seed=0, of="noise"))
    wider = coded(text, 6, names, seed=0, scale=1.5)
    assert torch.equal(wider[:, :4], text)
    assert torch.equal(wider[:, 4:], 1.5 * code[:, 4:])

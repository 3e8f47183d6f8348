"""Points of a training that was taken back to an earlier step."""

import json

from pipelines.points import POINTS, PointLog, read_points


def test_points_of_steps_done_again_come_in_their_place(tmp_path):
    """After a rollback, steps that were not reported before come between those that were."""
    with PointLog(tmp_path) as log:
        for step in (20, 40, 60):
            log.write({"step": step, "run": "first"})
    with PointLog(tmp_path) as log:
        for step in (30, 50, 60, 70):
            log.write({"step": step, "run": "second"})
    found = [(point["step"], point["run"]) for point in read_points(tmp_path)]
    assert [step for step, _ in found] == [20, 30, 40, 50, 60, 70]
    assert dict(found)[60] == "second"


def test_lines_are_json_of_one_point_each(tmp_path):
    """The file is plain JSON lines, readable by anything, one a point."""
    with PointLog(tmp_path) as log:
        log.write({"step": 1, "losses": {"loss/image": 0.5}, "text": "two\nlines"})
        log.write({"step": 2})
    lines = (tmp_path / POINTS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]

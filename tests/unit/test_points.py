import json

from pipelines.points import POINTS, PointLog, read_points


def write(folder, *points):
    with PointLog(folder) as log:
        for point in points:
            log.write(point)


def test_points_come_once_and_in_order(tmp_path):
    """Steps come ascending; one done again after a restart counts with its later values."""
    write(tmp_path, {"step": 20, "loss": 2.0}, {"step": 40, "loss": 1.0}, {"step": 60, "loss": 0.9})
    write(tmp_path, {"step": 40, "loss": 1.5}, {"step": 80, "loss": 0.5}, {"step": 60, "loss": 0.8})
    found = list(read_points(tmp_path))
    assert [(p["step"], p["loss"]) for p in found] == [(20, 2.0), (40, 1.5), (60, 0.8), (80, 0.5)]


def test_points_are_stamped(tmp_path):
    """Each point says when it was made; nothing of the report is lost."""
    write(tmp_path, {"step": 1, "losses": {"loss/image": 0.5}})
    (point,) = read_points(tmp_path)
    assert point["losses"] == {"loss/image": 0.5}
    assert point["time_ms"] > 1.6e12


def test_cut_off_last_line_is_survived(tmp_path):
    """The half line of a killed process costs that point only."""
    write(tmp_path, {"step": 1}, {"step": 2})
    path = tmp_path / POINTS
    path.write_text(path.read_text()[:-12])
    assert [p["step"] for p in read_points(tmp_path)] == [1]


def test_going_on_after_a_cut_off_line(tmp_path):
    """Points written after a killed process's half line are all read."""
    write(tmp_path, {"step": 1}, {"step": 2})
    path = tmp_path / POINTS
    path.write_text(path.read_text()[:-12])
    write(tmp_path, {"step": 2}, {"step": 3})
    assert [p["step"] for p in read_points(tmp_path)] == [1, 2, 3]


def test_no_points_yet(tmp_path):
    """A stage without a file has no points."""
    assert list(read_points(tmp_path)) == []


def test_a_point_is_on_disk_at_once(tmp_path):
    """A reader beside the training sees each point as soon as it is written."""
    with PointLog(tmp_path) as log:
        log.write({"step": 1})
        assert [p["step"] for p in read_points(tmp_path)] == [1]
        assert json.loads((tmp_path / POINTS).read_text())["step"] == 1

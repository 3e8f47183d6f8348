"""Data that arrive in a bucket become a data set in a bucket."""

from __future__ import annotations

import pytest
from landing_place import FOLDER, picture
from s3_server import BUCKET

from pipelines import data_report, preparing
from pipelines.data_report import SHEET, told, write_data_report
from pipelines.ingesting import ingest
from pipelines.run import RunSpec
from pipelines.s3_files import S3Files
from sdn.data.dataset import open_dataset
from sdn.data.landing import Look
from sdn.data.shards import run_here
from sdn.data.verification import verify
from sdn.metrics import pixel_features


def test_a_bucket_is_a_landing_place(user, tmp_path, monkeypatch):
    """Whole objects are taken at once, an image without its caption waits, none is taken away."""
    monkeypatch.setattr(preparing, "on_ray", lambda settings: run_here)
    monkeypatch.setattr(data_report, "_network", lambda config: ("pixels", pixel_features))
    monkeypatch.setenv("SDN_CACHE", str(tmp_path / "cache"))
    run = RunSpec("folder", {}, str(tmp_path / "store")).open()
    landing, dataset = f"s3://{BUCKET}/arriving/landing", f"s3://{BUCKET}/arriving/set"
    bucket = S3Files(landing, endpoint=user.endpoint)

    def put(number, *, caption=True):
        bucket.write(f"deep/picture{number:02d}.png", picture(number))
        if caption:
            bucket.write(f"deep/picture{number:02d}.txt", f"picture number {number}".encode())

    def look():
        slept = []
        how = Look(sleep=slept.append)
        found = ingest(landing, dataset, FOLDER, run.settings, lambda *_: None, look=how)
        assert slept == []
        return found

    for number in range(30):
        put(number)
    first = look()
    assert (first.new, first.waiting_count) == (30, 0)
    assert not look().fresh
    for number in range(30, 50):
        put(number, caption=number < 49)
    second = look()
    assert (second.new, second.waiting_count) == (19, 1)
    files = preparing.place(dataset, run.settings)
    data = open_dataset(files)
    assert sum(data.manifest.counts.values()) == 49
    assert verify(files) == []
    report = write_data_report(run, data, first.manifest)
    assert sum(report.result["came"].values()) == 19
    assert report.result["captions"]["unseen_words"] == 19  # the numbers
    assert (run.store.fetch(report.folder) / SHEET).is_file()
    assert "Words never seen before" in " ".join(told(report.result))
    assert len(list(bucket.walk())) == 99


def test_a_bucket_that_is_not_there_is_told(user, tmp_path, monkeypatch):
    """The error names it, and nothing is made."""
    monkeypatch.setenv("SDN_CACHE", str(tmp_path / "cache"))
    settings = RunSpec("folder", {}, str(tmp_path / "store")).open().settings
    with pytest.raises(OSError, match="no-such-bucket-here"):
        ingest(
            "s3://no-such-bucket-here/landing",
            str(tmp_path / "set"),
            FOLDER,
            settings,
            lambda *_: None,
        )
    assert not (tmp_path / "set").exists()

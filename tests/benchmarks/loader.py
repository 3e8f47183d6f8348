"""Images a second of the loader: `python tests/benchmarks/loader.py [--json]`.

Reads a data set of 64 px JPEGs (made when the folder is empty) on one core, each measurement in a
process of its own: our loader in the caller's thread with neither cache nor earlier passes, plain
WebDataset over the same shards with the same decoder, batch and fields, litdata over the same bytes
where it is installed, and the decoder alone. Then the time to the first batch at steps far in.
Each measurement is pinned to one core.

With --s3 the same from an S3 server (SeaweedFS) that it starts on the other cores: our loader with
an empty cache, then with a full one, and plain WebDataset over boto3's streams.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "unit"), str(Path(__file__).parents[1])]
from shard_builder import Item, finish, make_segment, write_shards  # noqa: E402

from sdn.data.dataset import open_dataset  # noqa: E402
from sdn.data.files import Files, LocalFolder  # noqa: E402
from sdn.data.images import encode  # noqa: E402
from sdn.data.loader import batches  # noqa: E402
from sdn.data.plan import Plan  # noqa: E402

SIDE, SHARD = 64, 1000
WORDS = ("red", "small", "bird", "car", "in", "tree", "street", "white", "dog", "of", "and", "long")


def place_of(uri: str) -> Files:
    """Where a data set lies."""
    if not uri.startswith("s3://"):
        return LocalFolder(uri)
    from pipelines.s3_files import S3Files

    return S3Files(uri, endpoint=os.environ["SDN_S3_ENDPOINT"], cache=Path(os.environ["SDN_CACHE"]))


def picture(random_: np.random.Generator, smoothness: float) -> np.ndarray:
    """(H, W, 3) uint8: noise with the spectrum of photos, and two discs before it."""
    y, x = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij")
    fall = np.maximum(np.hypot(y, x), 1 / SIDE) ** -smoothness
    noise = np.fft.irfft2(np.fft.rfft2(random_.standard_normal((3, SIDE, SIDE))) * fall)
    noise[1:] = 0.8 * noise[:1] + 0.3 * noise[1:]  # photos have more light than colour
    pixels = 128 + 45 * noise / noise.std()
    y, x = np.mgrid[:SIDE, :SIDE]
    for _ in range(2):
        top, left, radius = random_.uniform((0, 0, 4), (SIDE, SIDE, 20))
        disc = (y - top) ** 2 + (x - left) ** 2 < radius**2
        pixels[:, disc] = 0.5 * pixels[:, disc] + random_.uniform(0, 128, (3, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def items(count: int, captions: int, smoothness: float):
    """Distinct samples."""
    random_ = np.random.default_rng(0)
    for number in range(count):
        texts = tuple(" ".join(random_.choice(WORDS, 10).tolist()) for _ in range(captions))
        image = encode(picture(random_, smoothness), "jpg")
        yield Item(f"item-{number:08d}", image, texts, {"class": f"c{number % 200}"})


def build(folder: Path, samples: int, captions: int, smoothness: float) -> None:
    """The data set, once."""
    files = LocalFolder(folder)
    if files.exists("manifest.json"):
        return
    shards = list(write_shards(files, "train", items(samples, captions, smoothness), SHARD))
    finish(files, [make_segment(files, "train", shards, len(shards))], SIDE)


def images(place: Files):
    """(key, JPEG, captions, labels) of all samples, in order."""
    from sdn.data.reading import ShardReader

    reader = ShardReader(open_dataset(place), "train", cache_gib=0)
    for number, shard in enumerate(reader.shards):
        index, tar = reader.index(number), place.read(shard.name)
        for row in range(len(index)):
            at = int(index.offset[row])
            image, about = (
                tar[at + start[row] : at + start[row] + length[row]]
                for start, length in (
                    (index.image_offset, index.image_length),
                    (index.json_offset, index.json_length),
                )
            )
            about = json.loads(about)
            yield index.keys[row], image, about["captions"], about["labels"]


def plan_of(place: Files, batch: int) -> Plan:
    """The plan of the data set."""
    samples = open_dataset(place).shards("train").samples
    return Plan(shard_samples=samples, seed=0, global_batch=batch)


def measure_ours(place: Files, batch: int, workers: int = 0) -> float:
    """Our loader, in this thread or in others."""
    import pyarrow.parquet  # noqa: F401 - importing is no part of reading

    plan = plan_of(place, batch)
    began = time.perf_counter()
    steps = plan.steps_per_epoch
    run = batches(place, "train", plan=plan, seed=0, steps=steps, workers=workers, cache_gib=0)
    seen = {key for found in run for key in found.keys}
    took = time.perf_counter() - began
    assert len(seen) == plan.samples
    return plan.samples / took


def measure_ahead(place: Files, batch: int) -> float:
    """Our loader with a thread that reads ahead, as training has it."""
    return measure_ours(place, batch, workers=1)


def decode_jpeg(_: str, data: bytes) -> np.ndarray:
    """The same decoder as ours."""
    import simplejpeg

    return simplejpeg.decode_jpeg(data, "RGB")


def decoded(key: str, data: bytes):
    """As `webdataset` asks for a decoder; it decodes the JSON by itself."""
    return decode_jpeg(key, data) if key.endswith("jpg") else None


def fields(sample: dict) -> tuple:
    """What our batches have."""
    about = sample["json"]
    return sample["__key__"], sample["jpg"], random.choice(about["captions"]), about["labels"]


def measure_webdataset(place: Files, batch: int) -> float:
    """Plain WebDataset in this thread; it checks nothing."""
    import webdataset

    webdataset.gopen_schemes["s3"] = stream
    urls = [f"{place.uri}/{shard.name}" for shard in open_dataset(place).shards("train")]
    began = time.perf_counter()
    run = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .decode(decoded)
        .map(fields)
        .batched(batch)
    )
    seen = 0
    for _, pixels, _, _ in run:
        seen += len(torch.as_tensor(pixels).permute(0, 3, 1, 2))
    took = time.perf_counter() - began
    assert seen == open_dataset(place).samples("train")
    return seen / took


def stream(url: str, *_: object):
    """An object of S3 as boto3 streams it."""
    from pipelines.s3_files import make_client

    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = make_client(os.environ["SDN_S3_ENDPOINT"])
    return client.get_object(Bucket=bucket, Key=key)["Body"]


def measure_decoder(place: Files, batch: int) -> float:
    """The decoder alone, on bytes in memory."""
    from sdn.data.images import decode_jpeg_into

    found = [image for _, image, _, _ in images(place)]
    out = np.empty((batch, SIDE, SIDE, 3), np.uint8)
    began = time.perf_counter()
    for number, image in enumerate(found):
        decode_jpeg_into(image, out[number % batch])
    return len(found) / (time.perf_counter() - began)


def measure_litdata(place: Files, batch: int) -> float:
    """litdata's own chunks of the same bytes, shuffled, without workers."""
    from litdata import StreamingDataLoader, StreamingDataset

    class Decoded(StreamingDataset):
        def __getitem__(self, index):
            key, image, about = super().__getitem__(index)
            about = json.loads(about)
            return key, decode_jpeg("", image), random.choice(about["captions"]), about["labels"]

    def collate(samples):
        keys, pixels, captions, labels = zip(*samples, strict=True)
        return keys, torch.from_numpy(np.stack(pixels)), captions, labels

    folder = Path(place.uri, "litdata")
    began = time.perf_counter()
    data = Decoded(str(folder), shuffle=True)
    loader = StreamingDataLoader(data, batch_size=batch, num_workers=0, collate_fn=collate)
    seen = sum(len(found[0]) for found in loader)
    return seen / (time.perf_counter() - began)


def write_litdata(place: Files) -> None:
    """The same bytes in litdata's chunks of 64 MB, once."""
    from litdata.streaming.writer import BinaryWriter

    folder = Path(place.uri, "litdata")
    if folder.exists():
        return
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, (key, image, captions, labels) in enumerate(images(place)):
        writer[number] = (key, image, json.dumps({"captions": captions, "labels": labels}))
    writer.done()
    writer.merge()


def measure_first(place: Files, batch: int) -> dict[str, float]:
    """Seconds to the first batch at a step, data set and plan opened anew, by epoch and share."""
    found = {}
    for epoch in (1, 2, 3):
        for share in (0.0, 0.5, 0.99):
            began = time.perf_counter()
            plan = plan_of(place, batch)
            step = int((epoch - 1 + share) * plan.steps_per_epoch)
            run = batches(place, "train", plan=plan, seed=0, start_step=step, workers=0)
            assert next(run).step == step
            found[f"epoch {epoch}, {share:.0%}"] = time.perf_counter() - began
            run.close()
    return found


MEASURES = {
    "ours": measure_ours,
    "ahead": measure_ahead,
    "webdataset": measure_webdataset,
    "litdata": measure_litdata,
    "decoder": measure_decoder,
    "first": measure_first,
}


def measured(what: str, uri: str, batch: int, **env: str):
    """One measurement, in a fresh process on one core."""
    command = [sys.executable, __file__, "--measure", what, "--folder", uri, "--batch", str(batch)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | env,
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def s3_figures(folder: Path, batch: int, repeats: int) -> dict[str, float]:
    """Rates from an S3 server on this machine, beside the local ones of the same run."""
    import s3_server

    others = sorted(os.sched_getaffinity(0))[:-1]
    with tempfile.TemporaryDirectory(prefix="sdn-s3-") as temporary:
        here = Path(temporary)
        with s3_server.running(here, cores=others) as server:
            env = server.keys()
            os.environ.update(env, SDN_CACHE=str(here / "upload"))
            uri, place = "s3://data/set", place_of("s3://data/set")
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = path.relative_to(folder).as_posix()
                if not name.startswith("litdata/"):
                    place.write(name, path.read_bytes())
            runs = []
            for number in range(repeats):
                cache = {"SDN_CACHE": str(here / f"cache-{number}")}
                runs.append(
                    {
                        "first": measured("ahead", uri, batch, **cache),
                        "second": measured("ahead", uri, batch, **cache),
                        "local": measured("ahead", str(folder), batch),
                        "streaming": measured("webdataset", uri, batch),
                    }
                )
    best = {name: max(run[name] for run in runs) for name in runs[0]}
    return {
        "s3_first_pass_images_per_s": best["first"],
        "s3_second_pass_images_per_s": best["second"],
        "local_images_per_s": best["local"],
        "s3_streaming_images_per_s": best["streaming"],
        "ratio_second_pass_local": best["second"] / best["local"],
        "ratio_first_pass_streaming": best["first"] / best["streaming"],
    }


def figures(uri: str, batch: int, repeats: int) -> dict[str, object]:
    """All figures; rates are the best of passes that take turns: others only slow them down."""
    place = place_of(uri)
    installed = {"ours", "webdataset", "decoder"}
    if importlib.util.find_spec("litdata"):
        write_litdata(place)
        installed.add("litdata")
    runs = [{what: measured(what, uri, batch) for what in installed} for _ in range(repeats)]
    rates = {what: max(run[what] for run in runs) for what in installed}
    sizes = [len(image) for _, image, _, _ in images(place)]
    return {
        "images_per_s": rates["ours"],
        "webdataset_images_per_s": rates["webdataset"],
        "ratio_webdataset": rates["ours"] / rates["webdataset"],
        "litdata_images_per_s": rates.get("litdata"),
        "decode_only_images_per_s": rates["decoder"],
        "first_batch_s": measured("first", uri, batch),
        "samples": len(sizes),
        "batch": batch,
        "bytes_per_image": statistics.mean(sizes),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", help="where the data set is kept; a temporary one by default")
    parser.add_argument("--samples", type=int, default=40_960)
    parser.add_argument("--captions", type=int, default=5, help="of each sample")
    parser.add_argument(
        "--smoothness",
        type=float,
        default=2.4,
        help="how fast detail falls off: 2.4 as in product photos, 1.7 as in bird photos",
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--s3", action="store_true", help="from an S3 server, too")
    parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(MEASURES[options.measure](place_of(options.folder), options.batch)))
        return
    with tempfile.TemporaryDirectory(prefix="sdn-loader-") as temporary:
        folder = options.folder or temporary
        build(Path(folder), options.samples, options.captions, options.smoothness)
        found = figures(folder, options.batch, options.repeats)
        if options.s3:
            found |= s3_figures(Path(folder), options.batch, options.repeats)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:26} {value}")


if __name__ == "__main__":
    main()

"""The page of `sdn play`: what it answers, whom it refuses, what its pictures carry."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from tiny_data import picture, record, write

from pipelines import work
from pipelines.generation import FoundModel
from pipelines.neighbours import (
    Neighbours,
    data_of_model,
    example_captions,
    places,
    spread,
)
from pipelines.play import Shown, Superseded, Turns, create_app
from pipelines.play_command import find_models
from pipelines.run import RunSpec, perform
from pipelines.store import StoreError
from sdn.captions import new_encoder
from sdn.config import CaptionConfig, DataConfig, from_dict, to_dict
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.recipes import recipe
from sdn.sampling import Synthesizer
from sdn.stage_run import CONFIG
from sdn.student import Student
from sdn.taps import blocks_of

WIDTH = 0.05
HOSTILE = "<img src=x onerror=alert(1)> \"'& </script>"


def synthesizer(seed=1):
    """A small model with untrained weights that draw something."""
    student = Student(
        blocks_of("vgg11", WIDTH), resolution=32, text_dim=8, width=WIDTH, init="he", seed=seed
    )
    encoder = new_encoder(CaptionConfig(dim=8, width=8, max_chars=60))
    encoder.requires_grad_(requires_grad=False).eval()
    return Synthesizer(encoder=encoder, student=student.eval(), resolution=32, max_chars=60)


def found(name="m", version="1"):
    uri = f"models:/{name}/{version}"
    return FoundModel(folder=None, name=name, version=version, uri=uri, sha256="ab" * 32)


class Noisy:
    """Draws its seed, and ten times its noise scale."""

    noise = True

    def __init__(self, noise_scale=1.5):
        self.noise_scale = noise_scale

    def __call__(self, captions, *, seed=0, noise_scale=None):
        drawn = torch.full((len(captions), 3, 8, 8), seed, dtype=torch.uint8)
        drawn[:, 1] = round(10 * (self.noise_scale if noise_scale is None else noise_scale))
        return drawn


def shown(**changes):
    return Shown(**({"model": found(), "synthesizer": synthesizer()} | changes))


@contextmanager
def client(models=None, neighbours=None):
    models = models or [shown()]
    known = neighbours or {model.name: "gone" for model in models}
    with TestClient(create_app(models, known), base_url="http://127.0.0.1:7860") as one:
        yield one


def pixels_of(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def test_models_draw_side_by_side():
    """Each model answers in order with the very pixels that it draws elsewhere, and its time."""
    models = [shown(), shown(model=found(version="2"), synthesizer=synthesizer(2))]
    with client(models) as page:
        answer = page.post("/draw", json={"caption": "a red house", "number": 7})
    assert answer.status_code == 200
    assert answer.json()["number"] == 7
    pictures = answer.json()["pictures"]
    assert [one["model"] for one in pictures] == ["m version 1", "m version 2"]
    for one, model in zip(pictures, models, strict=True):
        drawn = model.synthesizer(["a red house"])[0].permute(1, 2, 0).numpy()
        assert np.array_equal(pixels_of(one["png"]), drawn)
        assert one["ms"] >= 0
    assert not np.array_equal(pixels_of(pictures[0]["png"]), pixels_of(pictures[1]["png"]))


@pytest.mark.parametrize(
    ("caption", "words"),
    [("", "no letter"), ("!?  ", "no letter"), ("x" * 61, "61 characters.*at most 60")],
)
def test_a_caption_that_cannot_be_drawn(caption, words):
    """Empty, without letters, too long: a text to show, no picture, no failure of the server."""
    with client() as page:
        answer = page.post("/draw", json={"caption": caption})
    assert answer.status_code == 422
    assert re.search(words, answer.json()["error"])
    assert answer.json()["pictures"][0]["png"] == ""


def test_a_caption_that_one_model_refuses():
    """What only one of the models refuses is drawn by the other, and the reason is told."""
    models = [shown(), shown(model=found(version="2"), synthesizer=Noisy())]
    with client(models) as page:
        answer = page.post("/draw", json={"caption": "x" * 61})
    assert answer.status_code == 200
    assert "at most 60" in answer.json()["error"]
    assert [bool(one["png"]) for one in answer.json()["pictures"]] == [False, True]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"caption": 3},
        {"caption": "a", "seed": -1},
        {"caption": "a", "seed": 2**31},
        {"caption": "a", "noise_scale": -0.1},
        {"caption": "a", "noise_scale": 3.1},
    ],
)
def test_a_request_of_another_form(body):
    """What the page would never send is refused with a reason that names the field."""
    with client() as page:
        answer = page.post("/draw", json=body)
    assert answer.status_code == 422
    assert re.match("(Caption|Seed|Noise): ", answer.json()["error"])
    assert answer.json()["fields"] == [list(body)[-1] if body else "caption"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:7860"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "https://127.0.0.1:7860"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_sites_are_refused(headers):
    """Neither another host's name nor another page's origin gets a drawing."""
    with client() as page:
        answer = page.post("/draw", json={"caption": "a cat"}, headers=headers)
    assert answer.status_code in (400, 403)
    assert "png" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860"])
def test_the_page_itself_is_served(host):
    """Under this machine's names the page and its own requests are answered, and no other site."""
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    with client() as page:
        assert page.get("/", headers={"Host": host}).status_code == 200
        answer = page.post("/draw", json={"caption": "a cat"}, headers=headers)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_asks_nobody_else():
    """No address of another place stands in the page, and its policy lets nothing be loaded."""
    with client() as page:
        answer = page.get("/")
    assert not re.search(r"(?:https?:)?//\w", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', answer.text))
    assert f"script-src 'nonce-{nonce}'" in policy
    with client() as page:
        assert nonce not in page.get("/").text


def test_captions_and_names_are_escaped(tmp_path):
    """Markup in a name, an example, a reason or a credit is text; the answer to it is JSON."""
    write(tmp_path, [record(1)], attribution=HOSTILE)
    known = Neighbours(open_dataset(tmp_path))
    models = [
        shown(model=found(name=HOSTILE), examples=[HOSTILE]),
        shown(model=found(version="2")),
    ]
    neighbours = {models[0].name: known, models[1].name: HOSTILE}
    with client(models, neighbours) as page:
        html = page.get("/").text
        answer = page.post("/draw", json={"caption": HOSTILE})
    assert html.count("&lt;img src=x") >= 5
    assert "<img src=x" not in html
    assert html.count("</script>") == 1
    assert "innerHTML" not in html
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_download_carries_its_lineage():
    """The picture's file says which model drew which caption, as `sdn generate` writes it."""
    with client() as page:
        answer = page.post("/draw", json={"caption": "ein größerer Käfer", "seed": 5})
    png = base64.b64decode(answer.json()["pictures"][0]["png"])
    assert Image.open(io.BytesIO(png)).text == {
        "sdn:model": "m",
        "sdn:version": "1",
        "sdn:uri": "models:/m/1",
        "sdn:caption": "ein größerer Käfer",
        "sdn:seed": "0",  # there is no noise: the seed changed nothing
        "sdn:sha256": "ab" * 32,
    }


def test_the_seed_where_there_is_noise():
    """A model with noise gets the seed and the field; without noise the page says so instead."""
    noisy = shown(model=found(version="2"), synthesizer=Noisy())
    with client([noisy]) as page:
        html = page.get("/").text
        one = page.post("/draw", json={"caption": "a", "seed": 9}).json()["pictures"][0]
    assert set(pixels_of(one["png"])[..., 0].flat) == {9}
    assert Image.open(io.BytesIO(base64.b64decode(one["png"]))).text["sdn:seed"] == "9"
    seed = re.compile(r'<input id="seed"[^>]*>')
    assert "disabled" not in seed.search(html).group()
    assert "no noise" not in html
    with client([shown()]) as page:
        html = page.get("/").text
    assert "disabled" in seed.search(html).group()
    assert "no noise" in html
    with client([shown(), noisy]) as page:
        html = page.get("/").text
    assert "disabled" not in seed.search(html).group()
    assert "change nothing in the pictures of m version 1:" in html


def test_the_noise_scale_where_there_is_noise():
    """The page says how far each model's noise goes; another is drawn, and stands in the file."""
    noisy = shown(model=found(version="2"), synthesizer=Noisy())
    field = re.compile(r'<input id="noise"[^>]*>')

    def drawn(page, **more):
        answer = page.post("/draw", json={"caption": "a", **more}).json()["pictures"][-1]["png"]
        text = Image.open(io.BytesIO(base64.b64decode(answer))).text
        return pixels_of(answer)[0, 0, 1], text.get("sdn:noise_scale")

    with client([noisy]) as page:
        html = page.get("/").text
        assert drawn(page) == (15, None)
        assert drawn(page, noise_scale=0.4) == (4, "0.4")
        assert drawn(page, noise_scale=0) == (0, "0.0")
    assert 'placeholder="1.5"' in field.search(html).group()
    assert "1.5, as the model draws" in html
    with client([shown(), noisy]) as page:
        assert "1.5, as m version 2 draws" in page.get("/").text
        assert drawn(page, noise_scale=2) == (20, "2.0")
    other = shown(model=found(version="3"), synthesizer=Noisy(1.0))
    with client([noisy, other]) as page:
        html = page.get("/").text
    assert 'placeholder=""' in field.search(html).group()
    assert "m version 2 1.5, m version 3 1." in html
    with client([shown()]) as page:
        html = page.get("/").text
        assert drawn(page, noise_scale=2)[1] is None
    assert "disabled" in field.search(html).group()


def test_neighbours_beside_a_picture(tmp_path):
    """The three nearest training images come with key, captions and pixels; 0 is a copy."""
    write(tmp_path, [record(n) for n in range(12)])
    known = Neighbours(open_dataset(tmp_path))

    def copy(captions, *, seed=0, noise_scale=None):
        return torch.from_numpy(picture(4)).permute(2, 0, 1).unsqueeze(0)

    models = [shown(synthesizer=copy)]
    with client(models, {models[0].name: known}) as page:
        near = page.post("/draw", json={"caption": "a"}).json()["pictures"][0]["neighbours"]
        html = page.get("/").text
    assert len(near) == 3
    assert near[0]["key"] == "item-4"
    assert near[0]["captions"] == ["picture 4", "number 4", "the 4th"]
    assert np.array_equal(pixels_of(near[0]["png"]), picture(4))
    assert near[0]["distance"] == 0.0
    assert 0 < near[1]["distance"] <= near[2]["distance"]
    assert "of 12;" in html
    assert "nobody" in html  # whom to name beside the images


def test_neighbours_are_the_nearest_of_all(tmp_path):
    """The search finds what comparing with each image by itself finds, at the right distance."""
    images = np.stack([picture(n) for n in range(17)]).astype(float)
    write(tmp_path)
    drawn = picture(99)
    found_ = Neighbours(open_dataset(tmp_path)).nearest(
        torch.from_numpy(drawn).permute(2, 0, 1), count=5
    )
    exact = np.sqrt(((images - drawn) ** 2).mean((1, 2, 3)))
    assert [one.key for one in found_] == [f"item-{n}" for n in exact.argsort()[:5]]
    assert [one.distance for one in found_] == pytest.approx(sorted(exact)[:5], rel=1e-4)


def test_a_large_split_is_thinned_out(tmp_path):
    """Of more images than are kept, evenly spread ones are; the page says how many."""
    write(tmp_path)
    told = []
    known = Neighbours(open_dataset(tmp_path), lambda *counts: told.append(counts), kept=4)
    assert (len(known), known.total) == (4, 17)
    near = known.nearest(torch.zeros(3, 32, 32, dtype=torch.uint8), count=9)
    keys = load_split(tmp_path, "train").keys
    assert {one.key for one in near} == {keys[n] for n in (0, 4, 8, 12)}
    assert told == [(4, 4)]
    models = [shown()]
    with client(models, {models[0].name: known}) as page:
        assert "of 4 of 17, evenly spread" in page.get("/").text


def test_places_count_through_the_shards():
    """Every number of a split is one row of one shard, in order, empty shards included."""
    sizes = np.array([3, 0, 1, 4])
    shards, rows = places(sizes, spread(8, 100))
    expected = [(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == expected


def test_training_images_that_are_lost_meanwhile(tmp_path):
    """When the data vanish under the running page, it draws all the same and says why."""
    write(tmp_path)
    models = [shown()]
    known = Neighbours(open_dataset(tmp_path))
    for shard in tmp_path.glob("train-*.tar"):
        shard.unlink()
    with client(models, {models[0].name: known}) as page:
        answer = page.post("/draw", json={"caption": "a"})
    one = answer.json()["pictures"][0]
    assert answer.status_code == 200
    assert one["png"]
    assert one["neighbours"] == []
    assert "cannot be read" in one["no_neighbours"]


def test_why_there_are_no_neighbours():
    """The page says why no training images stand beside the pictures."""
    with client(neighbours={"m version 1": "the store has no data"}) as page:
        assert "They cannot be shown: the store has no data" in page.get("/").text


def test_examples_are_of_unseen_images(tmp_path):
    """Captions to try come from the test split, without those that the model cannot read."""
    items = [record(n) for n in range(3)]
    items += [record(n, "test", captions=("y" * n,)) for n in (5, 6, 30)]
    write(tmp_path, items)
    examples = example_captions(open_dataset(tmp_path), max_chars=20)
    assert sorted(examples) == ["yyyyy", "yyyyyy"]


def test_the_data_of_a_model(tmp_path):
    """The config in a model's folder leads to its data set; what is missing is told."""
    manifest = write(tmp_path / "data")
    config = to_dict(recipe("tiny"))
    config["data"] |= {"source": "shards", "path": str(tmp_path / "data"), "resolution": 32}
    run = RunSpec("tiny", store=str(tmp_path / "store")).open()
    data = from_dict(DataConfig, config["data"])
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    config["evaluation"] = {"of another version": 1}  # only the data matter here
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(StoreError, match="name the store of its run with --store"):
        data_of_model(tmp_path, str(tmp_path / "store"))
    perform(run, work.prepare(run))
    found_ = data_of_model(tmp_path, str(tmp_path / "store"))
    assert found_.manifest.digest == manifest.digest
    (tmp_path / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"no {CONFIG}"):
        data_of_model(tmp_path, str(tmp_path / "store"))


def test_models_named_by_their_folders(tmp_path):
    """Folders need no registry, and one that is named twice is shown once."""
    from sdn.sampling import save_synthesizer

    model = synthesizer()
    settings = {
        "blocks": [list(block) for block in model.student.blocks],
        "resolution": 32,
        "text_dim": 8,
        "width": WIDTH,
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_synthesizer(tmp_path / name, model.encoder, model.student.state_dict(), settings, 60)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert [m.uri for m in find_models([two, one, two], str(tmp_path / "store"))] == [two, one]


@pytest.mark.parametrize(
    ("aliases", "expected"),
    [
        ({"champion": "3"}, ["models:/m/3"]),
        ({"champion": "3", "previous": "1"}, ["models:/m/3", "models:/m/1"]),
        ({"champion": "3", "previous": "3"}, ["models:/m/3"]),
    ],
)
def test_the_champion_and_the_one_before(aliases, expected, monkeypatch):
    """Without --model the champion is shown, and the one before it where there is one."""

    class Registry:
        def get_registered_model(self, name):
            assert name == "m"
            return SimpleNamespace(aliases=aliases)

    def find_model(model, store):
        alias = "champion" if model is None else model.removeprefix("models:/m@")
        return found(version=aliases[alias])

    monkeypatch.setattr("pipelines.tracking.client", lambda settings: Registry())
    monkeypatch.setattr("pipelines.generation.find_model", find_model)
    assert [m.uri for m in find_models([], "store")] == expected


def test_models_that_cannot_stand_side_by_side():
    """No model, one name twice, or nothing said of neighbours is refused."""
    with pytest.raises(ValueError, match="at least one"):
        create_app([], {})
    with pytest.raises(ValueError, match="different names"):
        create_app([shown(), shown()], {"m version 1": ""})
    with pytest.raises(ValueError, match="neighbours of m version 1"):
        create_app([shown()], {})


def test_the_newest_request_wins():
    """While one draws, of a page's waiting requests only the newest goes on; others wait theirs."""
    turns = Turns()
    turns.take("page", 1)
    ends, threads = {}, []

    def wait(page, number):
        try:
            turns.take(page, number)
            ends[page, number] = "drawn"
            turns.leave()
        except Superseded:
            ends[page, number] = "superseded"

    for page, number in (("page", 2), ("other", 1), ("page", 3)):
        threads.append(threading.Thread(target=wait, args=(page, number)))
        threads[-1].start()
        while turns._newest.get(page, 0) < number:
            pass
    threads[0].join(timeout=30)  # answered at once, while the first draws still
    assert ends == {("page", 2): "superseded"}
    with pytest.raises(Superseded):
        turns.check("page", 1)
    turns.leave()
    for thread in threads:
        thread.join(timeout=30)
    expected = {("page", 2): "superseded", ("page", 3): "drawn", ("other", 1): "drawn"}
    assert ends == expected


def test_a_late_request_is_not_drawn():
    """An answer says that a newer request came before; another page is not touched by it."""
    with client() as page:
        ask = {"caption": "a cat", "page": "p"}
        assert page.post("/draw", json=ask | {"number": 5}).json()["pictures"]
        late = page.post("/draw", json=ask | {"number": 4}).json()
        assert late == {"number": 4, "superseded": True}
        assert page.post("/draw", json=ask | {"number": 4, "page": "q"}).json()["pictures"]
        assert page.post("/draw", json=ask | {"number": 6}).json()["pictures"]


def test_a_failed_drawing_gives_its_turn_back():
    """After a model has failed the next request is drawn."""
    fail = [True]

    def model(captions, *, seed=0, noise_scale=None):
        if fail.pop():
            raise RuntimeError("out of memory")
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    fail[:0] = [False]
    app = create_app([shown(synthesizer=model)], {"m version 1": "gone"})
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as page:
        assert page.post("/draw", json={"caption": "a"}).status_code == 500
        assert page.post("/draw", json={"caption": "a"}).status_code == 200

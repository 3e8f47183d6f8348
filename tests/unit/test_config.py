import dataclasses
import json

import pytest

from sdn.config import (
    DataConfig,
    EvaluationConfig,
    LossWeights,
    Range,
    RunConfig,
    SearchConfig,
    StageConfig,
    TeacherConfig,
    from_dict,
    to_dict,
    to_key,
    with_overrides,
)
from sdn.recipes import RECIPES, recipe


def value_at(config, dotted):
    for part in dotted.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("workers", "4", 4),
        ("stage_two.epochs", "3", 3.0),
        ("stage_two.rate", "5e-4", 5e-4),
        ("data.source", "folder", "folder"),
        ("data.path", "/some where/else", "/some where/else"),
        ("data.path", "2024", "2024"),
        ("data.limit", "12", 12),
        ("data.limit", "null", None),
        ("teacher.arch", "vgg16", "vgg16"),
        ("captions.loss", "contrastive", "contrastive"),
        ("stage_one.precision", "bf16", "bf16"),
        ("stage_one.weights.conv3", "0.5", 0.5),
        ("stage_one.weights.taps", '{"conv1_1": 2, "pool5": 0}', {"conv1_1": 2.0, "pool5": 0.0}),
        ("stage_one.weights.taps.conv5_2", "0.25", 0.25),
        ("teacher.sha256", "dcbb9e9d", "dcbb9e9d"),
        ("teacher.sha256", "12345678", "12345678"),
        ("evaluation.captions", "300", 300),
        ("evaluation.protocol", "gan", "gan"),
        ("evaluation.inception_sha256", "12345678", "12345678"),
        ("evaluation.judge.noise", "0", 0.0),
        ("promotion.margin", "1", 1.0),
        ("search.scheduler", "pbt", "pbt"),
        ("search.score", "retrieval", "retrieval"),
        ("search.stage_one", "true", True),
        ("search.first_images", "100", 100),
        ("search.first_images", "null", None),
        ("search.minutes", "5", 5.0),
        ("search.minutes", "null", None),
        ("search.rerun_level", "1", 1.0),
        ("search.space.conv3.high", "2", 2.0),
        ("search.space.rate", '{"low": 0.5}', Range(low=0.5)),
        ("search.space", '{"pool2": {"low": 1, "high": 3}}', {"pool2": Range(low=1, high=3)}),
        ("search.space", "{}", {}),
    ],
)
def test_override_of_each_type(key, text, value):
    """An override of any type arrives as the annotated type, and nothing else changes."""
    before = recipe("openmoji")
    after = with_overrides(before, {key: text})
    found = value_at(after, key)
    assert found == value
    assert type(found) is type(value)
    back = with_overrides(before, {})
    assert back == before
    changed = {f.name for f in dataclasses.fields(before)} - {key.split(".")[0]}
    assert all(getattr(after, name) == getattr(before, name) for name in changed)


def test_several_overrides_at_once():
    """Overrides that are only possible together are accepted together."""
    changes = {"lanes": "5", "workers": "5", "stage_one.global_batch": "10"}
    with pytest.raises(ValueError, match="workers"):
        with_overrides(recipe("tiny"), {"workers": "5"})
    found = with_overrides(recipe("tiny"), changes | {"stage_two.global_batch": "20"})
    assert (found.lanes, found.workers, found.stage_one.global_batch) == (5, 5, 10)


def test_settings_that_came_later_are_no_part_of_a_key_while_they_change_nothing():
    """What was made before there were such settings is found again; used, they count."""
    config = RunConfig(name="one")
    key = to_key(config)
    assert {name for name in to_dict(config.data) if name not in key["data"]} == {
        "validation_from_train"
    }
    assert {name for name in to_dict(config.student) if name not in key["student"]} == {
        "noise_scale"
    }
    used = {"data.validation_from_train": "true", "student.noise_scale": "1.5"}
    used = with_overrides(config, used)
    assert to_key(used) == to_dict(used)


def test_tap_weight_replaces_its_groups():
    """A tap's own weight wins over its group's; the pool belongs to the group of its block."""
    weights = with_overrides(
        LossWeights(conv4=3), {"taps.conv4_2": "7", "taps.pool5": "0", "image": "20"}
    )
    found = [weights.of(t) for t in ("conv4_1", "conv4_2", "pool4", "pool5", "conv5_1", "image")]
    assert found == [3, 7, 3, 0, 1, 20]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("stage_two.epoch", ["stage_two.epoch", "did you mean stage_two.epochs?"]),
        ("stage_tow.epochs", ["stage_tow.epochs", "did you mean stage_two?"]),
        ("stage_one.weights.cnv3", ["did you mean stage_one.weights.conv3?"]),
        ("search.low", ["'search.low'", "search.space, search.stage_one"]),
        ("search.space.conv1.hihg", ["did you mean search.space.conv1.high?"]),
        ("search.space.rate.low", ["'search.space.rate.low'", "search.space.conv1"]),
        ("foo.bar", ["'foo.bar'", "Known here: name, data, teacher"]),
        ("zzz", ["'zzz'", "Known here: name, data, teacher"]),
        ("data.source.name", ["'data.source.name'", "data.source"]),
    ],
)
def test_unknown_key_names_the_nearest(key, words):
    """An unknown key is refused with the nearest known one, or with those that are known there."""
    with pytest.raises(ValueError, match="unknown config key") as caught:
        with_overrides(recipe("tiny"), {key: "1"})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("workers", "two", ["workers must be int", "'two'"]),
        ("workers", "1.5", ["workers must be int", "1.5"]),
        ("workers", "true", ["workers must be int", "True"]),
        ("stage_two.rate", "fast", ["stage_two.rate must be float", "'fast'"]),
        ("stage_two.rate", "false", ["stage_two.rate must be float", "False"]),
        ("stage_two.epochs", "null", ["stage_two.epochs must be float", "None"]),
        ("data.limit", "many", ["data.limit must be int", "'many'"]),
        ("data.fit", "stretch", ["data.fit must be one of", "'pad', 'resize', 'crop'", "stretch"]),
        ("teacher.arch", "[1]", ["teacher.arch must be one of", "vgg19"]),
        ("teacher", "3", ["teacher is a group of keys", "3"]),
        ("stage_one.weights.taps", "3", ["stage_one.weights.taps must be a JSON object"]),
        ("stage_one.weights.taps.conv1_1", "x", ["stage_one.weights.taps.conv1_1 must be float"]),
        ("search.scheduler", "hyperband", ["search.scheduler must be one of", "'pbt'"]),
        ("search.score", "fid", ["search.score must be one of", "'kid', 'retrieval'", "fid"]),
        ("search.stage_one", "1", ["search.stage_one must be bool", "1"]),
        ("search.minutes", "soon", ["search.minutes must be float", "'soon'"]),
        ("search.space", "conv1", ["search.space must be a JSON object", "'conv1'"]),
        ("search.space", '{"rate": [0.1, 10]}', ["search.space.rate is a group of keys"]),
        ("search.space.conv1.low", "null", ["search.space.conv1.low must be float", "None"]),
    ],
)
def test_value_of_another_type_is_named(key, text, words):
    """A value of the wrong type is refused with its key, the expected type and what came."""
    with pytest.raises(ValueError, match=r".") as caught:
        with_overrides(recipe("tiny"), {key: text})
    for word in words:
        assert word in str(caught.value)


def test_a_random_teacher_has_no_weight_file():
    """`teacher.epochs=0` would be ignored beside weights; it is refused with what to set."""
    changes = {"teacher.epochs": "0"}
    with pytest.raises(ValueError, match=r"set teacher\.weights=null and teacher\.sha256=null"):
        with_overrides(recipe("cub"), changes)
    changes |= {"teacher.weights": "null", "teacher.sha256": "null"}
    assert with_overrides(recipe("cub"), changes).teacher.epochs == 0


@pytest.mark.parametrize(
    ("resolution", "near"), [(50, 64), (0, 32), (-32, 32), (33, 32), (100, 96), (16, 32)]
)
def test_impossible_resolution_says_which_are_possible(resolution, near):
    """A resolution that cannot be halved five times is refused with the rule and a near one."""
    with pytest.raises(ValueError, match=f"multiple of 32.*not {resolution}; try {near}$"):
        with_overrides(recipe("tiny"), {"data.resolution": str(resolution)})
    assert with_overrides(recipe("tiny"), {"data.resolution": str(near)}).data.resolution == near


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("data.shard_samples", "0", "data.shard_samples must be > 0, not 0"),
        ("data.limit", "0", "data.limit must be > 0, not 0"),
        ("data.failure_budget", "1", r"data.failure_budget must be in \[0, 1\), not 1"),
        ("data.validation_share", "-0.1", r"data.validation_share must be in \[0, 1\), not -0.1"),
        ("student.chroma", "3", r"student.chroma must be 1, 2, 4 or 8, not 3"),
        ("student.noise_scale", "3.5", r"student.noise_scale must be in \[0, 3\], not 3.5"),
        ("teacher.width", "0", r"teacher.width must be in \(0, 4\], not 0"),
        ("teacher.epochs", "-1", "teacher.epochs must be >= 0, not -1"),
        ("teacher.batch", "1", "teacher.batch must be > 1"),
        ("teacher.rate", "0", "teacher.rate must be > 0"),
        ("teacher.sha256", "dcbb", "at least 8 hexadecimal digits, not dcbb"),
        ("captions.dim", "0", "captions.dim must be > 0"),
        ("captions.batch", "1", "captions.batch must be > 1"),
        ("captions.rate", "-1", "captions.rate must be > 0"),
        ("stage_one.epochs", "-1", "epochs must be in .0, 1e6., not -1"),
        ("stage_one.global_batch", "0", "global_batch must be > 0, not 0"),
        ("stage_one.rate", "NaN", r"rate must be in \(0, 1\), not nan"),
        ("stage_two.warmup_share", "1", r"warmup_share must be in \[0, 1\)"),
        ("stage_two.average_share", "1", r"average_share must be in \[0, 1\)"),
        ("stage_two.image_scale", "0", "image_scale must be > 0"),
        ("stage_two.checkpoint_images", "0", "checkpoint_images must be > 0"),
        ("stage_two.weights.conv1", "-1", "weights.conv1 must be >= 0 and finite, not -1"),
        (
            "stage_two.weights.taps.pool1",
            "-1",
            "weights.taps.pool1 must be >= 0 and finite, not -1",
        ),
        ("search.trials", "-1", "search.trials must be >= 0"),
        ("search.images", "0", "search.images must be > 0"),
        ("search.reruns", "-1", "search.reruns must be >= 0, not -1"),
        ("search.random_trials", "-1", "search.random_trials must be >= 0, not -1"),
        ("search.seed", "-1", "search.seed must be >= 0, not -1"),
        ("search.workers", "0", "search.workers must be > 0, not 0"),
        ("search.captions", "5", "search.captions must be > 5, not 5"),
        ("search.reduction", "1", "search.reduction must be > 1, not 1"),
        ("search.level", "0", r"search.level must be in \(0, 0.5\), not 0"),
        ("search.level", "0.5", r"search.level must be in \(0, 0.5\), not 0.5"),
        ("search.rerun_level", "0", r"search.rerun_level must be in \(0, 1\], not 0"),
        ("search.rerun_level", "1.01", r"search.rerun_level must be in \(0, 1\], not 1.01"),
        ("search.minutes", "0", "search.minutes must be > 0 or null, not 0"),
        ("search.minutes", "NaN", "search.minutes must be > 0 or null, not nan"),
        ("search.first_images", "0", r"in \[1, search.images = 320\], not 0"),
        ("search.first_images", "321", r"in \[1, search.images = 320\], not 321"),
        (
            "search.space.conv1.low",
            "0",
            "search.space.conv1.low and high, .* 0 < low <= 1 <= high, not 0.0 and 10",
        ),
        ("search.space.conv1.low", "1.5", "not 1.5 and 10"),
        ("search.space.conv1.low", "NaN", "not nan and 10"),
        ("search.space.conv1.high", "0.9", "not 0.1 and 0.9"),
        ("evaluation.sheet", "0", "evaluation.sheet must be > 0, not 0"),
        ("evaluation.samples", "0", "evaluation.samples must be > 0"),
        ("evaluation.real_images", "0", "evaluation.real_images must be > 0"),
        ("evaluation.splits", "1", r"evaluation.splits must be > 1 \(deviation\), not 1"),
        ("evaluation.seed", "-1", "evaluation.seed must be >= 0, not -1"),
        ("evaluation.captions", "2", "evaluation.captions must be > 2"),
        ("evaluation.features_size", "100", "features_size must be a multiple of 32, not 100"),
        ("evaluation.features_size", "0", "features_size must be a multiple of 32, not 0"),
        ("evaluation.inception_sha256", "6726825", "at least 8 hexadecimal digits, not 6726825"),
        ("evaluation.protocol", "authers", "evaluation.protocol must be one of .*'gan'"),
        ("evaluation.features", "vgg", "evaluation.features must be one of .*'lite0'"),
        ("evaluation.judge.dim", "0", "evaluation.judge.dim must be > 0, not 0"),
        ("evaluation.judge.epochs", "0", "evaluation.judge.epochs must be > 0"),
        ("evaluation.judge.batch", "1", "evaluation.judge.batch must be > 1"),
        ("evaluation.judge.rate", "0", "evaluation.judge.rate must be > 0"),
        (
            "evaluation.judge.temperature",
            "NaN",
            "evaluation.judge.temperature must be > 0, not nan",
        ),
        ("evaluation.judge.decay", "-1", "evaluation.judge.decay must be >= 0"),
        ("evaluation.judge.noise", "-0.1", "evaluation.judge.noise must be >= 0, not -0.1"),
        ("promotion.level", "0", r"promotion.level must be in \(0, 0.5\), not 0"),
        ("promotion.level", "0.5", r"promotion.level must be in \(0, 0.5\), not 0.5"),
        ("promotion.margin", "0", r"promotion.margin must be in \(0, 1\], not 0"),
        ("promotion.margin", "1.5", r"promotion.margin must be in \(0, 1\], not 1.5"),
        ("lanes", "0", "lanes must be > 0, not 0"),
        ("threads", "-1", "threads must be >= 0, not -1"),
    ],
)
def test_value_out_of_range(key, value, word):
    """A value out of its range is refused with its key and what came."""
    with pytest.raises(ValueError, match=word):
        with_overrides(recipe("tiny"), {key: value})


def test_all_loss_weights_zero():
    """At least one term must remain."""
    nothing = dict.fromkeys(("image", "conv1", "conv2", "conv3", "conv4", "conv5"), 0.0)
    with pytest.raises(ValueError, match=r"^image, conv1 \.\. conv5 or one of taps must be > 0"):
        LossWeights(**nothing)
    assert LossWeights(**nothing, taps={"pool5": 1.0}).of("pool5") == 1


@pytest.mark.parametrize(
    "name",
    ["conv6", "conv0", "conv1_5", "conv1_0", "pool6", "Image", "rate2", "", "beta2", "rate "],
)
def test_what_cannot_be_searched_is_named(name):
    """A name of nothing that a search varies is refused with what can be, for both stages."""
    for whole in (name, f"stage_one.{name}"):
        with pytest.raises(ValueError, match="nothing of this name can be searched") as caught:
            SearchConfig(space={"image": Range(), whole: Range()}, stage_one=True)
        assert str(caught.value).startswith(f"space.{whole}: ")
    with pytest.raises(ValueError, match="nothing of this name"):
        SearchConfig(space={"stage_one.share": Range()}, stage_one=True)


@pytest.mark.parametrize("name", ["image", "conv3", "conv5_4", "pool1", "rate"])
def test_stage_ones_values_need_its_search(name):
    """Values of stage one, and share, are searched only where trials train stage one too."""
    found = SearchConfig(space={name: Range()})
    assert found.space == {name: Range(low=0.1, high=10)}
    for about_one in (f"stage_one.{name}", "share"):
        with pytest.raises(ValueError, match=r"it needs search\.stage_one=true") as caught:
            SearchConfig(space={about_one: Range()})
        assert str(caught.value).startswith(f"space.{about_one} is about stage one")
        assert SearchConfig(space={about_one: Range()}, stage_one=True).space


@pytest.mark.parametrize("changes", [{"workers": 2}, {"stage_one": True}])
def test_a_population_trains_stage_two_on_one_worker(changes):
    """pbt goes with neither several workers nor stage one; the other schedulers go with both."""
    with pytest.raises(ValueError, match=r"it needs search\.workers=1 and search\.stage_one=false"):
        SearchConfig(scheduler="pbt", **changes)
    assert SearchConfig(scheduler="pbt").workers == 1
    for scheduler in ("asha", "none"):
        assert SearchConfig(scheduler=scheduler, **changes).scheduler == scheduler


def test_a_range_holds_the_recipes_own_value():
    """Factors lie about 1, which may be an end; several values of the default are independent."""
    assert (Range().low, Range().high) == (0.1, 10)
    assert Range(low=1, high=1) == Range(low=1.0, high=1.0)
    first, second = SearchConfig(), SearchConfig()
    assert first.space == second.space
    assert first.space is not second.space
    assert set(first.space) == {"image", "conv1", "conv2", "conv3", "conv4", "conv5"}


def test_shares_must_leave_something_to_train_on():
    """Validation and test together may not take everything."""
    with pytest.raises(ValueError, match="must leave something to train on") as caught:
        DataConfig(validation_share=0.5, test_share=0.5)
    assert "1.0" in str(caught.value)
    assert DataConfig(validation_share=0.4, test_share=0.5).test_share == 0.5


def test_workers_must_divide_lanes():
    """Workers that do not divide the lanes are refused with those that do."""
    with pytest.raises(ValueError, match="workers must divide lanes") as caught:
        RunConfig(name="x", lanes=12, workers=5)
    assert "5 does not; possible: [1, 2, 3, 4, 6, 12]" in str(caught.value)
    with pytest.raises(ValueError, match="workers must be > 0"):
        RunConfig(name="x", workers=0)


def test_each_number_of_elastic_workers_must_do():
    """From workers to max_workers each number must divide the lanes."""
    assert RunConfig(name="x", workers=1, max_workers=4).max_workers == 4
    with pytest.raises(ValueError, match=r"lanes \(48\), 5 does not"):
        RunConfig(name="x", workers=1, max_workers=8)
    with pytest.raises(ValueError, match="at most max_workers, not 4 and 2"):
        RunConfig(name="x", workers=4, max_workers=2)


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_workers_must_not_outnumber_a_batch(stage):
    """More workers than a stage's global batch has images are refused with that stage's name."""
    with pytest.raises(ValueError, match=rf"\(16\) must be at most {stage}.global_batch \(8\)"):
        RunConfig(**{"name": "x", "workers": 16, stage: StageConfig(global_batch=8)})


def test_weights_by_url_need_a_digest():
    """Weights that are fetched must name their digest; a local file need not."""
    with pytest.raises(ValueError, match=r"^sha256 is needed when teacher"):
        TeacherConfig(weights="https://example.org/vgg.pth")
    assert TeacherConfig(weights="vgg.pth").sha256 is None
    assert TeacherConfig(weights="https://example.org/vgg.pth", sha256="0" * 8).weights


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name):
    """Every recipe comes back equal from its JSON, and again from that of a changed one."""
    config = recipe(name)
    assert from_dict(RunConfig, to_dict(config)) == config
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    changed = with_overrides(config, {"stage_two.weights.taps.conv1_1": "3", "data.limit": "9"})
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(changed)))) == changed
    assert changed != config


def test_missing_keys_take_their_defaults():
    """A config from an older file without a key takes that key's default."""
    assert from_dict(SearchConfig, {"trials": 9}) == SearchConfig(trials=9)
    half = from_dict(SearchConfig, {"space": {"rate": {"low": 0.5}}})
    assert half.space == {"rate": Range(low=0.5, high=10)}
    assert from_dict(EvaluationConfig, {}) == EvaluationConfig()


def test_configs_are_frozen():
    """No part of a config can be changed after its checks."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("tiny").workers = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("tiny").data.resolution = 50


@pytest.mark.parametrize(
    ("key", "text", "begins"),
    [
        ("stage_two.rate", "-1", "stage_two.rate must be"),
        ("stage_one.weights.conv1", "-1", "stage_one.weights.conv1 must be"),
        (
            "stage_one.weights",
            '{"image": 0, "conv1": 0, "conv2": 0, "conv3": 0, "conv4": 0, "conv5": 0}',
            r"stage_one.weights.image, conv1 \.\. conv5 or one",
        ),
        ("search.images", "0", "search.images must be"),
        ("evaluation.judge.batch", "0", "evaluation.judge.batch must be"),
        ("workers", "7", "workers must divide"),
    ],
)
def test_a_refusal_names_the_whole_key(key, text, begins):
    """Stages one, two and three all have a rate: the text says whose it is, once."""
    with pytest.raises(ValueError, match=f"^{begins}"):
        with_overrides(recipe("tiny"), {key: text})

"""`prefect.yaml`: what a server is given of each flow, and the form that its page makes of it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate

from sdn.recipes import RECIPES, recipe

FILE = Path(__file__).parents[2] / "prefect.yaml"
CONTENT = yaml.safe_load(FILE.read_text())
DEPLOYMENTS = {one["name"]: one for one in CONTENT["deployments"]}
EXPECTED = {
    *("sdn-pipeline", "sdn-retrain", "sdn-tune"),
    *("sdn-evaluate", "sdn-promote", "sdn-rollback"),
}
PLAIN = {"string", "integer", "number", "boolean", "array"}
NEEDED = {"sdn-promote": {"version": 1}}
"""What a person has to fill in."""

each = pytest.mark.parametrize("name", sorted(DEPLOYMENTS))


def flow_of(name) -> Flow:
    return load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"])


def schema_of(name):
    return parameter_schema(flow_of(name)).model_dump_for_openapi()


def test_prefect_reads_the_file():
    """By Prefect's own model, which drops what it does not know; nothing here is dropped."""
    read = PrefectYamlModel.model_validate(CONTENT).model_dump(by_alias=True)
    assert set(DEPLOYMENTS) >= EXPECTED
    assert len(DEPLOYMENTS) == len(CONTENT["deployments"])
    for given, kept in zip(CONTENT["deployments"], read["deployments"], strict=True):
        for key, value in given.items():
            if isinstance(value, dict) and isinstance(kept[key], dict):
                assert value.items() <= kept[key].items(), key
            else:
                assert kept[key] is not None, key


@each
def test_a_form_is_loaded_without_what_its_run_needs(name):
    """Neither torch nor MLflow, so that `sdn up` deploys sooner."""
    module = DEPLOYMENTS[name]["entrypoint"].rpartition(".")[0]
    code = f"import sys, {module}; sys.exit({{'torch', 'mlflow', 'ray'}} & {{*sys.modules}} or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@each
def test_a_deployment_is_described_and_has_its_place(name):
    """Its flow has its name; description, tags, pool, queue and its folder are there."""
    given = DEPLOYMENTS[name]
    assert flow_of(name).name == name
    assert given["description"].strip()
    assert "sdn" in given["tags"]
    pool = given["work_pool"]
    assert pool["name"] == "sdn"
    long = "training" in given["tags"]
    assert pool["work_queue_name"] == ("training" if long else "default")
    assert pool["job_variables"]["working_dir"] == "{{ $PWD }}"
    if long:
        # Cancelled, an event of a second landing place would be lost, and a dead run's successor.
        assert given["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


@each
def test_every_field_is_plain_and_described(name):
    """No nested model, no tabs, a description each; a number has its range."""
    schema = schema_of(name)
    is_valid_schema(schema)
    assert not schema["definitions"]
    for field, given in schema["properties"].items():
        assert given.get("description", "").strip(), field
        assert given["type"] in PLAIN, field
        if given["type"] in {"integer", "number"} and "enum" not in given:
            assert {"minimum", "exclusiveMinimum"} & set(given), field
            assert {"maximum", "exclusiveMaximum"} & set(given), field
    assert set(schema.get("required", ())) == set(NEEDED.get(name, ()))


@each
def test_the_form_as_it_opens_is_taken(name):
    """Defaults and the deployment's parameters are valid, for the server and for the flow."""
    schema, given = schema_of(name), DEPLOYMENTS[name].get("parameters", {})
    defaults = {k: v["default"] for k, v in schema["properties"].items() if "default" in v}
    filled = defaults | given | NEEDED.get(name, {})
    validate(filled, schema, raise_on_error=True)
    assert set(given) <= set(schema["properties"])
    assert flow_of(name).validate_parameters(filled) == filled


@pytest.mark.parametrize(
    ("name", "field", "value", "reason"),
    [
        ("sdn-pipeline", "stage_two_epochs", -1, "less than the minimum of 0"),
        ("sdn-pipeline", "resolution", 33, "not a multiple of 32"),
        ("sdn-pipeline", "learning_rate", 1, "greater than or equal to the maximum of 1"),
        ("sdn-pipeline", "recipe", "tyni", "is not one of"),
        ("sdn-pipeline", "source", "photos", "is not one of"),
        ("sdn-tune", "search_trials", 1, "less than the minimum of 2"),
        ("sdn-promote", "version", 0, "less than the minimum of 1"),
        ("sdn-promote", "version", 2**31, "greater than the maximum of 2147483647"),
        ("sdn-pipeline", "workers", 5, "is not one of"),
        ("sdn-tune", "workers", 49, "is not one of"),
    ],
)
def test_what_is_out_of_range_is_refused_with_field_and_reason(name, field, value, reason):
    """As the server validates a form that was sent."""
    with pytest.raises(ValidationError, match=f"'{field}'.*{reason}"):
        validate(NEEDED.get(name, {}) | {field: value}, schema_of(name), raise_on_error=True)


def test_workers_divide_the_lanes():
    """The form's list is what every recipe's config takes, and 0."""
    lanes = recipe("tiny").lanes
    possible = [n for n in range(1, lanes + 1) if lanes % n == 0]
    assert schema_of("sdn-pipeline")["properties"]["workers"]["enum"] == [0, *possible]
    assert {make().lanes for make in RECIPES.values()} == {lanes}


@each
def test_defaults_stand_in_the_code(name):
    """What the file repeats of a flow's defaults does not differ from them."""
    parameters = inspect.signature(flow_of(name)).parameters
    for field, value in DEPLOYMENTS[name].get("parameters", {}).items():
        assert parameters[field].default == value, field

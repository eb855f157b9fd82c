"""The unit of systemd and the objects for Kubernetes are valid, and fit the server."""

import configparser
import json
import re
import shlex

import jsonschema
import pytest
import yaml
from places import DATA, PROJECT
from typer.main import get_command

from grokctl.cli.app import app
from grokctl.serving.app import ENDPOINTS

DOCUMENT = (PROJECT / "docs" / "serve.md").read_text("utf-8")
DEPLOYMENT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "apps/v1"},
        "kind": {"const": "Deployment"},
        "metadata": {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["selector", "template"],
            "properties": {
                "replicas": {"type": "integer"},
                "strategy": {"properties": {"type": {"enum": ["Recreate", "RollingUpdate"]}}},
                "selector": {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector"},
                "template": {"$ref": "#/$defs/io.k8s.api.core.v1.PodTemplateSpec"},
            },
        },
    },
}


def recipe(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    return found


def options_of(words):
    return get_command(app).commands["serve"].make_context("serve", list(words)).params


@pytest.fixture
def objects():
    return list(yaml.safe_load_all(recipe("yaml")))


def test_the_objects_for_kubernetes_are_what_its_schema_allows(objects):
    definitions = json.loads((DATA / "kubernetes.json").read_text())["$defs"]
    schemas = {"Deployment": DEPLOYMENT, "Service": {"$ref": "#/$defs/Service"}}

    assert [each["kind"] for each in objects] == ["Deployment", "Service"]
    for each in objects:
        jsonschema.validate(each, {**schemas[each["kind"]], "$defs": definitions})
    del objects[0]["spec"]["template"]["spec"]["containers"][0]["name"]
    with pytest.raises(jsonschema.ValidationError, match="name"):
        jsonschema.validate(objects[0], {**DEPLOYMENT, "$defs": definitions})


def test_the_objects_fit_each_other_and_the_server(objects):
    deployment, service = objects
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    program, verb, *words = container["command"]
    options = options_of(words)

    assert (program, verb) == ("grokctl", "serve")
    assert options["host"] == "0.0.0.0"
    assert template["spec"]["terminationGracePeriodSeconds"] > options["drain"] + 10
    assert container["ports"][0]["containerPort"] == options["port"]
    assert template["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    open_paths = {each.path for each in ENDPOINTS if each.is_open}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in open_paths


def test_the_unit_starts_the_server_and_lets_it_drain():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(recipe("ini"))
    service = unit["Service"]
    program, verb, *words = shlex.split(service["ExecStart"])
    options = options_of(words)

    assert program.endswith("/grokctl")
    assert verb == "serve"
    assert float(service["TimeoutStopSec"]) > options["drain"] + 10
    assert str(options["api_key_file"]).endswith("/key")
    assert service["LoadCredential"].startswith("key:")
    assert (
        dict(each.split("=") for each in service["Environment"].split())["GROKCTL_HOME"]
        == (service["ReadWritePaths"])
    )

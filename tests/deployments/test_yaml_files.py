"""The YAML files that ship with the project are what Ray and our own configuration accept."""

from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from common.config import ServingConfig

ROOT = Path(__file__).parents[2]


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    return content


def test_serve_yaml_is_one_application_named_sida() -> None:
    schema = ServeDeploySchema.model_validate(read("deployments/serve.yaml"))
    assert [(app.name, app.import_path, app.route_prefix) for app in schema.applications] == [
        ("sida", "deployments.app:build", "/")
    ]


def test_serve_yaml_has_only_keys_of_the_configuration() -> None:
    args = read("deployments/serve.yaml")["applications"][0]["args"]
    assert ServingConfig.from_args(args, environ={}) == ServingConfig(), "the file shows the defaults"


def test_cluster_yaml_is_what_the_launcher_accepts() -> None:
    config = read("cluster.yaml")
    validate_config(prepare_config(config))
    assert set(config["available_node_types"]) == {"head", "cpu-store", "gpu-executor"}
    assert config["available_node_types"]["cpu-store"]["resources"]["host_memory_gb"] > 0

"""The YAML files that ship with the project are what Ray and our own configuration accept."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start
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


def test_kuberay_yaml_serves_the_application_of_serve_yaml() -> None:
    service, ours = (
        yaml.safe_load(read("deployments/kuberay.yaml")["spec"]["serveConfigV2"]),
        read("deployments/serve.yaml"),
    )
    ServeDeploySchema.model_validate(service)
    (application,), (our_application,) = service.pop("applications"), ours.pop("applications")
    assert service == ours, "proxies listen alike"
    args, our_args = application.pop("args"), our_application.pop("args")
    assert application == our_application
    ServingConfig.from_args(args, environ={})
    # The keys of a real model, which serve.yaml only suggests, are known to the configuration alone.
    assert set(args) - {"model", "model_name", "device"} <= set(our_args)


def test_kuberay_yaml_has_the_nodes_of_cluster_yaml() -> None:
    nodes = read("cluster.yaml")["available_node_types"]
    groups = {group["groupName"]: group for group in _cluster()["workerGroupSpecs"]}
    assert set(groups) == set(nodes) - {"head"}
    for name, group in groups.items():
        assert (group["minReplicas"], group["maxReplicas"]) == (
            nodes[name]["min_workers"],
            nodes[name]["max_workers"],
        )
        start = _start_options(group)
        wanted = {"CPU": _limit(group, "cpu"), "GPU": _limit(group, "nvidia.com/gpu"), **start["resources"]}
        assert {key: value for key, value in wanted.items() if value} == nodes[name]["resources"]
        assert start["labels"] == nodes[name]["labels"]


def test_kuberay_yaml_starts_ray_with_options_that_it_has() -> None:
    known = {option.removeprefix("--") for param in ray_start.params for option in param.opts}
    for group in (_cluster()["headGroupSpec"], *_cluster()["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
            "Kubernetes demands it"
        )
        reserved = int(_start_options(group)["object_store_memory"])
        assert reserved <= _memory_bytes(group), "shared memory counts against the container's memory"


def _cluster() -> dict[str, Any]:
    cluster: dict[str, Any] = read("deployments/kuberay.yaml")["spec"]["rayClusterConfig"]
    return cluster


def _start_options(group: dict[str, Any]) -> dict[str, Any]:
    """What `ray start` receives once the shell has read the parameters, as KubeRay has it do."""
    given = {key: shlex.split(value)[0] for key, value in group["rayStartParams"].items()}
    return {
        "resources": json.loads(given.get("resources", "{}")),
        "labels": dict(pair.split("=") for pair in given.get("labels", "").split(",") if pair),
        "object_store_memory": given.get("object-store-memory", "0"),
    }


def _limit(group: dict[str, Any], resource: str) -> int:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return int(limits.get(resource, 0))


def _memory_bytes(group: dict[str, Any]) -> int:
    memory: str = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    return int(memory.removesuffix("Gi")) * 2**30

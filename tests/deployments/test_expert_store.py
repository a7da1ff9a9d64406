"""The store as a Serve replica: it serves when it has its experts, comes back after a kill, and fails readably."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.expert_store.directory import ExpertDirectory
from common.config import ServingConfig
from deployments.expert_store import ExpertStoreDeployment
from tests.tiny_models import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("serve_url")]

TIMEOUT_S = 90.0


class StoreWithPid(ExpertStoreDeployment):
    """The deployment, and which process it is."""

    async def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path, moe_intermediate_size=256)


@pytest.fixture
def app(request: pytest.FixtureRequest) -> Iterator[str]:
    """Named after the test; told to stop at its end, while the next one begins."""
    name = str(request.node.name)
    yield name
    serve.delete(name, _blocking=False)


def run_store(folder: Path, app: str) -> DeploymentHandle:
    config = ServingConfig.from_args({"model": str(folder)})
    deployment = serve.deployment(StoreWithPid).options(
        ray_actor_options={"num_cpus": 0.1}, health_check_period_s=1, max_constructor_retry_count=1
    )
    return serve.run(deployment.bind(config), name=app, route_prefix=None)


def directory_of(handle: DeploymentHandle) -> ExpertDirectory:
    directory = handle.directory.remote().result(timeout_s=TIMEOUT_S)
    assert isinstance(directory, ExpertDirectory)
    return directory


def wait_for_new_generation(handle: DeploymentHandle, old: str) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            generation: str = handle.generation.remote().result(timeout_s=5)
        except (ray.exceptions.RayError, TimeoutError):
            continue  # the replica is dead and its successor not there yet
        if generation != old:
            return generation
    raise AssertionError(f"no generation after {old} within {TIMEOUT_S} s")


def test_a_killed_store_comes_back_with_all_experts(folder: Path, app: str) -> None:
    handle = run_store(folder, app)
    before = directory_of(handle)
    held = ray.get(list(before.refs.values()))  # what an executor on this node has resolved
    copies = [slab.copy() for slab in held]

    os.kill(handle.pid.remote().result(timeout_s=TIMEOUT_S), signal.SIGKILL)
    assert wait_for_new_generation(handle, before.generation) != before.generation

    assert all((slab == copy).all() for slab, copy in zip(held, copies, strict=True))
    after = directory_of(handle)
    assert after.model_fingerprint == before.model_fingerprint
    reloaded = ray.get([after.refs[expert] for expert in before.refs])
    assert all((slab == copy).all() for slab, copy in zip(reloaded, copies, strict=True))
    assert handle.describe.remote().result(timeout_s=TIMEOUT_S)["state"] == "ready"


def test_a_damaged_checkpoint_fails_the_deployment_and_says_why(folder: Path, app: str) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError):
        run_store(folder, app)
    [deployment] = serve.status().applications[app].deployments.values()
    assert (
        f"checkpoint {folder / 'model.safetensors'}: is truncated or no safetensors file"
        in deployment.message
    )

"""What all tests share: one Ray cluster and one Serve HTTP port per session. Knows no part of the system.

`make test` runs them in two processes: those of that cluster in one; the rest, first what starts a cluster of its own,
file by file in the other.
"""

import gc
import os
import socket
from collections.abc import Iterator

import pytest
import torch

# Read by Ray when it is imported, so they are set before.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # of 5, a busy machine needs more
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the threads of two processes would wait for each other
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when Triton is imported; see actors/executor/conftest.py

LOGICAL_CPUS = 8  # more than a laptop has: tests share the machine, they do not fill it
OBJECT_STORE_BYTES = 600_000_000


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The groups of `--dist loadgroup`, the longest first."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("cluster" if _shares_cluster(item) else item.path.name))
    items.sort(key=lambda item: (not _shares_cluster(item), item.get_closest_marker("cluster") is None))


def _shares_cluster(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "ray_cluster" in item.fixturenames


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look through it again and again."""
    gc.freeze()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of the session's own."""
    import ray

    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def serve_url(ray_cluster: None) -> Iterator[str]:
    """Serve on that cluster, without applications; yields its base URL, "http://127.0.0.1:<port>"."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The URL of an embedded Valkey server; tests share it, so each uses request ids of its own."""
    from deployments.table_server import EmbeddedValkey

    server = EmbeddedValkey("127.0.0.1")
    yield server.url
    server.stop()

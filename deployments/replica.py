"""Who this process is inside Serve; outside of it, as in tests, the defaults."""

import os

from ray import serve
from ray.serve.exceptions import RayServeException

DEFAULT_APP = "sida"


def app_name() -> str:
    """The application's name: part of every Redis key."""
    try:
        name: str = serve.get_replica_context().app_name
        return name
    except RayServeException:
        return DEFAULT_APP


def replica_id() -> str:
    """Unique among the replicas of a deployment."""
    try:
        unique_id: str = serve.get_replica_context().replica_id.unique_id
        return unique_id
    except RayServeException:
        return f"process-{os.getpid()}"

"""Asks the other executors of this application what they hold, for a new one to warm up with."""

import logging

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError

from actors.executor.warm_up import Residents

logger = logging.getLogger("ray.serve")

_ANSWER_S = 2.0  # a new executor waits so long at most


async def ask_peers(model_fingerprint: str) -> list[Residents]:
    """What the running executors of the same model hold, from within a replica of their deployment.

    One that does not answer is no reason not to start: then there are none.
    """
    try:
        deployment = serve.get_replica_context().deployment
        broadcast = serve.get_deployment_handle(deployment).broadcast("residents")
        answers = await broadcast.results_async(timeout_s=_ANSWER_S, return_exceptions=True)
    except DeploymentUnavailableError:
        return []  # this executor is the first
    except Exception as error:
        logger.warning("The other executors do not tell what they hold: %s: %s", type(error).__name__, error)
        return []
    return [
        answer
        for answer in answers
        # During an update, those of before may serve another model.
        if isinstance(answer, Residents) and answer.model_fingerprint == model_fingerprint
    ]

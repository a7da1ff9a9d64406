"""The application: `serve run --name sida deployments.app:build key=value ...`.

Checks the configuration and the model's folder first, so that what cannot work ends in one line before Ray starts.
"""

from collections.abc import Mapping
from typing import Any

import click
import torch
from ray import serve
from ray.serve import Application, Deployment

from actors.executor.build import check_eviction
from actors.executor.families import check_supported
from actors.executor.pager import NEXT_GATE
from actors.executor.predictors import chosen_predictor, early_routers
from actors.executor.resident_set import count_pinned, recorded_counts
from actors.expert_store.loads import ExpertLoads
from actors.predictor.hash_function import find_hash_function
from common.architecture import MoeArchitecture, describe_architecture, load_config, meta_model
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError, ServingError
from common.expert_layout import ExpertLayout
from deployments.executor import ExecutorDeployment
from deployments.expert_store import ExpertStoreDeployment
from deployments.ingress import Ingress, ServedModel
from deployments.predictor import PredictorDeployment
from deployments.table_server import TableServer

_UNLOGGED = {"enable_access_log": False}  # executors ask the store every second whether it is still the same
# How the load is averaged; handles report it every 10 s, and it must hold one report.
_AVERAGED = {"look_back_period_s": 12.0}
_LAST_ERRORS_S = 10.0  # for the ingress to tell clients of the executors that were stopped
_CONSTRUCTOR_RETRIES = 3  # a replica that cannot start says why three times, not twenty


def build(args: dict[str, Any]) -> Application:
    """The application of one served model.

    Args:
        args: keys of `ServingConfig`, as text or typed, and `config`, a YAML file of the same keys.
    Raises:
        click.ClickException: the configuration or the model's folder cannot work; its message is one line.
    """
    try:
        config, architecture = checked_config(args)
    except ServingError as error:
        raise click.ClickException(str(error)) from error
    return bind(config, served_model(architecture))


def checked_config(args: Mapping[str, Any]) -> tuple[ServingConfig, MoeArchitecture]:
    """The configuration with `device` and `max_context_tokens` decided, once everything that can be known without
    weights is known to fit.

    Raises:
        ConfigError, CheckpointError, SlotsTooFewError: what does not.
    """
    config = ServingConfig.from_args(args)
    if config.device == "auto":
        config = config.model_copy(update={"device": "cuda" if torch.cuda.is_available() else "cpu"})
    architecture = _check_model(config)
    check_eviction(config.eviction, torch.device(config.device))
    _check_decode_predictor(config, architecture)
    _predicts(config)
    if config.placement_trace is not None:
        ExpertLoads.load_for(Checkpoint.open(config.model), config.placement_trace)
    limit = config.context_limit(architecture.max_context_tokens)
    return config.model_copy(update={"max_context_tokens": limit}), architecture


def served_model(architecture: MoeArchitecture) -> ServedModel:
    has_encoder = architecture.is_encoder_decoder or bool(architecture.labels)
    return ServedModel(architecture.vocab_size, has_encoder, architecture.labels)


def bind(config: ServingConfig, model: ServedModel) -> Application:
    """Wire the deployments of a checked configuration."""
    store = (
        _on_cpu(ExpertStoreDeployment, config, num_cpus=0.1)
        .options(max_ongoing_requests=1000, logging_config=_UNLOGGED)
        .bind(config)
    )
    tables = predictor = None
    if _predicts(config):
        tables = _on_cpu(TableServer, config, num_cpus=0.05).options(max_ongoing_requests=1000).bind(config)
        predictor = (
            _on_cpu(PredictorDeployment, config, num_cpus=0.25)
            .options(max_ongoing_requests=256)
            .bind(config, tables)
        )
    executor = _executor(config).bind(config, store, tables)
    ingress = _on_cpu(serve.ingress()(Ingress), config, num_cpus=0.2).options(
        # The executors bound what runs and waits; the ingress lets everything through to them.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=config.drain_timeout_s + _LAST_ERRORS_S,
    )
    return ingress.bind(config, model, predictor, executor, store)


def _executor(config: ServingConfig) -> Deployment:
    on_gpu = config.device == "cuda"
    actor_options = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 0.5}
    # An executor queues by itself, so Serve hands it all that it may run or keep waiting. Serve counts a request as
    # queued even while it looks for a replica: its own limit must let a burst through that the executors can hold.
    capacity = config.max_batch_size + config.max_queued_requests
    return serve.deployment(ExecutorDeployment).options(
        ray_actor_options=actor_options,
        autoscaling_config={
            "min_replicas": config.min_executors,
            "max_replicas": config.max_executors,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            **_AVERAGED,
        },
        max_ongoing_requests=capacity,
        max_queued_requests=capacity * config.max_executors,
        max_constructor_retry_count=_CONSTRUCTOR_RETRIES,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
    )


def _on_cpu(deployment_class: type, config: ServingConfig, num_cpus: float) -> Deployment:
    actor_options: dict[str, Any] = {"num_cpus": num_cpus}
    if config.device == "cuda":
        # An actor without GPUs still sees them; what does not compute on them must not take memory there.
        actor_options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    return serve.deployment(deployment_class).options(
        ray_actor_options=actor_options,
        max_constructor_retry_count=_CONSTRUCTOR_RETRIES,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )


def _check_model(config: ServingConfig) -> MoeArchitecture:
    model_config = load_config(config.model)
    check_supported(model_config, config.model)
    architecture = describe_architecture(config.model)
    dtype = config.compute_dtype(config.device, model_config.dtype or torch.float32)
    slot_bytes = ExpertLayout.from_shapes(architecture.expert_shapes, dtype).slab_bytes
    if not config.expert_slots.is_auto:  # what fits is for the executors to see, on their devices
        num_slots = config.expert_slots.slots_per_layer(
            architecture.num_layers, architecture.num_experts, slot_bytes, architecture.top_k
        )
        count_pinned(config, num_slots, architecture.num_experts, architecture.top_k)
    return architecture


def _check_decode_predictor(config: ServingConfig, architecture: MoeArchitecture) -> None:
    """
    Raises:
        ConfigError: the device or the model rules it out, or `resident_set` is missing or unusable.
    """
    recorded_counts(config)
    if chosen_predictor(config, config.device) == NEXT_GATE and config.device == "cpu":
        early_routers(meta_model(load_config(config.model), config.model), architecture)


def _predicts(config: ServingConfig) -> bool:
    """Whether there is a hash function to predict with.

    Raises:
        ConfigError, CheckpointError: it is damaged or for another model, or `routing` needs one and there is none.
    """
    if find_hash_function(config.model, config.hash_function) is not None:
        return True
    if config.routing == "predicted":
        allowed = f"{config.model} has no hash_function folder; train one, or set hash_function"
        raise ConfigError("routing", config.routing, allowed)
    return False

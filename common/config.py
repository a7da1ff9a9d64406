"""Every setting of the system: its type, range and one-line description, which is also what the README shows.

Values come from, in rising order: defaults, a YAML file (`config=FILE`), `SIDA_*` environment variables, and the
arguments of the application builder. They are read once, at start-up; nothing reads the environment later.
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigError
from common.slot_budget import ALLOWED as SLOTS_ALLOWED
from common.slot_budget import SlotBudget

if TYPE_CHECKING:
    import torch

ENVIRONMENT_PREFIX = "SIDA_"
FILE_KEY = "config"
REFERENCE_MODEL = Path(__file__).parent.parent / "models" / "reference"
DEFAULT_CONTEXT_TOKENS = 4096

_SECRETS = frozenset({"api_key", "redis_url"})


def _option(default: Any, allowed: str, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"allowed": allowed}, **limits)


def _at_least(default: int, low: int, high: int, description: str) -> Any:
    return _option(default, f"{low} to {high}", description, ge=low, le=high)


def _absolute(value: Any) -> Any:
    # Replicas run in other working directories than whoever wrote the path.
    return str(Path(value).expanduser().resolve()) if isinstance(value, str | Path) and str(value) else value


def _absolute_or_auto(value: Any) -> Any:
    return value if value == "auto" else _absolute(value)


def _parse_slots(value: Any) -> Any:
    return value if isinstance(value, SlotBudget) else SlotBudget.parse(value)


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


class ServingConfig(BaseModel):
    """The configuration of one application. Immutable; travels to every deployment by pickle."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: Annotated[str, BeforeValidator(_absolute)] = _option(
        str(REFERENCE_MODEL),
        "a folder",
        "Hugging Face checkpoint folder; must lie at the same path on every node.",
        min_length=1,
    )
    model_name: str | None = _option(
        None, "any text", "Name of the model in the API; default: the name of its folder.", min_length=1
    )
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto",
        "auto, cpu or cuda",
        "Where executors compute. auto looks at the machine that builds the application; on a cluster say cuda.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "auto, float32, bfloat16 or float16",
        "Type to compute in. auto: the checkpoint's on cuda, float32 on cpu.",
    )
    expert_slots: Annotated[SlotBudget, BeforeValidator(_parse_slots)] = _option(
        SlotBudget.parse("50%"),
        SLOTS_ALLOWED,
        "Experts that an executor holds on its device at once; the rest stay in host memory. auto: as many as fit on "
        "the GPU beside weights, KV cache and decode graphs; on cpu half of them.",
    )
    routing: Literal["exact", "predicted"] = _option(
        "exact",
        "exact or predicted",
        "Who routes: the model's own routers (predictions only prefetch), or the hash function (SiDA, lossy).",
    )
    prefetch: bool = _option(
        True,
        "true or false",
        "Load the experts that hash tables name for a prompt before its forward pass asks for them.",
    )
    decode_predictor: Literal["auto", "none", "next-gate", "activation-trace", "frequency"] = _option(
        "auto",
        "auto, none or next-gate; on cpu also activation-trace or frequency",
        "Who names the experts that decode steps will need in coming layers, which are loaded while a layer computes: the "
        "next layer's router, a layer early (Pre-gated MoE, HOBBIT; on cuda within prompts, too); the most similar earlier "
        "request (MoE-Infinity); or `resident_set`. auto: next-gate on cuda with prefetch, else none.",
    )
    eviction: Literal["lfu", "lru", "fifo", "inactive-lifo", "activation"] = _option(
        "lfu",
        "lfu, lru or fifo; on cpu also inactive-lifo or activation",
        "Which expert leaves its slot: the least often used of late, the least recently used, the oldest, the newest "
        "that the batch does not need, or the one that the running requests used least.",
    )
    resident_set: Annotated[str | None, BeforeValidator(_absolute)] = _option(
        None,
        "a file",
        "Expert loads recorded from a trace, for example of one task (`python -m actors.expert_store.record_loads`): "
        "`pinned_experts` of those it used most never leave their slots, and decode_predictor=frequency loads by it. Must "
        "lie at the same path on every node.",
        min_length=1,
    )
    pinned_experts: Annotated[int | None, BeforeValidator(_auto_is_none)] = _option(
        None,
        "auto or 0 to 4096",
        "Experts per layer that `resident_set` pins, at most the slots less the experts of one token. auto: a quarter of "
        "the slots.",
        ge=0,
        le=4096,
    )
    hash_function: Annotated[str, BeforeValidator(_absolute_or_auto)] = _option(
        "auto",
        "auto or a folder",
        "Folder of the trained hash function. auto: `hash_function` in the model's folder, or none.",
        min_length=1,
    )
    placement_trace: Annotated[str | None, BeforeValidator(_absolute)] = _option(
        None,
        "a file",
        "Expert loads recorded from a trace (`python -m actors.expert_store.record_loads`), by which the store shares out "
        "experts over nodes; default: nodes are filled evenly. Must lie at the same path on every node.",
        min_length=1,
    )
    redis_url: str | None = _option(
        None,
        "redis://, rediss:// or unix:// and an address",
        "Redis for the hash tables; default: an embedded Valkey server.",
        pattern=r"^(redis|rediss|unix)://.+",
        repr=False,
    )
    table_ttl_s: int = _at_least(300, 1, 86_400, "Seconds after which a hash table leaves Redis.")
    max_batch_size: int = _at_least(8, 1, 1024, "Requests that one executor runs at the same time.")
    max_context_tokens: Annotated[int | None, BeforeValidator(_auto_is_none)] = _option(
        None,
        "auto or 2 to 10000000",
        f"Prompt and completion together; with an encoder, each. auto: the model's limit, at most {DEFAULT_CONTEXT_TOKENS}.",
        ge=2,
        le=10_000_000,
    )
    prefill_chunk_tokens: int = _at_least(
        512,
        1,
        65_536,
        "Prompt tokens per forward pass; smaller chunks delay running requests less. An encoder reads a prompt in one pass.",
    )
    max_stall_ms: int = _at_least(
        50,
        1,
        60_000,
        "How long a prompt may hold up running streams before they get a step between two layers.",
    )
    min_executors: int = _at_least(
        1,
        0,
        1024,
        "Executors that always run; with 0 none does after a pause, and the next request waits for a start.",
    )
    max_executors: int = _at_least(1, 1, 1024, "Executors under load; Serve scales between the two.")
    target_ongoing_requests: float = _option(
        8.0, "above 0", "Requests per executor that scaling aims at.", gt=0, allow_inf_nan=False
    )
    upscale_delay_s: float = _option(
        10.0,
        "0 to 86400",
        "How long the load must be above the aim before an executor is added.",
        ge=0,
        le=86_400,
    )
    downscale_delay_s: float = _option(
        300.0, "0 to 86400", "How long it must be below before one is taken away.", ge=0, le=86_400
    )
    drain_timeout_s: float = _option(
        120.0,
        "0 to 86400",
        "How long an executor that is taken away, or stops with the application, may finish its requests; the rest get "
        "an error.",
        ge=0,
        le=86_400,
    )
    max_chunks_per_s: float = _option(
        1500.0,
        "above 0",
        "Pieces of streams that all executors together send per second; where there would be more, tokens share one.",
        gt=0,
        allow_inf_nan=False,
    )
    max_queued_requests: int = _at_least(
        128, 1, 1_000_000, "Requests that may wait for an executor; more are refused with status 503."
    )
    status_interval_s: float = _option(
        5.0,
        "0 to 86400",
        "Seconds between the lines in which an executor logs what it does, while it does something; 0: none.",
        ge=0,
        le=86_400,
    )
    api_key: str | None = _option(
        None,
        "printable ASCII without spaces",
        "Key that clients must send as `Authorization: Bearer`; default: no key.",
        pattern=r"^[!-~]+$",
        repr=False,
    )
    seed: int | None = _option(
        None,
        "0 to 9223372036854775807",
        "Sampling seed of requests that send none; default: random.",
        ge=0,
        le=2**63 - 1,
    )

    @model_validator(mode="after")
    def _executors_are_ordered(self) -> Self:
        if self.max_executors < self.min_executors:
            allowed = f"max_executors is {self.max_executors}; give at most that, or raise max_executors"
            raise ConfigError("min_executors", self.min_executors, allowed)
        return self

    @classmethod
    def from_args(cls, args: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Self:
        """Read the file, the environment and the builder's arguments; later ones win.

        Args:
            args: keys of this class, as text or typed; and `config`, a YAML file of the same keys.
        Raises:
            ConfigError: the first unknown key or impossible value.
        """
        given = dict(args)
        values = {**_read_file(given.pop(FILE_KEY, None)), **_read_environment(environ), **given}
        for key, value in values.items():
            _check_known(key, value)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _config_error(error) from error

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        return self.model_name or Path(self.model).name

    def context_limit(self, model_limit: int) -> int:
        """Tokens of prompt and completion together, given what the model's positions allow.

        Raises:
            ConfigError: `max_context_tokens` is above the model's limit.
        """
        if self.max_context_tokens is None:
            return min(model_limit, DEFAULT_CONTEXT_TOKENS)
        if self.max_context_tokens > model_limit:
            raise ConfigError(
                "max_context_tokens", self.max_context_tokens, f"the model's limit is {model_limit} tokens"
            )
        return self.max_context_tokens

    def compute_dtype(self, device: str, checkpoint_dtype: "torch.dtype") -> "torch.dtype":
        """The type to compute in on "cpu" or "cuda"; most CPUs have no fast 16-bit arithmetic."""
        import torch  # takes 2 s, which processes that do not compute are spared

        if self.dtype == "auto":
            return checkpoint_dtype if device == "cuda" else torch.float32
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def _read_file(path: Any) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(str(path)).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(FILE_KEY, path, f"a readable YAML file ({_one_line(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(FILE_KEY, path, "a YAML file of key: value lines")
    return {str(key): value for key, value in values.items()}


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and value
    }


def _check_known(key: str, value: Any) -> None:
    known = list(ServingConfig.model_fields)
    if key in known:
        return
    nearest = get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are {', '.join(known)}"
    shown = "***" if _SECRETS.intersection(nearest) else value
    raise ConfigError(key, shown, f"there is no such key; {hint}")


def _config_error(error: ValidationError) -> ConfigError:
    """The first problem that pydantic found, in one line and without secrets."""
    problem = error.errors(include_url=False)[0]
    key = str(problem["loc"][0])
    value = "***" if key in _SECRETS else problem["input"]
    return ConfigError(key, value, allowed_values(key))


def allowed_values(key: str) -> str:
    """What a key accepts, as users read it."""
    extra = ServingConfig.model_fields[key].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["allowed"])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

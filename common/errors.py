"""Every error this system raises on purpose, with its HTTP status and whether a retry helps.

ServingError                       500
├─ ConfigError                     (start-up) a configuration value is unknown or impossible
├─ CheckpointError                 (start-up) a checkpoint is damaged or incomplete
│  └─ UnsupportedModelError        (start-up) an architecture this version cannot serve
├─ CapacityError                   (start-up) the experts do not fit in the host memory on offer
├─ SlotsTooFewError                (start-up) a layer has fewer slots than one token needs
├─ HostRegistrationError           the GPU cannot read host memory in place; experts are staged
├─ NonFiniteLogitsError            500  the model computed NaN for a request
├─ HashTableError                  a hash table cannot be used; the request runs on demand
├─ TableBusError                   retryable  the table bus does not answer; the request runs on demand
├─ RequestError                    400
│  ├─ InvalidParameterError        400  one field of the request
│  ├─ VocabularyError              400  a token id outside the vocabulary
│  ├─ ContextTooLongError          400  prompt + max_tokens over the limit, or what an encoder is to read
│  ├─ NoChatTemplateError          400  messages for a model that cannot read them
│  ├─ WrongTaskError               400  a classification of a model that generates, or the other way round
│  ├─ AuthenticationError          401
│  └─ ModelNotFoundError           404
└─ UnavailableError                503, retryable
   ├─ QueueFullError               503, retryable  too many requests wait
   ├─ EngineStoppedError           503, retryable  the executor stops or has died
   └─ ExpertsUnavailableError      503, retryable  an expert could not be fetched in time

Ray rebuilds an exception by calling its class with `args`, so every class passes all its arguments to
`super().__init__` and formats its message in `__str__`.
"""

import reprlib
from typing import Any, ClassVar


class ServingError(Exception):
    """Root of the tree. `status` is the HTTP status, `code` the machine-readable name in the API."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    param: str | None = None  # the request field at fault, if one is


class ConfigError(ServingError):
    code = "invalid_config"

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        super().__init__(key, value, allowed)
        self.key, self.value, self.allowed = key, value, allowed

    def __str__(self) -> str:
        return f"{self.key}={self.value!r} is not possible: {self.allowed}"


class CheckpointError(ServingError):
    code = "invalid_checkpoint"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"checkpoint {self.path}: {self.problem}"


class UnsupportedModelError(CheckpointError):
    code = "unsupported_model"


class CapacityError(ServingError):
    code = "host_memory_too_small"

    def __init__(self, needed_bytes: int, available_bytes: int, remedy: str) -> None:
        super().__init__(needed_bytes, available_bytes, remedy)
        self.needed_bytes, self.available_bytes, self.remedy = needed_bytes, available_bytes, remedy

    def __str__(self) -> str:
        needed, available = self.needed_bytes / 1e9, self.available_bytes / 1e9
        return (
            f"the experts need {needed:.2f} GB but the object store offers {available:.2f} GB; {self.remedy}"
        )


class SlotsTooFewError(ServingError):
    code = "too_few_slots"

    def __init__(self, slots: int, top_k: int) -> None:
        super().__init__(slots, top_k)
        self.slots, self.top_k = slots, top_k

    def __str__(self) -> str:
        return (
            f"{self.slots} expert slots per layer are too few: one token needs {self.top_k} experts at once; "
            f"set expert_slots to {self.top_k} or more"
        )


class HostRegistrationError(ServingError):
    code = "host_registration_failed"

    def __init__(self, num_bytes: int, cuda_error: str) -> None:
        super().__init__(num_bytes, cuda_error)
        self.num_bytes, self.cuda_error = num_bytes, cuda_error

    def __str__(self) -> str:
        return (
            f"{self.num_bytes / 1e9:.2f} GB of host memory cannot be registered for the GPU: "
            f"{self.cuda_error}; experts are copied through pinned buffers instead, which is slower; to avoid it "
            "raise the container's memory and locked-memory limits (docker run --ulimit memlock=-1)"
        )


class NonFiniteLogitsError(ServingError):
    code = "non_finite_logits"

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position

    def __str__(self) -> str:
        return f"the model's output for the token at position {self.position} is not a number; check the checkpoint and dtype"


class HashTableError(ServingError):
    code = "unusable_hash_table"

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"hash table not usable: {self.problem}"


class TableBusError(ServingError):
    code = "table_bus_unavailable"
    retryable = True

    def __init__(self, server: str, problem: str) -> None:
        super().__init__(server, problem)
        self.server, self.problem = server, problem

    def __str__(self) -> str:
        return f"table bus {self.server}: {self.problem}; requests run on demand until it answers"


class RequestError(ServingError):
    status = 400
    code = "invalid_request"


class InvalidParameterError(RequestError):
    code = "invalid_parameter"

    def __init__(self, param: str, value: Any, allowed: str) -> None:
        super().__init__(param, value, allowed)
        self.param, self.value, self.allowed = param, value, allowed

    def __str__(self) -> str:
        return f"{self.param}={self.value!r} is not possible: {self.allowed}"


class Shortened:
    """Shows a value in an error without repeating a whole prompt."""

    def __init__(self, value: Any) -> None:
        self._text = reprlib.repr(value)

    def __repr__(self) -> str:
        return self._text


class VocabularyError(RequestError):
    code = "token_out_of_range"

    def __init__(self, token_id: int, vocab_size: int, param: str = "prompt") -> None:
        super().__init__(token_id, vocab_size, param)
        self.token_id, self.vocab_size, self.param = token_id, vocab_size, param

    def __str__(self) -> str:
        return f"token id {self.token_id} is not in the vocabulary of {self.vocab_size} tokens (0 to {self.vocab_size - 1})"


class ContextTooLongError(RequestError):
    """`max_tokens` is 0 where the completion does not count."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, max_tokens: int, limit: int, param: str = "prompt") -> None:
        super().__init__(prompt_tokens, max_tokens, limit, param)
        self.prompt_tokens, self.max_tokens, self.limit = prompt_tokens, max_tokens, limit
        self.param = param

    def __str__(self) -> str:
        if self.max_tokens == 0:
            return f"the {self.param} has {self.prompt_tokens} tokens; the limit is {self.limit}"
        return (
            f"the prompt has {self.prompt_tokens} tokens and max_tokens is {self.max_tokens}, together "
            f"{self.prompt_tokens + self.max_tokens}; the limit is {self.limit}"
        )


class WrongTaskError(RequestError):
    code = "wrong_task"

    def __init__(self, task: str, path: str) -> None:
        super().__init__(task, path)
        self.task, self.path = task, path

    def __str__(self) -> str:
        return f"the model {self.task}; use {self.path}"


class NoChatTemplateError(RequestError):
    code = "no_chat_template"
    param = "messages"

    def __init__(self, missing: str) -> None:
        super().__init__(missing)
        self.missing = missing

    def __str__(self) -> str:
        return (
            f"the model has no {self.missing}, so it cannot read messages; send a prompt to /v1/completions"
        )


class AuthenticationError(RequestError):
    status = 401
    code = "invalid_api_key"

    def __str__(self) -> str:
        return "missing or wrong API key; send it as 'Authorization: Bearer <key>'"


class ModelNotFoundError(RequestError):
    status = 404
    code = "model_not_found"

    def __init__(self, model: str, served: str) -> None:
        super().__init__(model, served)
        self.param, self.model, self.served = "model", model, served

    def __str__(self) -> str:
        return f"model {self.model!r} is not served here; {self.served!r} is"


class UnavailableError(ServingError):
    status = 503
    code = "unavailable"
    retryable = True


class QueueFullError(UnavailableError):
    code = "queue_full"

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(waiting, limit)
        self.waiting, self.limit = waiting, limit

    def __str__(self) -> str:
        return f"{self.waiting} requests wait already and the limit is {self.limit}; try again later"


class EngineStoppedError(UnavailableError):
    code = "engine_stopped"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the executor stopped before the request was finished: {self.reason}; try again"


class ExpertsUnavailableError(UnavailableError):
    code = "experts_unavailable"

    def __init__(self, layer: int, expert_id: int, waited_s: float) -> None:
        super().__init__(layer, expert_id, waited_s)
        self.layer, self.expert_id, self.waited_s = layer, expert_id, waited_s

    def __str__(self) -> str:
        return f"expert {self.expert_id} of layer {self.layer} could not be fetched in {self.waited_s:.0f} s; try again"

"""The bodies of OpenAI's completions and what they share with chat completions, as received and as sent.

Knows no tokenizer, executor or transport; the bodies of chat completions are in `chat_schema.py`.

Fields of OpenAI that would change the result and are not supported are refused by name unless they hold their
default; `user` and `metadata` change nothing and are accepted; every other unknown field is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from common.errors import InvalidParameterError, Shortened
from common.generation import ExpertUsage, FinishReason, RequestTimings, SamplingParams

MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_CHOICES = 16  # per prompt
DEFAULT_MAX_TOKENS = 16  # OpenAI's for this endpoint

Prompt = str | list[int]
ErrorKind = Literal["invalid_request_error", "server_error"]


def as_prompts(value: Any) -> list[Prompt]:
    """One prompt or a list of them, as a list of text or token ids."""
    if isinstance(value, str) or _are_token_ids(value):
        return [value]
    are_prompts = isinstance(value, list) and all(isinstance(p, str) or _are_token_ids(p) for p in value)
    if not are_prompts or not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either")
    return list(value)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _as_stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and s for s in stops)
    ):
        raise ValueError(f"a text that is not empty, or a list of up to {MAX_STOPS} of them")
    return stops


def _describe(schema: dict[str, Any], body: type[Any]) -> None:
    """Say in the JSON schema what validators accept: nulls, and defaults of what is not supported."""
    fields: dict[str, Any] = schema["properties"]
    for name, default in body.unsupported.items():
        fields[name] = {"const": default, "description": "Not supported: nothing else is accepted."}
    describe_nulls(schema)


def describe_nulls(schema: dict[str, Any]) -> None:
    """Say in the JSON schema that what is not required may be null."""
    fields: dict[str, Any] = schema["properties"]
    for name in fields.keys() - set(schema.get("required", ())):
        fields[name] = {"anyOf": [fields[name], {"type": "null"}]}


_TEXT = {"type": "string", "minLength": 1}
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"anyOf": [{"type": "string"}, _TOKEN_IDS]}
PROMPTS_SCHEMA: dict[str, Any] = {
    "anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT, "minItems": 1, "maxItems": MAX_PROMPTS}]
}
_STOPS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}]}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    include_usage: bool = False


class GenerationBody(BaseModel, ABC):
    """What every request for a generation has. A field that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, json_schema_extra=_describe)

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1)  # 0 and -1 keep the whole vocabulary
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)  # choice i of a prompt uses seed + i
    stop: Annotated[list[str], BeforeValidator(_as_stops), WithJsonSchema(_STOPS)] = []
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    timings: bool = False  # tell in `usage` where the time went
    user: str | None = None
    metadata: dict[str, Any] | None = None

    # What OpenAI's API has and this one does not: the only value that is accepted.
    unsupported: ClassVar[Mapping[str, Any]] = {
        "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
    }  # fmt: skip

    @property
    @abstractmethod
    def token_limit(self) -> int | None:
        """The most tokens to generate; None: what the context leaves."""

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many tokens beside the chosen one to tell log probabilities of; None: of none at all."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        for key, default in cls.unsupported.items():
            if key in given and (
                given[key] != default or isinstance(given[key], bool) != isinstance(default, bool)
            ):
                allowed = f"not supported here, only {default!r} is accepted"
                raise InvalidParameterError(key, Shortened(given[key]), allowed)
            given.pop(key, None)
        return given

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidParameterError(
                "stream_options", self.stream_options.model_dump(), "only with stream=true"
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, default_seed: int | None, choice: int = 0) -> SamplingParams:
        """
        Args:
            choice: its number among the `n` of its prompt.
        Raises:
            InvalidParameterError: `min_tokens` is above `max_tokens`.
        """
        if self.min_tokens > max_tokens:
            raise InvalidParameterError(
                "min_tokens", self.min_tokens, f"at most max_tokens, {max_tokens} here"
            )
        seed = default_seed if self.seed is None else self.seed
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=None if seed is None else _int64(seed + choice),
            stop=tuple(self.stop),
            logprobs=self.num_logprobs,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
        )


def _int64(number: int) -> int:
    """Wrapped round, as samplers take seeds."""
    return (number + 2**63) % 2**64 - 2**63


class CompletionRequest(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[list[Prompt], BeforeValidator(as_prompts), WithJsonSchema(PROMPTS_SCHEMA)]
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)  # `n`, or not given
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    unsupported: ClassVar[Mapping[str, Any]] = {**GenerationBody.unsupported, "suffix": ""}

    @model_validator(mode="after")
    def _refuse_what_does_not_go_together(self) -> Self:
        if self.best_of not in (None, self.n):
            raise InvalidParameterError(
                "best_of", self.best_of, f"not supported here, only n ({self.n}) is accepted"
            )
        if self.echo and self.logprobs is not None:
            raise InvalidParameterError("echo", True, "not with logprobs, which prompts do not have here")
        return self

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class Logprobs(BaseModel):
    """Per token of a choice. A token that is no text of its own is written "token_id:<id>"."""

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []  # characters from the start of the completion


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ExpertFigures(BaseModel):
    """`common.generation.ExpertUsage`, and the share of the needed experts that lay in a slot already."""

    needed: int
    predicted: int
    missed: int
    moved_bytes: int
    hit_rate: float | None  # None where nothing was needed

    @classmethod
    def of(cls, usage: ExpertUsage) -> "ExpertFigures":
        return cls(
            needed=usage.needed,
            predicted=usage.predicted,
            missed=usage.missed,
            moved_bytes=usage.moved_bytes,
            hit_rate=round(1 - usage.missed / usage.needed, 4) if usage.needed else None,
        )


class TimingFigures(BaseModel):
    """`common.generation.RequestTimings`; of several prompts, which run side by side, the longest of each."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    tokens_per_s: float | None  # of all prompts while they decode; None where no token came after the first

    @classmethod
    def of(cls, timings: Sequence[RequestTimings], num_decoded: int) -> "TimingFigures":
        """
        Args:
            timings: one or more.
            num_decoded: tokens after the first of each prompt.
        """
        decode_s = max(each.decode_s for each in timings)
        return cls(
            queue_ms=round(1e3 * max(each.queue_s for each in timings), 3),
            prefill_ms=round(1e3 * max(each.prefill_s for each in timings), 3),
            decode_ms=round(1e3 * decode_s, 3),
            tokens_per_s=round(num_decoded / decode_s, 2) if num_decoded and decode_s > 0 else None,
        )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    experts: ExpertFigures
    timings: TimingFigures | None = Field(None, exclude_if=lambda timings: timings is None)


class Completion(BaseModel):
    """The whole answer, and every event of a streamed one: there `choices` holds what is new."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int  # Unix seconds
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sida-serve"
    max_model_len: int  # tokens of prompt and completion together; with an encoder, of each


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: ErrorKind
    param: str | None = None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail

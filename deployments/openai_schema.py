"""The bodies of the OpenAI completions API, as received and as sent. Knows no tokenizer, executor or transport.

Fields of OpenAI that would change the result and are not supported are refused by name unless they hold their
default; `user` and `metadata` change nothing and are accepted; every other unknown field is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from common.errors import InvalidParameterError
from common.generation import ExpertUsage, FinishReason, SamplingParams

MAX_PROMPTS = 64
MAX_STOPS = 16
DEFAULT_MAX_TOKENS = 16  # OpenAI's for this endpoint

Prompt = str | list[int]
ErrorKind = Literal["invalid_request_error", "server_error"]


def _as_prompts(value: Any) -> list[Prompt]:
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


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """`POST /v1/completions`. A field that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: Annotated[list[Prompt], BeforeValidator(_as_prompts)]
    model: str | None = None
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1)  # 0 and -1 keep the whole vocabulary
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[str], BeforeValidator(_as_stops)] = []
    logprobs: int | None = Field(None, ge=0, le=5)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    # What OpenAI's API has and this one does not: the only value that is accepted.
    unsupported: ClassVar[Mapping[str, Any]] = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "suffix": "",
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
    }

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
                raise InvalidParameterError(
                    key, given[key], f"not supported here, only {default!r} is accepted"
                )
            given.pop(key, None)
        return given

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "CompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidParameterError(
                "stream_options", self.stream_options.model_dump(), "only with stream=true"
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, default_seed: int | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=default_seed if self.seed is None else self.seed,
            stop=tuple(self.stop),
            logprobs=self.logprobs,
            ignore_eos=self.ignore_eos,
        )


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


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    experts: ExpertFigures


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
    max_model_len: int  # tokens of prompt and completion together


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

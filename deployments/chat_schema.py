"""The bodies of OpenAI's chat completions, as received and as sent. Knows no tokenizer, executor or transport."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from common.errors import InvalidParameterError
from common.generation import FinishReason
from deployments.openai_schema import GenerationBody, Usage

_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}


def _as_text(value: Any) -> str:
    """A message's content as one text, its parts one below the other."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts:
        raise ValueError("text, or a list of text parts")
    return "\n".join(part if isinstance(part, str) and part is value else _part_text(part) for part in parts)


def _part_text(part: Any) -> str:
    is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
    if not is_text or not isinstance(part["text"], str):
        raise ValueError('every part must be {"type": "text", "text": "..."}')
    text: str = part["text"]
    return text


class ChatMessage(BaseModel):
    """One message of a conversation, as chat templates take it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_as_text), WithJsonSchema(_CONTENT)]
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Clients send answers back with all that they lack: `"tool_calls": null`."""
        return (
            {key: value for key, value in data.items() if value is not None}
            if isinstance(data, dict)
            else data
        )


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)  # None: what the context leaves
    max_completion_tokens: int | None = Field(None, ge=1)  # the newer name of the same
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=5)

    unsupported: ClassVar[Mapping[str, Any]] = {
        **GenerationBody.unsupported,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
    }

    @model_validator(mode="after")
    def _refuse_what_does_not_go_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameterError("top_logprobs", self.top_logprobs, "only with logprobs=true")
        if self.max_tokens not in (None, self.token_limit):
            allowed = f"max_tokens, another name of the same, is {self.max_tokens}"
            raise InvalidParameterError("max_completion_tokens", self.max_completion_tokens, allowed)
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenLogprob(BaseModel):
    token: str  # "token_id:<id>" if it is no text of its own
    logprob: float
    bytes: list[int] | None  # of its text in UTF-8; None if it is no text of its own


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int  # Unix seconds
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    # In the first delta of a choice, and absent in others.
    role: Literal["assistant"] | None = Field(None, exclude_if=lambda role: role is None)
    content: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a streamed answer: what is new."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int  # Unix seconds
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None

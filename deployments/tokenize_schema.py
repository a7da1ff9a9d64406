"""The bodies of the routes beside OpenAI's that turn text into token ids and back, and tell the version."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.errors import InvalidParameterError
from deployments.chat_schema import Messages

TokenId = Annotated[int, Field(ge=0)]


def _one_of_two(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
        {
            "required": ["messages"],
            "properties": {
                "messages": {"type": "array"},
                "prompt": {"type": "null"},
                "add_special_tokens": {"type": "null"},
            },
        },
    ]


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: a prompt, or messages as `/v1/chat/completions` would read them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, json_schema_extra=_one_of_two)

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # of a prompt; default true, as for completions

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParameterError("prompt", self.prompt, "either prompt or messages, and not both")
        if self.messages is not None and self.add_special_tokens is not None:
            allowed = "only with prompt; a chat template writes its special tokens itself"
            raise InvalidParameterError("add_special_tokens", self.add_special_tokens, allowed)
        return self


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int  # as in `ModelCard`


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokens: list[TokenId]


class Detokenized(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str

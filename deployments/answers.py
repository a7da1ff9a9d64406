"""Answers as they grow: the chunks of generations into bodies of the OpenAI API, whole or in pieces.

Nothing here waits or sends; `completions.py` brings the chunks.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from common.generation import (
    ExpertUsage,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    RequestTimings,
    TokenLogprobs,
)
from deployments.chat_schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChosenLogprob,
    TokenLogprob,
)
from deployments.openai_schema import Choice, Completion, ExpertFigures, Logprobs, TimingFigures, Usage


@dataclass(frozen=True)
class NamedToken:
    """A token of a choice by its text, or as "token_id:<id>" if it is no text of its own."""

    name: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int  # characters of the choice before it


@dataclass(frozen=True)
class Part:
    """Some of a choice, or all of it."""

    index: int
    text: str
    tokens: tuple[NamedToken, ...] | None  # None where nobody asked for log probabilities
    finish_reason: FinishReason | None
    is_first: bool = True


@dataclass
class GrowingChoice:
    """One generation's output so far."""

    index: int
    token_text: Callable[[int], str]
    echoed: str = ""  # the prompt, where the answer is to repeat it
    text: list[str] = field(default_factory=list)
    tokens: list[NamedToken] = field(default_factory=list)
    num_tokens: int = 0
    num_characters: int = 0
    finish_reason: FinishReason | None = None
    experts: ExpertUsage = field(default_factory=ExpertUsage)
    timings: RequestTimings | None = None

    def add(self, chunk: GenerationChunk) -> Part:
        """Take a chunk in; returns what is new."""
        is_first = not self.text
        text = self.echoed + chunk.text if is_first else chunk.text
        tokens = tuple(self._name(position) for position in chunk.logprobs)
        self.text.append(text)
        self.tokens += tokens
        self.num_tokens += len(chunk.token_ids)
        self.finish_reason = chunk.finish_reason
        self.experts = chunk.experts or self.experts
        self.timings = chunk.timings or self.timings
        return Part(self.index, text, tokens or None, chunk.finish_reason, is_first)

    def whole(self) -> Part:
        return Part(self.index, "".join(self.text), tuple(self.tokens) or None, self.finish_reason)

    def _name(self, position: TokenLogprobs) -> NamedToken:
        name, offset = self.token_text(position.token_id), self.num_characters
        top = tuple((self.token_text(token_id), logprob) for token_id, logprob in position.top)
        self.num_characters += len(name) if _is_text(name) else 0
        return NamedToken(name, position.logprob, top, offset)


@dataclass
class Answer(ABC):
    """One request under way: its generations, and what has come of them."""

    id: str
    model: str
    requests: list[GenerationRequest]
    choices: list[GrowingChoice]
    prompt_tokens: int
    tells_timings: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    id_prefix: ClassVar[str]

    @abstractmethod
    def whole(self) -> Completion | ChatCompletion:
        """The body of an answer that is not streamed, once all is there."""

    @abstractmethod
    def piece(self, part: Part) -> Completion | ChatCompletionChunk:
        """An event of a streamed answer."""

    @abstractmethod
    def last_piece(self) -> Completion | ChatCompletionChunk:
        """The event that tells the usage."""

    def usage(self) -> Usage:
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
            experts=ExpertFigures.of(ExpertUsage.total(choice.experts for choice in self.choices)),
            timings=self._timings() if self.tells_timings else None,
        )

    def _timings(self) -> TimingFigures | None:
        timings = [choice.timings for choice in self.choices if choice.timings is not None]
        num_decoded = sum(choice.num_tokens - 1 for choice in self.choices)
        return TimingFigures.of(timings, num_decoded) if timings else None

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.model}


class CompletionAnswer(Answer):
    id_prefix = "cmpl"

    def whole(self) -> Completion:
        choices = [_choice(choice.whole()) for choice in self.choices]
        return Completion(**self._head(), choices=choices, usage=self.usage())

    def piece(self, part: Part) -> Completion:
        return Completion(**self._head(), choices=[_choice(part)])

    def last_piece(self) -> Completion:
        return Completion(**self._head(), choices=[], usage=self.usage())


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"

    def whole(self) -> ChatCompletion:
        choices = [_chat_choice(choice.whole()) for choice in self.choices]
        return ChatCompletion(**self._head(), choices=choices, usage=self.usage())

    def piece(self, part: Part) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head(), choices=[_chat_chunk_choice(part)])

    def last_piece(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head(), choices=[], usage=self.usage())


def _choice(part: Part) -> Choice:
    logprobs = None if part.tokens is None else _logprobs(part.tokens)
    return Choice(index=part.index, text=part.text, logprobs=logprobs, finish_reason=part.finish_reason)


def _logprobs(tokens: Sequence[NamedToken]) -> Logprobs:
    return Logprobs(
        tokens=[token.name for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_by_name(token.top) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def _by_name(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    by_name: dict[str, float] = {}
    for name, logprob in top:
        by_name.setdefault(name, logprob)  # the likelier of two with one spelling
    return by_name


def _chat_choice(part: Part) -> ChatChoice:
    return ChatChoice(
        index=part.index,
        message=AssistantMessage(content=part.text),
        logprobs=_chat_logprobs(part.tokens),
        finish_reason=part.finish_reason,
    )


def _chat_chunk_choice(part: Part) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=part.index,
        delta=ChatDelta(role="assistant" if part.is_first else None, content=part.text),
        logprobs=_chat_logprobs(part.tokens),
        finish_reason=part.finish_reason,
    )


def _chat_logprobs(tokens: Sequence[NamedToken] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    return ChatLogprobs(
        content=[
            ChosenLogprob(
                **_token(token.name, token.logprob),
                top_logprobs=[TokenLogprob(**_token(*top)) for top in token.top],
            )
            for token in tokens
        ]
    )


def _token(name: str, logprob: float) -> dict[str, Any]:
    return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if _is_text(name) else None}


def _is_text(name: str) -> bool:
    return not name.startswith("token_id:")

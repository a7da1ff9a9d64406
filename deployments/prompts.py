"""Prompts, as text, token ids or messages, into checked token ids; and token ids into text.

The text of completions is not made here: executors decode it, because stop strings depend on it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jinja2

from common.errors import (
    ContextTooLongError,
    InvalidParameterError,
    NoChatTemplateError,
    VocabularyError,
)
from deployments.chat_schema import ChatMessage
from deployments.openai_schema import Prompt

_NO_TOKENIZER = "the model's folder has no tokenizer; send token ids"


class Tokenizer(Protocol):
    chat_template: Any  # None: there is none

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


class PromptReader:
    """Turns prompts into token ids that a model can take.

    Args:
        context_limit: in tokens: of prompt and completion together, or with an encoder of each.
        has_encoder: the model's encoder reads prompts.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, context_limit: int, has_encoder: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.context_limit = context_limit
        self._has_encoder = has_encoder

    def read(self, prompt: Prompt, max_tokens: int | None, param: str = "prompt") -> tuple[int, ...]:
        """
        Args:
            max_tokens: of the completion; None: at least one, and what the context leaves.
            param: the request's field that holds the prompt, for errors.
        Raises:
            InvalidParameterError: the prompt is empty, or text without a tokenizer to read it, or with an encoder
                `max_tokens` is above the limit.
            VocabularyError: a token id is not in the vocabulary.
            ContextTooLongError: prompt and completion together are above the limit; with an encoder, the prompt is.
        """
        token_ids = self.encode(prompt, param=param) if isinstance(prompt, str) else prompt
        return self._checked(token_ids, max_tokens or 1, param)

    def room_after(self, prompt: Sequence[int]) -> int:
        """The most tokens that a completion of the prompt may have."""
        return self.context_limit - (0 if self._has_encoder else len(prompt))

    def read_messages(self, messages: Sequence[ChatMessage], max_tokens: int | None) -> tuple[int, ...]:
        """The messages as the model's chat template writes them, up to where the assistant's answer begins.

        Raises:
            NoChatTemplateError: the model has no chat template, or no tokenizer.
            InvalidParameterError: the template refuses the messages.
            VocabularyError, ContextTooLongError: as `read`.
        """
        return self._checked(self.encode_messages(messages), max_tokens or 1, "messages")

    def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """
        Args:
            param: the request's field that holds the text, for errors.
        Raises:
            InvalidParameterError: there is no tokenizer, or the text is none that UTF-8 could write.
        """
        if self._tokenizer is None:
            raise InvalidParameterError(param, "(text)", _NO_TOKENIZER)
        _check_characters(text, param)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_messages(self, messages: Sequence[ChatMessage]) -> list[int]:
        """
        Raises:
            NoChatTemplateError, InvalidParameterError: as `read_messages`.
        """
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise NoChatTemplateError("tokenizer" if self._tokenizer is None else "chat template")
        plain = [message.model_dump(exclude_none=True) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            allowed = f"the model's chat template refuses them: {reason}"
            raise InvalidParameterError("messages", f"({len(plain)} messages)", allowed) from error
        return self.encode(text, add_special_tokens=False, param="messages")

    def decode(self, token_ids: Sequence[int], param: str) -> str:
        """The text of token ids, special tokens included.

        Args:
            param: the request's field that holds them, for errors.
        Raises:
            InvalidParameterError: there is no tokenizer.
            VocabularyError: a token id is not in the vocabulary.
        """
        if self._tokenizer is None:
            raise InvalidParameterError(param, "(token ids)", "the model's folder has no tokenizer")
        self._check_ids(token_ids, param)
        return self._tokenizer.decode(token_ids)

    def echo(self, prompt: Prompt) -> str:
        """A prompt as text.

        Raises:
            InvalidParameterError: it is token ids, and there is no tokenizer.
        """
        return prompt if isinstance(prompt, str) else self.decode(prompt, "echo")

    def check_stops(self, stops: Sequence[str]) -> None:
        """
        Raises:
            InvalidParameterError: there are stop strings and no tokenizer that could find them, or one is no text.
        """
        if stops and self._tokenizer is None:
            raise InvalidParameterError("stop", list(stops), _NO_TOKENIZER)
        for stop in stops:
            _check_characters(stop, "stop")

    def token_text(self, token_id: int) -> str:
        """The text of one token; "token_id:<id>" if it is not a text of its own (half a character, or no tokenizer)."""
        text = self._tokenizer.decode([token_id]) if self._tokenizer is not None else ""
        return text if text and "\ufffd" not in text else f"token_id:{token_id}"

    def _checked(self, token_ids: Sequence[int], max_tokens: int, param: str) -> tuple[int, ...]:
        if not token_ids:
            raise InvalidParameterError(param, "", "at least one token")
        self._check_ids(token_ids, param)
        if self._has_encoder:
            self._check_each(len(token_ids), max_tokens, param)
        elif len(token_ids) + max_tokens > self.context_limit:
            raise ContextTooLongError(len(token_ids), max_tokens, self.context_limit, param)
        return tuple(token_ids)

    def _check_each(self, num_tokens: int, max_tokens: int, param: str) -> None:
        if num_tokens > self.context_limit:
            raise ContextTooLongError(num_tokens, 0, self.context_limit, param)
        if max_tokens > self.context_limit:
            raise InvalidParameterError("max_tokens", max_tokens, f"at most {self.context_limit}, the limit")

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise VocabularyError(token_id, self.vocab_size, param)


def _check_characters(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        allowed = f"half of a surrogate pair, at character {error.start}, is no text"
        raise InvalidParameterError(param, "(text)", allowed) from error

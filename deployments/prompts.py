"""Prompts, as text or token ids, into checked token ids; and token ids into the text of logprobs.

The text of completions is not made here: executors decode it, because stop strings depend on it.
"""

from collections.abc import Sequence
from typing import Protocol

from common.errors import ContextTooLongError, InvalidParameterError, VocabularyError
from deployments.openai_schema import Prompt

_NO_TOKENIZER = "the model's folder has no tokenizer; send token ids"


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class PromptReader:
    """Turns prompts into token ids that a model can take."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, context_limit: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.context_limit = context_limit

    def read(self, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
        """
        Raises:
            InvalidParameterError: the prompt is empty, or text without a tokenizer to read it.
            VocabularyError: a token id is not in the vocabulary.
            ContextTooLongError: prompt and completion together are above the limit.
        """
        token_ids = self._encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        if not token_ids:
            raise InvalidParameterError("prompt", prompt, "at least one token")
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise VocabularyError(token_id, self.vocab_size)
        if len(token_ids) + max_tokens > self.context_limit:
            raise ContextTooLongError(len(token_ids), max_tokens, self.context_limit)
        return token_ids

    def check_stops(self, stops: Sequence[str]) -> None:
        """
        Raises:
            InvalidParameterError: there are stop strings and no tokenizer that could find them.
        """
        if stops and self._tokenizer is None:
            raise InvalidParameterError("stop", list(stops), _NO_TOKENIZER)

    def token_text(self, token_id: int) -> str:
        """The text of one token; "token_id:<id>" if it is not a text of its own (half a character, or no tokenizer)."""
        text = self._tokenizer.decode([token_id]) if self._tokenizer is not None else ""
        return text if text and "\ufffd" not in text else f"token_id:{token_id}"

    def _encode(self, text: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise InvalidParameterError("prompt", "(text)", _NO_TOKENIZER)
        return tuple(self._tokenizer.encode(text))

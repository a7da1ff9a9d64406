"""Text of a sequence as it grows: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Decoders that strip a leading space look at the token before; a few are enough.
_CONTEXT_TOKENS = 8


class TextStream:
    """
    Args:
        tokenizer: None when the model has none; the text is empty then.
        prompt_token_ids: what the generated tokens continue.
        stop: strings that end the text; they are not part of it.
        min_tokens: a stop string that is complete before so many tokens is text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str],
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(ids=list(prompt_token_ids[-_CONTEXT_TOKENS:]), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._num_deaf = max(0, min_tokens - 1)  # tokens that no stop string may end with
        self._held = ""  # decoded, but may begin a stop string
        self._undecoded: list[int] = []  # token ids that end in the middle of a character
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is certain now; sets `stopped` when a stop string is complete."""
        if self._tokenizer is None:
            return ""
        is_deaf, self._num_deaf = self._num_deaf > 0, max(0, self._num_deaf - 1)
        text = self._decoder.step(self._tokenizer, token_id)
        if text is None:
            self._undecoded.append(token_id)
            return ""
        self._undecoded.clear()
        num_old = len(self._held)
        self._held += text
        return self._release_ahead() if is_deaf else self._release(num_old)

    def flush(self) -> str:
        """The rest of the text when generation ends without a stop string; broken characters become U+FFFD."""
        rest = self._held
        if self._tokenizer is not None and self._undecoded:
            rest += self._tokenizer.decode(self._undecoded)
        self._held = ""
        self._undecoded.clear()
        return rest

    def _release(self, num_old: int) -> str:
        """What is certain; only a stop string that ends after the first `num_old` held characters ends the text."""
        starts = (self._held.find(stop, max(0, num_old + 1 - len(stop))) for stop in self._stop)
        found = [start for start in starts if start >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        return self._release_ahead()

    def _release_ahead(self) -> str:
        """All but an end that may begin a stop string."""
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

"""Span corruption (T5, arXiv 1910.10683, section 3.1.4), what Switch Transformers are pretrained on, with half of the text in
long spans (X-denoising, UL2, arXiv 2205.05131, section 3.1.2): in minutes, three times as many targets teach more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.sida.data.tokens import NUM_SENTINELS, Vocabulary

NOISE_SHARE = 0.5
SPAN_TOKENS = 8  # mean


@dataclass(frozen=True)
class Corrupted:
    """All rows of a batch are equally long: nothing is padded."""

    inputs: Tensor  # [windows, tokens] int64, a sentinel for each span, and the end of text
    labels: Tensor  # [windows, tokens] int64, each span behind its sentinel, and the end of text


class SpanCorruption:
    """
    Args:
        text: [tokens] of files, one after the other, on the device where windows are drawn.
    """

    def __init__(self, vocabulary: Vocabulary, text: Tensor, window_tokens: int) -> None:
        self._vocabulary, self._text, self._window = vocabulary, text, window_tokens
        self._noise = max(1, round(NOISE_SHARE * window_tokens))
        self._spans = max(1, round(self._noise / SPAN_TOKENS))
        assert self._spans <= NUM_SENTINELS

    def draw(self, num_windows: int, generator: torch.Generator) -> Corrupted:
        """Windows that begin anywhere. Args: generator: of the text's device."""
        device = self._text.device
        starts = torch.randint(
            len(self._text) - self._window, (num_windows, 1), generator=generator, device=device
        )
        windows = self._text[starts + torch.arange(self._window, device=device)].long()
        return self.corrupt(windows, generator)

    def corrupt(self, windows: Tensor, generator: torch.Generator) -> Corrupted:
        """Queues work alone: nothing waits for the device. Args: windows: [windows, window_tokens] int64."""
        is_noise = self._noise_mask(len(windows), generator)
        before = functional.pad(is_noise[:, :-1], (1, 0))
        begins = is_noise & ~before  # of spans; a window never begins with one
        sentinels = self._vocabulary.first_sentinel_id + begins.cumsum(1) - 1
        ends = windows.new_full((len(windows), 1), self._vocabulary.end_id)
        kept = _taken(
            torch.where(begins, sentinels, windows),
            ~is_noise | begins,
            self._window - self._noise + self._spans,
        )
        # Each span's sentinel goes before its first token: two columns per token, of which some are taken.
        doubled = torch.stack([sentinels, windows], dim=2).flatten(1)
        spans = _taken(doubled, torch.stack([begins, is_noise], dim=2).flatten(1), self._noise + self._spans)
        return Corrupted(torch.cat([kept, ends], 1), torch.cat([spans, ends], 1))

    def _noise_mask(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, window] bool: `_spans` spans of `_noise` tokens in all, each behind some that are kept."""
        kept = self._parts(count, self._window - self._noise, generator)
        noise = self._parts(count, self._noise, generator)
        lengths = torch.stack([kept, noise], dim=2).flatten(1)  # [count, 2 * spans], taking turns
        is_noise = torch.arange(2 * self._spans, device=lengths.device) % 2 == 1
        of_rows = is_noise.expand(count, -1).flatten()
        repeated = of_rows.repeat_interleave(lengths.flatten(), output_size=count * self._window)
        return repeated.view(count, self._window)

    def _parts(self, count: int, total: int, generator: torch.Generator) -> Tensor:
        """[count, spans] random lengths of at least 1 that add up to the total."""
        device = self._text.device
        places = torch.rand(count, total - 1, generator=generator, device=device).argsort(1)
        cuts = places[:, : self._spans - 1].sort(1).values + 1
        edges = functional.pad(cuts, (1, 0))
        return torch.cat([edges, cuts.new_full((count, 1), total)], 1).diff(dim=1)


def _taken(tokens: Tensor, mask: Tensor, count: int) -> Tensor:
    """[rows, count]: the tokens where the mask is True, which holds for that many in every row."""
    places = (~mask).byte().argsort(stable=True)[:, :count]
    return tokens.gather(1, places)

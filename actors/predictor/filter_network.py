"""What we read a token's context with: gated filters over the tokens, short ones and exponential averages, and no recurrence.

A sequence is read by matrix products alone, where an LSTM takes one step after the other, and what is carried along a
sequence has one size, however long it is. Exponential averages beside gates: Mega, arXiv 2209.10655; gated linear units:
arXiv 2002.05202. Not a hash function by itself: heads make one of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

TOKEN_BLOCKS = 2  # of what a token has alone, which inference looks up
CHUNK = 128  # tokens that are averaged by one product

FilterState = list[
    Tensor
]  # of one sequence; per block, last values [1, taps - 1, short] and averages [1, lives, wide]


class FilterNetwork(nn.Module):
    """Token features → blocks of filters and feed-forward layers, which add to them → both, normalised.

    Args:
        bidirectional: half of the filters run from a sequence's end to its beginning.
    """

    def __init__(
        self,
        embedding_size: int,
        compressed_size: int,
        hidden_size: int,
        num_blocks: int,
        num_taps: int,
        half_lives: Sequence[float],
        bidirectional: bool,
    ) -> None:
        super().__init__()
        self.compress = nn.Linear(embedding_size, compressed_size)
        self.token_blocks = nn.Sequential(*(FeedForward(compressed_size) for _ in range(TOKEN_BLOCKS)))
        self.enter = nn.Linear(compressed_size, hidden_size)
        self.filters = nn.ModuleList(
            FilterBlock(hidden_size, num_taps, half_lives, bidirectional) for _ in range(num_blocks)
        )
        self.feed_forward = nn.ModuleList(FeedForward(hidden_size) for _ in range(num_blocks))
        self.num_features = compressed_size + hidden_size

    def fit_scale(self, embedding: Tensor) -> None:
        """Nothing to do: embeddings are normalised."""

    def encode(self, embedded: Tensor) -> Tensor:
        """[tokens, compressed] of embeddings [tokens, embedding]."""
        encoded: Tensor = self.token_blocks(self.compress(normalised(embedded)))
        return encoded

    def forward(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            inputs: [sequences, tokens, compressed]. mask: [sequences, tokens] bool, False for padding on the right.
        Returns:
            [sequences, tokens, features].
        """
        return self._run(inputs, None, mask)[0]

    def extend(
        self, inputs: Tensor, states: Sequence[FilterState | None]
    ) -> tuple[Tensor, list[FilterState]]:
        """As `HashFunction.extend`, of inputs [sequences, tokens, compressed]."""
        given = [state for state in states if state is not None]
        assert len(given) in (0, len(states)), "states are all new or none"
        before = [torch.cat(parts) for parts in zip(*given, strict=True)] if given else None
        features, after = self._run(inputs, before, None)
        rows = range(len(inputs))
        return features, [[tensor[row : row + 1] for tensor in after] for row in rows]

    def _run(
        self, inputs: Tensor, state: FilterState | None, mask: Tensor | None
    ) -> tuple[Tensor, FilterState]:
        hidden: Tensor = self.enter(inputs)
        after: FilterState = []
        for number, (filters, feed_forward) in enumerate(zip(self.filters, self.feed_forward, strict=True)):
            before = None if state is None else state[2 * number : 2 * number + 2]
            hidden, block_state = filters(hidden, before, mask)
            hidden = feed_forward(hidden)
            after += block_state
        return torch.cat([normalised(inputs), normalised(hidden)], dim=-1), after


class FeedForward(nn.Module):
    """A gated linear unit of twice the width, added to its input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.enter = nn.Linear(size, 4 * size, bias=False)
        self.leave = nn.Linear(2 * size, size, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        gates, values = self.enter(normalised(hidden)).chunk(2, dim=-1)
        added: Tensor = self.leave(functional.silu(gates) * values)
        return hidden + added


class FilterBlock(nn.Module):
    """Filtered values, gated by the token's own, added to its input."""

    def __init__(self, size: int, num_taps: int, half_lives: Sequence[float], bidirectional: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(size, 2 * size, bias=False)
        self.leave = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.leave.weight)
        directions = 2 if bidirectional else 1
        self.directions = nn.ModuleList(
            CausalFilters(size // directions, num_taps, half_lives) for _ in range(directions)
        )

    def forward(
        self, hidden: Tensor, state: FilterState | None, mask: Tensor | None
    ) -> tuple[Tensor, FilterState]:
        gates, values = self.enter(normalised(hidden)).chunk(2, dim=-1)
        if len(self.directions) == 1:  # padding follows, so it changes nothing
            filtered, state = self.directions[0](values, state)
        else:
            if mask is not None:
                values = values * mask[..., None]
            onwards, backwards = values.chunk(2, dim=-1)
            ahead, state = self.directions[0](onwards, None)
            back, _ = self.directions[1](backwards.flip(1), None)
            filtered = torch.cat([ahead, back.flip(1)], dim=-1)
        added: Tensor = self.leave(functional.silu(gates) * filtered)
        assert state is not None
        return hidden + added, state


class CausalFilters(nn.Module):
    """Half of the channels through a filter over the last tokens, half through exponential averages."""

    decays: Tensor  # [lives], per token
    within: Tensor  # [lives, CHUNK, CHUNK]: what a token (row) gets of one before it

    def __init__(self, size: int, num_taps: int, half_lives: Sequence[float]) -> None:
        """Args: size: channels, a multiple of 2 and of twice the number of half-lives."""
        super().__init__()
        assert size % (2 * len(half_lives)) == 0
        self._taps = num_taps
        self.short = nn.Conv1d(size // 2, size // 2, num_taps, groups=size // 2)
        decays = 0.5 ** (1 / torch.tensor(half_lives))
        distance = (torch.arange(CHUNK)[:, None] - torch.arange(CHUNK)).clamp(min=0)
        # Averages of noise have its variance, whatever the half-life.
        gains = (1 - decays**2).sqrt()
        within = (gains[:, None, None] * decays[:, None, None] ** distance).tril()
        self.register_buffer("decays", decays, persistent=False)
        self.register_buffer("within", within, persistent=False)

    def forward(self, values: Tensor, state: FilterState | None) -> tuple[Tensor, FilterState]:
        """Args: values: [sequences, tokens, channels]."""
        short, long = values.chunk(2, dim=-1)
        last, averages = state if state is not None else self._empty(short, long)
        short = torch.cat([last, short], dim=1)
        filtered = self.short(short.mT).mT
        averaged, averages = self._average(long, averages)
        kept = short[:, short.shape[1] - (self._taps - 1) :]
        return torch.cat([filtered, averaged], dim=-1), [kept, averages]

    def _empty(self, short: Tensor, long: Tensor) -> FilterState:
        lives = len(self.decays)
        last = short.new_zeros(len(short), self._taps - 1, short.shape[-1])
        return [last, long.new_zeros(len(long), lives, long.shape[-1] // lives)]

    def _average(self, values: Tensor, averages: Tensor) -> tuple[Tensor, Tensor]:
        """Chunk after chunk; every half-life has its channels. Args: averages: [sequences, lives, wide]."""
        chunks = []
        for chunk in values.split(CHUNK, dim=1):
            num_tokens, lives = chunk.shape[1], len(self.decays)
            by_life = chunk.unflatten(-1, (lives, -1)).transpose(1, 2)  # [sequences, lives, tokens, wide]
            fading = self.decays[:, None] ** torch.arange(1, num_tokens + 1, device=chunk.device)
            before = fading[..., None] * averages.unsqueeze(2)
            averaged = self.within[:, :num_tokens, :num_tokens] @ by_life + before
            averages = averaged[:, :, -1]
            chunks.append(averaged.transpose(1, 2).flatten(2))
        return torch.cat(chunks, dim=1), averages


def normalised(hidden: Tensor) -> Tensor:
    """Root mean square normalisation; what follows has weights enough."""
    return functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-10)

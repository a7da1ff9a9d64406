"""What SiDA-MoE reads a token's context with (arXiv 2310.18859, section 3.4.2): an LSTM and SparseMax self-attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from actors.predictor.sparsemax import sparsemax

ATTENTION_ROWS = 256  # queries per block, so that a long prompt's scores are never in memory all at once

LstmState = tuple[Tensor, Tensor]  # h and c, each [lstm layers, sequences, hidden]


@dataclass
class PaperState:
    """Where the reading of one sequence is. The history grows in place."""

    lstm: LstmState
    length: int
    history: Tensor  # [capacity, hidden], LSTM outputs

    @classmethod
    def empty(cls, hidden_size: int, like: Tensor) -> "PaperState":
        return cls((like.new_empty(0), like.new_empty(0)), 0, like.new_empty(0, hidden_size))

    def remember(self, outputs: Tensor) -> Tensor:
        """Append [tokens, hidden] LSTM outputs; returns all there are, as a view."""
        stop = self.length + len(outputs)
        if stop > len(self.history):
            grown = outputs.new_empty(max(stop, 2 * len(self.history), 64), outputs.shape[-1])
            grown[: self.length] = self.history[: self.length]
            self.history = grown
        self.history[self.length : stop] = outputs
        self.length = stop
        return self.history[:stop]


class PaperNetwork(nn.Module):
    """Compression → LSTM → SparseMax self-attention (q = k = v) → residual.

    Args:
        token_residual: features hold the compressed embedding, too.
        bidirectional: attention sees the whole sequence; the LSTM stays what it is.
    """

    def __init__(
        self,
        embedding_size: int,
        compressed_size: int,
        hidden_size: int,
        lstm_layers: int,
        token_residual: bool,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        self.compress = nn.Linear(embedding_size, compressed_size)
        self.lstm = nn.LSTM(compressed_size, hidden_size, lstm_layers, batch_first=True)
        self._token_residual, self._bidirectional = token_residual, bidirectional
        self.num_features = hidden_size + (compressed_size if token_residual else 0)

    @torch.no_grad()
    def fit_scale(self, embedding: Tensor) -> None:
        """Give the LSTM inputs of unit variance. Embeddings are often tiny (a deviation of 0.03 in the reference model),
        and a fresh LSTM learns little from them: recall 0.61 instead of 0.40 after 150 steps.
        """
        std = float(embedding.float().std())
        self.compress.weight /= std if std > 0 else 1.0

    def encode(self, embedded: Tensor) -> Tensor:
        """[tokens, compressed] of embeddings [tokens, embedding]."""
        compressed: Tensor = self.compress(embedded)
        return compressed

    def forward(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            inputs: [sequences, tokens, compressed]. mask: [sequences, tokens] bool, False for padding on the right.
        Returns:
            [sequences, tokens, features].
        """
        outputs, _ = self.lstm(inputs)
        if self._bidirectional:
            attended = attention(outputs, outputs, None if mask is None else ~mask[:, None])
        else:
            attended = causal_attention(outputs, outputs)
        return self._features(inputs, outputs + attended)

    def extend(self, inputs: Tensor, states: Sequence[PaperState | None]) -> tuple[Tensor, list[PaperState]]:
        """As `HashFunction.extend`, of inputs [sequences, tokens, compressed]."""
        given = [state for state in states if state is not None]
        assert len(given) in (0, len(states)), "states are all new or none"
        before = (torch.cat(parts, dim=1) for parts in zip(*(state.lstm for state in given), strict=True))
        outputs, (h, c) = self.lstm(inputs, tuple(before) if given else None)
        after = given or [PaperState.empty(outputs.shape[-1], outputs) for _ in states]
        attended = []
        for number, state in enumerate(after):
            row = slice(number, number + 1)
            state.lstm = (h[:, row].contiguous(), c[:, row].contiguous())
            attended.append(causal_attention(outputs[row], state.remember(outputs[number]).unsqueeze(0)))
        return self._features(inputs, outputs + torch.cat(attended)), after

    def _features(self, inputs: Tensor, attended: Tensor) -> Tensor:
        return torch.cat([attended, inputs], dim=-1) if self._token_residual else attended


def causal_attention(queries: Tensor, history: Tensor) -> Tensor:
    """Each query attends to the history up to and including itself; keys and values are the history.

    Args:
        queries: [sequences, tokens, hidden], the last `tokens` positions of the history.
        history: [sequences, all tokens, hidden].
    """
    num_tokens, before = queries.shape[1], history.shape[1] - queries.shape[1]
    blocks = []
    for start in range(0, num_tokens, ATTENTION_ROWS):
        stop = min(start + ATTENTION_ROWS, num_tokens)
        shape = (stop - start, before + stop)
        future = torch.ones(shape, dtype=torch.bool, device=queries.device).triu(before + start + 1)
        blocks.append(_attend(queries[:, start:stop], history[:, : before + stop], future))
    return torch.cat(blocks, dim=1)


def attention(queries: Tensor, keys: Tensor, excluded: Tensor | None) -> Tensor:
    """Args: queries and keys, which are also the values: [sequences, tokens, hidden]; excluded: [sequences, 1, tokens] bool."""
    blocks = queries.split(ATTENTION_ROWS, dim=1)
    return torch.cat([_attend(block, keys, excluded) for block in blocks], dim=1)


def _attend(queries: Tensor, keys: Tensor, excluded: Tensor | None) -> Tensor:
    scores = queries @ keys.mT / sqrt(keys.shape[-1])  # [sequences, rows, keys]
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    return sparsemax(scores) @ keys

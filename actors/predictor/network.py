"""SiDA's hash function as a network (arXiv 2310.18859, section 3.4.2): token ids to router logits of every MoE layer.

Causal throughout, for decoders: what follows a token, padding included, never changes its prediction. Knows no files.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from actors.predictor.sparsemax import sparsemax

ATTENTION_ROWS = 256  # queries per block, so that a long prompt's scores are never in memory all at once
VOCABULARY_ROWS = 8192  # converted to float32 at a time

LstmState = tuple[Tensor, Tensor]  # h and c, each [lstm layers, sequences, hidden]


@dataclass(frozen=True)
class WeightRule:
    """How scaling factors follow from predicted logits: the softmax over all experts, cut to the top k, and then this.

    A sum of 1 is what routers give that renormalise (`norm_topk_prob`); None leaves the softmax as it is.
    """

    sum: float | None
    scale: float = 1.0
    gates: bool = False  # a sigmoid of each expert's logit instead: routers that weight experts one by one


@dataclass(frozen=True)
class HashFunctionSpec:
    """What a hash function is made for and its sizes; the defaults are the paper's."""

    model_fingerprint: str
    embedding_key: str  # of the token embeddings in the model's checkpoint
    vocab_size: int
    embedding_size: int
    num_layers: int  # MoE layers
    num_experts: int
    top_k: int
    weight_rule: WeightRule
    compressed_size: int = 256
    hidden_size: int = 256
    lstm_layers: int = 2
    version: str = "1"
    # Not in the paper: the heads also read the compressed embedding. Routers near the embeddings mostly follow the token
    # itself, of which the LSTM's outputs keep too little.
    token_residual: bool = False


class HashFunction(nn.Module):
    """Embeddings → compression → LSTM → SparseMax self-attention (q = k = v) → residual → one head per layer.

    The embeddings are the model's own and are not trained; they are no part of the state dict.
    """

    embedding: Tensor
    compressed: Tensor | None

    def __init__(self, spec: HashFunctionSpec, embedding: Tensor) -> None:
        """
        Args:
            embedding: [vocab, embedding] of any float dtype.
        """
        super().__init__()
        assert embedding.shape == (spec.vocab_size, spec.embedding_size)
        self.spec = spec
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("compressed", None, persistent=False)
        self.compress = nn.Linear(spec.embedding_size, spec.compressed_size)
        self.lstm = nn.LSTM(spec.compressed_size, spec.hidden_size, spec.lstm_layers, batch_first=True)
        heads_size = spec.hidden_size + (spec.compressed_size if spec.token_residual else 0)
        self.heads = nn.Linear(heads_size, spec.num_layers * spec.num_experts)

    @torch.no_grad()
    def scale_compression(self) -> None:
        """Before training: give the LSTM inputs of unit variance. Embeddings are often tiny (a deviation of 0.03 in the
        reference model), and a fresh LSTM learns little from them: recall 0.61 instead of 0.40 after 150 steps.
        """
        std = float(self.embedding.float().std())
        self.compress.weight /= std if std > 0 else 1.0

    def forward(self, token_ids: Tensor) -> Tensor:
        """
        Args:
            token_ids: [sequences, tokens] int64; padding, if any, on the right.
        Returns:
            [sequences, tokens, layers, experts] logits.
        """
        outputs, _ = self.read(token_ids, None)
        return self.logits(token_ids, outputs, outputs)

    def read(self, token_ids: Tensor, state: LstmState | None) -> tuple[Tensor, LstmState]:
        """LSTM outputs [sequences, tokens, hidden] of tokens that follow `state`, and the state after them."""
        outputs, state = self.lstm(self._compress(token_ids), state)
        return outputs, state

    def _compress(self, token_ids: Tensor) -> Tensor:
        if self.compressed is not None:
            return functional.embedding(token_ids, self.compressed)
        embedded = functional.embedding(token_ids, self.embedding)
        compressed: Tensor = self.compress(embedded.to(self.compress.weight.dtype))
        return compressed

    def logits(self, token_ids: Tensor, queries: Tensor, history: Tensor) -> Tensor:
        """
        Args:
            token_ids: [sequences, tokens], those to predict for.
            queries: [sequences, tokens, hidden], the LSTM outputs to predict from: the last ones of the history.
            history: [sequences, all tokens so far, hidden].
        Returns:
            [sequences, tokens, layers, experts].
        """
        attended = queries + causal_attention(queries, history)
        if self.spec.token_residual:
            attended = torch.cat([attended, self._compress(token_ids)], dim=-1)
        logits: Tensor = self.heads(attended)  # [sequences, tokens, layers * experts]
        return logits.view(*logits.shape[:2], self.spec.num_layers, self.spec.num_experts)

    @torch.no_grad()
    def compress_vocabulary(self) -> None:
        """Ready for inference: keep the compression of every token, [vocab, compressed], instead of the embeddings."""
        rows = self.embedding.split(VOCABULARY_ROWS)
        self.compressed = torch.cat([self.compress(part.to(self.compress.weight.dtype)) for part in rows])
        self.embedding = self.embedding.new_empty(0)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted top k, most likely first, and their scaling factors (section 3.3).

        Args:
            logits: [..., experts].
        Returns:
            ids [..., top_k] int64, weights [..., top_k] of the logits' dtype.
        """
        rule = self.spec.weight_rule
        weights, ids = logits.softmax(-1).topk(self.spec.top_k, dim=-1)
        if rule.sum is not None:
            weights = rule.sum * weights / weights.sum(-1, keepdim=True)
        return ids, rule.scale * weights


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
        keys = history[:, : before + stop]
        scores = queries[:, start:stop] @ keys.mT / sqrt(keys.shape[-1])  # [sequences, rows, keys]
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(before + start + 1)
        blocks.append(sparsemax(scores.masked_fill(future, -torch.inf)) @ keys)
    return torch.cat(blocks, dim=1)

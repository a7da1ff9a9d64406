"""The hash function as a network: token ids to router logits of every MoE layer (SiDA-MoE, arXiv 2310.18859, section 3.4.2).

What reads a token's context is the paper's network or ours. Causal unless the spec says otherwise: what follows a token,
padding included, never changes its prediction. Knows no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from actors.predictor.filter_network import FilterNetwork
from actors.predictor.paper_network import PaperNetwork

VOCABULARY_ROWS = 8192  # converted to float32 at a time
BISECTIONS = 30  # of the threshold of `use_probabilities`, to better than 1e-6


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
    lstm_layers: int = 2  # of the paper's network
    version: str = "1"
    # Not in the paper: the heads also read the compressed embedding. Routers near the embeddings mostly follow the token
    # itself, of which the LSTM's outputs keep too little.
    token_residual: bool = False
    network: Literal["paper", "filters"] = "paper"
    blocks: int = 2  # of filters
    taps: int = 4  # tokens that a short filter sees
    half_lives: tuple[float, ...] = (2.0, 8.0, 32.0, 128.0)  # of the exponential averages, in tokens
    # For encoders: a prediction may depend on the tokens after its own. Sequences are then read at once, not in steps.
    bidirectional: bool = False


class HashFunction(nn.Module):
    """Embeddings → token features → features of the token in its context → one head per layer.

    The embeddings are the model's own and are not trained; they are no part of the state dict.
    """

    embedding: Tensor
    encoded: Tensor | None
    weight_scale: Tensor
    weight_offset: Tensor
    use_temperature: Tensor

    def __init__(self, spec: HashFunctionSpec, embedding: Tensor) -> None:
        """
        Args:
            embedding: [vocab, embedding] of any float dtype.
        """
        super().__init__()
        assert embedding.shape == (spec.vocab_size, spec.embedding_size)
        self.spec = spec
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("encoded", None, persistent=False)
        self.network = _make_network(spec)
        self.heads = nn.Linear(self.network.num_features, spec.num_layers * spec.num_experts)
        # Calibration, see `calibration`.
        self.register_buffer("weight_scale", torch.ones(spec.num_layers))
        self.register_buffer("weight_offset", torch.zeros(spec.num_layers, spec.num_experts))
        self.register_buffer("use_temperature", torch.ones(spec.num_layers))

    @torch.no_grad()
    def prepare_training(self) -> None:
        """Before training: fit what reads the embeddings to their scale."""
        self.network.fit_scale(self.embedding)

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            token_ids: [sequences, tokens] int64; padding, if any, on the right.
            mask: [sequences, tokens] bool, False for padding; a bidirectional one needs it where there is any.
        Returns:
            [sequences, tokens, layers, experts] logits.
        """
        return self._to_logits(self.network(self._encode(token_ids), mask))

    def extend(self, token_ids: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Read the next tokens of sequences.

        Args:
            token_ids: [sequences, tokens] int64.
            states: of each sequence what the last call returned, None for a new one; a call's states are all new or none.
        Returns:
            [sequences, tokens, layers, experts] logits, and the states after these tokens. The given ones are spent.
        """
        assert not self.spec.bidirectional, "it reads whole sequences"
        features, states = self.network.extend(self._encode(token_ids), states)
        return self._to_logits(features), states

    def _encode(self, token_ids: Tensor) -> Tensor:
        """[sequences, tokens, features of a token]; what a token has alone is computed once for each distinct one."""
        if self.encoded is not None:
            return functional.embedding(token_ids, self.encoded)
        distinct, positions = token_ids.unique(return_inverse=True)
        embedded = functional.embedding(distinct, self.embedding).to(self.heads.weight.dtype)
        return functional.embedding(positions, self.network.encode(embedded))

    def _to_logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.heads(features)  # [sequences, tokens, layers * experts]
        return logits.view(*logits.shape[:2], self.spec.num_layers, self.spec.num_experts)

    @torch.no_grad()
    def encode_vocabulary(self) -> None:
        """Ready for inference: keep the features of every token, [vocab, features], instead of the embeddings."""
        rows = self.embedding.split(VOCABULARY_ROWS)
        dtype = self.heads.weight.dtype
        self.encoded = torch.cat([self.network.encode(part.to(dtype)) for part in rows])
        self.embedding = self.embedding.new_empty(0)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted top k, most likely first, and their scaling factors (section 3.3).

        Args:
            logits: [..., layers, experts].
        Returns:
            ids [..., layers, top_k] int64, weights [..., layers, top_k] of the logits' dtype.
        """
        ids = logits.topk(self.spec.top_k, dim=-1).indices
        return ids, self.weights_of(logits * self.weight_scale[:, None] + self.weight_offset, ids)

    def weights_of(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Scaling factors of chosen experts. Args: scores: [..., layers, experts], calibrated logits; ids: as of `route`."""
        rule = self.spec.weight_rule
        weights = (scores.sigmoid() if rule.gates else scores.softmax(-1)).gather(-1, ids)
        if rule.sum is not None:
            weights = rule.sum * weights / weights.sum(-1, keepdim=True)
        return rule.scale * weights

    def use_probabilities(self, logits: Tensor) -> Tensor:
        """[..., layers, experts]: how probable it is that the router chooses each expert. Args: logits: of that shape."""
        return use_probabilities(logits, self.spec.top_k, self.use_temperature)


def use_probabilities(logits: Tensor, top_k: int, temperature: Tensor) -> Tensor:
    """A soft top k: the sigmoid of (logit - threshold) / temperature, with the threshold for which they add up to k.

    Args:
        logits: [..., layers, experts]. temperature: [layers].
    """
    scores = logits / temperature[:, None]
    low, high = scores.amin(-1, keepdim=True) - 20, scores.amax(-1, keepdim=True) + 20
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = (scores - middle).sigmoid().sum(-1, keepdim=True) > top_k
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (scores - (low + high) / 2).sigmoid()


def _make_network(spec: HashFunctionSpec) -> PaperNetwork | FilterNetwork:
    if spec.network == "paper":
        return PaperNetwork(
            spec.embedding_size,
            spec.compressed_size,
            spec.hidden_size,
            spec.lstm_layers,
            spec.token_residual,
            spec.bidirectional,
        )
    return FilterNetwork(
        spec.embedding_size,
        spec.compressed_size,
        spec.hidden_size,
        spec.blocks,
        spec.taps,
        spec.half_lives,
        spec.bidirectional,
    )

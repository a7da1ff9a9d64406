"""What predictors that need more than a trace guess on its text: the library's model or the hash function reads it again."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.predictor.decoding import Shares
from actors.predictor.hash_function import load_hash_function
from actors.predictor.library_routing import load_resident_model
from actors.predictor.next_gate import EarlyRouters
from common.checkpoint import Checkpoint

# [tokens, layers, experts]: the shares of a layer's activations that a token is expected to give its experts.
Guesses = NDArray[np.float32]


@torch.inference_mode()
def guess_next_gates(
    model: Path, texts: Iterable[Sequence[int]], num_layers: int, device: torch.device
) -> list[Guesses]:
    """Of each text: what a layer's router makes of what the router before it reads; 0 for the first layer.

    Args:
        texts: token ids, for the encoder where there is one.
        num_layers: of the stack that reads them.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    resident, architecture = load_resident_model(model, device, dtype), Checkpoint.open(model).architecture
    routers = EarlyRouters(resident, architecture)
    routers.listen()
    reader = resident.get_encoder() if architecture.num_encoder_layers else resident.base_model
    guesses = []
    for text in texts:
        reader(input_ids=torch.tensor([text], device=device), use_cache=False)
        later = [routers.guess(layer, routers.last_read(layer - 1)) for layer in range(1, num_layers)]
        guesses.append(np.stack([np.zeros_like(later[0]), *later], axis=1))
    return guesses


@torch.inference_mode()
def guess_by_hash_function(folder: Path, model: Path, texts: Iterable[Sequence[int]]) -> list[Guesses]:
    """Of each text, for all layers: the weights that the hash function predicts, of each token in sum 1."""
    function = load_hash_function(folder, model)
    guesses = []
    for text in texts:
        logits = function(torch.tensor([text]))[0]  # [tokens, layers, experts]
        ids, weights = function.route(logits)
        shares = torch.zeros_like(logits).scatter_(-1, ids, weights / weights.sum(-1, keepdim=True))
        guesses.append(shares.numpy())
    return guesses


class RecordedGuesses:
    """Names what was guessed before; of several tokens in a pass, their mean."""

    def __init__(self, passes: Iterable[Guesses], reach: int | None = None) -> None:
        """
        Args:
            passes: all that will begin, in their order.
            reach: layers that a guess names at once, from the next one on; None for all.
        """
        self._passes, self._reach = iter(passes), reach

    def begin_pass(self, requests: Sequence[str]) -> None:
        self._guesses: Shares = next(self._passes).mean(axis=0)  # [layers, experts]

    def predict(self, layer: int) -> Shares:
        shares = self._guesses[layer:].copy()
        if self._reach is not None:
            shares[self._reach :] = 0
        return shares

    def observe(self, layer: int, expert_ids: Sequence[NDArray[np.int64]], hidden: Tensor | None) -> None:
        pass

    def end_request(self, request: str) -> None:
        pass

"""Which experts the next layer will need, from hidden states: its own router is asked a layer early."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.predictor.decoding import Shares
from actors.predictor.library_routing import find_routers
from common.architecture import MoeArchitecture, find_experts_modules
from common.errors import UnsupportedModelError


class EarlyRouters:
    """The routers of a library model, one for each MoE layer, to be asked by themselves."""

    def __init__(self, model: PreTrainedModel, architecture: MoeArchitecture) -> None:
        """
        Args:
            model: on any device, also on meta.
        Raises:
            UnsupportedModelError: its routers cannot be found, or need more than hidden states.
        """
        self.modules, self._logits_index = find_routers(model)
        self._num_experts, self._top_k = architecture.num_experts, architecture.top_k
        num_layers = len(find_experts_modules(model))
        if len(self.modules) != num_layers:
            problem = f"it has {len(self.modules)} routers for {num_layers} MoE layers"
            raise UnsupportedModelError(architecture.model_type, problem)
        self._last_read: list[Tensor | None] = [None] * num_layers
        sample = torch.zeros(1, architecture.hidden_size, dtype=model.dtype, device=model.device)
        try:
            for layer in range(num_layers):
                self._ask(layer, sample)
        except (TypeError, RuntimeError, LookupError) as error:
            problem = f"its routers cannot be asked by hidden states alone ({' '.join(str(error).split())})"
            raise UnsupportedModelError(architecture.model_type, problem) from error

    def listen(self) -> None:
        """Have `last_read` know what every router reads from now on."""
        for layer, router in enumerate(self.modules):
            router.register_forward_pre_hook(partial(self._keep, layer), with_kwargs=True)

    def last_read(self, layer: int) -> Tensor:
        """[tokens, hidden]"""
        hidden = self._last_read[layer]
        assert hidden is not None, "its router has run"
        return hidden

    @torch.inference_mode()
    def guess(self, layer: int, hidden: Tensor) -> Shares:
        """[tokens, experts]: shares of what the layer's router would choose. Args: hidden: [tokens, hidden]."""
        logits, chosen = self._ask(layer, hidden)
        weights = logits.float().gather(1, chosen).softmax(dim=-1)  # [tokens, top_k]
        shares: Shares = weights.new_zeros(logits.shape).scatter_(1, chosen, weights).cpu().numpy()
        return shares

    @torch.inference_mode()
    def _ask(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, experts] logits and [tokens, top_k] expert ids.

        The ids are the router's own where it returns any: some choose by more than their logits.
        """
        output: Any = self.modules[layer].forward(hidden)  # past the hooks, which are for what the model asks
        outputs = (output,) if isinstance(output, Tensor) else output
        logits = outputs[self._logits_index].reshape(-1, self._num_experts)
        own = [
            each for each in outputs if each.dtype == torch.int64 and each.shape == (len(logits), self._top_k)
        ]
        return logits, own[0] if own else logits.topk(self._top_k).indices

    def _keep(self, layer: int, _router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        self._last_read[layer] = hidden.reshape(-1, hidden.shape[-1])


class NextGatePredictor:
    """Names what the next layer's router makes of the hidden states that this layer's router has read.

    Pre-gated MoE (arXiv 2308.12066) trains routers for that. Asking those that are there, as HOBBIT does (arXiv
    2411.01433), needs no training, and the layer's real choice still decides.

    Args:
        num_encoder_layers: MoE layers of an encoder; the first layer after them reads other tokens.
    """

    def __init__(self, routers: EarlyRouters, num_experts: int, num_encoder_layers: int = 0) -> None:
        self._routers, self._num_encoder_layers = routers, num_encoder_layers
        self._shares = np.zeros((len(routers.modules), num_experts), np.float32)

    def begin_pass(self, requests: Sequence[str]) -> None:
        self._shares[:] = 0

    def predict(self, layer: int) -> Shares:
        return self._shares[layer:]

    def observe(self, layer: int, expert_ids: Sequence[NDArray[np.int64]], hidden: Tensor | None) -> None:
        self._shares[layer] = 0
        if layer + 1 < len(self._shares) and layer + 1 != self._num_encoder_layers:
            assert hidden is not None, "this predictor reads hidden states"
            self._shares[layer + 1] = self._routers.guess(layer + 1, hidden).mean(axis=0)

    def end_request(self, request: str) -> None:
        pass

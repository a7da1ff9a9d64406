"""Which decoding predictor a configuration means on a device, and the lookahead that asks it."""

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actors.executor.host_pager import HostPager
from actors.executor.lookahead import COPIES_AHEAD, Lookahead
from actors.executor.model_loader import SlotModel
from actors.executor.pager import NEXT_GATE
from actors.predictor.decoding import ActivationTracePredictor, DecodingPredictor, FrequencyPredictor
from actors.predictor.next_gate import EarlyRouters, NextGatePredictor
from common.architecture import MoeArchitecture
from common.config import ServingConfig
from common.errors import ConfigError, UnsupportedModelError

SETTING = "decode_predictor"
NONE, ACTIVATION_TRACE, FREQUENCY = "none", "activation-trace", "frequency"
_ON_CUDA = (NONE, NEXT_GATE)


def chosen_predictor(config: ServingConfig, device_type: str) -> str:
    """The predictor's name, with auto decided by what wins where it was measured (benchmarks/README.md).

    Raises:
        ConfigError: the device, the routing or a missing file rules it out.
    """
    chosen = config.decode_predictor
    if chosen == "auto":
        return NEXT_GATE if device_type == "cuda" and config.prefetch and config.routing == "exact" else NONE
    if chosen != NONE and config.routing == "predicted":
        allowed = "auto or none with routing=predicted, where the hash function routes and no router is asked"
        raise ConfigError(SETTING, chosen, allowed)
    if device_type == "cuda" and chosen not in _ON_CUDA:
        known = f"on a GPU, which pages by itself, one of auto, {', '.join(_ON_CUDA)}"
        raise ConfigError(SETTING, chosen, f"{known}; the others are for device=cpu")
    if chosen == FREQUENCY and config.resident_set is None:
        raise ConfigError(SETTING, chosen, "set resident_set, the file that says how often experts were used")
    return chosen


def early_routers(model: PreTrainedModel, architecture: MoeArchitecture) -> EarlyRouters:
    """
    Args:
        model: on any device, also on meta.
    Raises:
        ConfigError: the model's routers cannot be asked early.
    """
    try:
        return EarlyRouters(model, architecture)
    except UnsupportedModelError as error:
        others = f"{NONE}, {ACTIVATION_TRACE} or {FREQUENCY}"
        raise ConfigError(SETTING, NEXT_GATE, f"{error.problem}; for this model give {others}") from error


def given_lookahead(
    predictor: DecodingPredictor, slot_model: SlotModel, copies: int = COPIES_AHEAD
) -> Lookahead:
    """For a predictor that the configuration does not know."""
    return Lookahead(predictor, type(predictor).__name__, slot_model.pager, slot_model.clock, copies=copies)


def new_lookahead(
    name: str,
    slot_model: SlotModel,
    architecture: MoeArchitecture,
    counts: NDArray[np.int64] | None = None,
) -> Lookahead | None:
    """For passes that the host drives on a CPU; None where there is nothing to do.

    Args:
        counts: [layers, experts], for FREQUENCY.
    Raises:
        ConfigError: as `early_routers`.
    """
    pager, clock = slot_model.pager, slot_model.clock
    if name == NONE or not isinstance(pager, HostPager) or pager.num_slots == pager.num_experts:
        return None
    if name == NEXT_GATE:
        routers = early_routers(slot_model.model, architecture)
        routers.listen()
        predictor: DecodingPredictor = NextGatePredictor(
            routers, architecture.num_experts, architecture.num_encoder_layers
        )
        return Lookahead(predictor, name, pager, clock, routers.last_read)
    if name == FREQUENCY:
        assert counts is not None, "chosen_predictor asked for the file"
        return Lookahead(FrequencyPredictor(counts), name, pager, clock)
    trace = ActivationTracePredictor(architecture.num_layers, architecture.num_experts)
    return Lookahead(trace, name, pager, clock)

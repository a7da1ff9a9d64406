"""How many experts of a layer may lie on the device at once, as users write it: "16", "25%", "12GiB", "all" or
"auto".

Arithmetic only: it neither allocates slots nor knows what is in them, nor measures what fits.
"""

import re
from dataclasses import dataclass
from typing import Literal

from common.errors import ConfigError, SlotsTooFewError

_UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B)?", re.IGNORECASE)

ALLOWED = "a number of experts per layer (16), a share of the experts (25%), bytes over all layers (12GiB), all, or auto"


@dataclass(frozen=True)
class SlotBudget:
    """A budget of expert slots; `amount` is experts per layer, percent of the experts, or bytes over all layers. "auto"
    has none: it is what fits.
    """

    unit: Literal["experts", "percent", "bytes", "auto"]
    amount: float
    text: str  # as the user wrote it

    @classmethod
    def parse(cls, value: str | int) -> "SlotBudget":
        """
        Raises:
            ValueError: the value is not one of the forms, is zero, or is a share above 100%.
        """
        text = str(value).strip()
        if text.lower() == "all":
            return cls("percent", 100.0, text)
        if text.lower() == "auto":
            return cls("auto", 0.0, text)
        match = _PATTERN.fullmatch(text)
        if isinstance(value, bool) or match is None:
            raise ValueError(ALLOWED)
        budget = cls._of(float(match[1]), (match[2] or "").upper(), text)
        if budget.amount <= 0 or (budget.unit == "percent" and budget.amount > 100):
            raise ValueError(ALLOWED)
        return budget

    @classmethod
    def _of(cls, number: float, unit: str, text: str) -> "SlotBudget":
        if unit == "%":
            return cls("percent", number, text)
        if unit:
            return cls("bytes", number * _UNITS[unit], text)
        if not number.is_integer():
            raise ValueError(ALLOWED)
        return cls("experts", number, text)

    def __str__(self) -> str:
        return self.text

    @property
    def is_auto(self) -> bool:
        """Whether only the device that will hold the slots can tell their number."""
        return self.unit == "auto"

    def slots_per_layer(
        self,
        num_layers: int,
        num_experts: int,
        slot_bytes: int,
        top_k: int,
        available_bytes: int | None = None,
    ) -> int:
        """The slots each of the MoE layers gets; bytes beyond what all experts need are left unused.

        Args:
            slot_bytes: size of one expert as it lies in a slot.
            available_bytes: that the slots of all layers may take; auto needs it, and nothing else looks at it.
        Raises:
            SlotsTooFewError: fewer than `top_k`, so that one token could not be computed.
            ConfigError: a count above the number of experts, or auto where nobody knows what fits.
        """
        slots = self._slots(num_layers, num_experts, slot_bytes, available_bytes)
        if slots < top_k:
            raise SlotsTooFewError(slots, top_k)
        if slots > num_experts:
            allowed = f"the model has {num_experts} experts per layer; give {top_k} to {num_experts}, or all"
            raise ConfigError("expert_slots", self.text, allowed)
        return slots

    def _slots(self, num_layers: int, num_experts: int, slot_bytes: int, available_bytes: int | None) -> int:
        if self.unit == "experts":
            return int(self.amount)
        if self.unit == "percent":
            return int(num_experts * self.amount / 100)
        num_bytes = available_bytes if self.is_auto else int(self.amount)
        if num_bytes is None:
            raise ConfigError("expert_slots", self.text, "what fits is not known here; say how many")
        return min(num_experts, max(0, num_bytes) // (num_layers * slot_bytes))

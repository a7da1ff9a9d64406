import pytest

from common.errors import ConfigError, SlotsTooFewError
from common.slot_budget import SlotBudget


def slots(
    text: str | int, *, num_layers: int = 6, num_experts: int = 32, slot_bytes: int = 1000, top_k: int = 4
) -> int:
    return SlotBudget.parse(text).slots_per_layer(num_layers, num_experts, slot_bytes, top_k)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", 16),
        (16, 16),
        ("4", 4),
        ("32", 32),
        ("25%", 8),
        ("40 %", 12),  # 12.8, never more than asked for
        ("100%", 32),
        ("all", 32),
        ("ALL", 32),
        ("60kB", 10),  # 60,000 bytes over 6 layers of 1000-byte slots
        ("60KiB", 10),
        ("0.06 MB", 10),
        ("1TiB", 32),  # more bytes than all experts need
    ],
)
def test_reads_counts_shares_and_bytes(text: str | int, expected: int) -> None:
    assert slots(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "-1", "100.5%", "1.5", "12 gigs", "GiB", "0GiB", "many", "1,5%", True]
)
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"a number of experts per layer \(16\)"):
        SlotBudget.parse(text)


@pytest.mark.parametrize("text", ["3", "10%", "23kB"])
def test_refuses_fewer_slots_than_one_token_needs(text: str) -> None:
    with pytest.raises(SlotsTooFewError, match="set expert_slots to 4 or more") as caught:
        slots(text)
    assert caught.value.slots == 3


def test_refuses_more_slots_than_experts() -> None:
    with pytest.raises(ConfigError, match=r"expert_slots='33' .* 32 experts per layer; give 4 to 32, or all"):
        slots("33")


@pytest.mark.parametrize(
    ("available_bytes", "expected"), [(60_000, 10), (65_999, 10), (24_000, 4), (10**9, 32)]
)
def test_auto_is_what_fits(available_bytes: int, expected: int) -> None:
    budget = SlotBudget.parse(" Auto ")
    assert budget.is_auto and str(budget) == "Auto"
    assert budget.slots_per_layer(6, 32, 1000, 4, available_bytes) == expected


@pytest.mark.parametrize(("available_bytes", "slots"), [(23_999, 3), (0, 0), (-5, 0)])
def test_auto_refuses_fewer_slots_than_one_token_needs(available_bytes: int, slots: int) -> None:
    with pytest.raises(SlotsTooFewError) as caught:
        SlotBudget.parse("auto").slots_per_layer(6, 32, 1000, 4, available_bytes)
    assert caught.value.slots == slots


def test_auto_needs_to_know_what_is_available() -> None:
    with pytest.raises(ConfigError, match="expert_slots='auto' .* what fits is not known here"):
        slots("auto")


@pytest.mark.parametrize(("text", "expected"), [("16", 16), ("25%", 8), ("60kB", 10), ("all", 32)])
def test_only_auto_looks_at_what_is_available(text: str, expected: int) -> None:
    assert not SlotBudget.parse(text).is_auto
    assert SlotBudget.parse(text).slots_per_layer(6, 32, 1000, 4, available_bytes=0) == expected


def test_keeps_the_text_of_the_user() -> None:
    assert str(SlotBudget.parse(" 12GiB ")) == "12GiB"

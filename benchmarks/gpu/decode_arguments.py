"""What the decode benchmark is asked for: its command line, model, prompts and numbers of slots."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.executor.gpu.page_state import EVICTION_ORDERS
from actors.executor.gpu.pager import MAX_ROWS
from actors.predictor.text import read_tokens
from benchmarks.gpu.library_baselines import BASELINES
from benchmarks.gpu.paged_model import HostModel, Prompts, staggered
from benchmarks.gpu.routings import NATURAL
from benchmarks.gpu.shapes import TINY, qwen3_30b
from common.errors import ConfigError, SlotsTooFewError
from common.slot_budget import SlotBudget

FIRST_SHARE = 0.25  # of the experts: the setup that matters most


@dataclass(frozen=True)
class Setup:
    """One way to give the model slots."""

    eviction: str
    slots: str  # as asked for
    num_slots: int
    share: float  # of the experts; 1 is all-resident

    def labels(self, what: str) -> dict[str, Any]:
        return {"what": what, "eviction": self.eviction, "slots": self.slots, "share": round(self.share, 4)}


def parse_arguments(arguments: list[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=48, help="of the shape of Qwen3-30B-A3B")
    model.add_argument(
        "--model", type=Path, help="a checkpoint instead of random weights; routing is natural"
    )
    model.add_argument(
        "--text", help="for prompts from a checkpoint: file, or FILE.npz#NAME; default: its held-out ids"
    )
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument("--tiny", action="store_true", help="a toy of the same architecture")
    model.add_argument("--seed", type=int, default=0)
    cases = parser.add_argument_group("cases")
    cases.add_argument("--slots", nargs="+", default=["12.5%", "25%", "50%", "100%"])
    cases.add_argument("--eviction", nargs="+", default=["lfu"], choices=list(EVICTION_ORDERS))
    cases.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32])
    cases.add_argument(
        "--routing",
        nargs="+",
        help="natural, uniform, zipf<exponent>, trace:<file>; default: natural zipf1.5 zipf1.0 uniform",
    )
    cases.add_argument("--prefetch", nargs="+", default=["on"], choices=["on", "off"])
    cases.add_argument(
        "--foresight",
        type=float,
        help="of prefetching under a table: the share of a layer's experts that the guess of them names; "
        "default: the model's own guess, which is about other experts",
    )
    cases.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    cases.add_argument("--prompt-tokens", type=int, default=64, help="of the shortest prompt")
    cases.add_argument("--prefill-tokens", type=int, default=512, help="0 measures no prefill")
    effort = parser.add_argument_group("effort")
    effort.add_argument("--warmup", type=int, default=24, help="steps")
    effort.add_argument("--steps", type=int, default=16, help="per run; fewer where they are slow")
    effort.add_argument("--runs", type=int, default=5)
    effort.add_argument("--prefill-runs", type=int, default=3)
    effort.add_argument("--time-limit-s", type=float, default=500.0, help="stop with what there is")
    others = parser.add_argument_group("beside it")
    others.add_argument("--baseline", nargs="+", default=[], choices=BASELINES)
    others.add_argument(
        "--merge", type=Path, nargs="+", default=[], help="results of this or of gpu.baselines"
    )
    others.add_argument("--out", type=Path, help="JSON; the last line of output then leaves the rows to it")
    others.add_argument("--plot", type=Path, help="PNG")
    parsed = parser.parse_args(arguments)
    every = ["natural", "zipf1.5", "zipf1.0", "uniform"] if parsed.model is None else [NATURAL]
    parsed.routing = parsed.routing or every
    if not all(1 <= batch <= MAX_ROWS for batch in parsed.batch):
        parser.error(f"--batch {parsed.batch}: one graph takes 1 to {MAX_ROWS} rows")
    if parsed.model is not None and parsed.routing != [NATURAL] and parsed.routing[0][:6] != "trace:":
        parser.error("a checkpoint's own routing is what counts: --routing natural, or trace:<file>")
    return parsed


def load_host(arguments: argparse.Namespace, device: torch.device) -> HostModel:
    if arguments.model is not None:
        return HostModel.load(arguments.model, dtype_on(device), device)
    config = qwen3_30b(arguments.layers, dtype_on(device), **(TINY if arguments.tiny else {}))
    return HostModel.random(config, arguments.seed, device)


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def draw_prompts(arguments: argparse.Namespace, host: HostModel, rows: int) -> tuple[Prompts, Prompts]:
    """One per row, and those whose prefill is timed."""
    lengths = staggered(arguments.prompt_tokens, rows)
    if arguments.prefill_tokens:
        lengths += [arguments.prefill_tokens] * (1 + arguments.prefill_runs)
    if arguments.model is not None:
        text = read_tokens(arguments.text or f"{arguments.model}/heldout.npz#heldout", arguments.model)
    else:
        generator = torch.Generator().manual_seed(arguments.seed)
        text = torch.randint(host.vocab_size, (sum(lengths),), generator=generator)
    prompts = [tuple(part.tolist()) for part in text[: sum(lengths)].split(lengths)]
    return prompts[:rows], prompts[rows:]


def list_setups(arguments: argparse.Namespace, host: HostModel) -> tuple[list[Setup], list[dict[str, Any]]]:
    """For each eviction about FIRST_SHARE, then from the most slots down; and rows of what cannot be."""
    counts, impossible = {}, []
    for slots in arguments.slots:
        try:
            counts[slots] = SlotBudget.parse(slots).slots_per_layer(
                host.num_layers, host.num_experts, host.layout.slab_bytes, host.top_k
            )
        except (SlotsTooFewError, ConfigError) as error:
            impossible.append({"what": "skipped", "slots": slots, "reason": str(error)})
    order = sorted(counts, key=lambda slots: -counts[slots])
    order.sort(key=lambda slots: abs(counts[slots] / host.num_experts - FIRST_SHARE) > 0.1)
    setups = [
        Setup(eviction, slots, counts[slots], counts[slots] / host.num_experts)
        for eviction in arguments.eviction
        for slots in order
        if counts[slots] < host.num_experts or eviction == arguments.eviction[0]  # where all fit, none leaves
    ]
    return setups, impossible


def read_merged(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Earlier results of the same model.

    Raises:
        ValueError: of another one.
    """
    records = [json.loads(path.read_text()) for path in arguments.merge]
    for path, record in zip(arguments.merge, records, strict=True):
        settings = record["conditions"]["settings"]
        if settings["layers"] != arguments.layers or settings["tiny"] != arguments.tiny:
            raise ValueError(
                f"{path} measured a model of {settings['layers']} layers, not {arguments.layers}"
            )
    return records

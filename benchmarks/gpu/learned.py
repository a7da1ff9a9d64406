"""Trains, in minutes, a Mixture-of-Experts model that is large enough to have routing worth caching.

A decoder of the qwen3_moe architecture with 700 M parameters in 64 experts per layer, on the Python sources of the
machine it runs on. Random weights say nothing about hit rates, and no trained checkpoint is at hand offline. Reports the
held-out perplexity and the skew of its routing; saves a checkpoint, the token ids of both parts and routing traces, one for
`benchmarks.gpu.cache_simulation` and one in windows for `benchmarks.cache_policies`. Not a model to use: it has seen tens
of millions of tokens.

    python -m benchmarks.gpu.learned --out learned [--minutes 3.5]
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from actors.predictor.traces import TraceWriter
from actors.predictor.traces import windows as cut_into_windows
from actors.predictor.tracing import LiveTraces, RoutingTracer
from benchmarks.conditions import conditions
from benchmarks.gpu.python_sources import Corpus, read_python_sources
from benchmarks.gpu.routing_trace import REFERENCE_MODEL, RoutingTrace, trace_routing
from models.reference.train import END_OF_TEXT_ID, MasterWeightAdamW, balance_loss

LOG_EVERY = 50  # steps; reading a loss waits for the GPU
WINDOW_TOKENS, WINDOWS_AT_ONCE = 128, 64  # of `traces/`
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

TINY: dict[str, int] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}


@dataclass(frozen=True)
class Settings:
    minutes: float
    batch: int  # sequences per step
    context: int  # tokens per sequence
    lr: float
    weight_decay: float
    balance: float  # weight of each layer's load-balancing loss
    warmup: int  # steps
    seed: int


def model_config(vocab_size: int, context: int, **changes: int) -> Qwen3MoeConfig:
    """703 M parameters, of which 109 M compute a token."""
    sizes = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "moe_intermediate_size": 384,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    }
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        intermediate_size=1536,  # of dense layers, of which there are none
        max_position_embeddings=2 * context,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        norm_topk_prob=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
        **{**sizes, **changes},
    )


class Trainer:
    """Steps a new model until the minutes are spent. Computes in bf16; AdamW keeps fp32 copies of the weights."""

    def __init__(self, config: Qwen3MoeConfig, settings: Settings, tokens: Tensor) -> None:
        """
        Args:
            tokens: [tokens] int64 to train on; their device is where the model goes.
        """
        torch.manual_seed(settings.seed)
        with tokens.device:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model.set_experts_implementation("grouped_mm")
        self.settings = settings
        self._tokens = tokens
        self._optimizer = MasterWeightAdamW(self.model, settings.weight_decay)

    def train(self) -> list[dict[str, float]]:
        """Returns the losses every LOG_EVERY steps."""
        self.model.train()
        curve: list[dict[str, float]] = []
        for step, progress in enumerate(self._progress()):
            loss, balance = self._step(self._learning_rate(step, progress))
            if step % LOG_EVERY == 0:
                layers = self.model.config.num_hidden_layers
                point = {
                    "step": step,
                    "progress": round(progress, 4),
                    "loss": round(loss.item(), 4),
                    "balance": round(balance.item() / layers, 4),
                }
                print(point, flush=True)
                curve.append(point)
        self.num_steps = step + 1
        self.model.eval().requires_grad_(False)
        return curve

    def _progress(self) -> Iterator[float]:
        """The share of the minutes that is spent, before each step."""
        started = time.monotonic()
        while (progress := (time.monotonic() - started) / (60 * self.settings.minutes)) < 1.0:
            yield progress

    def _step(self, lr: float) -> tuple[Tensor, Tensor]:
        settings, device = self.settings, self._tokens.device
        starts = torch.randint(len(self._tokens) - settings.context, (settings.batch, 1), device=device)
        windows = self._tokens[starts + torch.arange(settings.context + 1, device=device)]
        loss, router_logits = next_token_loss(self.model, windows)
        balance = balance_loss(router_logits, self.model.config.num_experts_per_tok)
        (loss + settings.balance * balance).backward()
        self._optimizer.step(lr)
        return loss.detach(), balance.detach()

    def _learning_rate(self, step: int, progress: float) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak."""
        warm = min(1.0, (step + 1) / self.settings.warmup)
        return self.settings.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def next_token_loss(model: PreTrainedModel, windows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mean loss of [batch, context + 1] tokens, and the router logits of each layer."""
    output = model.base_model(windows[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.get_output_embeddings()(output.last_hidden_state).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return loss, output.router_logits


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor, context: int, batch: int) -> float:
    """Of windows laid end to end; what the last one lacks is left out."""
    windows = tokens.unfold(0, context + 1, context)  # [windows, context + 1]
    losses = [next_token_loss(model, part)[0] * len(part) for part in windows.split(batch)]
    return math.exp(float(torch.stack(losses).sum()) / len(windows))


def trace(model: PreTrainedModel, tokens: Tensor, context: int, num_tokens: int) -> RoutingTrace:
    """Routing of the first num_tokens held-out tokens, with the probabilities of some thousands of them."""
    return trace_routing(model, tokens[:num_tokens], context)


def save(folder: Path, model: PreTrainedModel, corpus: Corpus, routing: RoutingTrace, traced: Tensor) -> None:
    """A Hugging Face checkpoint with its tokenizer, `train.npz#train`, `heldout.npz#heldout`, `trace.npz`, and `traces/`.

    Args: traced: [tokens] int64 for `traces/`.
    """
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(REFERENCE_MODEL / name, folder / name)
    np.savez(folder / "train.npz", train=corpus.train)
    np.savez_compressed(folder / "heldout.npz", heldout=corpus.held_out)
    routing.save(folder / "trace.npz")
    write_traces(folder, model, traced)


def write_traces(folder: Path, model: PreTrainedModel, tokens: Tensor) -> None:
    """The routing of every window by itself, as `actors.predictor.trace` writes it. Args: folder: holds the checkpoint."""
    shutil.rmtree(folder / "traces", ignore_errors=True)
    tracer = RoutingTracer(model, folder, num_kept=1)
    traces = LiveTraces(tracer, *cut_into_windows(tokens.cpu(), WINDOW_TOKENS))
    writer = TraceWriter(folder / "traces", traces.header)
    for batch in traces.batches(WINDOWS_AT_ONCE, None):
        writer.write(batch)


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    started = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(REFERENCE_MODEL / "tokenizer.json"))
    corpus = read_python_sources(tokenizer, int(arguments.text_mb * 1e6), arguments.seed)
    seconds = {"corpus": time.perf_counter() - started}
    print(f"{corpus.num_files} files, {len(corpus.train)} tokens in {seconds['corpus']:.1f} s", flush=True)
    train, held_out = (
        torch.from_numpy(ids.astype(np.int64)).to(device) for ids in (corpus.train, corpus.held_out)
    )
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})
    changes = TINY if arguments.tiny else {}
    trainer = Trainer(model_config(tokenizer.get_vocab_size(), settings.context, **changes), settings, train)
    training_started = time.perf_counter()
    curve = trainer.train()
    seconds["training"] = time.perf_counter() - training_started
    evaluated = held_out[: arguments.evaluated_tokens + 1]
    routing = trace(trainer.model, evaluated, settings.context, arguments.traced_tokens)
    record: dict[str, Any] = {
        "benchmark": "gpu_learned",
        "parameters": trainer.model.num_parameters(),
        "corpus": {"files": corpus.num_files, "bytes": corpus.num_bytes, "train_tokens": len(corpus.train)},
        "steps": trainer.num_steps,
        "tokens_seen": trainer.num_steps * settings.batch * settings.context,
        "heldout_perplexity": round(perplexity(trainer.model, evaluated, settings.context, settings.batch), 3),
        "usage_entropy": routing.usage_entropy().round(3).tolist(),
        "step_overlap": routing.step_overlap().round(3).tolist(),
        "overlap_by_chance": round(routing.ids.shape[-1] / routing.num_experts, 3),
    }  # fmt: skip
    save(arguments.out, trainer.model, corpus, routing, evaluated[: arguments.traced_tokens])
    seconds["all"] = time.perf_counter() - started
    record["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    for name, value in record.items():
        print(f"{name}: {value}")
    record |= {"curve": curve, "conditions": conditions(**vars(arguments))}
    (arguments.out / "learned.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=3.5, help="of training, without reading and tracing")
    parser.add_argument("--text-mb", type=float, default=120.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.005)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluated-tokens", type=int, default=131_072)
    parser.add_argument("--traced-tokens", type=int, default=65_536, help="of the evaluated ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same architecture")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Train the reference model from scratch on the encoded corpus, on one GPU or, for a trial, on the CPU.

The weights that compute are bf16, as they will be served; AdamW keeps fp32 copies of them. The step with the
best validation loss is the one that is saved.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from models.reference.corpus import MAX_TOKENS, VOCAB_SIZE

END_OF_TEXT_ID = 0
LOG_EVERY = 20  # steps; reading a loss waits for the GPU


@dataclass(frozen=True)
class Settings:
    """What decides a run, besides the corpus and the architecture."""

    steps: int
    minutes: float
    batch: int
    context: int
    lr: float
    weight_decay: float
    dropout: float
    balance: float
    warmup: int
    validate_every: int
    seed: int


@dataclass
class Record:
    """What happened: written beside the checkpoint, read by the model card."""

    settings: dict[str, object]
    environment: dict[str, str]
    train_tokens: int
    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_validation_loss: float = math.inf
    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0


def model_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,  # of dense layers, of which there are none
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        moe_intermediate_size=96,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def add_dropout(model: nn.Module, probability: float) -> None:
    """Drop out what attention and MoE blocks add to the residual stream; the library has no such option."""
    for layer in model.get_submodule("model.layers").children():
        layer.get_submodule("self_attn.o_proj").register_forward_hook(_dropout_hook(probability))
        layer.get_submodule("mlp").register_forward_hook(_dropout_hook(probability))


def _dropout_hook(probability: float) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda module, _args, output: functional.dropout(output, probability, module.training)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Load-balancing loss (Switch Transformer, arXiv 2101.03961, section 2.2), summed over the layers.

    Each layer gives 1.0 when its experts are used evenly. Layers are balanced one by one: over their union,
    one layer's dead expert would hide behind another's busy one.

    Args:
        router_logits: one [tokens, num_experts] per layer.
    """
    logits = torch.stack(router_logits).float()  # [layers, tokens, num_experts]
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter_(-1, logits.topk(top_k, -1).indices, 1.0 / top_k)
    num_experts = logits.shape[-1]
    return num_experts * (chosen.mean(1) * probabilities.mean(1)).sum()


class MasterWeightAdamW:
    """AdamW on fp32 copies of bf16 parameters; the copies are what is decayed, clipped and stepped."""

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.params = list(model.parameters())
        self.masters = [param.detach().float().clone() for param in self.params]
        groups = [
            {"params": [master for master in self.masters if master.ndim > 1], "weight_decay": weight_decay},
            {"params": [master for master in self.masters if master.ndim == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def step(self, lr: float) -> None:
        """Apply the parameters' gradients and clear them."""
        for master, param in zip(self.masters, self.params, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
            param.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_([*self.params], self.masters)


class Trainer:
    """One run: steps the model until the steps or the minutes are spent, and keeps its best step."""

    def __init__(self, settings: Settings, tokens: dict[str, Tensor], device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.tokens = tokens  # of "train" and "validation": [tokens] int64 on the device
        self.model = Qwen3MoeForCausalLM(model_config()).to(device, torch.bfloat16)
        self.model.set_experts_implementation("grouped_mm")
        add_dropout(self.model, settings.dropout)
        self.documents = _document_starts(tokens["train"])
        self.optimizer = MasterWeightAdamW(self.model, settings.weight_decay)
        self.record = Record(asdict(settings), _environment(device), tokens["train"].numel())
        self.best = self._snapshot()

    def train(self) -> Record:
        start = time.monotonic()
        progress = 0.0
        while progress < 1.0:
            losses = self._step(self._learning_rate(progress))
            self.record.steps += 1
            self.record.seconds = time.monotonic() - start
            progress = self._progress()
            last = progress >= 1.0
            if self.record.steps % LOG_EVERY == 0 or last:
                self._log(losses, validate=self.record.steps % self.settings.validate_every == 0 or last)
        self.record.tokens_seen = self.record.steps * self.settings.batch * self.settings.context
        self.model.load_state_dict(self.best)
        return self.record

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> float:
        """Mean loss per token over windows laid end to end; what the last window lacks is left out."""
        self.model.eval()
        length = self.settings.context
        starts = torch.arange(0, tokens.numel() - length, length, device=tokens.device)
        total = 0.0
        for part in starts.split(self.settings.batch):
            loss, _ = self._losses(_windows(tokens, part, length))
            total += loss.item() * part.numel()
        self.model.train()
        return total / starts.numel()

    def save(self, folder: Path) -> None:
        """Write checkpoint, generation defaults and record."""
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
        )
        self.model.save_pretrained(folder, max_shard_size="12MB")
        (folder / "training.json").write_text(json.dumps(asdict(self.record), indent=1) + "\n")

    def _progress(self) -> float:
        """Share of the steps or of the minutes that is spent, whichever is more."""
        settings, record = self.settings, self.record
        return max(record.steps / settings.steps, record.seconds / (60 * settings.minutes))

    def _step(self, lr: float) -> tuple[Tensor, Tensor]:
        loss, balance = self._losses(self._draw_windows())
        (loss + self.settings.balance * balance).backward()
        self.optimizer.step(lr)
        return loss.detach(), balance.detach()

    def _draw_windows(self) -> Tensor:
        """[batch, context + 1] int64: from a random token on, or from the start of its document if a window reaches it.

        So about half of the windows start as prompts do, with a document, and hardly any token is seen more often.
        """
        tokens, length = self.tokens["train"], self.settings.context
        drawn = torch.randint(tokens.numel() - length, (self.settings.batch,), device=tokens.device)
        documents = self.documents[torch.searchsorted(self.documents, drawn, right=True) - 1]
        return _windows(tokens, torch.where(drawn - documents < length, documents, drawn), length)

    def _losses(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token loss and balance loss of [batch, context + 1] tokens."""
        output = self.model.model(windows[:, :-1], use_cache=False, output_router_logits=True)
        logits = self.model.lm_head(output.last_hidden_state).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        return loss, balance_loss(output.router_logits, self.model.config.num_experts_per_tok)

    def _learning_rate(self, progress: float) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak."""
        warm = min(1.0, (self.record.steps + 1) / self.settings.warmup)
        return self.settings.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _log(self, losses: tuple[Tensor, Tensor], *, validate: bool) -> None:
        loss, balance = (value.item() for value in losses)
        layers = self.model.config.num_hidden_layers
        point: dict[str, float] = {"step": self.record.steps, "loss": loss, "balance": balance / layers}
        if validate:
            point["validation_loss"] = self._validate()
            print(f"{self.record.seconds:6.1f} s  {point}", flush=True)
        self.record.curve.append(point)

    def _validate(self) -> float:
        loss = self.evaluate(self.tokens["validation"])
        if loss < self.record.best_validation_loss:
            self.record.best_step, self.record.best_validation_loss = self.record.steps, loss
            self.best = self._snapshot()
        return loss

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """[starts, length + 1] int64."""
    return tokens[starts[:, None] + torch.arange(length + 1, device=tokens.device)]


def _document_starts(tokens: Tensor) -> Tensor:
    """[documents] int64, ascending: where each document of a token stream begins."""
    ends = (tokens[:-1] == END_OF_TEXT_ID).nonzero().flatten()
    return torch.cat([ends.new_zeros(1), ends + 1])


def _environment(device: torch.device) -> dict[str, str]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "hardware": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def load_tokens(corpus: Path, device: torch.device) -> dict[str, Tensor]:
    """The encoded parts of the corpus by name, each [tokens] int64."""
    with np.load(corpus) as parts:
        return {name: torch.from_numpy(parts[name].astype(np.int64)).to(device) for name in parts.files}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the reference model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--corpus", type=Path, default=Path(".bundle/corpus.npz"), help="made by corpus.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the checkpoint")
    parser.add_argument("--device", default=device, help="cuda or cpu")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=4.8, help="end by then; the schedule shrinks")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--context", type=int, default=MAX_TOKENS, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=1.0, help="of every matrix")
    parser.add_argument("--dropout", type=float, default=0.15, help="on the residual branches")
    parser.add_argument("--balance", type=float, default=0.005, help="weight of each layer's balance loss")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--validate-every", type=int, default=200, help="steps, a multiple of 20")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    trainer = Trainer(settings, load_tokens(args.corpus, device), device)
    record = trainer.train()
    trainer.save(args.out)
    print(f"best: step {record.best_step} of {record.steps}, loss {record.best_validation_loss:.4f}")


if __name__ == "__main__":
    main()

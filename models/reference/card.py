"""Measure the reference model on its held-out files and write its card, its figures and the plot of its loss.

Reads the folder that train.py wrote; trains nothing. Computes in fp32: it scores the weights, not a kernel.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM, TokenizersBackend

from models.reference.choose import last_loss
from models.reference.corpus import END_OF_TEXT, FOLDER, HELD_OUT, VALIDATION
from models.reference.hash_function_card import hash_function_values

PROMPTS = (
    "def fibonacci(n):",
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n\ndef read_lines(path):\n",
    "class TestQueue(unittest.TestCase):\n    def test_put_and_get(self):\n",
)
NUM_NEW_TOKENS = 96
SEEDS = (0, 1)


@dataclass(frozen=True)
class LayerRouting:
    """How one layer routes the held-out text. A share of 1.0 is an even share."""

    usage_entropy: float  # of the experts' shares of all choices, over its maximum
    token_entropy: float  # mean over tokens, of the router's softmax, over its maximum
    min_share: float
    max_share: float
    overlap: float  # share of a token's experts that the token before it used too


@dataclass(frozen=True)
class Figures:
    """The measured numbers of the card."""

    held_out_tokens: int
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    late_perplexity: float  # of tokens that see 1,024 or more before them
    layers: list[LayerRouting]


@dataclass(frozen=True)
class Trace:
    """What one pass over the held-out text gave."""

    losses: Tensor  # [tokens] float32: nats
    distances: Tensor  # [tokens] int64: tokens of context before the one that is scored
    router_logits: Tensor  # [layers, windows, context, num_experts] float32


@torch.no_grad()
def trace(model: Qwen3MoeForCausalLM, ids: Tensor, context: int) -> Trace:
    """Run the model over windows of `context` tokens, half overlapping, and score every token once.

    A window scores the tokens that no earlier window did, so all but the first see half a window or more.
    Routing is read from every second window, so that each token counts once.
    """
    losses, distances, routing = [], [], []
    for index, start in enumerate(range(0, ids.numel() - context, context // 2)):
        window = ids[start : start + context + 1]
        output = model.model(window[None, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state[0]).float()
        first = 0 if index == 0 else context // 2
        losses.append(functional.cross_entropy(logits, window[1:], reduction="none")[first:])
        distances.append(torch.arange(first + 1, context + 1))
        if index % 2 == 0:
            routing.append(torch.stack(output.router_logits).float())
    return Trace(torch.cat(losses).cpu(), torch.cat(distances), torch.stack(routing, 1).cpu())


def layer_routing(logits: Tensor, top_k: int) -> LayerRouting:
    """Summarise one layer from its [windows, context, num_experts] router logits."""
    num_experts = logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter_(-1, logits.topk(top_k, -1).indices, 1.0)
    usage = chosen.mean((0, 1)) / top_k
    overlap = (chosen[:, 1:] * chosen[:, :-1]).sum(-1).mean() / top_k
    token_entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    return LayerRouting(
        usage_entropy=float(torch.special.entr(usage).sum()) / math.log(num_experts),
        token_entropy=float(token_entropy) / math.log(num_experts),
        min_share=float(usage.min()) * num_experts,
        max_share=float(usage.max()) * num_experts,
        overlap=float(overlap),
    )


def measure(model: Qwen3MoeForCausalLM, tokenizer: TokenizersBackend, text: str, context: int) -> Figures:
    """Measure the model on `text`, the held-out documents."""
    ids = torch.tensor(tokenizer(text)["input_ids"], device=model.device)
    traced = trace(model, ids, context)
    num_bytes = len(text.replace(END_OF_TEXT, "").encode()) * traced.losses.numel() / ids.numel()
    top_k = model.config.num_experts_per_tok
    return Figures(
        held_out_tokens=traced.losses.numel(),
        loss=float(traced.losses.mean()),
        perplexity=float(traced.losses.mean().exp()),
        bits_per_byte=float(traced.losses.sum()) / math.log(2) / num_bytes,
        late_perplexity=float(traced.losses[traced.distances >= 1024].mean().exp()),
        layers=[layer_routing(logits, top_k) for logits in traced.router_logits],
    )


def complete(model: Qwen3MoeForCausalLM, tokenizer: TokenizersBackend, prompt: str, **options: Any) -> str:
    """The prompt and what the model writes after it, the end-of-text token included; options are `generate`'s."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, **options)
    return str(tokenizer.decode(output[0])).rstrip()


def plot_loss(training: dict[str, Any], out: Path) -> None:
    """Draw the training and validation loss over the tokens seen."""
    curve, settings = training["curve"], training["settings"]
    tokens = settings["batch"] * settings["context"] / 1e6
    scored = [point for point in curve if "validation_loss" in point]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    axes.plot(
        [point["step"] * tokens for point in curve], [point["loss"] for point in curve], lw=0.8, label="train"
    )
    axes.plot(
        [point["step"] * tokens for point in scored],
        [point["validation_loss"] for point in scored],
        marker="o",
        ms=3,
        label="validation files",
    )
    axes.axvline(training["best_step"] * tokens, color="grey", ls=":", label="saved step")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title="Reference model")
    axes.set_ylim(top=6)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)


def write_card(
    folder: Path, training: dict[str, Any], figures: Figures, samples: list[tuple[str, str]], num_params: int
) -> None:
    """Fill card.md.in with the numbers and write it as README.md."""
    settings, environment = training["settings"], training["environment"]
    template = Template((FOLDER / "card.md.in").read_text(encoding="utf-8"))
    values = {
        **settings,
        **environment,
        **hash_function_values(folder / "hash_function"),
        "parameters": f"{num_params / 1e6:.1f} M",
        "train_tokens": f"{training['train_tokens']:,}",
        "tokens_seen": f"{training['tokens_seen']:,}",
        "epochs": f"{training['tokens_seen'] / training['train_tokens']:.1f}",
        "saved_step": training["best_step"],
        "steps_done": training["steps"],
        "seconds": f"{training['seconds']:.0f}",
        "validation_perplexity": f"{math.exp(training['best_validation_loss']):.2f}",
        "train_loss": f"{last_loss(training):.2f}",
        "validation_loss": f"{training['best_validation_loss']:.2f}",
        "run_rows": "\n".join(_run_rows(training)),
        "held_out_tokens": f"{figures.held_out_tokens:,}",
        "perplexity": f"{figures.perplexity:.2f}",
        "late_perplexity": f"{figures.late_perplexity:.2f}",
        "bits_per_byte": f"{figures.bits_per_byte:.3f}",
        "min_share": f"{min(layer.min_share for layer in figures.layers):.2f}",
        "routing_rows": "\n".join(_routing_row(*row) for row in enumerate(figures.layers)),
        "held_out_files": ", ".join(f"`{name}`" for name in HELD_OUT),
        "validation_files": ", ".join(f"`{name}`" for name in VALIDATION),
        "samples": "\n\n".join(f"{title}:\n\n```text\n{text}\n```" for title, text in samples),
    }
    (folder / "README.md").write_text(template.substitute(values), encoding="utf-8")


def _run_rows(training: dict[str, Any]) -> list[str]:
    """Table rows of the saved run and of the runs it was chosen from."""
    saved = {**training, "last_loss": last_loss(training)}
    rows = []
    for title, run in [("saved", saved), *(("rejected", run) for run in training.get("rejected", []))]:
        settings = run["settings"]
        rows.append(
            f"| {title} | {settings['batch']} | {settings['dropout']} | {run['steps']} "
            f"| {run['tokens_seen'] / 1e6:.0f} M | {run['last_loss']:.2f} "
            f"| {math.exp(run['best_validation_loss']):.2f} |"
        )
    return rows


def _routing_row(index: int, layer: LayerRouting) -> str:
    return (
        f"| {index} | {layer.usage_entropy:.3f} | {layer.token_entropy:.3f} | {layer.min_share:.2f} "
        f"| {layer.max_share:.2f} | {layer.overlap:.3f} |"
    )


def _samples(model: Qwen3MoeForCausalLM, tokenizer: TokenizersBackend) -> list[tuple[str, str]]:
    """Titles and completions: each prompt at temperature 0 and, for each seed, at 0.7."""
    samples = []
    for prompt in PROMPTS:
        samples.append(("Temperature 0", complete(model, tokenizer, prompt)))
        for seed in SEEDS:
            torch.manual_seed(seed)
            text = complete(model, tokenizer, prompt, do_sample=True, temperature=0.7, top_k=0, top_p=1.0)
            samples.append((f"Temperature 0.7, seed {seed}", text))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the reference model and write its card.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="checkpoint folder, written by train.py")
    parser.add_argument("--context", type=int, default=2048, help="tokens per window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    training = json.loads((args.folder / "training.json").read_text())
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    figures = measure(model, tokenizer, text, args.context)
    (args.folder / "figures.json").write_text(json.dumps(asdict(figures), indent=1) + "\n")
    plot_loss(training, args.folder / "loss.png")
    write_card(args.folder, training, figures, _samples(model, tokenizer), model.num_parameters())
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()

"""How much of the routing is known beforehand, layer by layer: from the tokens alone, or some layers early?

On held-out text, the recall of the routers' true top k by: the experts that were most frequent in training, for the layer
or for the token id; hash functions, the paper's network and ours, trained here for the same minutes on the same text, and
the one beside the model; and the layer's own router, asked 1, 2, 3, ... layers early. With the perplexity when hash functions
route, the calibration of what they say, and their time for a prompt on the CPU. Not measured: what a hit is worth in time,
see `benchmarks.cache_policies` and `benchmarks.gpu.decode`.

    python -m benchmarks.prediction --out prediction.json --plot prediction.png
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from actors.predictor.baselines import FrequentExperts
from actors.predictor.evaluate import EvaluateArguments, evaluate
from actors.predictor.hash_function import find_hash_function
from actors.predictor.library_routing import load_resident_model
from actors.predictor.next_gate import EarlyRouters
from actors.predictor.text import read_windows
from actors.predictor.tracing import LiveTraces, RoutingTracer
from actors.predictor.train import (
    TrainArguments,
    TrainingData,
    read_training_data,
    save_training,
    train_hash_function,
)
from benchmarks.conditions import conditions
from common.checkpoint import Checkpoint
from common.config import REFERENCE_MODEL
from models.reference.corpus import encode, read_corpus

BUNDLED = "beside the model"
TEXTS = ("text", "traces", "validation", "held_out")  # arguments that say where something lies
# What is trained: the paper's network by its own recipe, or by ours as the others are. `filters` is as many bytes as the
# paper's network, `wide` takes about as long for a prompt. `distilled`: from logits, as the paper has it.
NETWORKS: dict[str, dict[str, Any]] = {
    "paper_recipe": {"network": "paper", "recipe": "paper"},
    "paper": {"network": "paper", "recipe": "fast"},
    "filters": {"network": "filters", "recipe": "fast", "compressed_size": 192, "hidden_size": 192},
    "filters_distilled": {
        "network": "filters",
        "recipe": "fast",
        "objective": "distillation",
        "compressed_size": 192,
        "hidden_size": 192,
    },
    "wide": {"network": "filters", "recipe": "fast", "hidden_size": 256, "blocks": 3},
}

Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--text", help="to train on; default: the reference model's own corpus")
    parser.add_argument("--traces", help="folder made by actors.predictor.trace, instead of --text")
    parser.add_argument(
        "--validation", help="text or traces that choose the best step; default: some of the first"
    )
    parser.add_argument("--held-out", default=str(REFERENCE_MODEL / "heldout.txt"), help="text to score on")
    parser.add_argument("--held-out-tokens", type=int, default=32_768)
    parser.add_argument(
        "--networks", nargs="*", choices=list(NETWORKS), default=["paper", "filters", "filters_distilled"]
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, for each network")
    parser.add_argument("--steps", type=int, default=10**6, help="at most")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per step of training")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument(
        "--counted-batches", type=int, default=64, help="of training, for the frequent experts"
    )
    parser.add_argument(
        "--distances", type=int, nargs="*", default=[1, 2, 3, 4], help="layers, of early routers"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep the hash functions in")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    return parser.parse_args()


def training_arguments(network: str, arguments: argparse.Namespace, work: Path) -> TrainArguments:
    text, validation = arguments.text, arguments.validation
    if text is None and arguments.traces is None:
        corpus = write_corpus(work / "corpus.npz")
        text, validation = f"{corpus}#train", validation or f"{corpus}#validation"
    return TrainArguments.model_validate(
        {
            "model": str(arguments.model),
            "text": text,
            "traces": arguments.traces,
            "held_out": validation,
            "out": str(work / network),
            "minutes": arguments.minutes,
            "steps": arguments.steps,
            "patience": 10**6,
            "batch_size": arguments.batch_size,
            "evaluate_every": arguments.evaluate_every,
            "window_tokens": arguments.window_tokens,
            "device": arguments.device,
            **NETWORKS[network],
        }
    )


def write_corpus(path: Path) -> Path:
    """What the reference model was trained on, and its validation files, as token ids."""
    if not path.exists():
        tokenizer, corpus = Tokenizer.from_file(str(REFERENCE_MODEL / "tokenizer.json")), read_corpus()
        parts = {"train": corpus.train, "validation": corpus.validation}
        encoded = {name: encode(tokenizer, texts.values()) for name, texts in parts.items()}
        np.savez(path, **encoded)  # type: ignore[arg-type]  # the stub takes the names for options
    return path


def score_frequent(data: TrainingData, held_out: LiveTraces, arguments: argparse.Namespace) -> list[Row]:
    batches = list(held_out.batches(arguments.batch_size, None))
    experts = FrequentExperts(data.source, batches, arguments.batch_size, arguments.counted_batches)
    recall, recall_2k = (
        experts.recall(),
        experts.recall(min(2 * data.source.header.top_k, data.source.header.num_experts)),
    )
    return [
        {"name": f"frequent by {name}", "recall": recall[name], "recall_2k": recall_2k[name]}
        for name in recall
    ]


def score_function(name: str, folder: Path, arguments: argparse.Namespace) -> Row:
    options = {
        "model": str(arguments.model),
        "text": arguments.held_out,
        "hash_function": str(folder),
        "max_tokens": arguments.held_out_tokens,
        "window_tokens": arguments.window_tokens,
        "device": arguments.device,
    }
    evaluation = evaluate(EvaluateArguments.model_validate(options))
    scores = asdict(evaluation)
    return {
        "name": f"hash function, {name}",
        **scores,
        "bytes": (folder / "hash_function.safetensors").stat().st_size,
    }


class EarlyRecall:
    """Of routers that are asked `distance` layers early."""

    def __init__(self, tracer: RoutingTracer, routers: EarlyRouters) -> None:
        self._tracer, self._routers = tracer, routers
        routers.listen()

    def rows(self, batches: list[tuple[Tensor, Tensor]], distances: list[int]) -> list[Row]:
        """Args: batches: token ids and mask, [windows, tokens] each."""
        num_layers = len(self._routers.modules)
        found = np.zeros((len(distances), num_layers))
        total = 0
        for token_ids, mask in batches:
            inside = mask.flatten().numpy()
            true = self._tracer.trace(token_ids, mask).expert_ids.flatten(0, 1).cpu().numpy()[inside]
            for row, distance in enumerate(distances):
                for layer in range(distance, num_layers):
                    shares = self._routers.guess(layer, self._routers.last_read(layer - distance))[inside]
                    found[row, layer] += (np.take_along_axis(shares, true[:, layer], axis=1) > 0).sum()
            total += true[:, 0].size
        return [
            {
                "name": f"router, {distance} early",
                "recall": [
                    None if layer < distance else found[row, layer] / total for layer in range(num_layers)
                ],
            }
            for row, distance in enumerate(distances)
        ]


def measure(arguments: argparse.Namespace, work: Path) -> list[Row]:
    rows: list[Row] = []
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = load_resident_model(arguments.model, device, dtype)
    tracer = RoutingTracer(model, arguments.model)
    token_ids, mask = read_windows(arguments.held_out, arguments.model, arguments.window_tokens)
    num_windows = max(1, arguments.held_out_tokens // arguments.window_tokens)
    token_ids, mask = token_ids[:num_windows], mask[:num_windows]
    held_out = LiveTraces(tracer, token_ids, mask)
    data = read_training_data(training_arguments("filters", arguments, work))
    rows += score_frequent(data, held_out, arguments)
    for network in arguments.networks:
        training = training_arguments(network, arguments, work)
        function, record = train_hash_function(data, training)
        row = score_function(network, save_training(function, record, training), arguments)
        rows.append({**row, "trained_steps": record.steps, "trained_tokens": record.tokens_seen})
    bundled = find_hash_function(arguments.model)
    if bundled is not None:
        rows.append(score_function(BUNDLED, bundled, arguments))
    routers = EarlyRouters(model, Checkpoint.open(arguments.model).architecture)
    batches = list(zip(token_ids.split(arguments.batch_size), mask.split(arguments.batch_size), strict=True))
    distances = [distance for distance in arguments.distances if distance < data.source.header.num_layers]
    rows += EarlyRecall(tracer, routers).rows(batches, distances)
    return rows


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        recall = [value for value in row["recall"] if value is not None]
        cells = " ".join("    -" if value is None else f"{value:.3f}" for value in row["recall"])
        extra = ""
        if "ms_per_512_tokens" in row:
            extra = f"  {row['ms_per_512_tokens']:.1f} ms, {row['bytes'] / 1e6:.1f} MB"
        if row.get("perplexity_exact"):
            extra += f", perplexity {row['perplexity_predicted']:.3f} ({row['perplexity_exact']:.3f})"
        print(f"{row['name']:<30} {sum(recall) / len(recall):.4f}  {cells}{extra}")


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Write a PNG: recall over the layers, a line for each row."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        kind = row["name"].split()[0]
        style = {"frequent": ":", "hash": "-", "router,": "--"}[kind]
        values = [float("nan") if value is None else value for value in row["recall"]]
        axis.plot(values, style, marker="o", markersize=3, linewidth=1.4, label=row["name"])
    axis.set(xlabel="MoE layer", ylabel="recall of the routers' choice", title=title, ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = measure(arguments, work)
    print_rows(rows)
    architecture = Checkpoint.open(arguments.model).architecture
    title = (
        f"{architecture.num_layers} layers of {architecture.num_experts} experts, top {architecture.top_k}"
    )
    settings = {**vars(arguments), **{name: Path(vars(arguments)[name] or "") for name in TEXTS}}
    record = {"benchmark": "prediction", "model": title, "rows": rows, "conditions": conditions(**settings)}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, title, arguments.plot)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

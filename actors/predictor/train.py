"""`python -m actors.predictor.train model=FOLDER text=TEXT`: train the hash function of a model, in one command.

Runs the model over the text as training goes on (or reads `traces=`, made by `actors.predictor.trace`), prints the
held-out recall, and writes the best hash function where serving looks for it.
"""

import json
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.hash_function import find_embedding_key, read_embedding, save_hash_function
from actors.predictor.library_routing import load_resident_model
from actors.predictor.network import HashFunction, HashFunctionSpec
from actors.predictor.text import read_tokens
from actors.predictor.traces import TraceBatch, TraceFiles, TraceSource, windows
from actors.predictor.tracing import LiveTraces, RoutingTracer
from actors.predictor.training import TrainingOptions, TrainingRecord, train
from common.checkpoint import Checkpoint
from common.errors import ConfigError, ServingError, UnsupportedModelError

HELD_OUT_SHARE = 0.02
MAX_HELD_OUT_WINDOWS = 256
RECORD_FILE = "training.json"

# "paper" is section 3.5 as published. "fast" reaches a higher recall within minutes, see the model card.
RECIPES = {
    "paper": TrainingOptions(),
    "fast": TrainingOptions(learning_rate=4e-3, warmup_steps=100, cosine=True),
}


class TrainArguments(Arguments):
    text: str | None = Field(None, description="file, folder, or FILE.npz#NAME of token ids to train on")
    traces: str | None = Field(None, description="folder made by actors.predictor.trace, instead of text")
    held_out: str | None = Field(
        None, description="text for the recall; default: the last 2 % of the windows"
    )
    out: str | None = Field(None, description="folder to write; default: hash_function in the model's folder")
    recipe: Literal["paper", "fast"] = Field(
        "fast", description="paper: as published, for long training; or fast"
    )
    learning_rate: float | None = Field(None, gt=0, description="instead of the recipe's")
    batch_size: int = Field(64, ge=1, description="windows per step")
    ce_weight: float = Field(0.005, ge=0, description="lambda, weight of the hard top-1 loss")
    num_kept: int = Field(30, ge=1, description="T, experts of the truncated distillation")
    steps: int = Field(10_000, ge=1, description="at most")
    minutes: float = Field(inf, gt=0, description="at most")
    evaluate_every: int = Field(200, ge=1, description="steps")
    patience: int = Field(10, ge=1, description="evaluations without progress before it stops")
    compressed_size: int = Field(256, ge=1, description="of a token's embedding")
    hidden_size: int = Field(256, ge=1, description="of the LSTM")
    token_residual: bool = Field(
        False, description="let the heads read the token's embedding too, not in the paper"
    )
    seed: int = Field(0, ge=0, description="of weights and order")

    def options(self) -> TrainingOptions:
        recipe = RECIPES[self.recipe]
        return replace(
            recipe,
            learning_rate=self.learning_rate or recipe.learning_rate,
            batch_size=self.batch_size,
            ce_weight=self.ce_weight,
            steps=self.steps,
            minutes=self.minutes,
            evaluate_every=self.evaluate_every,
            patience=self.patience,
            seed=self.seed,
        )


@dataclass(frozen=True)
class TrainingData:
    """What several trainings of the same model may share."""

    source: TraceSource
    held_out: list[TraceBatch]
    embedding_key: str
    embedding: Tensor  # [vocab, embedding]
    device: torch.device


def read_training_data(arguments: TrainArguments) -> TrainingData:
    """
    Raises:
        ConfigError: no text, both text and traces, or traces of another model.
        UnsupportedModelError: routers that do not choose by their logits alone.
    """
    if (arguments.text is None) == (arguments.traces is None):
        raise ConfigError("text", arguments.text, "give either text or traces")
    source, held_out = _from_files(arguments) if arguments.traces else _from_model(arguments)
    fingerprint = Checkpoint.open(arguments.model).fingerprint
    if source.header.model_fingerprint != fingerprint:
        raise ConfigError("traces", arguments.traces, f"traces of model {fingerprint}")
    if source.header.teacher != "logits":
        raise UnsupportedModelError(
            arguments.model,
            "its routers' choices and weights do not follow from their logits by softmax and top k, which is what the hash "
            "function learns; its traces serve the other predictors",
        )
    key = find_embedding_key(arguments.model)
    return TrainingData(source, held_out, key, read_embedding(arguments.model, key), arguments.torch_device)


def _from_model(arguments: TrainArguments) -> tuple[TraceSource, list[TraceBatch]]:
    assert arguments.text is not None
    model = load_resident_model(arguments.model, arguments.torch_device, arguments.torch_dtype)
    tracer = RoutingTracer(model, arguments.model, arguments.num_kept)
    token_ids, mask = windows(read_tokens(arguments.text, arguments.model), arguments.window_tokens)
    if arguments.held_out:
        held_ids, held_mask = windows(
            read_tokens(arguments.held_out, arguments.model), arguments.window_tokens
        )
    else:
        cut = _first_held_out(len(token_ids), "text")
        (token_ids, held_ids), (mask, held_mask) = token_ids.tensor_split([cut]), mask.tensor_split([cut])
    held_source = LiveTraces(tracer, held_ids[:MAX_HELD_OUT_WINDOWS], held_mask[:MAX_HELD_OUT_WINDOWS])
    return LiveTraces(tracer, token_ids, mask), list(held_source.batches(arguments.batch_size, None))


def _from_files(arguments: TrainArguments) -> tuple[TraceSource, list[TraceBatch]]:
    assert arguments.traces is not None
    files = TraceFiles(arguments.traces)
    if arguments.held_out:
        return files, list(TraceFiles(arguments.held_out).batches(arguments.batch_size, None))
    cut = _first_held_out(files.num_shards, "traces")
    return files.part(0, cut), list(files.part(cut, files.num_shards).batches(arguments.batch_size, None))


def _first_held_out(count: int, key: str) -> int:
    if count < 2:
        raise ConfigError(
            key, count, "at least two windows, or give held_out: the last part is for the recall"
        )
    return count - max(1, round(HELD_OUT_SHARE * count))


def train_hash_function(data: TrainingData, arguments: TrainArguments) -> tuple[HashFunction, TrainingRecord]:
    """Train one on prepared data, with progress on the terminal."""
    torch.manual_seed(arguments.seed)
    spec = _spec(data, arguments)
    function = HashFunction(spec, data.embedding).to(data.device)
    function.scale_compression()
    with tqdm(total=arguments.steps, unit="step", dynamic_ncols=True) as progress:

        def report(row: dict[str, float]) -> None:
            progress.update(int(row["step"]) - progress.n)
            progress.set_postfix(loss=f"{row['loss']:.3f}", recall=f"{row['recall']:.4f}")

        record = train(function, data.source, data.held_out, arguments.options(), report)
    return function.eval(), record


def _spec(data: TrainingData, arguments: TrainArguments) -> HashFunctionSpec:
    header = data.source.header
    return HashFunctionSpec(
        model_fingerprint=header.model_fingerprint,
        embedding_key=data.embedding_key,
        vocab_size=data.embedding.shape[0],
        embedding_size=data.embedding.shape[1],
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        weight_rule=header.weight_rule,
        compressed_size=arguments.compressed_size,
        hidden_size=arguments.hidden_size,
        token_residual=arguments.token_residual,
    )


def save_training(function: HashFunction, record: TrainingRecord, arguments: TrainArguments) -> Path:
    """Write the hash function and, beside it, how it was trained; returns the folder."""
    folder = Path(arguments.out) if arguments.out else Path(arguments.model) / "hash_function"
    save_hash_function(function, folder)
    options = {key: value for key, value in asdict(arguments.options()).items() if value != inf}
    text = json.dumps({"options": options, "torch": torch.__version__, **asdict(record)}, indent=2)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def main() -> None:
    arguments = read_command_line(TrainArguments, __doc__)
    try:
        function, record = train_hash_function(read_training_data(arguments), arguments)
        folder = save_training(function, record, arguments)
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{record.tokens_seen} tokens in {record.seconds:.0f} s; best step {record.best_step}, written to {folder}"
    )
    for layer, recall in enumerate(record.best_recall):
        print(f"layer {layer:3d}  held-out recall@{function.spec.top_k}  {recall:.4f}")
    print(f"mean      held-out recall@{function.spec.top_k}  {record.best_mean_recall:.4f}")


if __name__ == "__main__":
    main()

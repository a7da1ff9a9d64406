"""`python -m actors.predictor.train model=FOLDER text=TEXT`: train the hash function of a model, in one command.

Runs the model over the text as training goes on (or reads `traces=`, made by `actors.predictor.trace`), prints the
held-out recall, and writes the best hash function, calibrated, where serving looks for it. Killed at any time, the same
command goes on from the last evaluation.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.calibration import calibrate
from actors.predictor.hash_function import find_embedding_key, read_embedding, save_hash_function
from actors.predictor.library_routing import load_resident_model
from actors.predictor.network import HashFunction, HashFunctionSpec
from actors.predictor.text import read_windows
from actors.predictor.traces import TraceBatch, TraceFiles, TraceSource
from actors.predictor.tracing import LiveTraces, RoutingTracer
from actors.predictor.training import Evaluated, Objective, Trainer, TrainingOptions, TrainingRecord
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, ConfigError, ServingError

HELD_OUT_SHARE = 0.02
MAX_HELD_OUT_WINDOWS = 256
RECORD_FILE = "training.json"
CHECKPOINT_FILE = "checkpoint.pt"

# "paper" is section 3.5 as published. "fast" reaches a higher recall within minutes, see the model card.
RECIPES = {
    "paper": TrainingOptions(),
    "fast": TrainingOptions(objective="choices", warmup_steps=30, cosine=True),
}
FAST_LEARNING_RATES = {"paper": 1e-2, "filters": 3e-3}  # by network


class TrainArguments(Arguments):
    text: str | None = Field(None, description="file, folder, or FILE.npz#NAME of token ids to train on")
    traces: str | None = Field(None, description="folder made by actors.predictor.trace, instead of text")
    held_out: str | None = Field(
        None, description="text, or traces, for the recall; default: the last 2 % of the windows"
    )
    out: str | None = Field(None, description="folder to write; default: hash_function in the model's folder")
    network: Literal["paper", "filters"] = Field(
        "filters", description="paper: LSTM and attention; filters: better and faster, not in the paper"
    )
    recipe: Literal["paper", "fast"] = Field(
        "fast", description="paper: as published, for long training; or fast"
    )
    objective: Objective | None = Field(
        None,
        description="distillation of router logits (recipe=paper), or likelihood of the weighted choices (fast)",
    )
    learning_rate: float | None = Field(None, gt=0, description="instead of the recipe's")
    batch_size: int = Field(64, ge=1, description="windows per step")
    ce_weight: float = Field(0.005, ge=0, description="lambda, weight of the hard top-1 loss in distillation")
    num_kept: int = Field(30, ge=1, description="T, experts of the truncated distillation")
    steps: int = Field(10_000, ge=1, description="at most")
    minutes: float = Field(inf, gt=0, description="at most")
    evaluate_every: int = Field(200, ge=1, description="steps")
    patience: int = Field(10, ge=1, description="evaluations without progress before it stops")
    compressed_size: int = Field(256, ge=1, description="features that a token has alone")
    hidden_size: int = Field(256, ge=1, description="of the LSTM, or width of the filters")
    blocks: int = Field(2, ge=1, description="of filters, one after the other")
    token_residual: bool = Field(
        False, description="network=paper: let the heads read the token's embedding too, not in the paper"
    )
    bidirectional: bool | None = Field(
        None, description="predict from the tokens that follow, too; default: for encoders"
    )
    seed: int = Field(0, ge=0, description="of weights and order")

    def options(self) -> TrainingOptions:
        recipe = RECIPES[self.recipe]
        usual = FAST_LEARNING_RATES[self.network] if self.recipe == "fast" else recipe.learning_rate
        return replace(
            recipe,
            objective=self.objective or recipe.objective,
            learning_rate=self.learning_rate or usual,
            batch_size=self.batch_size,
            ce_weight=self.ce_weight,
            steps=self.steps,
            minutes=self.minutes,
            evaluate_every=self.evaluate_every,
            patience=self.patience,
            seed=self.seed,
        )

    @property
    def folder(self) -> Path:
        """To write to."""
        return Path(self.out) if self.out else Path(self.model) / "hash_function"


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
    """
    if (arguments.text is None) == (arguments.traces is None):
        raise ConfigError("text", arguments.text, "give either text or traces")
    source, held_out = _from_files(arguments) if arguments.traces else _from_model(arguments)
    fingerprint = Checkpoint.open(arguments.model).fingerprint
    if source.header.model_fingerprint != fingerprint:
        raise ConfigError("traces", arguments.traces, f"traces of model {fingerprint}")
    key = find_embedding_key(arguments.model)
    return TrainingData(source, held_out, key, read_embedding(arguments.model, key), arguments.torch_device)


def _from_model(arguments: TrainArguments) -> tuple[TraceSource, list[TraceBatch]]:
    assert arguments.text is not None
    model = load_resident_model(arguments.model, arguments.torch_device, arguments.torch_dtype)
    tracer = RoutingTracer(model, arguments.model, arguments.num_kept)
    token_ids, mask = read_windows(arguments.text, arguments.model, arguments.window_tokens)
    if arguments.held_out:
        held_ids, held_mask = read_windows(arguments.held_out, arguments.model, arguments.window_tokens)
    else:
        cut = _first_held_out(len(token_ids), "text")
        (token_ids, held_ids), (mask, held_mask) = token_ids.tensor_split([cut]), mask.tensor_split([cut])
    held_source = LiveTraces(tracer, held_ids[:MAX_HELD_OUT_WINDOWS], held_mask[:MAX_HELD_OUT_WINDOWS])
    return LiveTraces(tracer, token_ids, mask), list(held_source.batches(arguments.batch_size, None))


def _from_files(arguments: TrainArguments) -> tuple[TraceSource, list[TraceBatch]]:
    assert arguments.traces is not None
    files = TraceFiles(arguments.traces)
    if arguments.held_out:
        held_out = TraceFiles(arguments.held_out)
        if held_out.header.model_fingerprint != files.header.model_fingerprint:
            raise ConfigError(
                "held_out", arguments.held_out, f"traces of model {files.header.model_fingerprint}"
            )
        return files, _first_windows(held_out, arguments.batch_size)
    cut = _first_held_out(files.num_shards, "traces")
    return files.part(0, cut), _first_windows(files.part(cut, files.num_shards), arguments.batch_size)


def _first_windows(source: TraceSource, batch_size: int) -> list[TraceBatch]:
    kept: list[TraceBatch] = []
    for batch in source.batches(batch_size, None):
        kept.append(batch)
        if sum(each.num_windows for each in kept) >= MAX_HELD_OUT_WINDOWS:
            break
    return kept


def _first_held_out(count: int, key: str) -> int:
    if count < 2:
        raise ConfigError(
            key, count, "at least two windows, or give held_out: the last part is for the recall"
        )
    return count - max(1, round(HELD_OUT_SHARE * count))


def train_hash_function(data: TrainingData, arguments: TrainArguments) -> tuple[HashFunction, TrainingRecord]:
    """Train one on prepared data, with progress on the terminal, and calibrate it on the held-out part.

    Raises:
        ConfigError: the routers cannot be learned that way, or the folder holds an unfinished other training.
    """
    options = arguments.options()
    if options.objective == "distillation" and data.source.header.teacher == "choices":
        problem = "choices: these routers do not decide by the softmax of their logits alone"
        raise ConfigError("objective", options.objective, problem)
    torch.manual_seed(arguments.seed)
    function = HashFunction(_spec(data, arguments), data.embedding).to(data.device)
    function.prepare_training()
    checkpoint = _TrainingCheckpoint(arguments, function.spec)
    with tqdm(total=arguments.steps, unit="step", dynamic_ncols=True) as progress:

        def report(row: Evaluated) -> None:
            progress.update(row.step - progress.n)
            layers = f"{row.recall[0]:.3f}..{row.recall[-1]:.3f}"
            progress.set_postfix(loss=f"{row.loss:.3f}", recall=f"{row.mean_recall:.4f}", layers=layers)
            checkpoint.write(trainer.state())

        trainer = Trainer(function, data.source, data.held_out, options, report)
        if (state := checkpoint.read(data.device)) is not None:
            trainer.resume(state)
            progress.update(int(state["record"]["steps"]))
        record = trainer.run()
    calibrate(function, data.held_out, by_expert=data.source.header.teacher == "choices")
    return function.eval(), record


class _TrainingCheckpoint:
    """A file beside what will be written; only the same command goes on from it."""

    def __init__(self, arguments: TrainArguments, spec: HashFunctionSpec) -> None:
        self._path = arguments.folder / CHECKPOINT_FILE
        described = {**arguments.model_dump(exclude={"device", "out"}), "model": spec.model_fingerprint}
        self._made_for = {name: str(value) for name, value in described.items()}

    def write(self, state: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".unfinished")
        torch.save({"made_for": self._made_for, **state}, unfinished)
        os.replace(unfinished, self._path)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """None where there is none."""
        if not self._path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._path, map_location=device, weights_only=True)
            made_for = state.pop("made_for")
        except (OSError, RuntimeError, KeyError, UnpicklingError) as error:
            raise CheckpointError(
                str(self._path), "no unfinished training that can be read; delete it"
            ) from error
        for name, value in self._made_for.items():
            if made_for.get(name) != value:
                problem = f"{made_for.get(name)}, as in the unfinished training in {self._path}; or delete that file"
                raise ConfigError(name, value, problem)
        return state


def _spec(data: TrainingData, arguments: TrainArguments) -> HashFunctionSpec:
    header = data.source.header
    is_encoder = header.stack == "encoder"
    if arguments.bidirectional and not is_encoder:
        raise ConfigError(
            "bidirectional", True, "false for decoders, whose later tokens are not known in time"
        )
    bidirectional = is_encoder if arguments.bidirectional is None else arguments.bidirectional
    multiple = 2 * len(HashFunctionSpec.half_lives) * (2 if bidirectional else 1)
    if arguments.network == "filters" and arguments.hidden_size % multiple:
        raise ConfigError("hidden_size", arguments.hidden_size, f"a multiple of {multiple}, with filters")
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
        network=arguments.network,
        blocks=arguments.blocks,
        bidirectional=bidirectional,
    )


def save_training(function: HashFunction, record: TrainingRecord, arguments: TrainArguments) -> Path:
    """Write the hash function and, beside it, how it was trained; returns the folder."""
    folder = arguments.folder
    save_hash_function(function, folder)
    options = {key: value for key, value in asdict(arguments.options()).items() if value != inf}
    text = json.dumps({"options": options, "torch": torch.__version__, **asdict(record)}, indent=2)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
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

"""Train the reference model's hash function: the paper's network and ours, in some variants, for the same minutes each;
the one with the best recall on the validation files is saved, and scored on the held-out files, which choose nothing.

    python -m models.reference.corpus --out .bundle/corpus.npz
    python -m models.reference.train_hash_function
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.baselines import FrequentExperts
from actors.predictor.evaluate import EvaluateArguments, evaluate, print_report
from actors.predictor.network import HashFunction
from actors.predictor.train import TrainArguments, read_training_data, save_training, train_hash_function
from actors.predictor.training import TrainingRecord

FOLDER = Path(__file__).parent
RESULT_FILE = "evaluation.json"

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"network": "paper", "recipe": "paper"},
    "token_hot": {
        "network": "paper",
        "objective": "distillation",
        "learning_rate": 2e-2,
        "token_residual": True,
    },
    # As many bytes as the paper's network.
    "filters": {"network": "filters", "compressed_size": 192, "hidden_size": 192},
    "filters_distilled": {
        "network": "filters",
        "objective": "distillation",
        "learning_rate": 6e-3,
        "compressed_size": 192,
        "hidden_size": 192,
    },
}


class ReferenceArguments(Arguments):
    model: str = Field(str(FOLDER), description="checkpoint folder", min_length=1)
    corpus: str = Field(".bundle/corpus.npz", description="made by models.reference.corpus")
    traces: str | None = Field(
        None,
        description="folder with traces of its parts in `train` and `validation`, so that no GPU is needed",
    )
    out: str = Field(str(FOLDER / "hash_function"), description="folder to write")
    work: str = Field(".bundle/hash_functions", description="folder that keeps every variant")
    minutes: float = Field(4.0, gt=0, description="of training, for each variant, at most")
    steps: int = Field(10_000, ge=1, description="of training, for each variant, at most")
    variants: str = Field(",".join(VARIANTS), description="which to train, separated by commas")
    batch_size: int = Field(64, ge=1, description="windows per step")
    evaluate_every: int = Field(100, ge=1, description="steps")
    max_tokens: int = Field(10**9, ge=2, description="of the held-out text")

    def training(self, variant: str) -> TrainArguments:
        text = {"text": f"{self.corpus}#train", "held_out": f"{self.corpus}#validation"}
        traces = {"traces": f"{self.traces}/train", "held_out": f"{self.traces}/validation"}
        return TrainArguments.model_validate(
            {
                **self.model_dump(include={"model", "device", "dtype", "window_tokens", "minutes", "steps"}),
                **self.model_dump(include={"batch_size", "evaluate_every"}),
                **(traces if self.traces else text),
                "out": f"{self.work}/{variant}",
                "patience": 20,
                **VARIANTS[variant],
            }
        )

    def evaluation(self) -> EvaluateArguments:
        return EvaluateArguments.model_validate(
            {
                **self.model_dump(include={"model", "device", "dtype", "window_tokens", "max_tokens"}),
                "text": str(FOLDER / "heldout.txt"),
                "hash_function": self.out,
            }
        )


def main() -> None:
    arguments = read_command_line(ReferenceArguments, __doc__)
    names = arguments.variants.split(",")
    # Every variant learns from the same model and text.
    data = read_training_data(arguments.training(names[0]))
    baselines = FrequentExperts(data.source, data.held_out).recall()
    print("recall of always naming the same experts:", baselines)
    runs: dict[str, tuple[HashFunction, TrainingRecord]] = {}
    for name in names:
        runs[name] = train_hash_function(data, arguments.training(name))
        save_training(*runs[name], arguments.training(name))
        record = runs[name][1]
        print(
            f"{name}: validation recall {record.best_mean_recall:.4f} at step {record.best_step} of {record.steps}"
        )
    best = max(runs, key=lambda name: runs[name][1].best_mean_recall)
    folder = save_training(*runs[best], arguments.training(best).model_copy(update={"out": arguments.out}))
    evaluation = evaluate(arguments.evaluation())
    print_report(evaluation)
    result = {
        "held_out": {**asdict(evaluation), "mean_recall": evaluation.mean_recall},
        "validation_baselines": baselines,
        "saved": best,
        "variants": [_summary(name, arguments.training(name), record) for name, (_, record) in runs.items()],
    }
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _summary(name: str, arguments: TrainArguments, record: TrainingRecord) -> dict[str, Any]:
    return {
        "name": name,
        "network": arguments.network,
        "recipe": arguments.recipe,
        "objective": arguments.options().objective,
        "learning_rate": arguments.options().learning_rate,
        "token_residual": arguments.token_residual,
        "device": arguments.torch_device.type,
        "validation_recall": record.best_recall,
        "mean_validation_recall": record.best_mean_recall,
        "best_step": record.best_step,
        "steps": record.steps,
        "tokens_seen": record.tokens_seen,
        "seconds": round(record.seconds, 1),
    }


if __name__ == "__main__":
    main()

"""What `--size cpu` and `--size full` mean: one place for every number that differs between a laptop and a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from benchmarks.sida.data.build import DataSize
from benchmarks.sida.data.tasks import TASKS, TaskName
from benchmarks.sida.hash_functions import NETWORKS, HashTraining
from benchmarks.sida.models import BaseShape, RouterTraining, TrainedShape
from benchmarks.sida.optimize import Schedule


@dataclass(frozen=True)
class SpeedSize:
    experts: tuple[int, ...]
    dtypes: tuple[str, ...]
    shape: BaseShape
    hash_function_hidden: int
    slots: tuple[str, ...]  # per layer
    sentences: int  # of a run


@dataclass(frozen=True)
class Size:
    experts: tuple[int, ...]  # of the models that are trained
    data: DataSize
    shape: TrainedShape
    window_tokens: int  # of the text that pretraining corrupts
    pretraining_batch: int  # windows
    pretraining: Schedule
    finetuning_batch_tokens: int
    finetuning: Mapping[TaskName, Schedule]
    evaluated_windows: int  # of corrupted test text
    hash_training: HashTraining
    speed: SpeedSize
    routers: RouterTraining = field(default_factory=RouterTraining)

    @property
    def training_minutes(self) -> float:
        """Of all that is trained for one number of experts."""
        of_text, of_tasks = (
            len(NETWORKS) + 1,
            len(NETWORKS) * len(TASKS),
        )  # hash functions; the decoder has one
        return (
            self.pretraining.minutes
            + sum(schedule.minutes for schedule in self.finetuning.values())
            + of_text * self.hash_training.minutes
            + of_tasks * self.hash_training.task_minutes
        )

    def within(self, minutes: float) -> "Size":
        """With so many training minutes, shared alike."""
        share = minutes / self.training_minutes
        return replace(
            self,
            pretraining=self.pretraining.scaled(share),
            finetuning={task: schedule.scaled(share) for task, schedule in self.finetuning.items()},
            hash_training=self.hash_training.scaled(share),
        )


SIZES = {
    "cpu": Size(
        experts=(8, 32),
        data=DataSize(
            max_bytes=12_000_000, max_text_tokens=4_000_000, train_examples=4_000, other_examples=400
        ),
        shape=TrainedShape(d_model=96, d_ff=192, d_kv=24, num_heads=4, encoder_layers=4, decoder_layers=2),
        window_tokens=96,
        pretraining_batch=16,
        pretraining=Schedule(minutes=0.8, learning_rate=3e-2, warmup_steps=20),
        finetuning_batch_tokens=2048,
        finetuning={
            "short": Schedule(minutes=0.3, learning_rate=1e-2, warmup_steps=10),
            "pair": Schedule(minutes=0.5, learning_rate=1e-2, warmup_steps=10),
            "long": Schedule(minutes=0.7, learning_rate=1e-2, warmup_steps=10),
        },
        evaluated_windows=128,
        hash_training=HashTraining(
            minutes=0.2,
            task_minutes=0.12,
            warmup_steps=10,
            evaluate_every=20,
            batch_tokens=2048,
            hidden_size=64,
            held_out_batches=8,
        ),
        speed=SpeedSize(
            experts=(8, 32),
            dtypes=("float32",),
            shape=BaseShape(vocab_size=6_208, d_model=128, d_ff=512, d_kv=32, num_heads=4, num_layers=4),
            hash_function_hidden=32,
            slots=("18%", "55%"),
            sentences=6,
        ),
    ),
    "full": Size(
        experts=(8, 64, 128),
        data=DataSize(
            max_bytes=120_000_000, max_text_tokens=18_000_000, train_examples=60_000, other_examples=2_000
        ),
        shape=TrainedShape(d_model=384, d_ff=768, d_kv=64, num_heads=6, encoder_layers=6, decoder_layers=4),
        window_tokens=256,
        pretraining_batch=128,
        pretraining=Schedule(minutes=2.0, learning_rate=2e-2, warmup_steps=100),
        finetuning_batch_tokens=16_384,
        finetuning={
            "short": Schedule(minutes=0.45, learning_rate=3e-3, warmup_steps=30),
            "pair": Schedule(minutes=0.5, learning_rate=3e-3, warmup_steps=30),
            "long": Schedule(minutes=1.1, learning_rate=3e-3, warmup_steps=30),
        },
        evaluated_windows=2048,
        hash_training=HashTraining(
            minutes=0.45,
            task_minutes=0.3,
            warmup_steps=30,
            evaluate_every=100,
            batch_tokens=16_384,
            hidden_size=256,
            held_out_batches=8,
        ),
        speed=SpeedSize(
            experts=(256, 128, 64, 8),  # what matters most comes first
            dtypes=("float32", "bfloat16"),
            shape=BaseShape(),
            hash_function_hidden=256,
            slots=("12%", "18%", "36%", "55%"),
            sentences=12,
        ),
    ),
}

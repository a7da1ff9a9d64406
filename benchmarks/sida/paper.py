"""The published figures: SiDA-MoE (arXiv 2310.18859), Switch-base in float32, one sentence at a time, an A100 of 80 GB."""

from benchmarks.sida.data.tasks import TaskName

# Sentences per second over the mean of three all-resident baselines, by number of experts.
SPEEDUP: dict[int, dict[TaskName, float]] = {
    128: {"short": 2.60, "pair": 2.52, "long": 1.26},
    256: {"short": 3.93, "pair": 3.83, "long": 1.57},
}
# At least; of the all-resident model's GPU memory.
MEMORY_SAVED: dict[int, dict[TaskName, float]] = {
    128: {"short": 0.60, "long": 0.20},
    256: {"short": 0.80, "long": 0.40},
}
# The routers' first choice is among three predicted experts.
HIT_RATE: dict[int, dict[TaskName, float]] = {
    8: {"short": 0.9900, "pair": 0.9741, "long": 0.9174},
    128: {"short": 0.9878, "pair": 0.9865, "long": 0.9049},
}
# The task's score with predicted routing over that with the routers' own.
FIDELITY: dict[int, dict[TaskName, float]] = {
    8: {"short": 0.9825, "pair": 0.9749, "long": 0.9895},
    128: {"short": 0.9302, "pair": 0.9259, "long": 0.9256},
}
# On C4: the routers' own, and predicted.
PERPLEXITY: dict[int, tuple[float, float]] = {
    8: (6.68, 18.49),
    64: (4.93, 11.84),
    128: (4.86, 11.73),
    256: (4.59, 8.11),
}
EXPERTS_NAMED: dict[TaskName, int] = {"short": 1, "pair": 3, "long": 3}  # per token, at inference

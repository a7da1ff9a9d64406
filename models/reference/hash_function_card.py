"""The model card's numbers about the hash function, from the files that its training wrote. Measures nothing."""

import json
from pathlib import Path
from typing import Any

from actors.predictor.train import RECIPES
from models.reference.train_hash_function import RESULT_FILE

CPU_FILE = "evaluation_cpu.json"  # what `python -m actors.predictor.evaluate` wrote on a CPU, in float32
WINDOW_TOKENS = 512  # of train_hash_function.py
RESIDUAL_FORM = "Unlike the paper's, its heads also read the compressed embedding (`token_residual`)."


def hash_function_values(folder: Path) -> dict[str, str]:
    """Fields of card.md.in for the hash function in `folder`."""
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    on_cpu = json.loads((folder / CPU_FILE).read_text(encoding="utf-8"))
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    spec = json.loads((folder / "hash_function.json").read_text(encoding="utf-8"))
    scores, saved = result["held_out"], _saved(result)
    exact, predicted = scores["perplexity_exact"], scores["perplexity_predicted"]
    return {
        "hf_bytes": f"{(folder / 'hash_function.safetensors').stat().st_size / 1e6:.1f} MB",
        "hf_compressed": str(spec["compressed_size"]),
        "hf_hidden": str(spec["hidden_size"]),
        "hf_window": str(WINDOW_TOKENS),
        "hf_tokens": f"{scores['num_tokens']:,}",
        "hf_recall": f"{scores['mean_recall']:.3f}",
        "hf_recall_rows": "\n".join(_recall_rows(result)),
        "hf_exact": f"{exact:.2f}",
        "hf_predicted": f"{predicted:.2f}",
        "hf_ratio": f"{predicted / exact:.3f}",
        "hf_cpu_recall": f"{on_cpu['mean_recall']:.3f}",
        "hf_cpu_exact": f"{on_cpu['perplexity_exact']:.2f}",
        "hf_cpu_predicted": f"{on_cpu['perplexity_predicted']:.2f}",
        "hf_ms": f"{on_cpu['ms_per_512_tokens']:.0f}",
        "hf_threads": str(on_cpu["torch_threads"]),
        "hf_host_ms": f"{scores['ms_per_512_tokens']:.0f}",
        "hf_host_threads": str(scores["torch_threads"]),
        "hf_form": RESIDUAL_FORM if spec.get("token_residual") else "The paper's form.",
        "hf_verdict": _verdict(saved["validation_recall"], result["validation_baselines"]["token"]),
        "hf_saved": result["saved"],
        "hf_seconds": f"{saved['seconds']:.0f}",
        "hf_minutes": f"{training['options']['minutes']:g}",
        "hf_variant_rows": "\n".join(
            _variant_row(variant, variant is saved) for variant in result["variants"]
        ),
    }


def _saved(result: dict[str, Any]) -> dict[str, Any]:
    """The saved variant's record; of two trainings of one variant, the better one is what was saved."""
    runs: list[dict[str, Any]] = [run for run in result["variants"] if run["name"] == result["saved"]]
    return max(runs, key=lambda run: float(run["mean_validation_recall"]))


def _verdict(recall: list[float], by_token: list[float]) -> str:
    """Where knowing the token alone is as good or better."""
    behind = [
        f"{layer} ({mine:.3f} to {theirs:.3f})"
        for layer, (mine, theirs) in enumerate(zip(recall, by_token, strict=True))
        if mine <= theirs
    ]
    if not behind:
        return "In every layer it beats the token id."
    return (
        f"Naming experts by the token id is still better in layer {', '.join(behind)}, and worse elsewhere."
    )


def _recall_rows(result: dict[str, Any]) -> list[str]:
    baselines, saved = result["validation_baselines"], _saved(result)
    columns = [
        result["held_out"]["recall"],
        saved["validation_recall"],
        baselines["token"],
        baselines["layer"],
    ]
    rows = [_row(str(layer), values) for layer, values in enumerate(zip(*columns, strict=True))]
    means = [sum(column) / len(column) for column in columns]
    return [*rows, _row("mean", means)]


def _row(title: str, values: Any) -> str:
    return f"| {title} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def _variant_row(variant: dict[str, Any], saved: bool) -> str:
    rate = variant.get("learning_rate") or RECIPES[variant["recipe"]].learning_rate
    perplexity = variant.get("perplexity_predicted")
    cells = (
        f"`{variant['name']}`{', saved' if saved else ''}",
        variant["recipe"],
        f"{rate:g}",
        "yes" if variant.get("token_residual") else "no",
        f"{variant['seconds']:.0f}",
        str(variant["steps"]),
        f"{variant['tokens_seen'] / 1e6:.0f} M",
        f"{variant['mean_validation_recall']:.3f}",
        f"{variant['validation_recall'][0]:.3f}",
        f"{perplexity:.2f}" if perplexity else "not measured",
    )
    return f"| {' | '.join(cells)} |"

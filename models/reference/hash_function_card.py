"""The model card's numbers about the hash function, from the files that its training wrote. Measures nothing."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from actors.predictor.hash_function import read_spec
from models.reference.train_hash_function import RESULT_FILE

CPU_FILE = "evaluation_cpu.json"  # what `python -m actors.predictor.evaluate` wrote on a CPU, in float32
FORMS = {
    "paper": "The paper's network: embeddings of the model → fully connected, $compressed_size → $lstm_layers LSTM layers of "
    "$hidden_size → causal SparseMax attention, added to what it reads → one head per layer.",
    "filters": "Its network is not the paper's: embeddings of the model → fully connected, $compressed_size, and two gated "
    "layers, which serving looks up by token id → $blocks blocks, $hidden_size wide, of gated filters over the tokens before "
    "($taps taps, and exponential averages with half-lives of $half_lives tokens) and feed-forward layers → one head per "
    "layer, which reads both.",
}
RESIDUAL_FORM = " Unlike the paper's, its heads also read the compressed embedding (`token_residual`)."


def hash_function_values(folder: Path) -> dict[str, str]:
    """Fields of card.md.in for the hash function in `folder`."""
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    scores = json.loads((folder / CPU_FILE).read_text(encoding="utf-8"))
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    exact, predicted = scores["perplexity_exact"], scores["perplexity_predicted"]
    saved, baselines = _saved(result), result["validation_baselines"]
    return {
        "hf_bytes": f"{(folder / 'hash_function.safetensors').stat().st_size / 1e6:.1f} MB",
        "hf_form": _form(asdict(read_spec(folder))),
        "hf_tokens": f"{scores['num_tokens']:,}",
        "hf_recall_rows": "\n".join(_recall_rows(scores["recall"], saved, baselines)),
        "hf_recall_2k": f"{_mean(scores['recall_2k']):.3f}",
        "hf_calibration_rows": "\n".join(_calibration_rows(scores["calibration"])),
        "hf_exact": f"{exact:.3f}",
        "hf_predicted": f"{predicted:.3f}",
        "hf_ratio": f"{predicted / exact:.4f}",
        "hf_ms": f"{scores['ms_per_512_tokens']:.0f}",
        "hf_threads": str(scores["torch_threads"]),
        "hf_verdict": _verdict(saved["validation_recall"], baselines["token"]),
        "hf_saved": result["saved"],
        "hf_batch": str(training["options"]["batch_size"]),
        "hf_variant_rows": "\n".join(
            _variant_row(variant, variant is saved) for variant in result["variants"]
        ),
    }


def _form(spec: dict[str, Any]) -> str:
    shown = {**spec, "half_lives": ", ".join(f"{life:g}" for life in spec["half_lives"])}
    residual = RESIDUAL_FORM if spec["token_residual"] else ""
    return Template(FORMS[spec["network"]]).substitute(shown) + residual


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


def _recall_rows(held_out: list[float], saved: dict[str, Any], baselines: dict[str, Any]) -> list[str]:
    columns = [held_out, saved["validation_recall"], baselines["token"], baselines["layer"]]
    rows = [_row(str(layer), values) for layer, values in enumerate(zip(*columns, strict=True))]
    return [*rows, _row("mean", [_mean(column) for column in columns])]


def _calibration_rows(scores: dict[str, list[float]]) -> list[str]:
    names = ("weight_error_uncalibrated", "weight_error", "use_ece_uncalibrated", "use_ece")
    columns = zip(*(scores[name] for name in names), strict=True)
    return [_row(str(layer), values) for layer, values in enumerate(columns)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _row(title: str, values: Any) -> str:
    return f"| {title} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def _variant_row(variant: dict[str, Any], saved: bool) -> str:
    perplexity = variant.get("perplexity_predicted")
    cells = (
        f"`{variant['name']}`{', saved' if saved else ''}",
        f"{variant['network']}{', token residual' if variant['token_residual'] else ''}",
        variant["objective"],
        f"{variant['learning_rate']:g}",
        f"{variant['seconds']:.0f}",
        str(variant["steps"]),
        f"{variant['tokens_seen'] / 1e6:.1f} M",
        f"{variant['mean_validation_recall']:.3f}",
        f"{variant['validation_recall'][0]:.3f}",
        f"{perplexity:.2f}" if perplexity else "not measured",
    )
    return f"| {' | '.join(cells)} |"

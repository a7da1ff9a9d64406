"""How long does the hash function take on the CPU, for a prompt, for several at once, and for one generated token?

Random weights, which take the same time as trained ones but for SparseMax (fewer rounds when attention is sharp).
Beside each prompt stands what its recurrence alone must take: the LSTM's recurrent matrices times one vector per
token, at this machine's rate for exactly that. Not measured: tokenizing, the table bus.

    python -m benchmarks.hash_function [--threads 1] [--hidden 256] [--layers 6] [--experts 32] [--top-k 4]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from actors.predictor.hash_function import HashFunctionState, load_hash_function, step_together
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from actors.predictor.predictor import HashFunctionPredictor
from benchmarks.conditions import conditions
from common.config import REFERENCE_MODEL

TOKENS = 512
EMBEDDING_SIZE = 192


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--trained", action="store_true", help="the reference model's own, instead of a random one"
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=6144)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make_function(arguments: argparse.Namespace) -> HashFunction:
    if arguments.trained:
        return load_hash_function(REFERENCE_MODEL / "hash_function", REFERENCE_MODEL)
    torch.manual_seed(0)
    spec = HashFunctionSpec(
        model_fingerprint="random",
        embedding_key="random",
        vocab_size=arguments.vocab,
        embedding_size=EMBEDDING_SIZE,
        num_layers=arguments.layers,
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        weight_rule=WeightRule(sum=1.0),
        hidden_size=arguments.hidden,
    )
    function = HashFunction(spec, torch.randn(arguments.vocab, EMBEDDING_SIZE)).requires_grad_(False).eval()
    function.compress_vocabulary()
    return function


def median_ms(call: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median and spread (largest minus smallest) of `runs` calls after one to warm up."""
    call()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times), max(times) - min(times)


def recurrence_ms(function: HashFunction, runs: int) -> float:
    """The recurrent matrices of all LSTM layers times one vector, once per token of one prompt."""
    matrices = [
        function.lstm.get_parameter(f"weight_hh_l{layer}") for layer in range(function.spec.lstm_layers)
    ]
    vector = torch.randn(function.spec.hidden_size)

    def multiply() -> None:
        for _ in range(TOKENS):
            for matrix in matrices:
                torch.mv(matrix, vector)

    return median_ms(multiply, runs)[0]


def measure(function: HashFunction, batches: list[int], runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds, by what was measured and the number of sequences."""
    generator = torch.Generator().manual_seed(0)
    vocab, results = function.spec.vocab_size, {}
    predictor = HashFunctionPredictor(function)
    for batch in batches:
        prompts = torch.randint(vocab, (batch, TOKENS), generator=generator).tolist()
        median, spread = median_ms(lambda prompts=prompts: predictor.predict(prompts), runs)  # type: ignore[misc]
        results[f"prompts_{batch}"] = {"ms": median, "spread_ms": spread, "ms_per_prompt": median / batch}
        states = [HashFunctionState(function) for _ in range(batch)]
        for state, prompt in zip(states, prompts, strict=True):
            state.prefill(prompt)
        median, spread = median_ms(lambda states=states: step_together(states, [1] * len(states)), 10 * runs)  # type: ignore[misc]
        results[f"step_{batch}"] = {"ms": median, "spread_ms": spread}
    return results


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    function = make_function(arguments)
    limit_ms = recurrence_ms(function, arguments.runs)
    results = measure(function, arguments.batch, arguments.runs)
    print(
        f"{TOKENS} tokens a prompt, {arguments.threads} thread(s), recurrence alone {limit_ms:.1f} ms a prompt"
    )
    for name, result in results.items():
        print(f"{name:<12} {result['ms']:8.2f} ms  (spread {result['spread_ms']:.2f})")
    record = {
        "benchmark": "hash_function",
        "results": results,
        "recurrence_ms": limit_ms,
        "conditions": conditions(**vars(arguments)),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

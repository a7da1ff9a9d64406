"""How long does the hash function take on the CPU, for a prompt, for several at once, and for one generated token?

The paper's network and ours, about equally large. Random weights, which take the same time as trained ones but for
SparseMax (fewer rounds when attention is sharp). Beside each network stands what its matrix products alone take for one
prompt on this machine: for the paper's the recurrent ones, one vector at a time; for ours all of them, the prompt at
once. Not measured: tokenizing, the table bus, and what a prediction is worth, see `benchmarks.prediction`.

    python -m benchmarks.hash_function [--threads 1] [--layers 6] [--experts 32] [--top-k 4]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.predictor.filter_network import FilterNetwork
from actors.predictor.hash_function import HashFunctionState, step_together
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from actors.predictor.paper_network import PaperNetwork
from actors.predictor.predictor import HashFunctionPredictor
from benchmarks.conditions import conditions

TOKENS = 512
EMBEDDING_SIZE = 192
NETWORKS: dict[str, dict[str, Any]] = {
    "paper": {"network": "paper"},
    "filters": {"network": "filters", "compressed_size": 192, "hidden_size": 192},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=6144)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make_function(network: str, arguments: argparse.Namespace) -> HashFunction:
    """With its vocabulary encoded, as it serves."""
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
        **NETWORKS[network],
    )
    function = HashFunction(spec, torch.randn(arguments.vocab, EMBEDDING_SIZE)).requires_grad_(False).eval()
    function.encode_vocabulary()
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


def products_ms(function: HashFunction, runs: int) -> float:
    """The products that nothing can spare for one prompt."""
    network = function.network
    if isinstance(network, FilterNetwork):
        linear = [function.heads, network.enter, *_linear(network.filters), *_linear(network.feed_forward)]
        factors = [(torch.randn(TOKENS, each.in_features), each.weight.T) for each in linear]
        repeats = 1
    else:
        assert isinstance(network, PaperNetwork)
        names = [f"weight_hh_l{layer}" for layer in range(network.lstm.num_layers)]
        vector = torch.randn(1, network.lstm.hidden_size)
        factors = [(vector, network.lstm.get_parameter(name).T) for name in names]
        repeats = TOKENS

    def multiply() -> None:
        for _ in range(repeats):
            for left, right in factors:
                torch.mm(left, right)

    return median_ms(multiply, runs)[0]


def _linear(parts: nn.Module) -> list[nn.Linear]:
    return [module for module in parts.modules() if isinstance(module, nn.Linear)]


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
    networks = {}
    for network in arguments.networks:
        function = make_function(network, arguments)
        num_parameters = sum(parameter.numel() for parameter in function.parameters())
        limit_ms = products_ms(function, arguments.runs)
        results = measure(function, arguments.batch, arguments.runs)
        print(f"{network}: {num_parameters} parameters, products alone {limit_ms:.1f} ms a prompt")
        for name, result in results.items():
            print(f"{name:<12} {result['ms']:8.2f} ms  (spread {result['spread_ms']:.2f})")
        networks[network] = {"parameters": num_parameters, "products_ms": limit_ms, "results": results}
    record = {
        "benchmark": "hash_function",
        "tokens": TOKENS,
        "networks": networks,
        "conditions": conditions(**vars(arguments)),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

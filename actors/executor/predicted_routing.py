"""routing=predicted: hash tables route prompts, and the same hash function, run here, routes generated tokens.

SiDA-MoE, arXiv 2310.18859, algorithm 1, continued past the prompt: the published system does not generate.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np

from actors.executor.passes import Routing, to_routing
from actors.executor.sequence import PromptChunk, Sequence
from actors.predictor.hash_function import HashFunctionState, step_together
from actors.predictor.network import HashFunction


class PredictedRouting:
    """Routes passes by one hash function. Used on the engine's thread alone."""

    def __init__(self, hash_function: HashFunction) -> None:
        self._function = hash_function

    def of_prompt(self, chunk: PromptChunk) -> Routing:
        """By the published table if it came in time, else by one predicted here: routing cannot wait or do without."""
        sequence = chunk.sequence
        if sequence.hash_function is None:
            sequence.hash_function = HashFunctionState(self._function)
            sequence.routing_table = sequence.hash_function.prefill(sequence.request.prompt_token_ids)
            if sequence.table is not None:
                sequence.routing_table = sequence.table
        table = sequence.routing_table
        assert table is not None
        rows = slice(chunk.start, chunk.stop)
        return to_routing(table.expert_ids[:, rows], table.weights[:, rows])

    def of_source(self, chunk: PromptChunk) -> Routing:
        """`of_prompt` for an encoder, which reads a prompt at once and generates nothing."""
        sequence = chunk.sequence
        table = sequence.table
        if table is None:
            table = HashFunctionState(self._function).prefill(sequence.request.prompt_token_ids)
        return to_routing(table.expert_ids, table.weights)

    def of_batch(self, batch: SequenceOf[Sequence]) -> Routing:
        """For the last generated token of each sequence."""
        states = [sequence.hash_function for sequence in batch if sequence.hash_function is not None]
        steps = step_together(states, [sequence.generated[-1] for sequence in batch])
        ids, weights = zip(*steps, strict=True)  # [layers, top_k] each
        return to_routing(np.stack(ids, axis=1), np.stack(weights, axis=1))

"""Predictors of decoding, on routing that is small enough to say what they must name."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.predictor.decoding import (
    ActivationTracePredictor,
    DecodingPredictor,
    FrequencyPredictor,
    NoPredictor,
    OraclePredictor,
    by_proximity,
    count_activations,
)

NUM_LAYERS, NUM_EXPERTS = 3, 4


def one_token(*experts: int) -> NDArray[np.int64]:
    """[1 token, layers, 1 choice]: the expert of each layer."""
    return np.array(experts).reshape(1, -1, 1)


def run(predictor: DecodingPredictor, passes: Sequence[NDArray[np.int64]]) -> None:
    for ids in passes:
        for layer in range(ids.shape[1]):
            predictor.observe(layer, ids[:, layer])


def test_nobody_is_named_without_a_predictor() -> None:
    predictor = NoPredictor(NUM_LAYERS, NUM_EXPERTS)
    run(predictor, [one_token(0, 1, 2)])
    assert predictor.predict(1).shape == (2, NUM_EXPERTS)
    assert not predictor.predict(0).any()


def test_frequency_names_each_layers_share_of_activations() -> None:
    ids = np.concatenate([one_token(0, 1, 2), one_token(0, 1, 3)])
    counts = count_activations(ids, NUM_EXPERTS)
    assert counts.tolist() == [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 1]]
    predictor = FrequencyPredictor(counts)
    assert predictor.predict(1).tolist() == [[0, 1, 0, 0], [0, 0, 0.5, 0.5]]


def test_a_layer_that_was_never_seen_names_nobody() -> None:
    assert not FrequencyPredictor(np.zeros((1, 2), np.int64)).predict(0).any()


def test_nearer_layers_come_first() -> None:
    shares = np.ones((3, 1), np.float32)
    assert by_proximity(shares, num_layers=4).ravel().tolist() == [1, 0.75, 0.5]


def test_the_oracle_names_the_running_pass_until_its_last_layer_is_routed() -> None:
    passes = [one_token(0, 1, 2), one_token(3, 3, 3)]
    predictor = OraclePredictor(passes, NUM_EXPERTS)
    assert predictor.predict(0).argmax(axis=1).tolist() == [0, 1, 2]
    run(predictor, passes[:1])
    assert predictor.predict(1).argmax(axis=1).tolist() == [3, 3]
    run(predictor, passes[1:])


def trained(*requests: Sequence[NDArray[np.int64]], capacity: int = 8) -> ActivationTracePredictor:
    predictor = ActivationTracePredictor(NUM_LAYERS, NUM_EXPERTS, capacity)
    for request in requests:
        run(predictor, request)
        predictor.end_request()
    return predictor


def test_activation_trace_names_what_the_most_similar_request_used() -> None:
    predictor = trained([one_token(0, 1, 2)] * 3, [one_token(0, 2, 3), one_token(1, 2, 3)])
    assert not predictor.predict(0).any(), "nothing of the request is known yet"
    predictor.observe(0, np.array([[0]]))
    assert predictor.predict(1).argmax(axis=1).tolist() == [1, 2], (
        "the first: all of its tokens chose expert 0"
    )
    predictor.observe(1, np.array([[2]]))
    assert predictor.predict(2).tolist() == [[0, 0, 0, 1]], "the second: 1.5 of two layers' shares match"


def test_activation_trace_forgets_the_request_that_ended() -> None:
    predictor = trained([one_token(0, 1, 2)])
    predictor.end_request()
    assert predictor.num_entries == 1, "a request without a pass is none"
    assert not predictor.predict(0).any()


def test_a_full_collection_gives_up_the_most_similar_entry() -> None:
    predictor = trained([one_token(0, 0, 0)], [one_token(1, 1, 1)], [one_token(1, 1, 2)], capacity=2)
    assert predictor.num_entries == 2
    predictor.observe(0, np.array([[1]]))
    assert predictor.predict(2).tolist() == [[0, 0, 1, 0]]
    predictor.end_request()
    predictor.observe(0, np.array([[0]]))
    assert predictor.predict(1).tolist() == [[1, 0, 0, 0]] * 2


def test_a_request_that_ended_within_a_pass_is_matched_by_what_it_has() -> None:
    predictor = trained([one_token(0, 1, 2)])
    predictor.observe(0, np.array([[3]]))
    predictor.end_request()  # an entry with one layer
    predictor.observe(0, np.array([[3]]))
    predictor.observe(1, np.array([[1]]))
    assert predictor.predict(2).shape == (1, NUM_EXPERTS)


@pytest.mark.parametrize("num_entries", [1, 5])
def test_cosines_are_those_of_the_layers_seen(num_entries: int) -> None:
    random = np.random.default_rng(num_entries)
    requests = [[random.integers(NUM_EXPERTS, size=(20, NUM_LAYERS, 1))] for _ in range(num_entries)]
    predictor = trained(*requests)
    running = random.integers(NUM_EXPERTS, size=(5, NUM_LAYERS, 1))
    for layer in range(NUM_LAYERS - 1):
        predictor.observe(layer, running[:, layer])
        seen = slice(layer + 1)
        own = count_activations(running, NUM_EXPERTS)[seen].ravel()
        others = [count_activations(request[0], NUM_EXPERTS) for request in requests]
        cosines = [float(own @ each[seen].ravel() / np.linalg.norm(each[seen])) for each in others]
        expected = others[int(np.argmax(cosines))][layer + 1 :] / 20
        assert np.allclose(predictor.predict(layer + 1), expected)

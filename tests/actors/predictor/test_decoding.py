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
    most_wanted,
)

NUM_LAYERS, NUM_EXPERTS = 3, 4


def one_token(*experts: int) -> NDArray[np.int64]:
    """[1 token, layers, 1 choice]: the expert of each layer."""
    return np.array(experts).reshape(1, -1, 1)


def run(
    predictor: DecodingPredictor, passes: Sequence[NDArray[np.int64]], request: str = "r", end: bool = False
) -> None:
    for ids in passes:
        predictor.begin_pass([request])
        for layer in range(ids.shape[1]):
            predictor.observe(layer, [ids[:, layer]], None)
    if end:
        predictor.end_request(request)


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


def test_the_most_wanted_absent_experts_come_first_and_take_no_slot_of_what_is_wanted_more() -> None:
    priority = np.array([[0.5, 0.2, 0.0, 0.3], [0.1, 0.4, 0.0, 0.0]], np.float32)
    absent = np.array([[False, True, True, True], [True, True, True, True]])
    wanted = list(most_wanted(priority, absent, num_slots=2, most=4))
    assert wanted == [(1, 1, [1]), (0, 3, [0, 3]), (1, 0, [0, 1])], "expert 1 of the first layer has no slot"
    assert list(most_wanted(priority, absent, num_slots=4, most=2)) == wanted[:2]
    assert not list(most_wanted(priority, np.zeros_like(absent), num_slots=2, most=4))


def test_the_oracle_names_the_running_pass_until_its_last_layer_is_routed() -> None:
    passes = [one_token(0, 1, 2), one_token(3, 3, 3)]
    predictor = OraclePredictor(passes, NUM_EXPERTS)
    assert predictor.predict(0).argmax(axis=1).tolist() == [0, 1, 2]
    run(predictor, passes[:1])
    assert predictor.predict(1).argmax(axis=1).tolist() == [3, 3]
    run(predictor, passes[1:])


def trained(*requests: Sequence[NDArray[np.int64]], capacity: int = 8) -> ActivationTracePredictor:
    """With the passes of some requests, the one after the other; the next one has begun."""
    predictor = ActivationTracePredictor(NUM_LAYERS, NUM_EXPERTS, capacity)
    for request in requests:
        run(predictor, request, end=True)
    predictor.begin_pass(["r"])
    return predictor


def observe(predictor: ActivationTracePredictor, layer: int, *experts_of_requests: int) -> None:
    predictor.observe(layer, [np.array([[expert]]) for expert in experts_of_requests], None)


def test_activation_trace_names_what_the_most_similar_request_used() -> None:
    predictor = trained([one_token(0, 1, 2)] * 3, [one_token(0, 2, 3), one_token(1, 2, 3)])
    assert not predictor.predict(0).any(), "nothing of the request is known yet"
    observe(predictor, 0, 0)
    assert predictor.predict(1).argmax(axis=1).tolist() == [1, 2], (
        "the first: all of its tokens chose expert 0"
    )
    observe(predictor, 1, 2)
    assert predictor.predict(2).tolist() == [[0, 0, 0, 1]], "the second: 1.5 of two layers' shares match"


def test_activation_trace_matches_every_request_of_a_batch_by_itself() -> None:
    predictor = trained([one_token(0, 1, 2)], [one_token(1, 2, 3)])
    predictor.begin_pass(["a", "b", "c", "d"])
    observe(predictor, 0, 0, 1, 1, 1)
    assert predictor.predict(1).tolist() == [[0, 0.25, 0.75, 0], [0, 0, 0.25, 0.75]]
    predictor.begin_pass(["new", "a"])
    assert predictor.predict(2).tolist() == [[0, 0, 0.5, 0]], (
        "nothing is known of the new one, a is as it was"
    )


def test_activation_trace_tells_requests_apart_when_they_end() -> None:
    predictor = trained()
    predictor.begin_pass(["a", "b"])
    for layer, experts in enumerate([(0, 1), (0, 1), (0, 1)]):
        observe(predictor, layer, *experts)
    predictor.end_request("b")
    predictor.end_request("never seen")
    assert predictor.num_entries == 1
    predictor.begin_pass(["a"])
    assert predictor.predict(1).tolist() == [[0, 1, 0, 0]] * 2, "all that it can match is b"
    predictor.end_request("a")
    predictor.begin_pass(["b"])
    assert not predictor.predict(0).any(), "another request of that name begins anew"


def test_activation_trace_forgets_the_request_that_ended() -> None:
    predictor = trained([one_token(0, 1, 2)])
    predictor.end_request("r")
    assert predictor.num_entries == 1, "a request without a pass is none"
    predictor.begin_pass(["r"])
    assert not predictor.predict(0).any()


def test_a_full_collection_gives_up_the_most_similar_entry() -> None:
    predictor = trained([one_token(0, 0, 0)], [one_token(1, 1, 1)], [one_token(1, 1, 2)], capacity=2)
    assert predictor.num_entries == 2
    observe(predictor, 0, 1)
    assert predictor.predict(2).tolist() == [[0, 0, 1, 0]]
    predictor.end_request("r")
    predictor.begin_pass(["r"])
    observe(predictor, 0, 0)
    assert predictor.predict(1).tolist() == [[1, 0, 0, 0]] * 2


def test_a_request_that_ended_within_a_pass_is_matched_by_what_it_has() -> None:
    predictor = trained([one_token(0, 1, 2)])
    observe(predictor, 0, 3)
    predictor.end_request("r")  # an entry with one layer
    predictor.begin_pass(["r"])
    observe(predictor, 0, 3)
    observe(predictor, 1, 1)
    assert predictor.predict(2).shape == (1, NUM_EXPERTS)


@pytest.mark.parametrize("num_entries", [1, 5])
def test_cosines_are_those_of_the_layers_seen(num_entries: int) -> None:
    random = np.random.default_rng(num_entries)
    requests = [[random.integers(NUM_EXPERTS, size=(20, NUM_LAYERS, 1))] for _ in range(num_entries)]
    predictor = trained(*requests)
    running = random.integers(NUM_EXPERTS, size=(5, NUM_LAYERS, 1))
    for layer in range(NUM_LAYERS - 1):
        predictor.observe(layer, [running[:, layer]], None)
        seen = slice(layer + 1)
        own = count_activations(running, NUM_EXPERTS)[seen].ravel()
        others = [count_activations(request[0], NUM_EXPERTS) for request in requests]
        cosines = [float(own @ each[seen].ravel() / np.linalg.norm(each[seen])) for each in others]
        expected = others[int(np.argmax(cosines))][layer + 1 :] / 20
        assert np.allclose(predictor.predict(layer + 1), expected)

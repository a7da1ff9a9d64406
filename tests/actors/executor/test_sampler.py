"""Choosing tokens: greedy, seeded, cut, and the log probabilities that are reported."""

import torch

from actors.executor.sampler import Sampler, sample
from common.generation import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def draws(count: int, **params: float | int) -> list[int]:
    sampler = Sampler(SamplingParams(**{"seed": 7, **params}))  # type: ignore[arg-type]
    return [sampler.draw(LOGITS) for _ in range(count)]


def test_temperature_zero_takes_the_most_likely() -> None:
    assert sample([Sampler(SamplingParams(temperature=0.0))], LOGITS[None]) == [(1, None)]


def test_same_seed_draws_the_same_tokens() -> None:
    assert draws(50) == draws(50)
    assert draws(50) != draws(50, seed=8)


def test_draws_follow_the_distribution() -> None:
    counts = torch.bincount(torch.tensor(draws(4000)), minlength=5) / 4000
    assert (counts - LOGITS.softmax(0)).abs().max() < 0.03


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(draws(300, top_k=2)) == {1, 2}
    assert set(draws(300, top_p=0.6)) == {1}
    assert set(draws(300, temperature=0.01)) == {1}


def test_logprobs_are_the_models_own_whatever_the_temperature() -> None:
    sampler = Sampler(SamplingParams(temperature=0.3, top_k=1, seed=0, logprobs=2))
    [(token_id, logprobs)] = sample([sampler], LOGITS[None])
    expected = LOGITS.log_softmax(0)
    assert logprobs is not None
    assert (token_id, logprobs.token_id) == (1, 1)
    assert logprobs.logprob == float(expected[1])
    assert logprobs.top == ((1, float(expected[1])), (2, float(expected[2])))


def test_a_neighbour_in_the_batch_changes_nothing() -> None:
    params = SamplingParams(seed=3)
    alone, beside = Sampler(params), Sampler(params)
    other = Sampler(SamplingParams(seed=4))
    for _ in range(20):
        [(token_alone, _)] = sample([alone], LOGITS[None])
        (_, (token_beside, _)) = sample([other, beside], LOGITS.expand(2, -1))
        assert token_alone == token_beside

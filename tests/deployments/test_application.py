"""The whole application over HTTP: every real component, tiny models, the library's own output as the measure."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from common.own_experts.switch_transformers import SwitchTransformersForSequenceClassification
from common.tokenizer import load_tokenizer
from deployments.prompts import PromptReader
from tests.actors.executor.harness import PROMPTS, library_greedy, library_model
from tests.deployments.application import NUM_TOKENS, complete, running, token_names, wait_until
from tests.deployments.fakes import VOCAB_SIZE
from tests.tiny_models import NUM_EXPERTS, make_classifier_checkpoint

pytestmark = pytest.mark.cluster


def test_serves_the_librarys_tokens_to_concurrent_clients(exact: httpx.Client, exact_folder: Path) -> None:
    reference = library_model(exact_folder)
    expected = [library_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = list(clients.map(lambda prompt: complete(exact, prompt), PROMPTS))
    name = PromptReader(load_tokenizer(exact_folder), VOCAB_SIZE, context_limit=100).token_text
    assert [token_names(answer) for answer in answers] == [list(map(name, tokens)) for tokens in expected]


def test_prediction_reaches_the_executor_through_redis(exact: httpx.Client) -> None:
    def tables() -> dict[str, int]:
        counts: dict[str, int] = exact.get("/v1/experts").json()["executors"][0]["hash_tables"]
        return counts

    def one_arrived() -> bool:
        usage = complete(exact, list(range(3, 120)), max_tokens=64)["usage"]["experts"]
        return usage["predicted"] > 0 and tables()["on_time"] + tables()["late"] > 0

    wait_until(one_arrived)
    layers = exact.get("/v1/experts").json()["executors"][0]["layers"]
    assert all(0 < layer["predictor_recall"] < 1 for layer in layers)
    assert tables()["unusable"] == 0


def test_what_happens_can_be_watched(exact: httpx.Client) -> None:
    timings = complete(exact, PROMPTS[0], timings=True)["usage"]["timings"]
    assert min(timings["queue_ms"], timings["prefill_ms"], timings["decode_ms"]) > 0
    names = {family.name: family for family in text_string_to_metric_families(exact.get("/metrics").text)}
    samples = names["sida_generation_tokens"].samples
    assert len(samples) == 1 and samples[0].value >= NUM_TOKENS
    assert names["sida_expert_store_bytes"].samples[0].value > 0
    ended = {
        sample.labels.get("finished_reason"): sample.value for sample in names["sida_request_success"].samples
    }
    assert ended["length"] >= 1
    (executor,) = exact.get("/v1/experts/live").json()["executors"]
    assert executor["replica"] == samples[0].labels["replica"]
    assert {len(row) for row in executor["experts"]} == {NUM_EXPERTS}
    assert set("".join(executor["experts"])) & set("hijklm"), "the request used some"
    assert "<title>sida-serve</title>" in exact.get("/").text


def test_classifies_the_texts_of_concurrent_clients(serve_url: str, tmp_path: Path) -> None:
    folder = make_classifier_checkpoint(tmp_path, ("no", "perhaps", "yes"))
    model = SwitchTransformersForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    with running(serve_url, "classifier", folder, model_name="tiny", expert_slots=2) as client:

        def classify(number: int) -> dict[str, Any]:
            texts = [PROMPTS[number], PROMPTS[0]]
            answer: dict[str, Any] = client.post("/classify", json={"input": texts}).json()
            return answer

        with ThreadPoolExecutor(len(PROMPTS)) as clients:
            answers = list(clients.map(classify, range(len(PROMPTS))))
    for number, answer in enumerate(answers):
        for judged, expected in zip(answer["data"], (logits[number], logits[0]), strict=True):
            assert judged["probs"] == pytest.approx(expected.softmax(0).tolist(), abs=1e-4)
            assert judged["label"] == ("no", "perhaps", "yes")[int(expected.argmax())]

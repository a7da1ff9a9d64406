"""From token ids to a table on a real server, several requests at a time."""

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest

from actors.predictor.network import HashFunction
from actors.predictor.predictor import HashFunctionPredictor
from actors.predictor.publisher import TablePublisher
from common.errors import EngineStoppedError, TableBusError, VocabularyError
from common.hash_table import HashTable
from common.table_bus import RedisTableBus


class CountingPredictor(HashFunctionPredictor):
    def __init__(self, function: HashFunction) -> None:
        super().__init__(function)
        self.batches: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def predict(self, prompts: Sequence[Sequence[int]]) -> list[HashTable]:
        self.may_go_on.wait(timeout=20)
        self.batches.append(len(prompts))
        return super().predict(prompts)


@pytest.fixture
def predictor(function: HashFunction) -> CountingPredictor:
    return CountingPredictor(function)


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[RedisTableBus]:
    async def resolve() -> str:
        return valkey_url

    bus = RedisTableBus(resolve, app=f"publisher-{uuid.uuid4().hex}")
    yield bus
    await bus.close()


@pytest.fixture
async def publisher(predictor: CountingPredictor, bus: RedisTableBus) -> AsyncIterator[TablePublisher]:
    publisher = TablePublisher(predictor, bus, max_batch=8)
    yield publisher
    await publisher.stop()


async def test_a_waiting_executor_gets_the_table_of_its_request(
    publisher: TablePublisher, bus: RedisTableBus, function: HashFunction
) -> None:
    prompts = {f"request-{n}": list(range(1, 3 + 4 * n)) for n in range(6)}
    waiting = {each: asyncio.create_task(bus.fetch(each, timeout_s=20)) for each in prompts}
    await asyncio.gather(*(publisher.publish(each, tokens) for each, tokens in prompts.items()))
    for each, tokens in prompts.items():
        table = await waiting[each]
        assert table is not None
        (expected,) = HashFunctionPredictor(function).predict([tokens])
        assert table.expert_ids.tolist() == expected.expert_ids.tolist()
    assert publisher.num_published == 6


async def test_requests_that_come_together_are_predicted_together(
    publisher: TablePublisher, predictor: CountingPredictor
) -> None:
    predictor.may_go_on.clear()
    first = asyncio.create_task(publisher.publish("first", [1, 2]))
    while publisher._queue.empty() and not first.done():  # until the worker has taken it
        others = [asyncio.create_task(publisher.publish(f"other-{n}", [1, 2, 3])) for n in range(20)]
        await asyncio.sleep(0)
    predictor.may_go_on.set()
    await asyncio.gather(first, *others)
    assert sum(predictor.batches) == 21
    assert max(predictor.batches) == 8
    assert len(predictor.batches) <= 4


async def test_a_bad_prompt_fails_alone(publisher: TablePublisher, bus: RedisTableBus) -> None:
    results = await asyncio.gather(
        publisher.publish("good", [1, 2]),
        publisher.publish("bad", [1, 10**6]),
        publisher.publish("fine", [3]),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), VocabularyError, type(None)]
    assert await bus.fetch("fine", timeout_s=0) is not None
    assert await bus.fetch("bad", timeout_s=0) is None


async def test_a_dead_bus_is_an_error_of_the_request_only(predictor: CountingPredictor) -> None:
    async def resolve() -> str:
        return "redis://127.0.0.1:1/0"

    publisher = TablePublisher(predictor, RedisTableBus(resolve))
    for _ in range(2):
        with pytest.raises(TableBusError):
            await publisher.publish("request", [1, 2])
    await publisher.stop()


async def test_stopping_fails_what_waits_and_can_be_repeated(
    predictor: CountingPredictor, bus: RedisTableBus
) -> None:
    publisher = TablePublisher(predictor, bus, max_batch=1)
    predictor.may_go_on.clear()
    waiting = [asyncio.create_task(publisher.publish(f"request-{n}", [1])) for n in range(3)]
    await asyncio.sleep(0)
    await publisher.stop()
    await publisher.stop()
    predictor.may_go_on.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, EngineStoppedError) for result in results)

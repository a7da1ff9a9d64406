"""The hash table's bytes: exact round trips, and a clear error for everything that is not a table."""

import pickle
from contextlib import suppress

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from common.errors import HashTableError
from common.hash_table import HashTable

SHAPES = st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(1, 3))


@st.composite
def tables(draw: st.DrawFn) -> HashTable:
    shape = draw(SHAPES)
    weights = arrays(np.float16, shape, elements=st.floats(0, 1, width=16))
    return HashTable(
        draw(arrays(np.uint16, shape)), draw(weights), draw(st.text()), draw(st.text()), draw(st.text())
    )


def small_table() -> HashTable:
    ids = np.arange(12, dtype=np.uint16).reshape(2, 3, 2)
    return HashTable(ids, (ids / 12).astype(np.float16), "fingerprint", "hash_function", "1")


def fields_of(table: HashTable) -> dict[str, object]:
    fields: dict[str, object] = msgpack.unpackb(table.to_bytes())
    return fields


@settings(deadline=None)  # shared machines stall
@given(tables())
def test_bytes_give_the_same_table_back(table: HashTable) -> None:
    back = HashTable.from_bytes(table.to_bytes())
    np.testing.assert_array_equal(back.expert_ids, table.expert_ids)
    np.testing.assert_array_equal(back.weights, table.weights)
    assert (back.model_fingerprint, back.predictor, back.predictor_version) == (
        table.model_fingerprint,
        table.predictor,
        table.predictor_version,
    )


@settings(deadline=None)  # shared machines stall
@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_hash_table_error(data: bytes) -> None:
    with pytest.raises(HashTableError):
        HashTable.from_bytes(data)


@settings(deadline=None)  # shared machines stall
@given(st.data())
def test_a_truncated_or_changed_table_never_raises_anything_else(data: st.DataObject) -> None:
    original = small_table().to_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    damaged = data.draw(
        st.sampled_from([original[:position], original[:position] + b"\xff" + original[position + 1 :]])
    )
    with suppress(HashTableError):
        HashTable.from_bytes(damaged)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("format", 2, "format 2, this version reads format 1"),
        ("model", 7, "model is missing"),
        ("expert_ids", b"", "not an array"),
        ("expert_ids", {"dtype": "<u4", "shape": [1, 1, 1], "data": b"1234"}, "not an array of <u2"),
        ("weights", {"dtype": "<f2", "shape": [2, 3, -2], "data": b""}, "no valid shape"),
        ("weights", {"dtype": "<f2", "shape": [2, 3, 2], "data": b"12"}, "2 bytes, its shape"),
        ("weights", {"dtype": "<f2", "shape": [2, 3, 1], "data": bytes(12)}, "must both be"),
        ("expert_ids", {"dtype": "<u2", "shape": [12], "data": bytes(24)}, "must both be"),
    ],
)
def test_each_wrong_field_is_named(field: str, value: object, problem: str) -> None:
    data = msgpack.packb({**fields_of(small_table()), field: value})
    with pytest.raises(HashTableError, match=problem):
        HashTable.from_bytes(data)


def test_a_table_must_fit_model_prompt_and_experts() -> None:
    table = small_table()
    table.check_fits("fingerprint", num_layers=2, num_experts=12, num_tokens=3)
    with pytest.raises(HashTableError, match="made for model 'fingerprint'"):
        table.check_fits("another", 2, 12, 3)
    with pytest.raises(HashTableError, match="2 layers x 3 tokens, expected 2 x 4"):
        table.check_fits("fingerprint", 2, 12, 4)
    with pytest.raises(HashTableError, match="expert 11 named, the model has 11"):
        table.check_fits("fingerprint", 2, 11, 3)


def test_arrays_of_any_byte_order_are_stored_little_endian() -> None:
    ids: NDArray[np.uint16] = np.full((1, 1, 1), 258, dtype=">u2")
    table = HashTable(ids, ids.astype(">f2"), "m", "p", "1")
    assert HashTable.from_bytes(table.to_bytes()).expert_ids[0, 0, 0] == 258


def test_a_table_survives_pickling() -> None:
    table = small_table()
    assert pickle.loads(pickle.dumps(table)).to_bytes() == table.to_bytes()

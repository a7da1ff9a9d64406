from pathlib import Path

import pytest

from common.errors import CheckpointError
from common.tokenizer import load_tokenizer
from tests.deployments.fakes import token_ids, write_tokenizer


def test_loads_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    assert load_tokenizer(str(tmp_path)) is None
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer is not None
    assert tokenizer.encode("ab") == token_ids("ab")


def test_a_damaged_tokenizer_is_an_error_not_an_absent_one(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        load_tokenizer(str(tmp_path))

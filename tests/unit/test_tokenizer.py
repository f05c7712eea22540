"""Tokenizers and end tokens of odd folders: read, or refused with one message."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from llmpq.errors import UserError
from llmpq.model_spec import ASSETS
from llmpq.prompts.tokenizer import end_tokens, load_tokenizer

FROM_CONFIG = SimpleNamespace(eos_token_id=2, vocab_size=1536)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in (ASSETS / "tiny-tales").iterdir():
        if path.suffix == ".json":
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_with_byte_order_marks_give_the_same_tokens(folder, encoding):
    text = "Once upon a time"
    expected = load_tokenizer(folder).encode(text)
    for path in folder.glob("*.json"):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    found = load_tokenizer(folder)
    assert found.encode(text) == expected
    assert found.decode(expected, skip_special_tokens=True) == text
    (folder / "generation_config.json").write_bytes('{"eos_token_id": 7}'.encode(encoding))
    assert end_tokens(folder, FROM_CONFIG) == {7}


def test_a_folder_without_a_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "null", '{"model": 3}', '{"version": []}', "\0" * 99, "[" * 9999],
)
def test_odd_tokenizer_files_are_one_message(folder, name, content):
    (folder / name).write_text(content)
    try:
        found = load_tokenizer(folder)
    except UserError as error:
        assert str(error).startswith(f"{folder}: its tokenizer cannot be loaded: ")
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:  # what transformers does without
        assert found.decode(found.encode("Once"), skip_special_tokens=True) == "Once"
        assert name == "tokenizer_config.json"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{}", {2}),
        ('{"eos_token_id": null}', set()),
        ('{"eos_token_id": 5}', {5}),
        ('{"eos_token_id": [5, 6, 6]}', {5, 6}),
        ('{"eos_token_id": []}', set()),
    ],
)
def test_end_tokens(tmp_path, content, expected):
    assert end_tokens(tmp_path, FROM_CONFIG) == {2}
    (tmp_path / "generation_config.json").write_text(content)
    assert end_tokens(tmp_path, FROM_CONFIG) == expected


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "5", '"text"', "\xff", '{"eos_token_id": 2, "eos_token_id": 3}'),
        *(json.dumps({"eos_token_id": v}) for v in ("2", [1, "2"], 2.5, True, [None], {"a": 1})),
    ],
)
def test_odd_end_tokens_are_refused(tmp_path, content):
    path = tmp_path / "generation_config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"generation_config.json"):
        end_tokens(tmp_path, FROM_CONFIG)


@pytest.mark.parametrize("value", [-1, 1536, [2, 10**9]])
def test_end_tokens_that_the_model_never_gives_are_refused(tmp_path, value):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match="is outside the vocabulary of 1536") as told:
        end_tokens(tmp_path, FROM_CONFIG)
    assert str(path) in str(told.value) and "--ignore-eos" in str(told.value)


def test_an_odd_end_token_of_the_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json: 'eos_token_id' must be a token id"):
        end_tokens(tmp_path, SimpleNamespace(eos_token_id="2"))

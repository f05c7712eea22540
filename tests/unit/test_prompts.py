"""prompts.jsonl: every fault with its line, chats, and requests made one by one."""

import json
import os
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest

from llmpq.errors import UserError
from llmpq.prompts.prompts import Limits, PromptFile, check_prompts
from llmpq.prompts.request import Request

LIMITS = Limits(new_tokens=4, max_positions=10, vocab_size=50)
NESTED = "[" * 500 + "]" * 500
EMBEDDING = '{"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "x"}}'
LINE = '{"id": "ok", "prompt_token_ids": [1]}'
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ["<unk>", "user", "assistant", "system", "hello", "be", "kind"]


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def check(tmp_path: Path, *lines: str, **more: Any) -> PromptFile:
    return check_prompts(write(tmp_path, *lines), None, LIMITS, **more)


def read(tmp_path: Path, *lines: str) -> list[Request]:
    return list(check(tmp_path, *lines).stream())


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a word of `WORDS`."""
    tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    found.chat_template = template
    return found


def chat(tmp_path: Path, *lines: dict[str, Any], tokenizer: Any = None) -> list[Request]:
    path = write(tmp_path, *map(json.dumps, lines))
    return list(check_prompts(path, tokenizer or chat_tokenizer(), LIMITS, chat=True).stream())


def test_requests_keep_order_ids_and_limits(tmp_path):
    found = read(
        tmp_path,
        '{"id": "a", "prompt_token_ids": [1, 2]}',
        "",
        '{"id": 7, "prompt_token_ids": [3], "max_new_tokens": 2}',
    )
    assert found == [Request("a", 0, (1, 2), 4), Request(7, 1, (3,), 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected"),
        ('{"prompt_token_ids": [1]}', "'id' must be"),
        ('{"id": true, "prompt_token_ids": [1]}', "'id' must be"),
        ('{"id": "a"}', "give either"),
        ('{"id": "a", "prompt": "x", "prompt_token_ids": [1]}', "give either"),
        ('{"id": "a", "prompt": "x"}', "no tokenizer"),
        ('{"id": "a", "prompt_token_ids": []}', "at least one token"),
        ('{"id": "a", "prompt_token_ids": [1.5]}', "token ids must be integers, found 1.5"),
        ('{"id": "a", "conversations": []}', "the line has 'conversations', 'id'"),
        (EMBEDDING, "/embeddings': only /v1/chat/completions and /v1/completions are supported"),
        ("Once upon a time", 'expected a line such as {"id": "1", "prompt": "..."}'),
        ("<!DOCTYPE html>", 'expected a line such as {"id": "1", "prompt": "..."}'),
        ("version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the file itself"),
        ('{"id": "a", "prompt_token_ids": [50]}', "outside the vocabulary of 50"),
        ('{"id": "a", "prompt_token_ids": [-1]}', "outside the vocabulary of 50"),
        ('{"id": "a", "prompt_token_ids": [1], "max_new_tokens": 0}', "positive integer"),
        ('{"id": "a", "prompt_token_ids": [1], "max_new_tokens": true}', "positive integer"),
        ('{"id": "a", "prompt_token_ids": [1, 1, 1, 1, 1, 1, 1]}', "10 positions"),
        ('{"id": "ok", "prompt_token_ids": [1]}', "was already used on line 1"),
        ('{"id": "a", "messages": [{"role": "user", "content": "b"}]}', "need a chat template"),
        ('{"id": "b", "id": "c", "prompt_token_ids": [1]}', "the key 'id' occurs twice"),
        ('{"id": "a", "prompt_token_ids": [1], "max_tokens": 2.5}', "'max_tokens' must be a pos"),
        (
            '{"id": "a", "prompt_token_ids": [1], "max_tokens": 2, "max_new_tokens": 3}',
            "'max_new_tokens' is 3 and 'max_tokens' is 2, though they mean the same",
        ),
        ('{"id": "a", "custom_id": "b", "prompt_token_ids": [1]}', "'id' and 'custom_id' differ"),
        ('{"custom_id": "a", "body": "x"}', "'body' must be an object"),
        ('{"custom_id": "a", "url": 3, "body": {}}', "'url' must be a string"),
        ('{"custom_id": "a", "body": {"model": "m"}}', "give either"),
        ('{"id": "\\ud800", "prompt_token_ids": [1]}', "half a character"),
        (f'{{"id": "a", "prompt_token_ids": [1], "max_new_tokens": {NESTED}}}', "positive integer"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, LINE, line)
    assert str(caught.value).count("\n") == 0
    assert f"{tmp_path / 'in.jsonl'}:2: " in str(caught.value)
    assert message in str(caught.value)


def test_all_bad_lines_are_listed_and_a_long_list_is_cut(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, *["{"] * 30)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and ":20: " in lines[19] and "10 more" in lines[20]


def test_other_line_breaks_may_be_inside_a_prompt(tmp_path):
    found = read(
        tmp_path, '{"id": 1, "prompt_token_ids": [5]}', '{"id": "\u2028", "prompt_token_ids": [6]}'
    )
    assert [(r.id, r.prompt) for r in found] == [(1, (5,)), ("\u2028", (6,))]


def test_windows_line_ends_and_a_missing_last_one(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"id": 1, "prompt_token_ids": [5]}\r\n\r\n{"id": 2, "prompt_token_ids": [6]}'
    )
    assert [r.number for r in check_prompts(path, None, LIMITS).stream()] == [0, 1]


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(LINE.encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"in.jsonl:2: not UTF-8 text \(byte 8\)"):
        check_prompts(path, None, LIMITS)


def test_a_file_that_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text("\n \n")
    for name, message in {
        "none": "no such file",
        "": "is a directory",
        "pipe": "is not a regular file",
        "empty": "holds no prompts",
    }.items():
        with pytest.raises(UserError, match=message):
            check_prompts(tmp_path / name, None, LIMITS)


def test_ids_and_lengths_come_from_the_check(tmp_path):
    more = '{"id": 7, "prompt_token_ids": [3, 4], "max_new_tokens": 2}'
    found = check(tmp_path, LINE, "", more)
    assert (found.ids, found.lengths, len(found)) == (["ok", 7], [(1, 4), (2, 2)], 2)


def test_numbers_stay_the_same_when_some_are_done(tmp_path):
    lines = [json.dumps({"id": i, "prompt_token_ids": [i]}) for i in range(6)]
    found = check(tmp_path, *lines)
    assert [(r.id, r.number) for r in found.stream({0, 3, "4", 99})] == [
        (1, 1),
        (2, 2),
        (4, 4),
        (5, 5),
    ]
    assert len(list(found.stream())) == 6  # and it can be streamed again


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ([LINE, "{"], r"in.jsonl:2: changed after it was checked"),
        ([LINE, '{"id": "b", "prompt_token_ids": [3]}'], r"in.jsonl:2: changed after"),
        ([LINE], r"in.jsonl:2: changed after"),
    ],
)
def test_a_file_that_changes_after_the_check_ends_the_run(tmp_path, after, message):
    found = check(tmp_path, LINE, '{"id": "b", "prompt_token_ids": [2]}')
    write(tmp_path, *after)
    requests = found.stream()
    assert next(requests).id == "ok"
    with pytest.raises(UserError, match=message):
        next(requests)


def test_a_file_that_vanishes_after_the_check_is_named(tmp_path):
    found = check(tmp_path, LINE)
    found.path.unlink()
    with pytest.raises(UserError, match="no such file"):
        list(found.stream())


def test_lines_added_after_the_check_wait_for_the_next_run(tmp_path):
    found = check(tmp_path, LINE)
    write(tmp_path, LINE, "{")
    assert [r.id for r in found.stream()] == ["ok"]


def many(tmp_path: Path, count: int, num_tokens: int) -> Path:
    tokens = [5] * num_tokens
    return write(
        tmp_path, *[json.dumps({"id": i, "prompt_token_ids": tokens}) for i in range(count)]
    )


def test_twenty_thousand_prompts_are_made_one_by_one(tmp_path):
    found = check_prompts(many(tmp_path, 20_000, 3), None, LIMITS)
    alive: weakref.WeakSet[Request] = weakref.WeakSet()
    most_alive = 0
    for request in found.stream():
        alive.add(request)
        most_alive = max(most_alive, len(alive))
    assert len(found) == 20_000 and request.number == 19_999
    assert most_alive <= 3


def test_checking_and_streaming_hold_a_fraction_of_the_file(tmp_path):
    path = many(tmp_path, 1_000, 500)
    limits = Limits(new_tokens=1, max_positions=512, vocab_size=50)
    tracemalloc.start()
    num_read = sum(1 for _ in check_prompts(path, None, limits).stream())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_read == 1_000
    assert peak < path.stat().st_size / 3  # and the tokens would take more than the file


def test_the_chat_template_makes_the_tokens(tmp_path):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    found = chat(
        tmp_path,
        {"id": 1, "messages": messages},
        {"id": 2, "prompt": "hello", "max_new_tokens": 1},
        {"id": 3, "prompt_token_ids": [4, 4]},
    )
    words = [[WORDS[t] for t in request.prompt] for request in found]
    assert words[0] == ["system", "be", "kind", "user", "hello", "assistant"]
    assert words[1] == ["user", "hello", "assistant"]
    assert words[2] == ["hello", "hello"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": ["hello"]}, "a message must be"),
        ({"messages": [{"role": "user"}]}, "a message must be"),
        ({"messages": [{"role": "user", "content": [1]}]}, "of a message must be a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
        ({"messages": [{"role": "user", "content": None}]}, "a message must be"),
        ({"messages": [{"role": 1, "content": "a"}]}, "'role' of a message must be a string"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "a string or parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'text' of a part"),
        ({"messages": [{"role": "user", "tool_calls": "a"}]}, "'tool_calls' must be a list"),
        ({"messages": [{"role": "user", "tool_calls": ["a"]}]}, "must have a 'function'"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "b"}, "give either"),
        ({"prompt": "hello " * 9}, "10 positions"),
        ({}, "give either 'prompt' or 'prompt_token_ids' or 'messages'"),
    ],
)
def test_a_bad_chat_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as caught:
        chat(tmp_path, {"id": 0, "prompt": "hello"}, {"id": 1} | line)
    assert str(caught.value).startswith(f"{tmp_path / 'in.jsonl'}:2: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_gets_one_message(tmp_path):
    for tokenizer in (None, chat_tokenizer(template=None)):
        with pytest.raises(UserError, match="no chat template") as caught:
            check_prompts(write(tmp_path, LINE, LINE), tokenizer, LIMITS, chat=True)
        assert "\n" not in str(caught.value)


def test_a_broken_template_is_a_message(tmp_path):
    with pytest.raises(UserError, match="chat template fails .TemplateSyntaxError"):
        chat(tmp_path, {"id": 0, "prompt": "a"}, tokenizer=chat_tokenizer("{% for"))


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    tokenizer = chat_tokenizer("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="chat template fails .SecurityError"):
        chat(tmp_path, {"id": 0, "prompt": "a"}, tokenizer=tokenizer)

"""Files of requests in other forms and from other systems: read alike, or named with what to do."""

import bz2
import gzip
import json
import lzma
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from llmpq.errors import UserError
from llmpq.prompts.prompt_rules import Limits
from llmpq.prompts.prompts import PromptFile, check_prompts

LIMITS = Limits(new_tokens=4, max_positions=64, vocab_size=300, too_long="error")
ROWS = [{"id": "a", "prompt": "Héllo"}, {"id": 7, "prompt": "two\nlines", "max_new_tokens": 2}]
SYSTEM = {"role": "system", "content": "be brief"}


class Bytes:
    """A token for every byte of UTF-8; a chat is its messages and tools, as JSON."""

    chat_template = "(messages, tool_calls, tools)"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode()

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> list[int]:
        if any(message["role"] == "odd" for message in conversation):
            raise ValueError("no such role")
        return self.encode(json.dumps([conversation, options.get("tools")]))


class NoTools(Bytes):
    chat_template = "(messages)"


def check(path: Path, tokenizer: Any = None, limits: Limits = LIMITS, **more: Any) -> PromptFile:
    return check_prompts(path, tokenizer or Bytes(), limits, **more)


def of_lines(tmp_path: Path, *lines: Any, **more: Any) -> PromptFile:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return check(path, **more)


def texts(found: PromptFile) -> list[tuple[Any, str, int]]:
    return [(r.id, bytes(r.prompt).decode(), r.new_tokens) for r in found.stream()]


def chat(found: PromptFile, number: int = 0) -> Any:
    """The messages and tools that a request's template was given."""
    return json.loads(bytes(found.request(number).prompt))


WANTED = [("a", "Héllo", 4), (7, "two\nlines", 2)]
LONG = Limits(new_tokens=4, max_positions=4096, vocab_size=300, too_long="error")
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
TABLE = 'id,prompt,max_tokens\r\na,Héllo,\r\n7,"two\nlines",2\r\n'


# ---- encodings and packing


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("text", [JSONL, json.dumps(ROWS, indent=2), TABLE])
def test_texts_of_any_form_encoding_and_packing(tmp_path, encoding, pack, text):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = tmp_path / "in.txt"
    path.write_bytes(pack((mark + text).encode(encoding)))
    wanted = [(str(i), *rest) for i, *rest in WANTED] if text == TABLE else WANTED
    assert texts(check(path)) == wanted


def test_marks_between_files_that_were_joined(tmp_path):
    path = tmp_path / "in.jsonl"
    line = '\ufeff{"id": %d, "prompt": "x"}\r\n'
    path.write_bytes("".join(line % i for i in range(3)).encode())
    assert check(path).ids == [0, 1, 2]


@pytest.mark.parametrize("text", [JSONL, json.dumps(ROWS), TABLE])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_file_that_is_not_whole(tmp_path, text, pack):
    path = tmp_path / "in.jsonl"
    path.write_bytes(pack(text.encode() * 9)[:-9])
    with pytest.raises(UserError, match="compressed, but incomplete|not valid CSV|JSON array"):
        check(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it first: zstd -d"),
        (b"PK\x03\x04", "zip archive or a workbook"),
        (b"\xd0\xcf\x11\xe0", "old Excel workbook"),
        (b"ARROW1\0\0", "Arrow file"),
        (b"%PDF-1.7", "is a PDF"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path, start, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(start + b"\0" * 99)
    with pytest.raises(UserError, match=message):
        check(path)


def test_one_object_over_several_lines(tmp_path):
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"prompts": ROWS}, indent=1))
    with pytest.raises(UserError, match="one JSON object over several lines; put each request"):
        check(path)
    path.write_text('{"id": 1,\n{"id": 2, "prompt": "a"}\n')  # a line that is torn is that
    with pytest.raises(UserError, match="in.json:1: not valid JSON"):
        check(path)


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1" + b"\0" * 99)
    with pytest.raises(UserError, match="Parquet file, which needs pyarrow .pip install pyarrow"):
        check(path)


@pytest.mark.library("pyarrow")
def test_parquet_with_its_library(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = {"Prompt": ["Héllo", "b"], "more": [b"\xff", b""], "max_tokens": [None, 2]}
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table(rows), path)
    assert texts(check(path)) == [(1, "Héllo", 4), (2, "b", 2)]
    parquet.write_table(pyarrow.table({"words": ["x"]}), path)
    with pytest.raises(UserError, match="has no column 'prompt' or 'text'; it has words"):
        check(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        check(path)


# ---- tables and arrays


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("column", ["prompt", "text", "Text", " Prompt "])
def test_a_table_is_known_by_its_columns(tmp_path, delimiter, column):
    path = tmp_path / "in"
    rows = [["x", column, "note"], ["1", f'"a{delimiter}""b"""', "n"], [], ["2", "c", ""]]
    path.write_text("\n".join(delimiter.join(row) for row in rows))
    found = check(path)
    assert texts(found) == [(1, f'a{delimiter}"b"', 4), (2, "c", 4)]
    told = "\n".join(found.notes)
    assert "read as CSV" in told and "numbered from 1" in told
    assert "'x' (2 lines)" in told and "'note' (1 lines)" in told


def test_a_table_with_all_kinds_of_cells(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text(
        "custom_id,prompt_token_ids,messages,max_new_tokens\n"
        'a,"[1, 2]",,3\n'
        'b,,"[{""role"": ""user"", ""content"": ""x""}]",\n'
    )
    found = check(path, limits=LONG)
    assert found.ids == ["a", "b"] and found.request(0).prompt == (1, 2)
    assert found.request(0).new_tokens == 3
    assert chat(found, 1)[0] == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,prompt\n1,a\n2,b,c\n3\n", "in.csv:3: has 3 cells.*\n.*in.csv:4: has 1 cells"),
        ("id,prompt,max_tokens\n1,a,\n2,b,many\n", "in.csv:3: column 'max_tokens' is not valid"),
        ("id,prompt,max_tokens\n1,a,2.5\n", "in.csv:2: 'max_tokens' must be a positive integer"),
        ('id,prompt\n1,"a\nb"\n1,c\n', "in.csv:4: id '1' was already used on line 2"),
        ('id,prompt\n1,"a\n', "in.csv:.: not valid CSV"),
        ("id,prompt,ID\n1,a,2\n", "in.csv:1: the column 'id' occurs twice"),
        ("id,words\n1,a\n", "in.csv:1: has no column 'prompt' or 'text'; its first line is 'id,w"),
        ("id,prompt\n", "holds no prompts"),
        ("", "in.csv:1: has no column"),
    ],
)
def test_a_bad_table_is_named_by_its_line(tmp_path, text, message):
    path = tmp_path / "in.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        check(path)


def test_bytes_that_are_no_text_in_a_table(tmp_path):
    path = tmp_path / "in.csv"
    path.write_bytes("id,prompt\n1,é\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        check(path)


def test_a_cell_may_be_long_and_the_process_keeps_its_limit(tmp_path):
    import csv

    before = csv.field_size_limit()
    path = tmp_path / "in.csv"
    path.write_text("id,prompt\n1," + "x" * 200_000 + "\n")
    assert check(path, limits=LONG).refused == {
        0: "200000 prompt + 4 new tokens exceed the 4096 positions of the model"
    }
    assert csv.field_size_limit() == before


def test_an_array_of_texts_and_objects(tmp_path):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(["a", {"prompt": "b"}, {"text": "c", "max_tokens": 1}]))
    assert texts(check(path)) == [(1, "a", 4), (2, "b", 4), (3, "c", 1)]
    path.write_text(" [] ")
    with pytest.raises(UserError, match="holds no prompts"):
        check(path)


def test_an_array_is_read_in_pieces(tmp_path, monkeypatch):
    from llmpq.prompts import prompt_tables

    monkeypatch.setattr(prompt_tables, "READ_CHARACTERS", 1)
    path = tmp_path / "in.json"
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False))
    assert texts(check(path)) == WANTED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1, "prompt": "a"},\n{"id": 1, "prompt": "b"}]', "in.json:2: id 1 was already"),
        ('[{"id": 1, "prompt": "a"},\n\n 5]', "in.json:3: a request must be a string or an object"),
        ('["a",\n{"prompt": "b"\n"id": 3}]', "in.json:3: not a valid JSON array: Expecting ','"),
        ('["a",\n"b"', "in.json:2: not a valid JSON array: expected ',' or ']', found the end"),
        ('["a"]\n["b"]', "in.json:2: there is more text after the end of the array"),
        ('["a",\n{"prompt": "b",\n"prompt": "c"}]', "in.json:2: .*'prompt' occurs twice"),
        ('["a", {"id": 4, "prompt": "b"}]', "1: has an 'id', which the first row does not have"),
        ('[{"id": 4, "prompt": "b"}, "a"]', "in.json:1: 'id' must be a string or an integer"),
        ("[" * 100_000, "in.json:1: "),
    ],
)
def test_a_bad_array_is_named_by_its_line(tmp_path, text, message):
    path = tmp_path / "in.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        check(path)


# ---- OpenAI's batch lines


def batch(name: Any = "r1", url: str | None = "/v1/chat/completions", **body: Any) -> dict:
    line = {"custom_id": name, "method": "POST", "url": url, "body": {"model": "m"} | body}
    return {key: value for key, value in line.items() if value is not None}


USER = {"role": "user", "content": "Hi"}


def test_lines_of_openais_batch_files(tmp_path):
    found = of_lines(
        tmp_path,
        batch("r1", messages=[SYSTEM, USER], max_completion_tokens=8),
        batch("r2", messages=[USER], max_tokens=3, n=1, stream=False, temperature=0.0),
        batch("r3", "https://api.example.com/v1/completions", prompt="Once", max_tokens=2),
        batch("r4", "/v1/completions", prompt=[5, 6]),
        batch("r5", "/v1/completions", prompt=["one"]),
        batch("r6", None, prompt=[[7]]),
        limits=LONG,
    )
    assert found.form == "openai" and not found.is_mixed and not found.refused
    requests = list(found.stream())
    assert chat(found)[0] == [SYSTEM, USER]
    assert [r.new_tokens for r in requests] == [8, 3, 2, 4, 4, 4]
    assert [r.is_chat for r in requests] == [True, True, False, False, False, False]
    assert [r.prompt for r in requests[3:]] == [(5, 6), tuple(b"one"), (7,)]
    *drawn, models = found.notes
    assert (
        models == f"{found.path}: lines name a model, but the plan's model is used: 'm' (6 lines)"
    )
    assert "with sampling settings of their own: 1;" in drawn[0] and len(drawn) == 1
    assert found.drawn == {1: {"temperature": 0.0}}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (batch(url="/v1/embeddings", prompt="a"), "only /v1/chat/completions and /v1/completions"),
        (batch(url="/v1/completions", messages=[USER]), "does not take 'messages'"),
        (batch(prompt="a"), "does not take 'prompt'"),
        (batch(url="/v1/completions", prompt=["a", "b"]), "2 prompts in one request"),
        (batch(messages=[{"role": "odd", "content": "a"}]), "template fails .ValueError: no such"),
        (batch(messages=[USER], n=2), "'n' 2 is not supported (only 1)"),
        (batch(messages=[USER], logprobs=True, top_logprobs=5), "'logprobs' True is not supported"),
        (batch(messages=[USER], response_format={"type": "json_object"}), "'response_format'"),
        (batch(messages=[USER], presence_penalty=0.5), "'presence_penalty' 0.5 is not supported"),
        (batch(messages=[USER], tool_choice="required"), "'tool_choice' 'required' is not"),
        (batch(url="/v1/completions", prompt="a", tools=[{"type": "function"}]), "need 'messages'"),
        (batch(messages=[USER], temperature=-1), "'temperature' must be a number from 0 to 1000"),
        (batch(messages=[USER], temperature="0.5"), "'temperature' must be a number from 0"),
        (batch(messages=[USER], temperature=True), "'temperature' must be a number from 0"),
        (batch(messages=[USER], temperature=math.inf), "'temperature' must be a number from 0"),
        (batch(messages=[USER], temperature=math.nan), "'temperature' must be a number from 0"),
        (batch(messages=[USER], top_p=0), "'top_p' must be a number above 0, up to 1, found 0"),
        (batch(messages=[USER], top_k=2.5), "'top_k' must be an integer from 1"),
        (batch(messages=[USER], seed=2**64), "'seed' must be a 64-bit integer"),
        (batch(messages=[USER], stop=["a", 5]), "'stop' must be a string or a list of strings"),
        (
            batch(messages=[USER], stop="x" * 1001),
            "'stop' may hold at most 16 strings, of at most 1000",
        ),
        (batch(messages=[USER]) | {"method": "GET"}, "method 'GET': only POST"),
        (batch(messages=[USER], max_tokens=9999), "9999 new tokens exceed the 4096 positi"),
    ],
)
def test_a_request_that_cannot_be_done_fails_alone(tmp_path, line, reason):
    found = of_lines(tmp_path, line, batch("fine", messages=[USER]), limits=LONG)
    assert list(found.refused) == [0] and reason.split(".")[0] in found.refused[0]
    assert [r.id for r in found.stream()] == ["fine"] and list(found.todo(())) == [1]
    assert any("fail alone: 1 (the first: line 1" in note for note in found.notes)


@pytest.mark.parametrize(
    "kind", ["image_url", "input_image", "input_audio", "file", "video_url", "thinking"]
)
def test_parts_that_are_no_text_fail_alone(tmp_path, kind):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    lines = [{"id": i, "messages": [{"role": "user", "content": c}]} for i, c in enumerate([parts])]
    found = of_lines(tmp_path, *lines, {"id": "b", "prompt": "x"})
    assert found.refused == {
        0: f"a message has a part of type '{kind}'; this model reads only text"
    }


def test_parts_that_are_texts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    found = of_lines(tmp_path, {"id": 1, "messages": [{"role": "user", "content": parts}]})
    assert chat(found)[0] == [{"role": "user", "content": "a\nb\nc"}]


def test_calls_of_tools(tmp_path):
    function = {"name": "f", "arguments": '{"x": 1}'}
    call = {"id": "c", "type": "function", "function": function}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    line = {"id": 1, "messages": messages, "tools": tools}
    found = of_lines(tmp_path, line, limits=LONG)
    given, known = chat(found)
    assert known == tools and given[2] == messages[2]
    assert given[1]["content"] == ""
    assert given[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    # A template that would leave them out does not get them.
    blind = of_lines(
        tmp_path,
        line,
        {"id": 2, "messages": [USER], "tools": tools},
        tokenizer=NoTools(),
        limits=LONG,
    )
    assert list(blind.refused) == [0, 1]
    assert (
        "support tool calls"
        in of_lines(
            tmp_path, {"id": 1, "messages": messages}, tokenizer=NoTools(), limits=LONG
        ).refused[0]
    )
    assert "the model's chat template does not support 'tools'" in blind.refused[1]
    function["arguments"] = "{"
    assert "are not valid JSON" in of_lines(tmp_path, line, limits=LONG).refused[0]


def test_a_file_may_have_lines_of_both_forms(tmp_path):
    found = of_lines(
        tmp_path,
        {"id": 1, "prompt": "a"},
        {"custom_id": "2", "messages": [USER]},
        batch("3", messages=[USER]),
        {"id": "1", "prompt_token_ids": [4]},
        limits=LONG,
    )
    assert found.ids == [1, "2", "3", "1"]
    assert found.is_mixed and found.form == "llmpq"


def test_a_text_that_the_tokenizer_cannot_encode_fails_alone(tmp_path):
    class Picky(Bytes):
        def encode(self, text: str) -> list[int]:
            if "?" in text:
                raise Exception("WordLevel error:\nno unknown token")
            return super().encode(text)

    lines = [{"id": "a", "prompt": "what?"}, {"id": "b", "prompt": "this"}]
    assert of_lines(tmp_path, *lines, tokenizer=Picky()).refused == {
        0: "the model's tokenizer fails (Exception: WordLevel error: no unknown token)"
    }


# ---- lengths


def test_every_name_for_the_number_of_new_tokens(tmp_path):
    names = ("max_new_tokens", "max_tokens", "max_completion_tokens")
    lines = [{"id": n, "prompt": "a", name: 3 + n} for n, name in enumerate(names)]
    same = {"id": 3, "prompt": "a", "max_tokens": 6, "max_new_tokens": 6}
    none = {"id": 4, "prompt": "a", "max_tokens": None}
    point = {"id": 5, "prompt": "a", "max_tokens": 7.0}  # as pandas writes a column with gaps
    found = of_lines(tmp_path, *lines, same, none, point)
    assert [r.new_tokens for r in found.stream()] == [3, 4, 5, 6, 4, 7]


def test_what_is_too_long_fails_alone_is_cut_or_refuses_the_file(tmp_path):
    lines = [{"id": "long", "prompt": "x" * 61}, {"id": "b", "prompt": "y"}]
    alone = of_lines(tmp_path, *lines)
    reason = "61 prompt + 4 new tokens exceed the 64 positions of the model"
    assert alone.refused == {0: reason} and alone.lengths == [(0, 0), (1, 4)]
    assert len(alone.request(0).prompt) == 61  # for the count in its line

    cut = Limits(4, 64, 300, too_long="truncate")
    lines[0]["prompt"] = "ab" + "x" * 60
    found = of_lines(tmp_path, *lines, limits=cut)
    assert texts(found)[0] == ("long", "x" * 60, 4) and not found.refused
    assert any("line 1: 62 tokens to 60" in note for note in found.notes)
    no_room = of_lines(tmp_path, lines[0] | {"max_tokens": 64}, limits=cut)
    assert list(no_room.refused) == [0]

    with pytest.raises(UserError, match=r"in.jsonl:1: 62 prompt \+ 4 new tokens"):
        of_lines(tmp_path, *lines, limits=Limits(4, 64, 300, too_long="fail"))


def test_the_plans_cache_is_a_limit_too(tmp_path):
    lines = [{"id": "long", "prompt": "x" * 30}, {"id": "b", "prompt": "y"}]
    limits = Limits(4, 64, 300, cache_tokens=20, too_long="error")
    assert of_lines(tmp_path, *lines, limits=limits).refused == {
        0: "30 prompt + 4 new tokens exceed the 20 tokens of KV cache that the plan reserves in all"
    }
    limits = Limits(4, 64, 300, cache_tokens=20, too_long="truncate")
    assert texts(of_lines(tmp_path, *lines, limits=limits))[0] == ("long", "x" * 16, 4)


# ---- what is told


def test_keys_without_a_meaning_are_told_once_with_their_count(tmp_path):
    lines = [{"id": i, "prompt": "a", "max_new_token": 5, "source": "x"} for i in range(30)]
    found = of_lines(tmp_path, *lines, batch("b", messages=[USER], user="u", metadata={}))
    (left_out,) = [note for note in found.notes if "unknown keys" in note]
    assert "'max_new_token', perhaps 'max_new_tokens' is meant (30 lines)" in left_out
    assert "'source' (30 lines)" in left_out
    assert "'body.user' (1 lines)" in left_out and "'body.metadata' (1 lines)" in left_out


def test_ever_new_keys_fill_no_memory(tmp_path):
    lines = [{"id": i, "prompt": "a", f"key {i}": 1} for i in range(3000)]
    found = of_lines(tmp_path, *lines)
    assert len(found._facts._left_out) <= 1001
    assert all(len(note) < 1000 for note in found.notes)


def test_a_prompts_checksum_knows_the_prompt_and_no_spaces(tmp_path):
    def of(line: str) -> int | None:
        path = tmp_path / "one.jsonl"
        path.write_text(line)
        found = check(path)
        assert found.checksums() == {"a": found.request(0).checksum}
        return found.request(0).checksum

    first = of('{"id": "a", "prompt": "abc"}')
    assert of('{"prompt":"abc",   "id":"a"}') == first
    others = ['"prompt": "abd"', '"prompt": "abc", "max_tokens": 4', '"prompt": "ab"']
    assert len({first, *(of(f'{{"id": "a", {other}}}') for other in others)}) == 4


# ---- settings of a request's own


def test_settings_of_single_requests(tmp_path):
    lines = [
        {"id": 0, "prompt": "a"},
        {"id": 1, "prompt": "a", "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 7},
        {"id": 2, "prompt": "a", "stop": "x", "top_k": 5.0, "n": 3, "user": "a column of a table"},
        batch("b", "/v1/completions", prompt="a", stop=["y", ""], seed=0, n=1, logprobs=None),
    ]
    found = of_lines(tmp_path, *lines)
    assert found.drawn == {
        1: {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "seed": 7},
        2: {"top_k": 5},
        3: {"seed": 0},
    }
    assert [request.stops for request in found.stream()] == [(), (), ("x",), ("y",)]
    assert not found.refused
    path = tmp_path / "in.csv"
    path.write_text("id,prompt,temperature,top_k,stop\n1,a,0.5,3,END\n2,b,,,\n")
    table = check(path)
    assert table.drawn == {0: {"temperature": 0.5, "top_k": 3}}
    assert [request.stops for request in table.stream()] == [("END",), ()]


@pytest.mark.parametrize("setting", [{"temperature": 0.5}, {"seed": 1}, {"stop": ["x"]}])
def test_a_resumed_run_notices_other_settings(tmp_path, setting):
    def checksum(**more: Any) -> int:
        return of_lines(tmp_path, {"id": 1, "prompt": "a", **more}).checksums()[1]

    assert checksum() != checksum(**setting) == checksum(**setting)
    changed = {key: value * 2 for key, value in setting.items()}
    assert checksum(**changed) not in (checksum(), checksum(**setting))
    assert checksum(temperature=None, user="u", presence_penalty=0) == checksum()


def test_half_a_character_to_stop_at_refuses_the_file(tmp_path):
    with pytest.raises(UserError, match="in.jsonl:1: 'stop' contains a lone surrogate"):
        of_lines(tmp_path, {"id": 1, "prompt": "a", "stop": ["\ud800"]})

"""Weights that are others are told apart, though their shapes and sizes are the same."""

import json
from pathlib import Path

import pytest

from llmpq.checkpoint import fingerprint as module
from llmpq.checkpoint.fingerprint import fingerprint
from llmpq.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"layers": 2, "dtype": "float16"}))
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 40)
    return tmp_path


def of(folder: Path) -> dict[str, str]:
    return fingerprint(folder / "config.json", folder.glob("*.safetensors"))


def test_what_changes_is_what_differs(folder):
    first = of(folder)
    assert list(first) == ["config.json", "a.safetensors", "b.safetensors"] and of(folder) == first
    (folder / "config.json").write_text('{"dtype": "bfloat16",\n "layers": 2}')  # says the same
    assert of(folder) == first
    (folder / "config.json").write_text('{"layers": 3}')
    data = bytearray((folder / "b.safetensors").read_bytes())
    data[5000] ^= 1
    (folder / "b.safetensors").write_bytes(data)
    after = of(folder)
    assert [name for name in first if first[name] != after[name]] == [
        "config.json",
        "b.safetensors",
    ]


def test_of_a_large_file_blocks_are_read_from_its_beginning_to_its_end(folder, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 100)
    monkeypatch.setattr(module, "BLOCKS", 5)
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    path = folder / "a.safetensors"
    path.write_bytes(bytes(range(256)) * 2)
    whole, first = path.read_bytes(), of(folder)["a.safetensors"]
    starts = [(len(whole) - 64) * i // 4 for i in range(5)]
    seen = set()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if of(folder)["a.safetensors"] != first:
            seen.add(place)
    assert seen == {start + i for start in starts for i in range(64)}
    path.write_bytes(whole + b"\0" * 64)
    assert of(folder)["a.safetensors"] != first  # its size counts


def test_a_file_that_is_gone_is_named(folder):
    with pytest.raises(UserError, match="c.safetensors: cannot be read"):
        fingerprint(folder / "config.json", [folder / "c.safetensors"])

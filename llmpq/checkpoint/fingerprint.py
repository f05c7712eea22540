"""Fingerprints of a model's weights, which tell models apart without reading all of their files.

Two models of one shape (a base model and a fine-tuned one) have the same configuration, the same
tensors and files of the same size. So the contents of files count: the whole of files up to
256 MiB; of larger ones the size and 512 blocks of 64 KiB that are spread evenly, the header and the
end among them. Fine-tuning changes nearly every number, and so nearly every block.

Not covered: large files that differ only between those blocks.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from llmpq.artifact import parse_json
from llmpq.errors import UserError

WHOLE_BYTES = 1 << 28  # files up to this size are read whole
BLOCKS, BLOCK_BYTES = 512, 1 << 16  # read of larger files
DIGITS = 16  # hexadecimal digits of each SHA-256 that are kept
# Keys of a configuration that no result depends on.
COSMETIC = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


def fingerprint(config: Path, files: Iterable[Path]) -> dict[str, str]:
    """Digests of a configuration and of files of weights, by the files' names."""
    found = {config.name: _of_config(config)} if config.is_file() else {}
    return found | {path.name: _of_weights(path) for path in sorted(set(files))}


def _of_config(path: Path) -> str:
    data = parse_json(path)
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key not in COSMETIC}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _of_weights(path: Path) -> str:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
            digest = hashlib.sha256(b"%d" % size)
            for offset in ((size - BLOCK_BYTES) * i // (BLOCKS - 1) for i in range(BLOCKS)):
                file.seek(offset)
                digest.update(file.read(BLOCK_BYTES))
            return digest.hexdigest()[:DIGITS]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None

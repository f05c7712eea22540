"""Loads the texts that perplexity is commonly measured on, by name.

    wikitext2   test part of WikiText-2 (raw), rows joined by blank lines, as GPTQ's protocol does
    ptb         test part of the Penn Treebank, sentences joined by a space
    c4          the first 1,100 documents of C4's first validation file, joined by a space

A plain text file of a folder (`wikitext2.test.txt`, `ptb.test.txt`, `c4.sample.txt`) is used
unchanged. The hub's own files (parquet, JSON lines), in the folder or on the hub itself, are read
with the `datasets` library and joined as listed above.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from llmpq.artifact import read_text
from llmpq.errors import UserError, one_line

INSTALL = "pip install 'llmpq[eval]'"


@dataclass(frozen=True)
class DataSet:
    """The location of a text, and how its rows are joined."""

    file: str  # plain text in the user's folder
    pattern: str  # matches the hub's own files, anywhere below that folder
    hub: str
    options: tuple[tuple[str, Any], ...]  # arguments of `datasets.load_dataset`
    column: str
    joiner: str
    max_rows: int | None = None

    def join(self, rows: Iterable[Mapping[str, str]], source: object) -> str:
        """The rows as one text. Raises `UserError`, naming `source`, for rows without text."""
        try:
            return self.joiner.join(row[self.column] for row in islice(rows, self.max_rows))
        except (KeyError, TypeError):
            raise UserError(f"{source}: has rows without text in '{self.column}'") from None


DATASETS = {
    "wikitext2": DataSet(
        file="wikitext2.test.txt",
        pattern="wikitext-2-raw-v1/test-*.parquet",
        hub="Salesforce/wikitext",
        options=(("name", "wikitext-2-raw-v1"), ("split", "test")),
        column="text",
        joiner="\n\n",
    ),
    "ptb": DataSet(
        file="ptb.test.txt",
        pattern="penn_treebank/test/*.parquet",
        hub="ptb-text-only/ptb_text_only",
        # the data set itself is a script; the hub keeps its rows as parquet beside it
        options=(
            ("name", "penn_treebank"),
            ("split", "test"),
            ("revision", "refs/convert/parquet"),
        ),
        column="sentence",
        joiner=" ",
    ),
    "c4": DataSet(
        file="c4.sample.txt",
        pattern="c4-validation.*.json*",
        hub="allenai/c4",
        options=(("data_files", "en/c4-validation.00000-of-00008.json.gz"), ("split", "train")),
        column="text",
        joiner=" ",
        max_rows=1100,
    ),
}


def named_text(name: str, folder: Path | None = None) -> str:
    """The text called `name`, from `folder` or else from the hub.

    Raises `UserError` where it is in neither, saying which file to put where.
    """
    wanted = DATASETS[name]
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of texts")
        if (folder / wanted.file).is_file():
            return read_text(folder / wanted.file)
        files = sorted(folder.rglob(wanted.pattern))
        if files:
            return wanted.join(_read_files(files), files[0])
    return wanted.join(_from_hub(name, wanted, folder), wanted.hub)


def _read_files(files: list[Path]) -> Any:
    """The rows of local files, whose names tell their format."""
    load = _loader(f"{files[0]}: reading it")
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    try:
        return load(kind, data_files=[str(file) for file in files], split="train")
    except Exception as error:  # the library passes on all errors of its readers
        raise UserError(f"{files[0]}: cannot be read: {one_line(error)}") from None


def _from_hub(name: str, wanted: DataSet, folder: Path | None) -> Any:
    looked = f"{folder} holds neither {wanted.file} nor {wanted.pattern}; " if folder else ""
    fix = (
        f"put {wanted.file} (plain text), or the files {wanted.pattern} of "
        f"https://huggingface.co/datasets/{wanted.hub}, into a folder and give it as --data DIR "
        "(or LLMPQ_DATA), or give any text with --text FILE"
    )
    load = _loader(f"--dataset {name}: {looked}{fix}; fetching it from the hub")
    try:
        return load(wanted.hub, **dict(wanted.options))
    except Exception as error:  # offline, gone or of another form: in each case it is not available
        reason = one_line(error)
        raise UserError(
            f"--dataset {name}: {looked}it could not be fetched from the hub ({reason}); {fix}"
        ) from None


def _loader(what: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{what} needs the datasets library: {INSTALL}") from None
    return partial(load_dataset, trust_remote_code=False)

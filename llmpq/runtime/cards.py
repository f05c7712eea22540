"""The cards that this process sees, those of the whole host, and which worker a process is.

This module asks CUDA, nvidia-smi and the other processes; `llmpq.seats` decides what follows from
the answers. Names and memory are read without making a CUDA context on a card.
"""

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import TypeAdapter

from llmpq.cluster import MIB
from llmpq.errors import UserError, WorkerError
from llmpq.placement import FoundCard, Refusal
from llmpq.plain import plain_line
from llmpq.plan_data import Plan
from llmpq.runtime.process import Role, all_gather
from llmpq.seats import Process, Seat, take_seats

MOST_BYTES = 1 << 20  # the limit of a process's description of itself
PROCESS = TypeAdapter(Process)
QUERY = "index,name,memory.total,compute_cap,uuid"


def visible_cards() -> tuple[FoundCard, ...]:
    """The cards that CUDA shows to this process, in CUDA's order."""
    if not torch.cuda.is_available():
        return ()
    return tuple(_card(index) for index in range(torch.cuda.device_count()))


def _card(index: int) -> FoundCard:
    found: Any = torch.cuda.get_device_properties(index)
    is_amd = torch.version.hip is not None
    architecture = found.gcnArchName.split(":")[0] if is_amd else f"{found.major}.{found.minor}"
    uuid = str(getattr(found, "uuid", ""))
    return FoundCard(index, found.name, found.total_memory, architecture, uuid)


def all_cards() -> tuple[FoundCard, ...]:
    """All cards of this host in the order of their PCI bus ids; none where nvidia-smi fails."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_cards(done.stdout)


def parse_cards(text: str) -> tuple[FoundCard, ...]:
    """The lines of nvidia-smi's answer to `QUERY`; lines of another form are left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return tuple(
        FoundCard(int(index), name, int(mib) * MIB, capability, uuid)
        for index, name, mib, capability, uuid in (row for row in rows if len(row) == 5)
        if index.isdigit() and mib.isdigit()
    )


def this_process(role: Role, variables: Mapping[str, str], asks_cards: bool) -> Process:
    """This process and its cards, for choosing seats; `asks_cards` is False where none are used."""
    group = variables.get("GROUP_RANK", "")
    number = int(group) if group.isdecimal() else (role.rank - role.local_rank)
    cards = visible_cards() if asks_cards else ()
    hidden = asks_cards and bool(variables.get("CUDA_VISIBLE_DEVICES"))
    return Process(role.rank, number, socket.gethostname(), cards, all_cards() if hidden else ())


def find_seats(plan: Plan, role: Role, device: str) -> tuple[list[Seat], bool]:
    """The seat of every rank, and whether cards were looked for and none is anywhere.

    Joins the other processes first. `device`: as --device has it. Raises `UserError` where the
    plan and the machines do not match.
    """
    asks = device != "cpu" and not plan.cluster.rehearse
    everyone = gather(this_process(role, os.environ, asks), role)
    with_cards = any(process.cards for process in everyone)
    found = take_seats(everyone, plan, with_cards)
    if isinstance(found, Refusal):
        raise UserError(found.reason)
    return found, asks and not with_cards


def gather(own: Process, role: Role) -> list[Process]:
    """The description that every process gives of itself, by rank."""
    if role.size == 1:
        return [own]
    texts = _all_texts(json.dumps(asdict(own)), role)
    return [read_process(text, rank) for rank, text in enumerate(texts)]


def _all_texts(text: str, role: Role) -> list[bytes]:
    """Every process's text, through tensors of equal size."""
    data = text.encode()
    lengths = all_gather(torch.tensor([len(data)]), role)
    for rank, length in enumerate(lengths):
        if not 0 < int(length) <= MOST_BYTES:
            raise _unreadable(rank)
    padded = torch.zeros(max(int(n) for n in lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    every = all_gather(padded, role)
    return [bytes(one[: int(length)].tolist()) for one, length in zip(every, lengths, strict=True)]


def read_process(text: bytes, rank: int) -> Process:
    """The JSON description that the process of this rank sent; raises `WorkerError` for others.

    Texts with line breaks or terminal control sequences are refused, as no worker sends them.
    """
    try:
        found = PROCESS.validate_json(text, strict=True)
    except ValueError:
        raise _unreadable(rank) from None
    cards = (*found.cards, *found.everywhere)
    texts = [t for card in cards for t in (card.name, card.compute_capability, card.uuid)]
    if found.rank != rank or any(plain_line(text) != text for text in (found.host, *texts)):
        raise _unreadable(rank)
    return found


def _unreadable(rank: int) -> WorkerError:
    return WorkerError(
        f"rank {rank}: the description of its host and cards cannot be read: another version of "
        "llmpq runs there, or another program has joined this run"
    )

"""Does `llmpq-profile links` tell the bandwidth that a plain ping-pong of torch.distributed gets?

Four local processes of one group. Pair by pair, both ways, in turns: a plain ping-pong by
`dist.send` and `dist.recv` at the largest message, and a visit of the link meter. In turns, because
a busy machine drifts. Bandwidth of the ping-pong is bytes over half the median round trip, so its
latency is in it; of the meter, bytes over what its line through all sizes says for that message.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS = 4
PAIRS = ((0, 1), (1, 0), (2, 3), (3, 2), (0, 3), (3, 0))
MAX_DIFFERENCE = 10.0  # percent


def run(quick: bool, device: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """The check, and a row for each pair."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
        words = [__file__, str(path), device, "quick" if quick else "full"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *start, *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        rows = json.loads(path.read_text())
    return _checks(rows), rows


def _checks(rows: list[dict[str, Any]]) -> list[Any]:
    """Over all pairs: the median difference, which is what the target is about, and the worst."""
    from _common import Check

    differences = [abs(row["difference_percent"]) for row in rows]
    return [
        Check(
            name=f"links' bandwidth against a plain ping-pong, {what} of {len(rows)} pairs",
            value=value,
            unit="%",
            target=f"within {MAX_DIFFERENCE:g} %",
            holds=value <= MAX_DIFFERENCE,
            samples=sum(row["num_round_trips"] for row in rows),
        )
        for what, value in (("median", median(differences)), ("worst", max(differences)))
    ]


def main(path: Path, device_name: str, quick: bool) -> None:
    """One rank."""
    import torch.distributed as dist

    from llmpq.profiler.link_meter import CARD_SIZES, CPU_SIZES, LinkMeter
    from llmpq.runtime.process import choose_device, connect, disconnect, role_from_environment

    role = role_from_environment()
    assert role is not None
    device = choose_device(device_name, role)
    transport = connect(role, device)
    on_card = transport.message_device.type == "cuda"
    meter = LinkMeter(transport, CARD_SIZES if on_card else CPU_SIZES)
    group = dist.new_group(backend=meter.backend)
    turns, visit_s, repeats = (4, 0.4, 40) if quick else (10, 0.6, 50)
    plain: dict[tuple[int, int], list[float]] = {pair: [] for pair in PAIRS}
    for _ in range(turns):
        for pair in PAIRS:
            plain[pair] += _ping_pong(meter, group, pair, repeats)
            meter.visit(pair, time.monotonic() + visit_s)
    rows = _rows(meter, plain)
    disconnect()
    if role.rank == 0:
        path.write_text(json.dumps(rows))


def _ping_pong(meter: Any, group: Any, pair: tuple[int, int], repeats: int) -> list[float]:
    """Seconds of round trips of the largest message both ways, on the source."""
    import torch
    import torch.distributed as dist

    source, destination = pair
    rank, device = meter.transport.rank, meter.transport.message_device
    meter.wait_for_all()
    if rank not in pair:
        meter.wait_for_all()
        return []
    message = torch.ones(meter.sizes[-1], dtype=torch.uint8, device=device)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        if rank == source:
            dist.send(message, destination, group=group)
            dist.recv(message, destination, group=group)
        else:
            dist.recv(message, source, group=group)
            dist.send(message, source, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    meter.wait_for_all()
    return times[1:] if rank == source else []


def _rows(meter: Any, plain: dict[tuple[int, int], list[float]]) -> list[dict[str, Any]]:
    """Both bandwidths of each pair; every rank must call this, rank 0 has all of them."""
    import torch

    from llmpq.cluster import Link

    mine = torch.zeros(len(PAIRS), 2, dtype=torch.float64)
    for number, pair in enumerate(PAIRS):
        if plain[pair]:
            mine[number] = torch.tensor([median(plain[pair]), len(plain[pair])])
    tables = meter.transport.gather(mine)
    found = {(p.source, p.destination): p for p in meter.result(PAIRS)}
    rows = []
    for number, pair in enumerate(PAIRS):
        trip_s, count = tables[pair[0]][number].tolist()
        plain_gbs = 1e-9 * meter.sizes[-1] / (trip_s / 2)
        link = found[pair]
        line = Link(latency_us=link.latency_us, bandwidth_gbs=link.bandwidth_gbs)
        line_gbs = 1e-9 * meter.sizes[-1] / line.seconds(meter.sizes[-1])
        rows.append(
            {
                "source": pair[0],
                "destination": pair[1],
                "plain_gbs": plain_gbs,
                "links_gbs": line_gbs,
                "links_bandwidth_gbs": link.bandwidth_gbs,
                "links_latency_us": link.latency_us,
                "difference_percent": 100 * (line_gbs / plain_gbs - 1),
                "largest_message_gbs": 1e-3 * link.rows[-1].num_bytes / link.rows[-1].time_us,
                "num_round_trips": int(count),
            }
        )
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "quick")

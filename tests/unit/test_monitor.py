"""Who is lost, who says so, and how processes end then; nothing here waits for a time to pass."""

import json
import os
import signal
import threading

import pytest
import torch.distributed as dist

from llmpq.errors import (
    FailedRequests,
    InfeasibleError,
    NeighbourLost,
    UserError,
    WorkerError,
)
from llmpq.reliability import monitor as module
from llmpq.reliability.ending import Interrupted, interruptible
from llmpq.reliability.monitor import (
    DONE,
    SILENT_LOOKS,
    START_LOOKS,
    Board,
    HeartbeatTracker,
    Monitor,
    Verdict,
    WorkerIdentity,
    verdict_on,
)
from llmpq.runtime.process import (
    LostWorkers,
    Role,
    check_meeting_point,
    conclusion,
    role_from_environment,
)

NAMES = ["worker 0 (a)", "worker 1 (b)", "worker 2 (c)"]


@pytest.fixture
def fast(monkeypatch):
    """Beats every hundredth of a second."""
    monkeypatch.setattr(module, "PERIOD_S", 0.01)


# ---- looks


def test_who_stops_beating_is_lost_after_some_looks_and_not_before():
    watch = HeartbeatTracker(2)
    beats = [[beat, min(beat, 3)] for beat in range(1, 3 + SILENT_LOOKS + 1)]
    found = [watch.look(two) for two in beats]
    assert found[:-1] == [[]] * (len(beats) - 1)
    assert found[-1] == [1]


def test_who_is_done_or_beats_slowly_is_not_lost():
    watch = HeartbeatTracker(2)
    for look in range(4 * SILENT_LOOKS):
        assert watch.look([DONE + 7, 1 + look // (SILENT_LOOKS - 1)]) == []


def test_who_has_not_begun_has_more_time():
    watch = HeartbeatTracker(2)
    looks = [watch.look([look, 0]) for look in range(1, START_LOOKS + 1)]
    assert looks == [[]] * (START_LOOKS - 1) + [[1]]


def test_time_in_which_nobody_looks_does_not_count():
    watch = HeartbeatTracker(1)
    for _ in range(SILENT_LOOKS):
        watch.look([5])
    assert watch.look([6]) == []  # however long ago the last look was


# ---- processes


# ---- monitors


class Crew:
    """Monitors of several workers in threads of this process, on one store."""

    def __init__(self, size: int) -> None:
        self.store, self.size = dist.HashStore(), size
        self.board = Board(self.store, size)
        self.ended: dict[int, str] = {}
        self.changed = threading.Condition()

    def monitor(self, rank: int) -> Monitor:
        def end(message: str) -> None:
            with self.changed:
                self.ended.setdefault(rank, message)
                self.changed.notify_all()

        return Monitor(rank, self.size, f"device {rank}", "go on", self._open, end)

    def wait_for(self, rank: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: rank in self.ended, timeout=240)
        return self.ended[rank]

    def _open(self, size: int) -> Board:
        return Board(self.store, size)


def wait_until(condition) -> None:
    waiting = threading.Event()
    for _ in range(3000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("waited in vain")


def test_all_end_in_order_and_nobody_is_lost(fast):
    crew = Crew(2)
    with crew.monitor(0), crew.monitor(1):
        wait_until(lambda: min(crew.board.beats()) > 2)
    assert crew.ended == {}
    assert all(beat > DONE for beat in crew.board.beats())


def test_one_that_falls_silent_is_named_by_the_others(fast):
    crew = Crew(3)
    crew.board.join(WorkerIdentity(1, "t4-16g on node0", "box", 4711))
    with crew.monitor(0), crew.monitor(2):
        told = crew.wait_for(0)
        assert crew.wait_for(2) == ""  # worker 0 of the same machine has said it
    assert told == (
        "worker 1 (t4-16g on node0, host box, pid 4711) was lost: no sign of life for 6 s; go on"
    )


def test_a_failure_is_told_to_the_others_with_its_cause(fast):
    crew = Crew(2)
    with crew.monitor(0):
        with pytest.raises(ZeroDivisionError), crew.monitor(1):
            wait_until(lambda: min(crew.board.beats()) > 0)
            raise ZeroDivisionError("by nothing")
        told = crew.wait_for(0)
    assert "worker 1 (device 1, host" in told
    assert "failed: ZeroDivisionError: by nothing; go on" in told


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InfeasibleError("2 MiB short\nmore"), Verdict((1,), "failed: 2 MiB short")),
        (UserError("no file"), Verdict((1,), "failed: no file", bad_input=True)),
        (OSError("gone"), Verdict((1,), "failed: OSError: gone")),
        (NeighbourLost("connection closed"), None),
        (SystemExit(0), None),
    ],
)
def test_what_a_failure_says(error, expected):
    assert verdict_on(1, error) == expected


def test_bad_input_is_left_to_the_others_to_find_for_a_while(fast):
    crew = Crew(2)
    crew.board.conclude(Verdict((1,), "failed: no such folder", bad_input=True))
    with crew.monitor(0) as monitor:
        assert "failed: no such folder" in crew.wait_for(0)
        assert monitor._num_looks >= SILENT_LOOKS


def test_a_store_that_no_longer_answers(fast):
    crew = Crew(2)
    hangs = threading.Event()

    class Hanging(Board):
        def beats(self) -> list[int]:
            hangs.wait(30)
            return super().beats()

    monitor = crew.monitor(0)
    monitor._open = lambda size: Hanging(crew.store, size)
    with monitor:
        assert "does not answer" in crew.wait_for(0)
        hangs.set()


def test_a_worker_alone_needs_no_store():
    with Monitor(0, 1, "alone", open_board=lambda size: pytest.fail("asked for a store")):
        pass


def test_the_first_verdict_stays():
    board = Board(dist.HashStore(), 2)
    assert board.verdict() is None
    first, second = Verdict((0,), "was lost"), Verdict((1,), "was lost")
    assert board.conclude(first) == first
    assert board.conclude(second) == first
    assert board.verdict() == first
    assert board.who(0) is None


# ---- what the parent concludes


def test_nothing_went_wrong():
    assert conclusion([0, 0, 0], [], None, NAMES, "again") is None


def test_a_killed_worker_is_lost_whatever_the_others_say():
    error = conclusion([4, -9, None], [2], Verdict((0,), "failed: odd"), NAMES, "again")
    assert isinstance(error, LostWorkers) and error.ranks == (1,) and error.exit_code == 4
    assert str(error) == "worker 1 (b) was ended by SIGKILL; again"


def test_several_lost_at_once_are_all_named():
    error = conclusion([-9, 4, -11], [], None, NAMES, "again")
    assert isinstance(error, LostWorkers) and error.ranks == (0, 2)
    assert "worker 0 (a) was ended by SIGKILL; worker 2 (c) was ended by SIGSEGV" in str(error)


def test_a_worker_that_was_asked_to_end_ends_the_run_so():
    error = conclusion([None, -signal.SIGTERM, 4], [], None, NAMES, "again")
    assert isinstance(error, LostWorkers) and error.exit_code == 143


def test_a_worker_that_hangs_is_lost():
    error = conclusion([None, None, None], [2], None, NAMES, "again")
    assert isinstance(error, LostWorkers) and error.ranks == (2,)
    assert str(error) == "worker 2 (c) was lost: no sign of life for 6 s; again"


def test_bad_input_and_lack_of_room_keep_their_exit_codes():
    assert isinstance(conclusion([2, 4, 0], [], None, NAMES, ""), UserError)
    error = conclusion([None, 3, 4], [], Verdict((1,), "failed: short"), NAMES, "")
    assert isinstance(error, InfeasibleError) and "worker 1 (b) stopped, see above" in str(error)


def test_a_failure_is_no_loss_unless_it_is_the_device():
    error = conclusion([4, 1, None], [], Verdict((1,), "failed: ValueError: x"), NAMES, "again")
    assert type(error) is WorkerError
    assert str(error) == "worker 1 (b) failed: ValueError: x; again"
    broken = Verdict((1,), "failed: no bus", device_lost=True)
    assert isinstance(conclusion([4, 1, None], [], broken, NAMES, "again"), LostWorkers)
    silent = conclusion([4, 1, None], [], None, NAMES, "again")
    assert str(silent) == "worker 1 (b) ended with code 1; again"


# ---- signals


def test_a_parent_is_interrupted_once_and_gets_its_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, interruptible("go on"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while it cleans up
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_worker_tells_is_plain_json():
    store = dist.HashStore()
    Board(store, 1).join(WorkerIdentity.here(0, "a"))
    assert json.loads(store.get("who/0"))["pid"] == os.getpid()


def test_failed_requests_are_the_leaders_to_tell_and_no_loss():
    error = conclusion([5, 0, 0], [], None, NAMES, "again")
    assert isinstance(error, FailedRequests) and (str(error), error.exit_code) == ("", 5)
    assert isinstance(conclusion([5, -9, 0], [], None, NAMES, "again"), LostWorkers)
    assert type(conclusion([5, 1, 0], [], None, NAMES, "again")) is WorkerError


# ---- what a launcher says

LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_role_from_what_a_launcher_sets():
    assert role_from_environment({}) is None and role_from_environment({"RANK": "abc"}) is None
    assert role_from_environment(LAUNCHED) == Role(1, 4, 1, 2)
    assert role_from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Role(0, 1, 0, 1)


NUMBERS = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "\u0663"])
def test_a_role_that_no_launcher_gives(name, value):
    with pytest.raises(UserError, match=f"{name} is .*unset RANK and WORLD_SIZE"):
        role_from_environment(LAUNCHED | {name: value})


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_role_beyond_the_others(name):
    with pytest.raises(UserError, match=f"{name}=7 of .*unset RANK and WORLD_SIZE"):
        role_from_environment(LAUNCHED | {name: "7"})


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_role_without_a_meeting_point(name):
    check_meeting_point(LAUNCHED)
    with pytest.raises(UserError, match=f"{name}.* is not set"):
        check_meeting_point({key: value for key, value in LAUNCHED.items() if key != name})
    with pytest.raises(UserError, match=name):
        check_meeting_point(LAUNCHED | {name: ""})

"""Parts 4, 5 and 7 of engine.py: kills and resumes, lost workers, damaged files.

All with the shipped model and prompts, in fp32, so that tokens do not depend on what shares a
micro-batch. Workers are processes of one thread.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from _common import Check
from _engine_common import Part, Rows, Settings, Sizes, Target, hand_plan, say, write_prompts
from _engine_fuzz import fuzz
from _engine_kill import KillResult, kill_test
from _engine_loss import Ending, LossResult, NewPlan, loss_test

from llmpq.artifact import write_json
from llmpq.model_spec import ASSETS
from llmpq.prompts.request import Request
from llmpq.prompts.tokenizer import load_tokenizer

KEPT = Target("4: results that kills made missing, double or different", "results", "0")
NOTICED = Target("5: most from the loss of a worker to the end of all", "s", "<= 10")
NAMED = Target("5: losses not named, or with another exit code", "runs", "0")
REPLANNED = Target("5: runs that did not finish by themselves with a new plan", "runs", "0")
SOUND = Target("7: damaged files that gave a traceback or lost a result", "files", "0")
MODEL = ASSETS / "tiny-tales"
KILLED_SIZES = Sizes(stages=2, batch=16, prefill=4, decode=4)
LOST_SIZES = Sizes(stages=3, batch=12, prefill=2, decode=4)
NEW_TOKENS = (8, 48)  # least and most
LOST_CODES = {"alone": 4, "torchrun": 1}  # torchrun has its own


def kills(settings: Settings) -> tuple[list[Check], Rows]:
    """Kills at random moments, and what they did to the results."""
    count, requests = (3, 24) if settings.quick else (200, 300)
    prompts, plan = inputs(settings, requests, KILLED_SIZES)

    def shown(done: int) -> None:
        if done % 10 == 0:
            say(f"{done} of {count} kills")

    found = kill_test(settings.folder, str(MODEL), prompts, plan, count, 0, shown)
    return [kept(found)], [asdict(found)]


def kept(found: KillResult) -> Check:
    """Of the kills."""
    wrong = found.duplicated + found.missing + found.different
    return KEPT.check(wrong, wrong == 0, found.num_kills)


def losses(settings: Settings) -> tuple[list[Check], Rows]:
    """Workers killed and stopped."""
    requests, lost, plans = (96, 2, 1) if settings.quick else (300, 20, 10)
    prompts, plan = inputs(settings, requests, LOST_SIZES)

    def shown(done: int) -> None:
        say(f"{done} of {lost + plans} losses")

    files = settings.folder, str(MODEL), prompts, plan
    found = loss_test(*files, LOST_SIZES.stages, lost, plans, 0, shown)
    every: list[Ending | NewPlan] = [*found.endings, *found.new_plans]
    return loss_checks(found), [asdict(one) for one in every]


def loss_checks(found: LossResult) -> list[Check]:
    """Of the losses."""
    longest = max(ending.seconds for ending in found.endings)
    unnamed = sum(not is_named(ending) for ending in found.endings)
    unfinished = sum(bool(new.exit_code or new.num_missing) for new in found.new_plans)
    return [
        NOTICED.check(longest, longest <= 10, len(found.endings)),
        NAMED.check(unnamed, unnamed == 0, len(found.endings)),
        REPLANNED.check(unfinished, unfinished == 0, len(found.new_plans)),
    ]


def is_named(ending: Ending) -> bool:
    """It ended as it should, and said which worker was lost; torchrun says so in its own words."""
    is_said = bool(ending.says) or ending.launcher == "torchrun"
    return is_said and ending.exit_code == LOST_CODES[ending.launcher]


def damaged_files(settings: Settings) -> tuple[list[Check], Rows]:
    """Plans, prompts, outputs and journals."""
    found = fuzz(100 if settings.quick else 2000, 0)
    wrong = found.num_tracebacks + found.num_lost
    return [SOUND.check(wrong, wrong == 0, found.num_examples)], [asdict(found)]


KILLED = Part((KEPT,), kills)
LOST = Part((NOTICED, NAMED, REPLANNED), losses)
DAMAGED = Part((SOUND,), damaged_files)


# ---- inputs


def inputs(settings: Settings, count: int, sizes: Sizes) -> tuple[Path, Path]:
    """Prompts and a plan for so many requests."""
    requests = shipped_requests(count)
    prompts = write_prompts(settings.folder / "prompts.jsonl", requests)
    plan = settings.folder / "plan.json"
    write_json(plan, hand_plan(MODEL, requests, sizes))
    return prompts, plan


def shipped_requests(count: int) -> Sequence[Request]:
    """The shipped prompts, again and again, with unequal numbers of new tokens."""
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer is not None
    lines = (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [tuple(tokenizer.encode(json.loads(line)["prompt"])) for line in lines]
    least, most = NEW_TOKENS
    return [
        Request(n, n, prompts[n % len(prompts)], least + 7 * n % (most - least + 1))
        for n in range(count)
    ]

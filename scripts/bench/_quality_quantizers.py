"""GPTQ and clipping against round to nearest, and against gptqmodel's own GPTQ.

All linears of all layers at 4 and at 3 bits; perplexity on held-out text and KL divergence from 16
bits. Second moments come from the calibration text through the file that runs read too. gptqmodel
gets the same token windows and the same groups; its dequantized weights are then read as a 16-bit
checkpoint, so that one piece of code judges both.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Check
from _quality_common import (
    AT_ONCE,
    Logits,
    Measured,
    Settings,
    Subject,
    logits_of,
    measure,
    standard_error,
    stated,
)

from llmpq.checkpoint.calibration_file import sha256_of, write_calibration
from llmpq.checkpoint.roundings import load_roundings
from llmpq.evaluation.calibration import CalibrationMeter
from llmpq.precision import group_size
from llmpq.quantizer import Quantizer

BITS = ("4", "3")
THEIRS = "gptqmodel"
NO_OTHER = f"--quick, or no Python with {THEIRS} was named, or it failed"
SHARE_OF_RTN = {"4": 1.0, "3": 0.6}  # of its rise, at most
NOISE = 2.0  # standard errors
THEIR_LIMIT_S = 900


@dataclass(frozen=True)
class Case:
    """A model and a text: what 16 bits and every (method, bits) did."""

    subject: Subject
    text: str
    base: Measured
    found: Mapping[tuple[str, str], Measured]

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.subject.name}, {self.text}"


def run(settings: Settings) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks, and a row for each method and number of bits of each case."""
    cases = [case for subject in settings.subjects() for case in cases_of(settings, subject)]
    checks = [check for case in cases for bits in BITS for check in checks_of(case, bits)]
    return checks, [row(case, *key) for case in cases for key in case.found]


def cases_of(settings: Settings, subject: Subject) -> list[Case]:
    """All methods on all texts of a model."""
    windows = subject.windows(subject.calibration, settings.num_windows)
    ours = [Quantizer(), Quantizer(method="mse"), gptq_from(settings, subject, windows)]
    variants: dict[tuple[str, str], Logits] = {
        (one.method, bits): logits_of(subject.stage(bits, load_roundings(one)))
        for one in ours
        for bits in BITS
    }
    variants |= theirs(settings, subject, windows)
    exact = logits_of(subject.stage("16"))
    cases = []
    for text in subject.evaluation:
        tokens = subject.windows(text, settings.num_windows)
        base, found = measure(exact, list(variants.values()), tokens)
        cases.append(Case(subject, text.name, base, dict(zip(variants, found, strict=True))))
    return cases


def gptq_from(settings: Settings, subject: Subject, windows: torch.Tensor) -> Quantizer:
    """GPTQ from the moments of these windows, through their file."""
    path = settings.folder / f"{subject.name}.quantizers.safetensors"
    stage = subject.stage("16")
    with torch.inference_mode(), CalibrationMeter(stage) as meter:
        for part in windows.split(AT_ONCE):
            stage.run(stage.embed(part))
    write_calibration(path, meter.statistics(), meter.keys, {"model": subject.name})
    return Quantizer(method="gptq", moments=str(path), sha256=sha256_of(path))


# ---- gptqmodel


def theirs(
    settings: Settings, subject: Subject, windows: torch.Tensor
) -> dict[tuple[str, str], Logits]:
    """What gptqmodel makes of the model; nothing where there is none, or where it fails."""
    found: dict[tuple[str, str], Logits] = {}
    if settings.gptqmodel is None:
        return found
    for bits in BITS:
        try:
            found[THEIRS, bits] = logits_of(their_stage(settings, subject, windows, bits))
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # ours must not be lost
            print(error, file=sys.stderr)
    return found


def their_stage(settings: Settings, subject: Subject, windows: torch.Tensor, bits: str) -> Any:
    """Its dequantized weights as a 16-bit checkpoint."""
    folder = settings.folder / f"{subject.name}-{THEIRS}-{bits}"
    folder.mkdir()
    groups = {op.name: group_size(int(bits), op.in_features) for op in subject.spec.linears}
    wholes = {op.name for op in subject.spec.linears if groups[op.name] == op.in_features}
    job = {
        "model": str(subject.folder),
        "bits": int(bits),
        "groups": {name: -1 if name in wholes else group for name, group in groups.items()},
        "windows": windows.tolist(),
        "output": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("_quality_gptqmodel.py")
    line = [str(settings.gptqmodel), "-P", str(script), str(folder / "job.json")]
    done = subprocess.run(line, timeout=THEIR_LIMIT_S, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{THEIRS} failed on {subject.name}: {done.stderr[-2000:]}")
    return subject.stage("16", files=folder)


# ---- rows and checks


def row(case: Case, method: str, bits: str) -> dict[str, Any]:
    """Figures of a method at a number of bits."""
    return {
        "model": case.subject.name,
        "text": case.text,
        "method": method,
        "bits": int(bits),
        "windows": len(case.base.loss),
        "perplexity_16": case.base.perplexity,
        **case.found[method, bits].figures(case.base),
    }


def checks_of(case: Case, bits: str) -> list[Check]:
    """Of one number of bits."""
    kl = [kl_check(case, bits, "gptq", other) for other in ("rtn", THEIRS)]
    return [share_check(case, bits), kl[0], their_check(case, bits), kl[1]]


def share_check(case: Case, bits: str) -> Check:
    """GPTQ's rise of perplexity as a share of round to nearest's."""
    nearest, ours = (case.found[m, bits].rise_percent(case.base) for m in ("rtn", "gptq"))
    most = SHARE_OF_RTN[bits]
    holds = ours <= most * nearest if most < 1 else ours < nearest
    name = f"{case.name}: rise at {bits} bits, gptq over rtn"
    return Check(name, ours / nearest, "x", f"<= {most:g}", holds, len(case.base.loss))


def kl_check(case: Case, bits: str, method: str, other: str) -> Check:
    """One method's KL divergence over another's: less noisy than perplexity."""
    name, samples = f"{case.name}: KL at {bits} bits, {method} over {other}", len(case.base.loss)
    if (other, bits) not in case.found:
        return Check(name, None, "x", "stated", None, samples, NO_OTHER)
    ours, others = (case.found[m, bits].kl.mean() for m in (method, other))
    return stated(name, float(ours / others), "x", samples)


def their_check(case: Case, bits: str) -> Check:
    """Our loss less gptqmodel's, as percent of perplexity; noise is over windows."""
    name, samples = (
        f"{case.name}: perplexity at {bits} bits, ours over {THEIRS}'s",
        len(case.base.loss),
    )
    their = case.found.get((THEIRS, bits))
    if their is None:
        return Check(name, None, "%", "<= 0 within noise", None, samples, NO_OTHER)
    difference = case.found["gptq", bits].loss - their.loss
    noise = NOISE * standard_error(difference)
    holds = bool(difference.mean() <= noise)
    target = f"<= 0 within noise ({100 * noise:.2f} %)"
    return Check(name, float(100 * difference.mean()), "%", target, holds, samples)

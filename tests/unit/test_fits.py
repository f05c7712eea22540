"""Models of measured rows: each recovers what it can, the best is chosen, errors are said."""

import sys
from collections.abc import Callable

import numpy as np
import pytest

from llmpq.costs import recipes
from llmpq.costs.fits import BEYOND, chosen_models, fit, fit_all, worst
from llmpq.costs.recipes import RECIPES, Points
from llmpq.profile_data import Candidate, ModelPart, Phase, ProfileRow, fit_hash

SIZES = [(p, s) for p in (1, 2, 4, 8, 16) for s in (8, 16, 32, 64, 128, 256)]


def row(phase: Phase, micro_batch: int, tokens: int, time_ms: float) -> ProfileRow:
    """A row measured once."""
    decode = phase == "decode"
    return ProfileRow(
        model_key="k",
        precision="16",
        phase=phase,
        micro_batch=micro_batch,
        prompt_tokens=0 if decode else tokens,
        past_tokens=tokens if decode else 0,
        time_ms=time_ms,
        time_ms_p10=time_ms,
        time_ms_p90=time_ms,
        num_samples=1,
    )


def prefills(time_ms: Callable[[int, int], float]) -> list[ProfileRow]:
    """A grid of prefills with these times."""
    return [row("prefill", p, s, time_ms(p, s)) for p, s in SIZES]


def roofline(p: int, s: int) -> float:
    """Weights are read once, then arithmetic takes over; attention beside it."""
    return 0.2 + max(3.0, 0.02 * p * s) + 1e-5 * p * s * s


def kernels(p: int, s: int) -> float:
    """Another kernel above 64 rows, with an unpacking of its own."""
    rows = p * s
    return 0.1 + (0.05 * rows if rows <= 64 else 5.0 + 0.01 * rows)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_recovers_the_papers_plane(name: str) -> None:
    """It lies in all their spaces, but for the pieces' copy of M."""
    found = fit_by(name, prefills(lambda p, s: 1 + 0.2 * p + 0.03 * p * s + 1e-4 * p * s * s))
    exact = 1 + 0.2 * 8 + 0.03 * 8 * 100 + 1e-4 * 8 * 100**2
    assert float(found.seconds(8, 100)) * 1e3 == pytest.approx(exact, rel=0.03)


def fit_by(name: str, rows: list[ProfileRow]) -> recipes.Model:
    """The model of one recipe."""
    return RECIPES[name](recipes.points_of(rows))


@pytest.mark.parametrize("time_ms", [roofline, kernels])
def test_pieces_follow_what_a_plane_cannot(time_ms: Callable[[int, int], float]) -> None:
    """Rooflines bend and kernels jump; the choice sees it and beats the regression by far."""
    rows = prefills(time_ms)
    found = fit(rows)
    paper = fit_by(recipes.REGRESSION, rows)
    unseen = [(p, s) for p in (1, 3, 6, 12) for s in (12, 24, 90, 200)]
    ours, theirs = (
        np.mean([abs(float(model.seconds(p, s)) * 1e3 / time_ms(p, s) - 1) for p, s in unseen])
        for model in (found, paper)
    )
    assert ours < 0.06
    assert ours < theirs / 2


def test_the_choice_is_by_unseen_rows() -> None:
    """Where the regression is the truth and rows are noisy, nothing richer wins by much."""
    noise = np.random.default_rng(3)
    rows = prefills(lambda p, s: (1 + 0.03 * p * s) * (1 + 0.05 * noise.standard_normal()))
    found = fit(rows)
    assert found.mean_error == pytest.approx(0.05, abs=0.025)
    exact = 1 + 0.03 * 5 * 70
    assert float(found.seconds(5, 70)) * 1e3 == pytest.approx(exact, rel=0.06)


def test_a_wild_row_is_not_followed() -> None:
    """One cell that was measured while the machine was busy, four times too long."""
    clean = prefills(roofline)
    wild = [
        r.model_copy(update={"time_ms": 4 * r.time_ms}) if i == 13 else r
        for i, r in enumerate(clean)
    ]
    model = fit_by("pieces", wild)
    others = [(p, s) for p, s in SIZES if (p, s) != SIZES[13]]
    errors = [abs(float(model.seconds(p, s)) * 1e3 / roofline(p, s) - 1) for p, s in others]
    assert np.median(errors) < 0.03


def test_accuracy_names_the_source() -> None:
    """Measured there, near, far from any row, or outside of all of them."""
    found = fit(prefills(roofline))
    assert found.accuracy(4, 64).source == "measured"
    assert found.accuracy(3, 50).source == "interpolated"
    corners = [row("prefill", p, s, roofline(p, s)) for p in (1, 64) for s in (8, 512)]
    assert fit(corners).accuracy(8, 64).source == "fitted"
    inside, outside = found.accuracy(16, 256), found.accuracy(16, 1024)
    assert outside.source == BEYOND
    assert outside.error > inside.error


def test_errors_are_relative_to_noise() -> None:
    """The error bar tells noisy profiles from clean ones."""
    noise = np.random.default_rng(5)
    noisy = fit(prefills(lambda p, s: roofline(p, s) * (1 + 0.2 * noise.random())))
    clean = fit(prefills(roofline))
    assert noisy.accuracy(4, 64).error > 2 * clean.accuracy(4, 64).error


def test_few_rows_get_the_tamest_model() -> None:
    """Any tool may write a profile, however small; no coefficient swings below 0 then."""
    found = fit([row("decode", q, past, 1.0 + q) for q in (1, 4) for past in (16, 64)])
    assert found.name == recipes.NON_NEGATIVE
    assert float(found.seconds(2, 30)) * 1e3 == pytest.approx(3.0, rel=1e-6)


def test_the_worst_points_come_first_and_apart() -> None:
    """Unknown regions and precisions before known points, and not all at one spot."""
    rows = [row("prefill", p, s, roofline(p, s)) for p in (1, 2, 4) for s in (8, 32, 128)]
    known = [Candidate("16", "prefill", p, s) for p in (1, 2, 4) for s in (8, 32)]
    far = [Candidate("16", "prefill", 16, s) for s in (500, 510, 520)]
    unknown = Candidate("4", "prefill", 2, 32)
    chosen = worst(rows, [*known, *far, unknown], 2)
    assert unknown in chosen
    assert len(set(chosen) & set(far)) == 1


def grids() -> list[ProfileRow]:
    """Rows of three precisions that every kind of model fits best, few rows, and a head."""
    noise = np.random.default_rng(7)
    bent, jumps = prefills(roofline), prefills(kernels)
    steady = [row("decode", q, n, 1 + 0.1 * q + 1e-3 * q * n) for q, n in SIZES]
    few = [r.model_copy(update={"precision": "3"}) for r in bent[:6]]
    heads = [row("head", q, 0, 1.0 + q) for q in (1, 4, 16)]
    rows = [*bent, *steady, *few, *heads]
    rows += [r.model_copy(update={"precision": "4"}) for r in jumps]
    return [r.model_copy(update={"time_ms": r.time_ms * (1 + 0.02 * noise.random())}) for r in rows]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_stored_model_is_the_fitted_one(name: str) -> None:
    """Its coefficients, through a file and back."""
    points = recipes.points_of(prefills(kernels))
    model = RECIPES[name](points)
    stored = [ModelPart.model_validate_json(p.model_dump_json()) for p in recipes.parts_of(model)]
    again = recipes.model_of(name, stored, points)
    for p, s in [(1, 8), (3, 50), (4, 64), (100, 7)]:
        assert float(again.seconds(p, s)) == float(model.seconds(p, s))


def test_a_profile_is_read_without_fitting_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fitted when it was written gives the same times, errors and labels."""
    rows = grids()
    fresh = fit_all(rows)
    stored = {(one.precision, one.phase): one for one in chosen_models(rows)}
    assert stored.keys() == fresh.keys()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    again = fit_all(rows, stored)
    for kind, model in fresh.items():
        assert again[kind].name == model.name
        assert again[kind].accuracy(3, 40) == model.accuracy(3, 40)
        assert again[kind].accuracy(64, 4000) == model.accuracy(64, 4000)
        assert float(again[kind].seconds(3, 40)) == float(model.seconds(3, 40))


def test_rows_that_were_changed_are_fitted_anew() -> None:
    """By the same recipe, as that is all that the profile still says."""
    rows = prefills(roofline)
    (stored,) = chosen_models(rows)
    doubled = [r.model_copy(update={"time_ms": 2 * r.time_ms}) for r in rows]
    found = fit_all(doubled, {("16", "prefill"): stored})["16", "prefill"]
    assert found.name == stored.model
    assert float(found.seconds(4, 64)) == pytest.approx(2e-3 * roofline(4, 64), rel=0.05)


@pytest.mark.parametrize(
    "damage",
    [
        {"parts": ()},
        {"parts": (ModelPart(coefficients=(1.0,)),)},
        {"parts": (ModelPart(coefficients=(1.0,) * 5, up_to_rows=16),)},
        {"parts": (ModelPart(coefficients=(1.0,) * 5),) * 2},
        {"errors": (0.1,)},
    ],
)
def test_stored_parts_that_do_not_fit_are_not_used(damage: dict[str, object]) -> None:
    """Such as those of another version; the rows are fitted as if nothing were stored."""
    rows = prefills(roofline)
    (stored,) = chosen_models(rows)
    stored = stored.model_copy(update=damage)
    stored = stored.model_copy(update={"sha256": fit_hash(rows, stored)})
    found = fit_all(rows, {("16", "prefill"): stored})["16", "prefill"]
    assert float(found.seconds(3, 40)) == float(fit(rows).seconds(3, 40))


def test_stored_coefficients_that_were_changed_are_not_used() -> None:
    """A file that was damaged, or edited by hand, predicts what its rows say."""
    rows = prefills(roofline)
    (stored,) = chosen_models(rows)
    part = stored.parts[0]
    wrong = part.model_copy(update={"coefficients": (-1e9,) * len(part.coefficients)})
    stored = stored.model_copy(update={"parts": (wrong, *stored.parts[1:])})
    found = fit_all(rows, {("16", "prefill"): stored})["16", "prefill"]
    assert float(found.seconds(3, 40)) == float(fit(rows).seconds(3, 40))


def test_a_model_that_a_profile_names_is_kept_and_an_unknown_one_chosen_anew() -> None:
    """Whether its coefficients are there or not."""
    rows = prefills(roofline)
    (chosen,) = chosen_models(rows)
    assert chosen.model == fit(rows).name != recipes.REGRESSION

    def named(name: str) -> str:
        stored = chosen.model_copy(update={"model": name, "parts": ()})
        return fit_all(rows, {("16", "prefill"): stored})["16", "prefill"].name

    assert named(recipes.REGRESSION) == recipes.REGRESSION
    assert named("of a later version") == chosen.model


def test_one_recipe_a_phase_is_chosen_over_all_precisions() -> None:
    """Small groups take the tamest."""
    others = [r.model_copy(update={"precision": "4"}) for r in prefills(kernels)]
    few = [r.model_copy(update={"precision": "3"}) for r in prefills(roofline)[:6]]
    found = fit_all([*prefills(kernels), *others, *few])
    assert found["16", "prefill"].name == found["4", "prefill"].name
    assert "switch" in found["4", "prefill"].name
    assert found["3", "prefill"].name == recipes.NON_NEGATIVE


def test_points_average_repeated_rows() -> None:
    """Two profiles of one device hold the same point."""
    points = recipes.points_of([row("head", 2, 0, 1.0), row("head", 2, 0, 3.0)])
    assert isinstance(points, Points)
    assert points.seconds.tolist() == pytest.approx([0.002])


# ---- layers with experts

SPARSE = "moe-h64-f32-a4-kv2-d16-v97-e64x32k8"


def expected(rows: float, count: float = 64) -> float:
    return count * (1 - (1 - 8 / count) ** rows)


def decodes(sizes: tuple[int, ...], count: float = 64) -> list[ProfileRow]:
    """Decode steps that read the experts that they use, with a few rows for each."""
    return [
        row(
            "decode", q, past, 1 + 0.2 * expected(q, count) + 0.01 * q + 1e-4 * q * past
        ).model_copy(update={"model_key": SPARSE, "experts_used": expected(q, count)})
        for q in sizes
        for past in (16, 64, 256)
    ]


@pytest.mark.parametrize("count", [64, 24])
def test_rows_of_experts_are_predicted_between_and_beyond_what_was_measured(count: float) -> None:
    """Also where routing prefers some: then as many are used as of fewer experts."""
    found = fit(decodes((1, 2, 8, 32, 128), count))
    for (truth,) in (decodes((q,), count)[:1] for q in (4, 16, 64, 200)):
        seconds = float(found.seconds(truth.micro_batch, truth.past_tokens))
        assert 1e3 * seconds == pytest.approx(truth.time_ms, rel=0.03)


def test_a_stored_fit_of_experts_is_what_was_fitted() -> None:
    rows = decodes((1, 2, 8, 32, 128))
    (stored,) = chosen_models(rows)
    kind = ("16", "decode")
    again, anew = fit_all(rows, {kind: stored})[kind], fit_all(rows)[kind]
    assert again.name == stored.model
    for q in (3, 50):
        assert float(again.seconds(q, 40)) == pytest.approx(float(anew.seconds(q, 40)), rel=1e-6)
    other = [one.model_copy(update={"experts_used": 9.0}) for one in rows]
    assert fit_hash(other, stored) != stored.sha256

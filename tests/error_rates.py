"""How often the protocol is wrong, on ten thousand simulated studies with a known truth for every line.

    python tests/error_rates.py [--studies 10000] [--only looks]

Paired differences have mean `effect` and standard deviation 1, and are normal, heavy-tailed (Student's t with
3 degrees of freedom) or strongly skewed (lognormal, skewness 6). A study judges a family of five contrasts,
as one scenario has by default.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from aqn_tune.evidence import PairedContrast, Verdict, judge, paired_contrast
from aqn_tune.evidence.looks import settled
from aqn_tune.evidence.power import detection_power
from aqn_tune.study.looks import alpha_at_look

ALPHA = 0.05
FAMILY = 5
STUDIES = 10_000
CLAIMS = (Verdict.BETTER, Verdict.WORSE)
LOOKS = (6, 9, 12)
POCOCK = 0.0221
"""Nominal level of three looks in Pocock's design (normal data, equal steps, one test)."""

Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]


def normal(rng: np.random.Generator, size: tuple[int, ...]) -> Any:
    """Return normal differences."""
    return rng.normal(size=size)


def heavy(rng: np.random.Generator, size: tuple[int, ...]) -> Any:
    """Return differences with heavy tails: t with 3 degrees of freedom."""
    return rng.standard_t(3, size=size) / math.sqrt(3)


def skewed(rng: np.random.Generator, size: tuple[int, ...]) -> Any:
    """Return strongly skewed differences: lognormal, less their mean."""
    mean, sd = math.exp(0.5), math.sqrt((math.e - 1) * math.e)
    return (np.exp(rng.normal(size=size)) - mean) / sd


DRAWS: dict[str, Draw] = {"normal": normal, "t3": heavy, "lognormal": skewed}


class Rate(NamedTuple):
    """A share that was counted."""

    value: float
    trials: int

    @property
    def error(self) -> float:
        """Its standard error."""
        return math.sqrt(max(self.value * (1 - self.value), 1e-12) / self.trials)


def contrasts(
    rng: np.random.Generator, n: int, draw: Draw, count: int, effect: float
) -> list[PairedContrast]:
    """Return contrasts of independent arms with one reference; each arm is better by `effect`."""
    reference = rng.normal(size=n)
    gains = effect + draw(rng, (count, n))
    return [paired_contrast((reference - gain).tolist(), reference.tolist()) for gain in gains]


class Familywise(NamedTuple):
    """How often a study in which nothing differs claims that something does."""

    any_claim: Rate
    without_note: Rate
    """Of all studies those with a false claim that carries no note about skewness."""


def familywise(n: int, draw: Draw, studies: int, *, seed: int = 0) -> Familywise:
    """Return the familywise error rate.

    Without a margin, so that no contrast is spared a claim by being equivalent.
    """
    rng = np.random.default_rng(seed)
    wrong = unsaid = 0
    for _ in range(studies):
        family = {str(k): c for k, c in enumerate(contrasts(rng, n, draw, FAMILY, 0.0))}
        claims = [j for j in judge(family, alpha=ALPHA, margin=None) if j.verdict in CLAIMS]
        wrong += bool(claims)
        unsaid += any(j.contrast is not None and not j.contrast.notes for j in claims)
    return Familywise(Rate(wrong / studies, studies), Rate(unsaid / studies, studies))


def wrongly_equivalent(n: int, draw: Draw, studies: int, margin: float, *, seed: int = 1) -> Rate:
    """Return how often a contrast whose true effect is twice the margin is called equivalent."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(studies):
        (one,) = contrasts(rng, n, draw, 1, 2 * margin)
        (judged,) = judge({"c": one}, alpha=ALPHA, margin=margin)
        found += judged.verdict is Verdict.EQUIVALENT
    return Rate(found / studies, studies)


def power(n: int, effect: float, studies: int, *, seed: int = 2) -> Rate:
    """Return how often a normal effect is found, tested alone."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(studies):
        (one,) = contrasts(rng, n, normal, 1, effect)
        found += one.t_p is not None and one.t_p < ALPHA and one.improvement > 0
    return Rate(found / studies, studies)


def coverage(n: int, draw: Draw, studies: int, *, seed: int = 3) -> Rate:
    """Return how often the 95 % interval holds the true effect."""
    rng = np.random.default_rng(seed)
    effect, held = 0.7, 0
    for _ in range(studies):
        (one,) = contrasts(rng, n, draw, 1, effect)
        held += one.low is not None and one.high is not None and one.low <= effect <= one.high
    return Rate(held / studies, studies)


class Sequential(NamedTuple):
    """What studies come to that are judged at several looks."""

    any_claim: Rate
    """Studies that claim a difference at any look that was judged: between looks the report shows it."""
    any_equivalent: Rate
    """Studies that call a contrast equivalent at any look that was judged."""
    found: Rate
    """Contrasts that are better at the look at which their study ended."""
    seeds: float
    """Seeds of a study, on average."""


def sequential(
    draw: Draw,
    studies: int,
    *,
    effect: float = 0.0,
    family: int = FAMILY,
    margin: float | None = None,
    looks: tuple[int, ...] = LOOKS,
    level: float | None = None,
    seed: int = 4,
) -> Sequential:
    """Judge studies look by look until nothing is left that more seeds could decide.

    `level` is that of each look, by default the protocol's. A single look is a study without any.
    """
    level = alpha_at_look(ALPHA, looks) if level is None else level
    rng = np.random.default_rng(seed)
    claims = equivalents = found = used = 0
    for _ in range(studies):
        reference = rng.normal(size=looks[-1])
        gains = effect + draw(rng, (family, looks[-1]))
        shown: set[Verdict] = set()
        for n in looks:
            own = reference[:n]
            contrasts = {
                str(k): paired_contrast((own - gain[:n]).tolist(), own.tolist(), alpha=level)
                for k, gain in enumerate(gains)
            }
            judged = judge(contrasts, alpha=level, margin=margin)
            shown |= {one.verdict for one in judged}
            if all(settled(one) for one in judged):
                break
        used += n
        claims += not shown.isdisjoint(CLAIMS)
        equivalents += Verdict.EQUIVALENT in shown
        found += sum(one.verdict is Verdict.BETTER for one in judged)
    return Sequential(
        Rate(claims / studies, studies),
        Rate(equivalents / studies, studies),
        Rate(found / (studies * family), studies),
        used / studies,
    )


def at_the_margin(draw: Draw, studies: int, *, family: int = 1, level: float | None = None) -> Rate:
    """Return how often `~` is given at any look to effects that are as large as the margin, 1 sd.

    The smallest effects of which `~` is wrong, and so those at which it is given most often.
    """
    return sequential(
        draw, studies, effect=1.0, margin=1.0, family=family, level=level
    ).any_equivalent


def print_looks(studies: int) -> None:
    """Print what looks come to, beside studies of a fixed size."""
    levels = (("alpha / 3", None), ("Pocock", POCOCK), ("alpha, the mistake", ALPHA))
    print(f"looks at {LOOKS}: any false claim at any of them")
    for name, draw in (("normal", normal), ("t3", heavy)):
        for family in (1, FAMILY):
            for what, level in levels:
                rate = sequential(draw, studies, family=family, level=level).any_claim
                print(
                    f"  {name:8s} {family} contrasts, {what:20s}: {rate.value:.4f} +- {rate.error:.4f}"
                )
    print("equivalent at any look, at a true effect of the margin itself, 1 sd")
    for name, draw in (("normal", normal), ("t3", heavy)):
        for family in (1, FAMILY):
            for what, level in levels:
                rate = at_the_margin(draw, studies, family=family, level=level)
                print(
                    f"  {name:8s} {family} contrasts, {what:20s}: {rate.value:.4f} +- {rate.error:.4f}"
                )
    print("power at the look at which the study ended, and its seeds")
    for effect in (1.0, 1.5, 2.0):
        for family in (1, FAMILY):
            for what, looks, level in (
                ("looks, alpha / 3", LOOKS, None),
                ("looks, Pocock", LOOKS, POCOCK),
                ("always 12", LOOKS[-1:], None),
            ):
                one = sequential(
                    normal, studies, effect=effect, family=family, looks=looks, level=level
                )
                print(
                    f"  effect {effect} sd, {family} contrasts, {what:18s}: {one.found.value:.4f} +- "
                    f"{one.found.error:.4f}, {one.seeds:.2f} seeds"
                )
    print_early(studies)


def main() -> None:
    """Print every rate."""
    parser = argparse.ArgumentParser(description="Count how often the protocol is wrong.")
    parser.add_argument("--studies", type=int, default=STUDIES, help="studies behind every line")
    parser.add_argument("--only", choices=["looks"], help="print one part alone")
    arguments = parser.parse_args()
    studies = arguments.studies
    if arguments.only == "looks":
        print_looks(studies)
        return
    print(f"any false claim among {FAMILY} null contrasts, alpha {ALPHA}")
    for name, draw in DRAWS.items():
        for n in (6, 8, 12):
            rate, unsaid = familywise(n, draw, studies)
            print(
                f"  {name:10s} n = {n:2d}: {rate.value:.4f} +- {rate.error:.4f}, "
                f"without a note about skewness {unsaid.value:.4f}"
            )
    print("equivalent, at a true effect of twice the margin")
    for name, draw in DRAWS.items():
        for margin in (0.5, 1.0, 2.0):
            rate = wrongly_equivalent(8, draw, studies, margin)
            print(f"  {name:10s} n =  8, margin {margin} sd: {rate.value:.4f} +- {rate.error:.4f}")
    print("power at an effect of 1 sd, one contrast: counted, theory")
    for n in (5, 8, 12):
        rate, theory = power(n, 1.0, studies), detection_power(n, 1.0, ALPHA)
        print(f"  n = {n:2d}: {rate.value:.4f} +- {rate.error:.4f}, {theory:.4f}")
    print("coverage of the 95 % interval")
    for name, draw in DRAWS.items():
        for n in (5, 8, 12):
            rate = coverage(n, draw, studies)
            print(f"  {name:10s} n = {n:2d}: {rate.value:.4f} +- {rate.error:.4f}")
    print_looks(studies)


class Early(NamedTuple):
    """What studies of one contrast show that end at their first look, beside all of them."""

    ended: Rate
    """Studies that end at the first look."""
    improvement: float
    """Mean improvement that those show; the truth is `effect`."""
    sd: float
    """Mean standard deviation of a paired difference that those show; the truth is 1."""
    held: Rate
    """Those whose interval holds the truth."""
    improvement_of_all: float
    """Mean improvement that is shown at the end, over all studies."""
    held_of_all: Rate
    """Studies whose interval holds the truth at the end."""


def early_ends(effect: float, studies: int, *, seed: int = 5) -> Early:
    """Return what studies of one contrast with normal differences show that end where they may."""
    level = alpha_at_look(ALPHA, LOOKS)
    rng = np.random.default_rng(seed)
    shown: list[tuple[bool, float, float, bool]] = []
    for _ in range(studies):
        reference = rng.normal(size=LOOKS[-1])
        gains = effect + rng.normal(size=LOOKS[-1])
        for n in LOOKS:
            own = reference[:n]
            one = paired_contrast((own - gains[:n]).tolist(), own.tolist(), alpha=level)
            if all(settled(each) for each in judge({"c": one}, alpha=level, margin=None)):
                break
        held = one.low is not None and one.high is not None and one.low <= effect <= one.high
        shown.append((n == LOOKS[0], one.improvement, one.sd or 0.0, held))
    first = [each for each in shown if each[0]]
    return Early(
        Rate(len(first) / studies, studies),
        float(np.mean([each[1] for each in first])),
        float(np.mean([each[2] for each in first])),
        Rate(float(np.mean([each[3] for each in first])), len(first)),
        float(np.mean([each[1] for each in shown])),
        Rate(float(np.mean([each[3] for each in shown])), studies),
    )


def print_early(studies: int) -> None:
    """Print what is shown by studies that end at their first look."""
    print(f"one contrast, looks at {LOOKS}: what ends at the first, and all at their end")
    for effect in (0.5, 1.0, 2.0):
        one = early_ends(effect, studies)
        print(
            f"  effect {effect} sd: {one.ended.value:.4f} +- {one.ended.error:.4f} end, improvement "
            f"{one.improvement:.3f}, sd {one.sd:.3f}, interval holds {one.held.value:.4f} +- "
            f"{one.held.error:.4f}; all: {one.improvement_of_all:.3f}, {one.held_of_all.value:.4f}"
        )


if __name__ == "__main__":
    main()

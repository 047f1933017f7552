"""What a study may do and should know about: noise that is known to go wrong, keys that change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aqn_tune.noise.carriers import CarrierSpec
from aqn_tune.noise.policy import NoisePolicy
from aqn_tune.study.scenario import Scenario
from aqn_tune.study.schema import Study
from aqn_tune.study.space import SpaceSpec, arm_of
from aqn_tune.study.space_checks import corners


def study_cautions(study: Study, scenarios: Sequence[Scenario]) -> tuple[str, ...]:
    """Return one sentence for each thing to know, each once, beginning with the key it is about.

    Of a search space its corners are looked at, and of policies with one carrier the loudest.
    """
    found: list[str] = []
    for where, policy in policies(study):
        found += (f"{where}: {text}" for text in policy.cautions())
        if policy.redraw != "step" and study.training.gradient_accumulation_steps == 1:
            found.append(
                f"{where}: redraw {policy.redraw} is redraw step here: a step is one microbatch "
                "(training.gradient_accumulation_steps)"
            )
    for scenario in scenarios:
        found += _unread(study, scenario)
    return tuple(dict.fromkeys(found))


def policies(study: Study) -> Iterator[tuple[str, NoisePolicy]]:
    """Yield each noise policy of a study with its key."""
    for name in study.controls.include:
        policy = study.controls.arm(name).noise
        if policy is not None:
            yield "controls", policy
    for own, arm in study.arms.items():
        if arm.noise is not None:
            yield f"arms.{own}", arm.noise
    if study.search is not None:
        for policy in _loudest(study.search.space):
            yield "search.space", policy


def _loudest(space: SpaceSpec) -> Iterator[NoisePolicy]:
    """Yield, for each carrier and redraw in a space, the corner with the largest sigma."""
    best: dict[tuple[CarrierSpec, str], NoisePolicy] = {}
    for params in corners(space):
        policy = arm_of(params).noise
        if policy is None:
            continue
        key = (policy.carrier, policy.redraw)
        if key not in best or policy.schedule.peak() > best[key].schedule.peak():
            best[key] = policy
    yield from best.values()


def _unread(study: Study, scenario: Scenario) -> Iterator[str]:
    """Yield each key of a device that is set and that no part of it reads."""
    spec = scenario.spec
    device = spec.whole()
    if spec.device_seed and not device.reads_seed():
        yield (
            f"{_key(study, 'device_seed')}: changes nothing: no fault has permanent places that a seed "
            "would draw (see density and persistence)"
        )
    if spec.adapter_path == "faulty" and not device.reads_adapter_path():
        yield (
            f"{_key(study, 'adapter_path')}: faulty changes nothing: no part acts on values that pass "
            "an adapter (name linear layers in `modules`, and another site than weight)"
        )


def _key(study: Study, key: str) -> str:
    return f"sweep.{key}" if key in study.sweep else f"scenario.{key}"

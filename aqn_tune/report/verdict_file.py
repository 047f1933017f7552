"""`verdict.json`: what the study found, for machines. The same ledger gives the same bytes."""

from __future__ import annotations

import json
from typing import Any

from aqn_tune.evidence.arms import ArmEvidence
from aqn_tune.evidence.assemble import ScenarioEvidence
from aqn_tune.evidence.declared import Declared
from aqn_tune.evidence.looks import Look
from aqn_tune.evidence.verdicts import Judged
from aqn_tune.report.results import Results
from aqn_tune.study.folder import study_hash
from aqn_tune.study.margin import GainMargin

VERDICT_FORMAT = 1
"""Raised when a key of `verdict.json` changes its meaning or goes away."""


def verdict_content(results: Results, *, times: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of `verdict.json`.

    Everything but `times` follows from the study, the lock and the ledger. Before the confirmation
    is complete `complete` is false, `missing` says why, and there are no contrasts and decisions but those of
    a declared look that left some of them open. Where looks are declared, `n` and every level but `alpha`
    are those of the look, and a contrast that the next look may decide has no `seeds_needed`. Numbers that do
    not exist are null; losses are in nats per answer token, shares in 0..1.
    """
    evidence, declared, look = results.evidence, results.evidence.declared, results.evidence.look
    rule = declared.margin_rule
    return {
        "format": VERDICT_FORMAT,
        "study": results.study.study,
        "study_hash": study_hash(results.study),
        "lock_hash": results.lock_hash or None,
        "complete": results.makes_claims,
        "missing": list(results.gaps),
        "metric": "faulty answer cross-entropy, nats per token, test split",
        "statement": "Intervals hold over training seeds given this test set.",
        "n": declared.replicates,
        "generation": declared.generation,
        "seeds": _seeds(results),
        "alpha": declared.alpha if look is None else look.whole_alpha,
        "look": None if look is None else _look(look),
        "family_size": len(declared.family),
        "margin": _same_everywhere(declared),
        "margin_share": rule.share if isinstance(rule, GainMargin) else None,
        "margin_rule": rule.model_dump(mode="json"),
        "mde_in_sd": evidence.mde_in_sd,
        "base_clean_loss": evidence.base_clean_loss,
        "scenarios": {one.scenario: _scenario(results, one) for one in evidence.scenarios},
        "not_available": [item._asdict() for item in results.not_available],
        "reused": dict(results.reused),
        "failed": sorted(cell for run in results.failed for cell in run.cells),
        "times": times or {},
    }


def verdict_json(content: dict[str, Any]) -> str:
    """Return the text of the file: keys sorted, floats in their shortest exact form."""
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _look(look: Look) -> dict[str, Any]:
    return {
        "number": look.number,
        "planned": list(look.planned),
        "n": look.seeds,
        "alpha": look.alpha,
        "complete": look.complete,
        "over": look.over,
        "stopped_early": look.early,
    }


def _seeds(results: Results) -> list[int]:
    found = {cell.replicate: cell.seed for cell in results.stage_cells("confirm")}
    return [found[replicate] for replicate in sorted(found)]


def _same_everywhere(declared: Declared) -> float | None:
    """Return the margin that was fixed for every scenario alike, None where there is no such number."""
    fixed = {one.nats for one in declared.margins}
    return fixed.pop() if len(fixed) == 1 else declared.margin


def _scenario(results: Results, evidence: ScenarioEvidence) -> dict[str, Any]:
    scenario = results.scenario(evidence.scenario)
    claims = results.shows_verdicts
    return {
        "during": scenario.spec.during,
        "values": scenario.values,
        "regime": str(evidence.regime.regime),
        "gain": evidence.regime.gain,
        "damage": evidence.regime.damage,
        "regime_reason": evidence.regime.reason,
        "margin": evidence.margin.model_dump(mode="json", exclude={"scenario"}),
        "faults": [
            {
                "kind": fault.kind,
                "affected_fraction": fault.affected_fraction,
                "relative_error": fault.relative_error,
            }
            for fault in evidence.faults
        ],
        "arms": {arm.arm: _arm(results, arm) for arm in evidence.arms},
        "contrasts": {
            one.name.rpartition("/")[2]: _contrast(results, one)
            for one in evidence.contrasts
            if claims
        },
        "decision": evidence.decision.say if evidence.decision and claims else None,
    }


def _arm(results: Results, arm: ArmEvidence) -> dict[str, Any]:
    found = arm.recovery
    luck = arm.shrinkage
    return {
        "loss": arm.mean_loss,
        "loss_sd": arm.sd_loss,
        "losses": [cell.loss for cell in arm.seeds],
        "clean_loss": arm.mean_clean_loss,
        "exact_match": arm.mean_exact_match,
        "clean_exact_match": results.clean_exact_match(arm).mean,
        "failed": arm.failed,
        "training_keys": [cell.training_key for cell in arm.seeds],
        "recovery": {
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "level": found.level,
            "reason": found.reason,
        },
        "config": luck.config if luck else None,
        "search_improvement": luck.search_improvement if luck else None,
        "confirm_improvement": luck.confirm_improvement if luck else None,
    }


def _contrast(results: Results, judged: Judged) -> dict[str, Any]:
    one = judged.contrast
    content: dict[str, Any] = {
        "verdict": judged.verdict.value,
        "word": judged.verdict.word,
        "real_but_below_margin": judged.real_but_below_margin,
        "margin": judged.margin,
        "holm_p": judged.holm_p,
        "family_low": judged.low,
        "family_high": judged.high,
        "seeds_needed": None if results.left_to_the_next_look(judged) else judged.seeds_needed,
        "reason": judged.reason,
    }
    if one is not None:
        content |= {
            "n": one.n,
            "improvement": one.improvement,
            "sd": one.sd,
            "low": one.low,
            "high": one.high,
            "p": one.t_p,
            "sign_flip_p": one.sign_flip_p,
            "sign_flip_floor": one.sign_flip_floor,
            "pairing_gain": one.pairing_gain,
            "wins": one.wins,
            "ties": one.ties,
            "losses": one.losses,
            "notes": list(one.notes),
        }
    return content

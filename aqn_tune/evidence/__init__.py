"""Statistics and verdicts. Reads only the ledger; knows neither torch nor Ray.

`assemble` turns ledger rows into the evidence on what was `declared`. Below it, pure functions on
numbers: a paired contrast (`contrasts`), corrections for a family of them
(`correction`), power (`power`), the four verdicts (`verdicts`), fault regimes and recovery
(`regimes`), the agreed conclusions (`decisions`). Losses go in, smaller is better; an improvement
is reference - arm, so positive means that the arm is better.
"""

from aqn_tune.evidence.contrasts import Degenerate, PairedContrast, paired_contrast, sign_flip_floor
from aqn_tune.evidence.correction import benjamini_hochberg, holm
from aqn_tune.evidence.decisions import (
    Decision,
    DecisionMatrix,
    check_decisions,
    decide,
    parse_decisions,
)
from aqn_tune.evidence.power import mde_sd_units, seeds_needed
from aqn_tune.evidence.regimes import Recovery, Regime, RegimeReport, gain, recovery, regime_of
from aqn_tune.evidence.verdicts import Judged, Undetermined, Verdict, judge

__all__ = [
    "Decision",
    "DecisionMatrix",
    "Degenerate",
    "Judged",
    "PairedContrast",
    "Recovery",
    "Regime",
    "RegimeReport",
    "Undetermined",
    "Verdict",
    "benjamini_hochberg",
    "check_decisions",
    "decide",
    "gain",
    "holm",
    "judge",
    "mde_sd_units",
    "paired_contrast",
    "parse_decisions",
    "recovery",
    "regime_of",
    "seeds_needed",
    "sign_flip_floor",
]

"""The append-only record of everything that ran."""

from __future__ import annotations

from aqn_tune.ledger.ledger import Ledger as Ledger

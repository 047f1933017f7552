"""The search: Ray Tune runs packs, Optuna proposes configs, ASHA stops them, the ledger remembers.

Every decision is a row of the ledger, so an interrupted search continues by reading it again; nothing
is restored from Ray. This room knows no torch: it trains through `aqn_tune.study.engine.Engine`.
"""

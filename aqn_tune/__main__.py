"""`python -m aqn_tune` is `aqn-tune`."""

from __future__ import annotations

from aqn_tune.cli.app import main

if __name__ == "__main__":
    main()

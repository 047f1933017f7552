"""The confirmation: finalists and controls on fresh seeds, under a lock that fixes everything first."""

"""Checking that a cluster is fit for a study: its file before it is started, its nodes while it runs."""

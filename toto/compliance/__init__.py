"""Compliance: InSpec profiles and pytest-testinfra modules of the infra repo, run against a machine.

`checks` finds them, `run` runs them in a cell, `results` is the one type of what they found, `history` keeps it.
"""

"""Rollouts: a release goes to the fleet in stages, is watched, and is taken back where it does not do.

`selection`, `evidence`, `guard`, `targets`, `machine` and `actions` are pure; `publisher` and `controller` are the
shell.
"""

"""Benchmarks of ep_prune, each a module to be run from the project's root with `python -m
benchmarks.NAME`."""

"""The measuring bed: Prism and its rivals on the same links, in the same run.

``scripts/bench`` runs it; ``python -m suite --help`` (with ``benchmarks`` on the path) tells what
there is. Each experiment takes turns between the systems it compares, and reports medians over the
rounds, the spread, and ratios of neighbours in time.
"""

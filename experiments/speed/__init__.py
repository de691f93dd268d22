"""Benchmarks of speed and cost, each with everything it is compared with in one run.

They stand above the training and the analysis, because they run the package's own loops beside those of others.
"""

"""Benchmarks of speed and cost, each with everything it is compared with in one run.

They stand above the training and the analysis, because they run the package's own loops beside those of others.

In all of them ``repeats`` is the number of rounds, ``quick`` makes a tiny run that only shows that everything works and
whose numbers mean nothing, ``command`` is the command line for the record, and ``progress`` is called with what is
being measured.
"""

"""Research on the zoo: what ConAM does to accuracy, speed and memory. Run with ``python -m experiments``."""

from experiments.accuracy import forms as _forms  # noqa: F401 (registers the forms of the ablation)

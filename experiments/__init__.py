"""Research on the zoo: what ConAM does to accuracy, speed and memory. Run with ``python -m experiments``."""

import conam_zoo  # noqa: F401 (before all else: from here on Ctrl-C ends the command without a traceback)
from experiments.accuracy import forms as _forms  # noqa: F401 (registers the forms of the ablation)

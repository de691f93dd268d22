"""The error for what a person typed or pointed at."""


class UserError(ValueError):
    """Bad input. Its message is one sentence that names the thing, the value and the remedy; the CLI prints just it."""

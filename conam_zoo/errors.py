"""The error for what a person typed or pointed at, and how a lack of memory is told from others."""


class UserError(ValueError):
    """Bad input. Its message is one sentence that names the thing, the value and the remedy; the CLI prints just it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or PyTorch on any device, has run out of memory."""
    text = str(error).lower()  # of the CPU's allocator, which raises a plain RuntimeError
    said = any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))
    return isinstance(error, MemoryError) or said

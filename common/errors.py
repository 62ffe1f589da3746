"""What a command says of an error: a line for a person, which a value of a damaged file cannot make too long to be read."""

LONGEST = 10_000  # characters of a message: it may list fifty problems of a cache


def in_one_line(error: Exception) -> str:
    """The message for a person: without the error number where the text explains itself."""
    plain = isinstance(error, OSError) and error.filename is None and error.strerror
    return shortened(str(plain or error), LONGEST)


def shortened(text: str, most: int = 500) -> str:
    """The text without its middle where it has more than `most` characters: it begins with the file and ends with what to do."""
    if len(text) <= most:
        return text
    left_out = f" ... ({len(text)} characters) ... "
    n = (most - len(left_out)) // 2
    return text[:n] + left_out + text[-n:]

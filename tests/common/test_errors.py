"""What commands say of errors: short enough to be read, whatever a file holds."""

import errno

from mrmae.common.errors import LONGEST, in_one_line, shortened


def test_a_long_message_keeps_its_file_and_what_to_do() -> None:
    said = in_one_line(ValueError(f"c/plan.json: holds {'x' * 10**6}; restore it"))
    assert said.startswith("c/plan.json: holds xx") and said.endswith("xx; restore it") and len(said) <= LONGEST
    assert " ... (1000031 characters) ... " in said


def test_a_short_text_stays_as_it_is() -> None:
    assert shortened("x" * 500) == "x" * 500 and len(shortened("x" * 501)) <= 500


def test_an_error_that_explains_itself_is_said_without_its_number() -> None:
    assert in_one_line(OSError(errno.ENOSPC, "m: free some space")) == "m: free some space"
    assert in_one_line(FileNotFoundError(errno.ENOENT, "not there", "m")) == "[Errno 2] not there: 'm'"

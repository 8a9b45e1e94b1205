"""The text of other people's errors, in one line."""

import pytest

from std_rt.core.errors import one_line


@pytest.mark.parametrize(
    ("error", "limit", "said"),
    [
        (ValueError("first\n  second\tthird"), None, "first second third"),
        (ValueError("first\nsecond"), 5, "first"),
        (ValueError("first\nsecond"), -6, "second"),
        (KeyError(), 10, "KeyError"),
        ("a driver's\nwords", None, "a driver's words"),
        ("", None, ""),
    ],
)
def test_an_error_is_one_line(error: BaseException | str, limit: int | None, said: str) -> None:
    assert one_line(error, limit) == said

"""The text of other people's errors, in one line."""

import pytest

from std_rt.core.errors import counted, one_line


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


@pytest.mark.parametrize(("count", "said"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps")])
def test_a_count_agrees_with_its_noun(count: int, said: str) -> None:
    assert counted(count, "step") == said

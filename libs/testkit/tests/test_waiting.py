import pytest

from tessera.testkit import eventually, eventually_blocking

pytestmark = pytest.mark.unit


async def test_the_value_is_given_back_once_it_is_true() -> None:
    values = iter([0, None, "", "there"])
    assert await eventually(lambda: next(values)) == "there"


async def test_an_async_condition_is_awaited() -> None:
    async def condition() -> int:
        return 7

    assert await eventually(condition) == 7


async def test_failing_assertions_are_tried_again() -> None:
    attempts: list[int] = []

    def condition() -> bool:
        attempts.append(1)
        assert len(attempts) == 3
        return True

    assert await eventually(condition)


async def test_after_the_deadline_the_last_failure_is_told() -> None:
    def condition() -> bool:
        raise AssertionError("still two rows")

    with pytest.raises(AssertionError, match=r"not within 0\.05 s; last result: still two rows"):
        await eventually(condition, 0.05)


async def test_other_errors_are_not_waited_out() -> None:
    with pytest.raises(ZeroDivisionError):
        await eventually(lambda: 1 // 0)


def test_without_a_loop() -> None:
    assert eventually_blocking(lambda: "there") == "there"

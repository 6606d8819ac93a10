"""Statements that go to the driver by themselves."""

import pytest

from tessera.storage import DirectStatement

pytestmark = pytest.mark.unit


def test_names_become_numbers_each_once_and_casts_stay() -> None:
    statement = DirectStatement("SELECT a::text, 'x' FROM t WHERE b = :second AND c = CAST(:first AS bigint[]) AND d = :second")
    assert statement.sql == "SELECT a::text, 'x' FROM t WHERE b = $1 AND c = CAST($2 AS bigint[]) AND d = $1"
    assert statement.names == ("second", "first")

import logging

import pytest

from tessera.telemetry.repeats import Repeats

pytestmark = pytest.mark.unit


def line(name: str, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord(name, logging.ERROR, "file", 1, message, arguments, None)


def test_a_sentence_of_a_noisy_library_passes_once_a_window_and_counts_the_rest() -> None:
    now = [0.0]
    repeats = Repeats("aiokafka", clock=lambda: now[0])
    told = [repeats.filter(line("aiokafka.client", "no broker at %s", host)) for host in ("a", "b", "a")]
    assert told == [True, False, False]
    now[0] = 10.0
    again = line("aiokafka.client", "no broker at %s", "a")
    assert repeats.filter(again)
    assert vars(again)["repeated"] == 2
    now[0] = 20.0
    once_more = line("aiokafka.client", "no broker at %s", "a")
    assert repeats.filter(once_more)
    assert "repeated" not in vars(once_more)


def test_other_sentences_and_other_loggers_pass() -> None:
    repeats = Repeats("aiokafka", clock=lambda: 0.0)
    assert all(repeats.filter(line("aiokafka.client", f"sentence {number}")) for number in range(2_001))
    assert all(repeats.filter(line(name, "the same")) for name in ("tessera.bus", "tessera.bus", "aiokafkaesque", "aiokafkaesque"))
    assert repeats.filter(line("aiokafka", "the same"))
    assert not repeats.filter(line("aiokafka", "the same"))

"""How long a fetch may wait at the broker: long where nothing is left out of it, so that an idle consumer costs next to nothing.

A fetch returns at once when one of its partitions has a record, so waiting costs nothing then. It does where a partition was left out
because its records wait to be taken or it is paused: once it goes on, it has to wait until the fetch without it comes back.
"""

from __future__ import annotations

from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition


def wait_long_while_idle(consumer: AIOKafkaConsumer, *, idle_milliseconds: int) -> None:
    """From now on a fetch of everything that is assigned waits so long; any other as long as the consumer was told. Call it once started.

    aiokafka 0.14 knows one wait for all fetches.
    """
    fetcher: Any = consumer._fetcher
    usual, hurried_milliseconds = fetcher._get_actions_per_node, fetcher._fetch_max_wait_ms

    def actions_per_node(assignment: Any) -> Any:
        complete = not any(_is_left_out(fetcher, assignment, partition) for partition in assignment.tps)
        fetcher._fetch_max_wait_ms = max(hurried_milliseconds, idle_milliseconds) if complete else hurried_milliseconds
        return usual(assignment)

    fetcher._get_actions_per_node = actions_per_node


def _is_left_out(fetcher: Any, assignment: Any, partition: TopicPartition) -> bool:
    state = assignment.state_value(partition)
    return partition in fetcher._records or state.paused or not state.has_valid_position

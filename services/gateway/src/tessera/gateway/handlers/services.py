"""What an operator tells running services."""

from tessera.contracts.catalogue import SERVICES, consumed_by
from tessera.contracts.events import ServiceControlled
from tessera.gateway.domain import errors
from tessera.gateway.ports import Call, Log


async def control(log: Log, command: ServiceControlled, call: Call) -> None:
    """Publishes the command; every replica that it names obeys on its own.

    Raises ApiError 404 `service_not_found` and 400 for a consumer that the service does not have.
    """
    if command.service not in SERVICES:
        raise errors.not_found("service_not_found", f"The service '{command.service}'")
    known = sorted({str(consumer.traffic_class) for topic in consumed_by(command.service) if (consumer := topic.consumer(command.service))})
    if command.consumer is not None and command.consumer not in known:
        raise errors.ApiError(400, "invalid_value", f"'{command.service}' has the consumers {', '.join(known)}.", param="consumer")
    await log.publish(command, call, key=command.service.encode())

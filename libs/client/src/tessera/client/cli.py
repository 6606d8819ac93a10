"""The `tessera` command.

Exit codes: 0 done, 1 the server refused, 2 wrong usage or a missing setting, 3 no answer.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn, TextIO, TypeVar

import click

from tessera.client.errors import AnswerError, UnreachableError
from tessera.client.sdk import Tessera

EXIT_REFUSED: Final = 1
EXIT_UNREACHABLE: Final = 3
_BATCH: Final = 500
_BAD: Final = ("refused", "failed")

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Context:
    """What all commands share."""

    url: str | None
    api_key: str | None
    as_json: bool

    def client(self) -> Tessera:
        """Raises UsageError where the address or the key is missing."""
        missing = [name for name, value in (("TESSERA_URL", self.url), ("TESSERA_API_KEY", self.api_key)) if not value]
        if missing:
            raise click.UsageError(f'{" and ".join(missing)} not set. With `make run`: eval "$(make -s env)"')
        return Tessera(str(self.url), str(self.api_key))

    def call(self, act: Callable[[Tessera], T]) -> T:
        """The result of `act`; ends the process with one clear line where it fails."""
        try:
            with self.client() as client:
                return act(client)
        except AnswerError as error:
            self._fail(EXIT_REFUSED, str(error), error.code)
        except UnreachableError as error:
            self._fail(EXIT_UNREACHABLE, error.message, error.code)

    def show(self, answer: Any, lines: Iterable[str]) -> None:
        """The answer as JSON, or its lines for a person."""
        for line in [json.dumps(answer, indent=2, ensure_ascii=False)] if self.as_json else lines:
            click.echo(line)

    def _fail(self, exit_code: int, message: str, code: str) -> NoReturn:
        click.echo(json.dumps({"error": {"message": message, "code": code}}) if self.as_json else f"tessera: {message}", err=True)
        sys.exit(exit_code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", envvar="TESSERA_URL", help="Address of the gateway [env: TESSERA_URL].")
@click.option(
    "--api-key", envvar="TESSERA_API_KEY", help="API key [env: TESSERA_API_KEY]; prefer the variable, arguments are visible to others."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@click.version_option(package_name="tessera-client")
@click.pass_context
def main(context: click.Context, url: str | None, api_key: str | None, as_json: bool) -> None:
    """Talk to a Tessera gateway.

    Exit codes: 0 done, 1 the server refused, 2 wrong usage or a missing setting, 3 no answer.
    """
    context.obj = Context(url, api_key, as_json)


@main.group()
def tenant() -> None:
    """Owners of data. Needs a key with the scope admin."""


@tenant.command("create")
@click.argument("tenant_id")
@click.option("--name", help="A name for people.")
@click.pass_obj
def create_tenant(context: Context, tenant_id: str, name: str | None) -> None:
    """Make a tenant: its topics, its row, and the event that tells the other services."""
    made = context.call(lambda client: client.create_tenant(tenant_id, name))
    context.show(made, [f"{made['id']}: {made['status']}"])


@tenant.command("list")
@click.pass_obj
def list_tenants(context: Context) -> None:
    """All tenants."""
    found = context.call(lambda client: client.tenants())
    context.show({"data": found}, [f"{entry['id']:<32} {entry['status']:<10} {entry['name']}" for entry in found])


@main.group()
def key() -> None:
    """API keys. Needs a key with the scope admin."""


@key.command("create")
@click.option("--tenant", "tenant_id", help="Whose key; your own tenant's where absent.")
@click.option("--name", help="What it is for.")
@click.option("--scope", "scopes", multiple=True, help="May be repeated; everything but usage and admin where absent.")
@click.option("--days", type=click.IntRange(min=1), help="Days until it expires; never where absent.")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="In place of what every key may.")
@click.option("--tokens-per-minute", type=click.IntRange(min=1), help="In place of what every key may.")
@click.option("--concurrent-streams", type=click.IntRange(min=1), help="In place of what every key may.")
@click.option("--spend-per-day", type=click.FloatRange(min=0.000001), help="In place of what every key may.")
@click.pass_obj
def create_key(
    context: Context, /, tenant_id: str | None, name: str | None, scopes: tuple[str, ...], days: int | None, **limits: float | None
) -> None:
    """Make a key and print it. It is shown this once."""
    expires_at = None if days is None else (datetime.now(UTC) + timedelta(days=days)).isoformat()
    made = context.call(lambda client: client.create_key(tenant_id, name=name, scopes=scopes, expires_at=expires_at, limits=limits))
    context.show(made, [made["key"]])


@key.command("list")
@click.option("--tenant", "tenant_id", help="Whose keys; your own tenant's where absent.")
@click.pass_obj
def list_keys(context: Context, tenant_id: str | None) -> None:
    """A tenant's keys, revoked ones included."""
    found = context.call(lambda client: client.keys(tenant_id))
    context.show({"data": found}, [f"{entry['id']} {entry['status']:<8} {entry['name']} [{' '.join(entry['scopes'])}]" for entry in found])


@key.command("rotate")
@click.argument("key_id")
@click.option(
    "--grace-seconds", type=click.IntRange(min=0), help="How long the secret that the key had still opens it; a day where absent."
)
@click.pass_obj
def rotate_key(context: Context, key_id: str, grace_seconds: int | None) -> None:
    """Give a key another secret and print it. It is shown this once."""
    made = context.call(lambda client: client.rotate_key(key_id, grace_seconds=grace_seconds))
    context.show(made, [made["key"]])


@key.command("revoke")
@click.argument("key_id")
@click.pass_obj
def revoke_key(context: Context, key_id: str) -> None:
    """Make a key open nothing any more: everywhere within five seconds."""
    context.call(lambda client: client.revoke_key(key_id))
    context.show({"id": key_id, "status": "revoked"}, [f"{key_id}: revoked"])


@main.command()
@click.argument("query")
@click.option("--limit", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--conversation", "conversation_id", help="Only memories of this conversation.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(["message", "chunk", "entity", "relation"]))
@click.pass_obj
def search(context: Context, query: str, limit: int, conversation_id: str | None, kinds: tuple[str, ...]) -> None:
    """Search memory and see why each result ranks where it does."""
    given = {"conversation_id": conversation_id, "kinds": list(kinds) or None}
    recall_filter: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    found = context.call(lambda client: client.search(query, limit=limit, **recall_filter))
    context.show(found, [line for memory in found["data"] for line in _memory_lines(memory)] or ["nothing found"])


@main.command()
@click.argument("text", required=False)
@click.option(
    "--conversation", "conversation_id", default="command-line", show_default=True, help="For TEXT: the conversation it belongs to."
)
@click.option("--role", type=click.Choice(["system", "user", "assistant", "tool"]), default="user", show_default=True)
@click.option("--file", "lines", type=click.File(encoding="utf-8"), help="Items as JSON lines, - for standard input, instead of TEXT.")
@click.option("--wait", is_flag=True, help="Wait until it is searchable.")
@click.pass_obj
def ingest(context: Context, *, text: str | None, conversation_id: str, role: str, lines: TextIO | None, wait: bool) -> None:
    """Remember TEXT as a message, or every item of a file."""
    if (text is None) == (lines is None):
        raise click.UsageError("Give TEXT or --file, not both.")
    if lines is not None:
        items = _items(lines)
        results = [
            result for start in range(0, len(items), _BATCH) for result in _ingest_batch(context, items[start : start + _BATCH], start)
        ]
    else:
        item = {"type": "message", "conversation_id": conversation_id, "role": role, "content": text}
        results = [context.call(lambda client: client.ingest(item))]
    _finish_ingestion(context, results, wait)


@main.command()
@click.pass_obj
def status(context: Context) -> None:
    """Each service with its dependencies, breakers that are not closed, and lag."""
    found = context.call(lambda client: client.status())
    context.show(found, [f"system: {found['status']}", *(line for service in found["services"] for line in _service_lines(service))])


@main.command()
@click.pass_obj
def lag(context: Context) -> None:
    """How many events wait in each consumer of each service."""
    found = context.call(lambda client: client.status())
    rows = [row for service in found["services"] for row in _lag_rows(service)]
    lines = [f"{row['service']:<10} {row['consumer']:<10} {row['lag']:>8}  {' '.join(row['states'])}" for row in rows]
    context.show({"data": rows}, lines or ["no service has reported"])


@main.group("dead-letter")
def dead_letter() -> None:
    """Events that could not be handled. Needs a key with the scope admin."""


def _which(command: F) -> F:
    """The options by which letters are chosen."""
    for option in (
        click.option("--tenant", "tenant_id", help="The topic's owner, or whose the event claims to be."),
        click.option("--event", "event_id", help="The event's own id."),
        click.option("--until", help="Refused before (RFC 3339)."),
        click.option("--since", help="Refused at or after (RFC 3339)."),
        click.option("--code", help="The reason, such as tenant_unknown."),
        click.option("--service", help="Whose consumer refused it."),
        click.option("--topic", help="Where the event was; ingest stands for every tenant's, too."),
    ):
        command = option(command)
    return command


@dead_letter.command("list")
@_which
@click.option("--status", type=click.Choice(["pending", "replayed", "discarded", "all"]), default="pending", show_default=True)
@click.option("--oldest-first", is_flag=True)
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@click.pass_obj
def list_dead_letters(context: Context, /, *, oldest_first: bool, limit: int, **query: str | None) -> None:
    """What could not be handled, and why."""
    order = "oldest" if oldest_first else "newest"
    found = context.call(lambda client: client.dead_letters(limit=limit, order=order, **query))
    context.show({"data": found}, [_letter_line(letter) for letter in found] or ["no dead letters"])


@dead_letter.command("show")
@click.argument("letter_id")
@click.pass_obj
def show_dead_letter(context: Context, letter_id: str) -> None:
    """One dead letter with its reason, headers and bytes."""
    found = context.call(lambda client: client.dead_letter(letter_id))
    context.show(found, _letter_lines(found))


@dead_letter.command("replay")
@click.argument("letter_ids", nargs=-1)
@_which
@click.option("--all", "everything", is_flag=True, help="Every pending letter.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.pass_obj
def replay_dead_letters(context: Context, /, *, letter_ids: tuple[str, ...], everything: bool, dry_run: bool, **chosen: str | None) -> None:
    """Publish the original events of LETTER_IDS again, or of all pending letters that the options choose.

    Each event has its effect once, however often it is replayed.
    """
    _check_choice(letter_ids, chosen, everything)
    ids = letter_ids or None
    _show_settled(context, context.call(lambda client: client.replay_dead_letters(ids=ids, dry_run=dry_run, **chosen)))


@dead_letter.command("discard")
@click.argument("letter_ids", nargs=-1)
@_which
@click.option("--all", "everything", is_flag=True, help="Every pending letter.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.pass_obj
def discard_dead_letters(
    context: Context, /, *, letter_ids: tuple[str, ...], everything: bool, dry_run: bool, **chosen: str | None
) -> None:
    """Decide that nothing shall be done about LETTER_IDS, or about all pending letters that the options choose.

    They are no longer listed; their bytes stay in the log.
    """
    _check_choice(letter_ids, chosen, everything)
    ids = letter_ids or None
    _show_settled(context, context.call(lambda client: client.discard_dead_letters(ids=ids, dry_run=dry_run, **chosen)))


@main.command()
@click.argument("service")
@click.argument("action", type=click.Choice(["pause", "resume", "reload"]))
@click.option("--consumer", help="The traffic class, such as ingestion; all of them where absent.")
@click.option("--instance", help="One replica; all of the service where absent.")
@click.pass_obj
def control(context: Context, service: str, action: str, consumer: str | None, instance: str | None) -> None:
    """Pause or resume a consumer of SERVICE, or have it read its settings again. `tessera status` shows when it is done."""
    told = context.call(lambda client: client.control_service(service, action, consumer=consumer, instance=instance))
    context.show(told, [f"{service}: {action} is on its way to {instance or 'every replica'}"])


@main.command()
@click.argument("outcome", type=click.Choice(["retry", "discard"]))
@click.argument("service")
@click.argument("event")
@click.pass_obj
def parked(context: Context, outcome: str, service: str, event: str) -> None:
    """Retry or discard an EVENT of SERVICE that is stuck: TOPIC:PARTITION:OFFSET, as `tessera status` shows it. Its key goes on.

    A discarded one becomes a dead letter, and can be replayed.
    """
    topic, partition, offset = _place(event)
    told = context.call(lambda client: client.decide_parked(service, topic, partition, offset, outcome))
    context.show(told, [f"{event}: {outcome} is on its way to {service}"])


def _place(event: str) -> tuple[str, int, int]:
    topic, _, rest = event.partition(":")
    partition, _, offset = rest.partition(":")
    if not (topic and partition.isascii() and partition.isdigit() and offset.isascii() and offset.isdigit()):
        raise click.BadParameter("an event is TOPIC:PARTITION:OFFSET, such as ingest:3:1742", param_hint="EVENT")
    return topic, int(partition), int(offset)


@main.group()
def audit() -> None:
    """Who did what. Needs a key with the scope audit; with admin as well it sees every tenant's records."""


@audit.command("list")
@click.option("--actor", help="Id of the key that acted.")
@click.option("--action", help="Such as key.revoke.")
@click.option("--target", help="Id of what was acted upon.")
@click.option("--tenant", "tenant_id", help="The tenant acted upon.")
@click.option("--since", help="At or after (RFC 3339).")
@click.option("--until", help="Before (RFC 3339).")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@click.pass_obj
def list_audit_events(context: Context, /, *, limit: int, **query: str | None) -> None:
    """Administrative acts and refusals, the newest first."""
    found = context.call(lambda client: client.audit_events(limit=limit, **query))
    context.show({"data": found}, [_audit_line(event) for event in found] or ["nothing on record"])


@main.group()
def spool() -> None:
    """What the gateway accepted while Kafka was away. Each replica has its own; the one that answers is named."""


@spool.command("list")
@click.pass_obj
def list_spool(context: Context) -> None:
    """Events that wait on the gateway's disk, oldest first."""
    found = context.call(lambda client: client.spool())
    context.show(found, [_spool_line(found["instance"], found["spool"]), *(_spooled_line(entry) for entry in found["data"])])


@spool.command("replay")
@click.option("--id", "event_ids", multiple=True, required=True, help="Id of an event; may be repeated.")
@click.pass_obj
def replay_spool(context: Context, event_ids: tuple[str, ...]) -> None:
    """Send events now instead of at the next attempt, each after what is before it in its key."""
    results = context.call(lambda client: client.replay_spool(event_ids))
    context.show({"data": results}, [f"{result['event_id']}: {result['status']}" for result in results])
    if any(result["status"] != "published" for result in results):
        sys.exit(EXIT_REFUSED)


@main.command()
@click.pass_obj
def models(context: Context) -> None:
    """Models on offer, and what each is."""
    found = context.call(lambda client: client.models())
    context.show(
        {"data": found}, [f"{model['id']:<32} {model['tessera']['capability']:<10} {model['tessera']['description']}" for model in found]
    )


@main.command()
@click.argument("request_id")
@click.pass_obj
def trace(context: Context, request_id: str) -> None:
    """Say how to see the way of a request (its x-request-id) through the services."""
    command = f"make trace ID={request_id}"
    lines = [
        f"On the machine that runs Tessera: {command}",
        "Where traces go by OTLP: search your trace store for tessera.request_id = " + request_id,
    ]
    context.show({"request_id": request_id, "command": command}, lines)


def _check_choice(letter_ids: tuple[str, ...], chosen: Mapping[str, str | None], everything: bool) -> None:
    ways = (bool(letter_ids), any(chosen.values()), everything)
    if sum(ways) != 1:
        raise click.UsageError("Give LETTER_IDS, or options that choose letters, or --all.")


def _show_settled(context: Context, settled: list[dict[str, Any]]) -> None:
    told = [
        f"{one['id']}: {one['result']}" + (f" {one['error']['code']}: {one['error']['message']}" if one["error"] else "") for one in settled
    ]
    context.show({"data": settled}, told or ["no dead letters"])
    if any(one["result"] in ("failed", "not_found") for one in settled):
        sys.exit(EXIT_REFUSED)


def _letter_line(letter: dict[str, Any]) -> str:
    event = letter["event_id"] or "no id"
    return f"{letter['id']}  {letter['refused_at']}  {letter['status']}  {letter['code']}  {letter['tenant_id'] or 'no tenant'}  {event}"


def _letter_lines(letter: dict[str, Any]) -> list[str]:
    where = f"{letter['topic']} partition {letter['partition']} offset {letter['offset']}" if letter["topic"] else "unknown"
    reason = f"{letter['code']}: {letter['message']}" + (f" (field {letter['field']})" if letter["field"] else "")
    key = letter["key"]
    return [
        _letter_line(letter),
        f"reason    {reason}",
        f"attempts  {letter['attempts']}, replayed {letter['replays']} times before",
        f"from      {where}, refused by {letter['service']}",
        f"trace     {letter['trace_id'] or 'none'}, request {letter['request_id'] or 'none'}",
        f"key       {_shown(key) if key else 'none'}",
        *(f"header    {header['name']}: {_shown(header)}" for header in letter["headers"]),
        f"value     {letter['size_bytes']} bytes",
        _shown(letter["value"]),
    ]


def _shown(content: dict[str, Any]) -> str:
    return str(content["text"]) if content["text"] is not None else f"base64 {content['base64']}"


def _audit_line(event: dict[str, Any]) -> str:
    actor, target = event["actor"], event["target"]
    by = f"by {actor['kind']}" + (f" {actor['id']}" if actor["id"] else "")
    parts = [
        event["occurred_at"],
        event["action"],
        event["outcome"] + (f" ({event['code']})" if event["code"] else ""),
        by,
        f"from {event['client_address']}" if event["client_address"] else "",
        f"on {target['kind']} {target['id']}" if target else "",
        f"of {event['tenant_id']}" if event["tenant_id"] else "",
        f"{event['count']} times" if event["count"] > 1 else "",
        " ".join(f"{name}={value}" for name, value in event["details"].items()),
    ]
    return "  ".join(part for part in parts if part)


def _lag_rows(service: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per consumer, over all replicas that still report."""
    consumers = [consumer for replica in service["replicas"] if replica["status"] != "lost" for consumer in replica["consumers"]]
    return [
        {
            "service": service["service"],
            "consumer": name,
            "lag": sum(consumer["lag"] for consumer in consumers if consumer["name"] == name),
            "states": sorted({consumer["state"] for consumer in consumers if consumer["name"] == name}),
        }
        for name in sorted({consumer["name"] for consumer in consumers})
    ]


def _items(lines: TextIO) -> list[Mapping[str, Any]]:
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except ValueError as error:
                raise click.UsageError(f"line {number} is not JSON: {error}") from error
    return items


def _ingest_batch(context: Context, items: list[Mapping[str, Any]], start: int) -> list[dict[str, Any]]:
    answer = context.call(lambda client: client.ingest_batch(items))
    return [{**result, "index": start + result["index"]} for result in answer["data"]]


def _finish_ingestion(context: Context, results: list[dict[str, Any]], wait: bool) -> None:
    if wait:
        results = [_settled(context, result) for result in results]
    context.show({"data": results}, [_result_line(result) for result in results])
    if any(result["status"] in _BAD for result in results):
        sys.exit(EXIT_REFUSED)


def _settled(context: Context, result: dict[str, Any]) -> dict[str, Any]:
    if result["status"] in _BAD:
        return result
    state = context.call(lambda client: client.wait_until_searchable(result["event_id"]))
    return {**result, "status": state["status"], "reason": state["reason"]}


def _result_line(result: dict[str, Any]) -> str:
    problem = result.get("error") or result.get("reason")
    where = f"item {result['index']}: " if "index" in result else ""
    told = f" {problem['code']}: {problem['message']}" if problem else ""
    event_id = f" {result['event_id']}" if result.get("event_id") else ""
    return f"{where}{result['status']}{event_id}{told}"


def _spool_line(instance: str, state: dict[str, Any]) -> str:
    if not state["enabled"]:
        return f"{instance}: no spool (TESSERA_GATEWAY__SPOOL__FOLDER is not set)"
    full = "; full" if state["full"] else ""
    return f"{instance}: {state['records']} events, {state['bytes']} bytes, oldest {state['oldest_accepted_at'] or '-'}{full}"


def _spooled_line(entry: dict[str, Any]) -> str:
    problem = f": {entry['last_error']}" if entry["last_error"] else ""
    return f"{entry['accepted_at']} {entry['tenant_id']} {entry['event_id']} {entry['type']}, {entry['attempts']} attempts{problem}"


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    scores = memory["scores"]
    parts = ", ".join(f"{part} {scores[part]:.3f}" for part in ("vector", "lexical", "importance", "recency"))
    return [f"{scores['total']:.3f}  {memory['text']}", f"       {memory['kind']} {memory['id']}: {parts}"]


def _service_lines(service: dict[str, Any]) -> list[str]:
    lines = [f"{service['service']:<10} {service['status']:<10} lag {service['lag']}"]
    for replica in service["replicas"]:
        down = [dependency["name"] for dependency in replica["dependencies"] if not dependency["healthy"]]
        told = f"; down: {', '.join(down)}" if down else ""
        broken = [f"{one['name']} {one['breaker']}" for one in replica["dependencies"] if one.get("breaker", "closed") != "closed"]
        told += f"; breakers: {', '.join(broken)}" if broken else ""
        lines.append(f"  {replica['instance']}: {replica['status']}{told}")
        lines += [line for consumer in replica["consumers"] for line in _consumer_lines(consumer)]
    return lines


def _consumer_lines(consumer: dict[str, Any]) -> list[str]:
    """What an operator has to decide about."""
    halted = [f"    {consumer['name']} is halted: {consumer['halted']}"] if consumer.get("halted") else []
    return halted + [
        f"    {consumer['name']} is stuck at {event['topic']}:{event['partition']}:{event['offset']}: {event['code']}, "
        f"{event['attempts']} attempts since {event['since']}"
        for event in consumer.get("stuck") or []
    ]

"""What Tessera is held against, as processes of their own: `python roles.py ROLE`. Everything they need is in the environment.

forwarder   a bare ASGI application that hands the provider's stream on, without Kafka
gateway, tokenizer, memory, generator
            the same hops as Tessera's by raw aiokafka, with a committed job row and nothing else: no schemas, no keys, no limits
"""

import asyncio
import gc
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import uvicorn
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from tessera.encodings import encoding

COALESCE_SECONDS = 0.045
_STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}

Document = dict[str, Any]
Change = Callable[[Document], Awaitable[None]]
Application = Callable[[Document, Callable[[], Awaitable[Document]], Callable[[Document], Awaitable[None]]], Awaitable[None]]


class Provider:
    """Kept connections to the fake provider; as little HTTP as its answers need."""

    def __init__(self) -> None:
        host, _, port = os.environ["BENCH_UPSTREAM"].rpartition(":")
        self._address = (host, int(port))
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._head = "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"

    async def chat(self, body: bytes) -> AsyncIterator[bytes]:
        """Its stream, piece by piece."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        writer.write(self._head.format(len(body)).encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(head.decode())
        while size := int(await reader.readline(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        self._idle.append((reader, writer))


async def _body(receive: Callable[[], Awaitable[Document]]) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _serve(application: Application) -> None:
    port = int(os.environ["BENCH_PORT"])
    config = uvicorn.Config(
        application, host="127.0.0.1", port=port, http="httptools", log_level="warning", access_log=False, lifespan="off"
    )
    gc.freeze()
    await uvicorn.Server(config).serve()


async def forwarder() -> None:
    """Every piece of the provider's stream as it comes."""
    provider = Provider()

    async def forward(_: Document, receive: Any, send: Any) -> None:
        body = await _body(receive)
        await send(_STREAM)
        async for piece in provider.chat(body):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    await _serve(forward)


async def _producer() -> AIOKafkaProducer:
    producer = AIOKafkaProducer(bootstrap_servers=os.environ["BENCH_BOOTSTRAP"], acks="all", enable_idempotence=True, linger_ms=0)
    await producer.start()
    return producer


async def gateway() -> None:
    """Publishes each request, and makes a stream of the replies."""
    producer, waiting = await _producer(), dict[str, asyncio.Queue[Document]]()

    async def answer(_: Document, receive: Any, send: Any) -> None:
        generation, replies = str(uuid.uuid4()), asyncio.Queue[Document]()
        waiting[generation] = replies
        request = {"id": generation, "body": json.loads(await _body(receive))}
        await producer.send(os.environ["BENCH_REQUESTED"], json.dumps(request).encode(), key=generation.encode())
        await send(_STREAM)
        more = True
        while more:
            reply = await replies.get()
            more = "usage" not in reply
            await send({"type": "http.response.body", "body": _frames(reply), "more_body": more})
        del waiting[generation]

    reading = asyncio.create_task(_read_replies(waiting))
    await _serve(answer)
    reading.cancel()
    await producer.stop()


def _frames(reply: Document) -> bytes:
    if "usage" not in reply:
        choice = {"index": 0, "delta": {"content": reply["text"]}, "finish_reason": None}
        return b"data: %b\n\n" % json.dumps({"choices": [choice], "usage": None}).encode()
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None}
    usage = {"choices": [], "usage": reply["usage"]}
    return b"data: %b\n\ndata: %b\n\ndata: [DONE]\n\n" % (json.dumps(end).encode(), json.dumps(usage).encode())


async def _read_replies(waiting: dict[str, asyncio.Queue[Document]]) -> None:
    consumer = AIOKafkaConsumer(bootstrap_servers=os.environ["BENCH_BOOTSTRAP"], auto_offset_reset="latest", fetch_max_wait_ms=50)
    await consumer.start()
    consumer.assign([TopicPartition(os.environ["BENCH_REPLIES"], 0)])
    await consumer.seek_to_end()
    while True:
        for records in (await consumer.getmany(timeout_ms=1000)).values():
            for record in records:
                if (replies := waiting.get(record.key.decode())) is not None:
                    replies.put_nowait(json.loads(record.value))


async def _consumer(topic: str, group: str) -> AIOKafkaConsumer:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=os.environ["BENCH_BOOTSTRAP"],
        group_id=group,
        auto_offset_reset="earliest",
        auto_commit_interval_ms=200,
        fetch_max_wait_ms=50,
        heartbeat_interval_ms=500,
    )
    await consumer.start()
    return consumer


async def _step(source: str, target: str, group: str, change: Change) -> None:
    """A stateless hop: it never waits for an acknowledgement before it reads on."""
    stopping, producer, consumer = _stopping(), await _producer(), await _consumer(source, group)
    while not stopping.is_set():
        for records in (await consumer.getmany(timeout_ms=200)).values():
            for record in records:
                request = json.loads(record.value)
                await change(request)
                await producer.send(target, json.dumps(request).encode(), key=record.key)
    await consumer.stop()
    await producer.stop()


async def tokenizer() -> None:
    """Counts the prompt."""
    counted = encoding("o200k_base")

    async def count(request: Document) -> None:
        request["tokens"] = sum(counted.count(message["content"]) for message in request["body"]["messages"])

    await _step(os.environ["BENCH_REQUESTED"], os.environ["BENCH_TOKENIZED"], "bench-tokenizer", count)


async def memory() -> None:
    """Reads one row."""
    connection = await asyncpg.connect(os.environ["BENCH_DATABASE_URL"])

    async def read(request: Document) -> None:
        request["memory"] = await connection.fetchval("SELECT content FROM remembered WHERE id = 1")

    await _step(os.environ["BENCH_TOKENIZED"], os.environ["BENCH_READY"], "bench-memory", read)
    await connection.close()


async def generator() -> None:
    """Commits the job rows of what one fetch gave, then runs each job on its own."""
    stopping, producer, provider = _stopping(), await _producer(), Provider()
    pool = await asyncpg.create_pool(os.environ["BENCH_DATABASE_URL"], min_size=4, max_size=4, reset=_no_reset)
    consumer, running = await _consumer(os.environ["BENCH_READY"], "bench-generator"), set[asyncio.Task[None]]()

    async def run(request: Document) -> None:
        await _speak(request, provider, producer)
        await pool.execute("UPDATE job SET ended = now() WHERE id = $1", request["id"])
        usage = {"usage": {"prompt_tokens": request["tokens"], "completion_tokens": 20}}
        await producer.send(os.environ["BENCH_REPLIES"], json.dumps(usage).encode(), key=request["id"].encode(), partition=0)

    while not stopping.is_set():
        for records in (await consumer.getmany(timeout_ms=200)).values():
            requests = [json.loads(record.value) for record in records]
            columns = [request["id"] for request in requests], [record.value.decode() for record in records]
            await pool.execute("INSERT INTO job (id, request) SELECT * FROM unnest($1::text[], $2::jsonb[])", *columns)
            for request in requests:
                running.add(task := asyncio.create_task(run(request)))
                task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    await consumer.stop()
    await producer.stop()
    await pool.close()


async def _no_reset(_: Any) -> None:
    """The pool would otherwise ask the server to reset each session."""


async def _speak(request: Document, provider: Provider, producer: AIOKafkaProducer) -> None:
    """The first token at once, the others with what came within COALESCE_SECONDS."""
    text, due = "", 0.0
    async for content in _contents(provider.chat(json.dumps(request["body"]).encode())):
        text += content
        if (now := time.monotonic()) >= due:
            await _say(request, text, producer)
            text, due = "", now + COALESCE_SECONDS
    if text:
        await _say(request, text, producer)


async def _say(request: Document, text: str, producer: AIOKafkaProducer) -> None:
    value, key = json.dumps({"text": text}).encode(), request["id"].encode()
    await producer.send(os.environ["BENCH_REPLIES"], value, key=key, partition=0)


async def _contents(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    async for piece in pieces:
        for line in piece.splitlines():
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    if content := choice["delta"].get("content"):
                        yield content


def _stopping() -> asyncio.Event:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    gc.freeze()
    return stopping


if __name__ == "__main__":
    roles = {role.__name__: role for role in (forwarder, gateway, tokenizer, memory, generator)}
    uvloop.run(roles[sys.argv[1]]())

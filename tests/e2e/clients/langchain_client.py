"""LangChain's OpenAI clients, unmodified: does what its arguments name and prints what came of each as one JSON object."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

chat, text, embedding, *wanted = sys.argv[1:]
told: dict[str, Any] = {"base_url": f"{os.environ['TESSERA_URL']}/v1", "api_key": os.environ["TESSERA_API_KEY"], "max_retries": 0}
model = ChatOpenAI(model=chat, stream_usage=True, **told)
completing = OpenAI(model=text, **told)


@tool
def look(where: str) -> str:
    """Look somewhere."""
    return where


def whole(message: Any) -> dict[str, Any]:
    return {
        "content": message.content,
        "finish_reason": message.response_metadata.get("finish_reason"),
        "total_tokens": message.usage_metadata["total_tokens"],
    }


def joined(parts: Iterable[Any]) -> dict[str, Any]:
    first, *others = parts
    return whole(sum(others, first))


def of(name: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=name, **{**told, **more})


operations: dict[str, Callable[[], Any]] = {
    "chat": lambda: whole(model.invoke("Hello")),
    "chat_stream": lambda: joined(model.stream("Hello")),
    "tools": lambda: model.bind_tools([look]).invoke("Hello").tool_calls,
    "text": lambda: completing.invoke("One"),
    "text_stream": lambda: "".join(completing.stream("One")),
    "embeddings": lambda: [len(vector) for vector in OpenAIEmbeddings(model=embedding, **told).embed_documents(["one", "two"])],
    "unknown_model": lambda: of("no/such").invoke("Hello"),
    "unknown_model_stream": lambda: list(of("no/such").stream("Hello")),
    "no_messages": lambda: model.invoke([]),
    "wrong_key": lambda: of(chat, api_key="no key at all").invoke("Hello"),
}

results: dict[str, Any] = {}
for name in wanted:
    try:
        results[name] = operations[name]()
    except openai.APIStatusError as error:
        about = {"status": error.status_code, "code": error.code, "param": error.param, "type": error.type}
        results[name] = {"raised": next(base.__name__ for base in type(error).__mro__ if base.__module__.startswith("openai")), **about}
print(json.dumps(results))

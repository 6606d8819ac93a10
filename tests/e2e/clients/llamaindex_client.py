"""LlamaIndex's OpenAI clients, unmodified: does what its arguments name and prints what came of each as one JSON object."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import openai
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

chat, _, embedding, *wanted = sys.argv[1:]
told: dict[str, Any] = {"api_base": f"{os.environ['TESSERA_URL']}/v1", "api_key": os.environ["TESSERA_API_KEY"], "max_retries": 0}
model = OpenAI(model=chat, **told)
hello = [ChatMessage(role="user", content="Hello")]


def whole(answer: Any) -> dict[str, Any]:
    raw = answer.raw
    content = answer.message.content
    return {"content": content, "finish_reason": raw.choices[0].finish_reason, "total_tokens": raw.usage.total_tokens}


operations: dict[str, Callable[[], Any]] = {
    "chat": lambda: whole(model.chat(hello)),
    "chat_stream": lambda: "".join(part.delta or "" for part in model.stream_chat(hello)),
    "text": lambda: model.complete("Hello").text,
    "text_stream": lambda: "".join(part.delta or "" for part in model.stream_complete("Hello")),
    "embeddings": lambda: [
        len(vector) for vector in OpenAIEmbedding(model_name=embedding, **told).get_text_embedding_batch(["one", "two"])
    ],
    "unknown_model": lambda: OpenAI(model="gpt-4", **told).chat(hello),
    "unknown_model_stream": lambda: list(OpenAI(model="gpt-4", **told).stream_chat(hello)),
    "no_messages": lambda: model.chat([]),
    "wrong_key": lambda: OpenAI(model=chat, **{**told, "api_key": "no key at all"}).chat(hello),
}

results: dict[str, Any] = {}
for name in wanted:
    try:
        results[name] = operations[name]()
    except openai.APIStatusError as error:
        about = {"status": error.status_code, "code": error.code, "param": error.param, "type": error.type}
        results[name] = {"raised": type(error).__name__, **about}
print(json.dumps(results))

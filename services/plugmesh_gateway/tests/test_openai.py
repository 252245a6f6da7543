"""The official client against the gateway: shapes, parameters, usage."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import openai
import pytest

from .conftest import EOS, say, until


async def test_chat_answers_whole_with_usage(start):
    stack = await start()
    reply = await stack.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])

    assert reply.choices[0].message.content == "Hello, world!"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len("<user>hi"), len("Hello, world!") + 1)
    assert reply.usage.prompt_tokens_details.cached_tokens == 7
    assert stack.is_idle()

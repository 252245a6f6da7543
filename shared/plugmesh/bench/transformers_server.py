"""transformers behind OpenAI's completions route, so that it can be measured like the other peers.

Runs in the peer's own environment (torch, transformers and the standard library, nothing of plugmesh): `python transformers_server.py
FOLDER PORT THREADS`. One thread owns the model. Requests that wait at the same time and have prompts of the same length run as one static
batch to the longest `max_tokens` among them, the others leaving early; that is what transformers offers without a serving engine around it. Greedy only.
"""

from __future__ import annotations

import importlib
import json
import queue
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_GATHER_S = 0.02  # how long a batch waits for company; far below any time to first token here
_MAX_BATCH = 64


class Call:
    """One request on its way: the worker puts (text, is_last), or an Exception, into `out`."""

    def __init__(self, ids: list[int], max_tokens: int, ignore_eos: bool) -> None:
        self.ids, self.max_tokens, self.ignore_eos = ids, max_tokens, ignore_eos
        self.out: queue.Queue[Any] = queue.Queue()
        self.num_out = 0
        self.is_gone = False


class Worker(threading.Thread):
    """Owns model and tokenizer; runs one static batch after another."""

    def __init__(self, folder: str, num_threads: int) -> None:
        super().__init__(daemon=True)
        # Not import statements: these packages belong to the peer's environment, and the host has to stay free of torch.
        self.torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        self.torch.set_num_threads(num_threads)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=self.torch.bfloat16).eval()
        self.cache_class = transformers.DynamicCache
        self.calls: queue.Queue[Call] = queue.Queue()

    def run(self) -> None:
        held: list[Call] = []
        while True:
            if not held:
                held.append(self.calls.get())
            until = time.monotonic() + _GATHER_S
            while len(held) < _MAX_BATCH and (left := until - time.monotonic()) > 0:
                try:
                    held.append(self.calls.get(timeout=left))
                except queue.Empty:
                    break
            batch = [c for c in held if len(c.ids) == len(held[0].ids)]
            held = [c for c in held if len(c.ids) != len(batch[0].ids)]
            try:
                with self.torch.inference_mode():
                    self._generate(batch)
            except Exception as e:  # the callers get it; the worker goes on
                for call in batch:
                    call.out.put(e)

    def _generate(self, batch: list[Call]) -> None:
        torch, ends = self.torch, {self.tokenizer.eos_token_id}
        cache = self.cache_class(config=self.model.config)
        ids = torch.tensor([c.ids for c in batch])
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        live = set(range(len(batch)))
        while True:
            best = logits[:, -1].argmax(-1)
            for row in sorted(live):
                call, token = batch[row], int(best[row])
                call.num_out += 1
                is_last = call.num_out >= call.max_tokens or (token in ends and not call.ignore_eos) or call.is_gone
                call.out.put((self.tokenizer.decode([token]), is_last))
                if is_last:
                    live.discard(row)
            if not live:
                return
            logits = self.model(best[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits


class Handler(BaseHTTPRequestHandler):
    """GET /health, /v1/models; POST /v1/completions and /v1/chat/completions, streamed or whole."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    worker: Worker

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": "default", "object": "model"}]})
        else:
            self._json(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_chat = self.path == "/v1/chat/completions"
        if not is_chat and self.path != "/v1/completions":
            return self._json(404, {"error": {"message": "no such route"}})
        if is_chat:
            ids = self.worker.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        else:
            ids = body["prompt"] if isinstance(body["prompt"], list) else self.worker.tokenizer(body["prompt"])["input_ids"]
        call = Call(list(ids), int(body.get("max_tokens") or 16), bool(body.get("ignore_eos")))
        self.worker.calls.put(call)
        first = call.out.get()
        if isinstance(first, Exception):
            return self._json(500, {"error": {"message": f"{type(first).__name__}: {first}"}})
        if body.get("stream"):
            return self._stream(call, first, is_chat)
        texts = [first[0]]
        while not first[1]:
            first = call.out.get()
            if isinstance(first, Exception):
                return self._json(500, {"error": {"message": f"{type(first).__name__}: {first}"}})
            texts.append(first[0])
        text = "".join(texts)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        return self._json(200, {"choices": [choice], "usage": self._usage(call)})

    def _usage(self, call: Call) -> dict[str, int]:
        return {"prompt_tokens": len(call.ids), "completion_tokens": call.num_out, "total_tokens": len(call.ids) + call.num_out}

    def _stream(self, call: Call, item: Any, is_chat: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            while True:
                if isinstance(item, Exception):
                    self._event({"error": {"message": type(item).__name__}})
                    break
                text, is_last = item
                part: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
                self._event({"choices": [{"index": 0, **part, "finish_reason": "length" if is_last else None}]})
                if is_last:
                    self._event({"choices": [], "usage": self._usage(call)})
                    break
                item = call.out.get()
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except ConnectionError:
            call.is_gone = True
            self.close_connection = True

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """A thread per connection, enough of them waiting to be accepted for a wave of requests."""

    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    folder, port, num_threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    Handler.worker = Worker(folder, num_threads)
    Handler.worker.start()
    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()

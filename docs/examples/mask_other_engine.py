"""Structured output for an engine that is not plugmesh's: a grammar instance says over gRPC which tokens may come next.

    plugmesh up                                       # or only: broker, weightstore, tokenizer, grammar
    plugmesh status                                   # shows the gRPC addresses
    python docs/examples/mask_other_engine.py --grammar 127.0.0.1:40001 --tokenizer 127.0.0.1:40002

The engine here is a toy: random logits over the model's real vocabulary, several sequences at a time. Whatever it draws, the result is in
the grammar's language. A real one puts `logits[~allowed(reply.mask)] = -inf` in front of its sampler, as `Toy.sample` does, and needs of this file
`Masks` and the loop in `main`. Needs grpcio, numpy and plugmesh's generated protocol (`plugmesh_proto`).
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
from collections.abc import Iterator

import grpc
import numpy as np

from plugmesh_proto.v1 import grammar_pb2, grammar_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["city", "river", "mountain"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "kind", "size", "tags"],
    "additionalProperties": False,
}


class Masks:
    """One Masks stream, used step by step: any number of requests out, as many replies back, in order."""

    def __init__(self, stub: grammar_pb2_grpc.GrammarStub) -> None:
        self._requests: queue.SimpleQueue[grammar_pb2.MaskRequest | None] = queue.SimpleQueue()
        self._replies = stub.Masks(self._outgoing())

    def _outgoing(self) -> Iterator[grammar_pb2.MaskRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def ask(self, requests: list[grammar_pb2.MaskRequest]) -> list[grammar_pb2.MaskReply]:
        for request in requests:
            self._requests.put(request)
        replies = [next(self._replies) for _ in requests]
        for reply in replies:
            if reply.HasField("error"):
                raise RuntimeError(f"sequence {reply.sequence}: {reply.error.code}: {reply.error.message}")
        return replies

    def close(self) -> None:
        self._requests.put(None)


class Toy:
    """An engine: logits out of nowhere, a mask, a draw."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(seed)

    def sample(self, mask: bytes) -> int:
        logits = self._random.standard_normal(self._vocab_size)
        if mask:  # empty: every token is allowed
            logits[~allowed(mask, self._vocab_size)] = -np.inf
        # Gumbel's trick: the largest of logits + noise is a draw at temperature 1.
        return int(np.argmax(logits + self._random.gumbel(size=self._vocab_size)))


def allowed(mask: bytes, vocab_size: int) -> np.ndarray:
    """Bit j % 32 of little-endian word j // 32 is token j, so that byte j // 8 holds it, lowest bit first."""
    return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:vocab_size].astype(bool)


def read_vocabulary(stub: tokenizer_pb2_grpc.TokenizerStub, model: str) -> list[bytes]:
    """The bytes of every token."""
    pieces: list[bytes] = []
    for part in stub.Vocabulary(tokenizer_pb2.DescribeTokenizerRequest(model=model)):
        pieces.extend(part.token_bytes)
    return pieces


def generate(masks: Masks, toy: Toy, opening: grammar_pb2.OpenMatcher, num_sequences: int, max_tokens: int) -> Iterator[list[int]]:
    """Token ids of each sequence, without the end token. Raises RuntimeError for one that did not end."""
    names = [f"row-{i}" for i in range(num_sequences)]
    replies = masks.ask([grammar_pb2.MaskRequest(sequence=name, open=opening) for name in names])
    running = dict(zip(names, replies, strict=True))
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(max_tokens):
        # One step of a batch: a token for each row, then all of them in one go.
        drawn = {name: toy.sample(reply.mask) for name, reply in running.items()}
        replies = masks.ask([grammar_pb2.MaskRequest(sequence=name, accept=grammar_pb2.AcceptTokens(token_ids=[token])) for name, token in drawn.items()])
        for reply in replies:
            assert reply.num_accepted == 1, "the mask allowed it"
            if reply.is_terminated:
                del running[reply.sequence]
                yield tokens[reply.sequence]
            else:
                tokens[reply.sequence].append(drawn[reply.sequence])
                running[reply.sequence] = reply
        if not running:
            return
    raise RuntimeError(f"{len(running)} sequences did not end within {max_tokens} tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grammar", required=True, help="host:port of a grammar instance's gRPC server")
    parser.add_argument("--tokenizer", required=True, help="host:port of a tokenizer instance's, for the bytes of tokens")
    parser.add_argument("--model", default="", help="whose tokenizer; empty: the mesh's default model")
    parser.add_argument("--schema", default=json.dumps(SCHEMA), help="a JSON schema")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with grpc.insecure_channel(options.grammar) as grammar_channel, grpc.insecure_channel(options.tokenizer) as tokenizer_channel:
        grammar = grammar_pb2_grpc.GrammarStub(grammar_channel)
        pieces = read_vocabulary(tokenizer_pb2_grpc.TokenizerStub(tokenizer_channel), options.model)
        wanted = grammar_pb2.CompileGrammarRequest(
            spec=grammar_pb2.GrammarSpec(kind="json_schema", source=options.schema, whitespace="compact"), model=options.model)
        info = grammar.Compile(wanted)
        print(f"compiled by {info.engine} {info.engine_version} in {info.compile_ms:.1f} ms, {info.num_bytes} bytes", file=sys.stderr)
        masks = Masks(grammar)
        try:
            for ids in generate(masks, Toy(len(pieces), options.seed), grammar_pb2.OpenMatcher(key=info.key), options.sequences, options.max_tokens):
                text = b"".join(pieces[i] for i in ids).decode()
                reply = grammar.Validate(grammar_pb2.ValidateGrammarRequest(grammar=wanted, text=text))
                if not reply.is_valid:
                    print(f"not in the language from byte {reply.num_valid_bytes} on: {text!r}", file=sys.stderr)
                    return 1
                print(text)
        finally:
            masks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc

from plugmesh.client.messages import (
    Completion,
    Event,
    Grammar,
    Prompt,
    Score,
    ServedModel,
    completion_from_pb,
    event_from_pb,
    metadata_of,
    models_from_pb,
    request_to_pb,
    score_to_pb,
    scores_from_pb,
)
from plugmesh.wire import error_from_rpc
from plugmesh_proto.v1 import inference_pb2, inference_pb2_grpc


class Client:
    """One channel to a gateway's gRPC address ("host:port"); safe to share between threads.

    Args:
        api_key: Sent as `authorization: Bearer`; empty for none.
        credentials: For TLS; None connects in the clear, which is for loopback and private networks.
        timeout_s: Of each call, from sending to the last event.
    """

    def __init__(self, address: str, *, api_key: str = "", credentials: grpc.ChannelCredentials | None = None, timeout_s: float = 300.0) -> None:
        self._channel = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._metadata = metadata_of(api_key)
        self._timeout_s = timeout_s

    def generate(
        self, prompt: Prompt | None = None, *, messages: Sequence[Mapping[str, Any]] | None = None, model: str = "",
        stop: str | Sequence[str] = (), priority: int = 0, request_id: str = "", timeout_s: float | None = None,
        grammar: Grammar | None = None, tools: Sequence[Mapping[str, Any]] = (), **sampling: Any,
    ) -> Iterator[Event]:
        """Events as they come. Closing (or dropping) the iterator early cancels the request everywhere.

        Args:
            prompt: Text or token ids; or `messages` for a chat.
            grammar: What every choice must obey: a JSON schema, a list of texts to choose from, or a `plugmesh.grammar.spec.GrammarSpec`.
            tools: As OpenAI has them; with messages only. Calls are part of the text, as the model writes them, and obey the tools' schemas.
            sampling: temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias,
                seed, max_tokens, min_tokens, stop_token_ids, ignore_eos, logprobs, top_logprobs, n.

        Raises:
            PlugmeshError: Of the class that the gateway meant.
        """
        request = request_to_pb(
            prompt, messages, model=model, stop=stop, priority=priority, request_id=request_id, sampling=sampling, grammar=grammar, tools=tools)
        call = self._stub.Generate(request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=self._metadata)
        try:
            for message in call:
                yield event_from_pb(message)
        except grpc.RpcError as e:
            raise error_from_rpc(e) from None
        finally:
            call.cancel()

    def complete(
        self, prompt: Prompt | None = None, *, messages: Sequence[Mapping[str, Any]] | None = None, model: str = "",
        stop: str | Sequence[str] = (), priority: int = 0, request_id: str = "", timeout_s: float | None = None,
        grammar: Grammar | None = None, tools: Sequence[Mapping[str, Any]] = (), **sampling: Any,
    ) -> Completion:
        """The whole answer; arguments and errors as for `generate`."""
        request = request_to_pb(
            prompt, messages, model=model, stop=stop, priority=priority, request_id=request_id, sampling=sampling, grammar=grammar, tools=tools)
        try:
            reply = self._stub.Complete(request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=self._metadata)
        except grpc.RpcError as e:
            raise error_from_rpc(e) from None
        return completion_from_pb(reply)

    def score(
        self, prompt: Prompt | None, continuations: Sequence[Prompt], *, messages: Sequence[Mapping[str, Any]] | None = None, model: str = "",
        top_logprobs: int = 0, priority: int = 0, request_id: str = "", timeout_s: float | None = None,
    ) -> list[Score]:
        """How likely the model finds each continuation of a prompt; nothing is generated, and the prompt is computed once.

        Args:
            prompt: Text or token ids; or `messages` for a chat.
            continuations: Text or token ids each. Text behind a text prompt is tokenized together with it.
            top_logprobs: Alternatives to each token, at most 20; `Score.is_greedy` needs one.
        """
        request = score_to_pb(prompt, messages, continuations, model=model, top_logprobs=top_logprobs, priority=priority, request_id=request_id)
        try:
            reply = self._stub.Score(request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=self._metadata)
        except grpc.RpcError as e:
            raise error_from_rpc(e) from None
        return scores_from_pb(reply)

    def models(self) -> list[ServedModel]:
        """Models that the mesh answers with, the default one first."""
        try:
            return models_from_pb(self._stub.ListModels(inference_pb2.ListServedModelsRequest(), timeout=30, metadata=self._metadata))
        except grpc.RpcError as e:
            raise error_from_rpc(e) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

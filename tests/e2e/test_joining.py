"""Meshes that are put together: on a broker that runs already, and one more instance by hand."""

from __future__ import annotations

import signal

import openai
import pytest

from plugmesh import models
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.testing.cluster import Cluster, wait_until

pytestmark = [
    pytest.mark.nats, pytest.mark.model, pytest.mark.timeout(200),
    pytest.mark.skipif(models.find("smollm2") is None, reason="plugmesh pull smollm2 fetches the model"),
]  # fmt: skip
SMALL = {"services": {"decode": {"num_kv_blocks": 64}, "prefill": {"num_kv_blocks": 64}}}


async def test_up_joins_a_broker_that_runs_already_and_leaves_it_running(tmp_path):
    (tmp_path / "broker").mkdir(mode=0o700)
    (tmp_path / "mesh").mkdir()
    broker = EmbeddedBroker(tmp_path / "broker", mesh="joined")
    address = await broker.start()
    config = {**SMALL, "mesh": {"name": "joined", "nats": {"user": address.user, "password_file": str(address.password_file)}}}
    cluster = Cluster(tmp_path / "mesh", config, arguments=["--nats", address.url])
    try:
        cluster.start()
        with openai.OpenAI(base_url=cluster.base_url, api_key="none", max_retries=0, timeout=60) as client:
            text = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=3, temperature=0).choices[0].text
        names = [p.name() for p in cluster.descendants()]

        assert "Paris" in text
        assert not [n for n in names if "nats-server" in n]
        assert 0 == cluster.stop()
        assert broker.pid is not None
    finally:
        cluster.stop()
        await broker.stop()


def test_one_more_decode_instance_joins_by_hand_and_leaves(tmp_path):
    cluster = Cluster(tmp_path, SMALL)
    try:
        cluster.start()
        served = cluster.command("serve", "decode")
        try:
            wait_until(lambda: len(cluster.instances("decode")) == 2, 60, "the second decode instance is listed")
            first, second = cluster.instances("decode")
            assert first["weight_version"] == second["weight_version"]
            served.send_signal(signal.SIGTERM)
            out, _ = served.communicate(timeout=30)
        finally:
            served.kill()
            served.wait()

        assert 0 == served.returncode, out.decode()[-2000:]
        wait_until(lambda: len(cluster.instances("decode")) == 1, 10, "it is gone again")
    finally:
        cluster.stop()

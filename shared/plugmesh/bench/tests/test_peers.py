"""The real peers, where `plugmesh bench peers --prepare` has installed them."""

from __future__ import annotations

import pytest

from plugmesh import models
from plugmesh.bench import peers
from plugmesh.bench.peers import BATCH, PEERS, SINGLE
from plugmesh.bench.systems import PeerSystem, Setting
from plugmesh.bench.workloads import Shape, random_prompts


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(PEERS))
async def test_a_peer_answers_rightly_with_exact_lengths_and_stops(name, tmp_path):
    if peers.why_missing(PEERS[name]):
        pytest.skip(peers.why_missing(PEERS[name]))
    system = PeerSystem(PEERS[name], Setting(models.find("smollm2"), tmp_path))
    try:
        facts = await system.start()
        assert facts["verified"] is True
        for profile, streams in ((SINGLE, 1), (BATCH, 3)):
            run = await system.run(random_prompts(Shape(num_conversations=3, num_in=20, num_out=6), 0), streams, profile, use_cache=False)
            assert [] == [r.error for r in run.records if not r.is_ok or not r.is_exact]
            assert run.facts["server_cpu_s"] > 0
        assert sum(m.pss for m in system.memory().values()) > 50e6
    finally:
        await system.stop()
    assert {} == system.memory()

"""The plugin in a whole mesh: the real broker, two decode instances, the real model."""

from __future__ import annotations

import openai
import pytest

from plugmesh import models
from plugmesh.testing.cluster import running

pytestmark = [
    pytest.mark.nats, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(200),
    pytest.mark.skipif(models.find("smollm2") is None, reason="plugmesh pull smollm2 fetches the model"),
]  # fmt: skip


def test_prompts_that_begin_alike_meet_in_one_instance_and_others_spread_and_limits_hold(tmp_path):
    decode = {"replicas": 2, "num_threads": 1, "num_kv_blocks": 256, "use_kvstore": False}
    config = {
        "services": {"decode": decode, "prefill": {"replicas": 0}, "kvstore": {"replicas": 0}, "gateway": {"plugins": ["aibrix_routing"]}},
        "plugins": {"aibrix_routing": {"client_limits": {"greedy": {"requests_per_minute": 2}}}},
    }
    with running(tmp_path, config) as cluster, openai.OpenAI(base_url=cluster.base_url, api_key="none", max_retries=0, timeout=60) as client:

        def cached(prompt: list[int], user: str = "modest") -> int:
            usage = client.completions.create(model="smollm2", prompt=prompt, max_tokens=2, user=user).usage
            assert usage is not None and usage.prompt_tokens_details is not None
            return usage.prompt_tokens_details.cached_tokens or 0

        prefixes = [[1000 + 100 * p + i for i in range(96)] for p in range(6)]
        first = [cached([*prefix, 5000]) for prefix in prefixes]
        # Blind routing over two instances would miss about half of these.
        again = [cached([*prefix, 6000 + i]) for i in range(2) for prefix in prefixes]

        assert first == [0] * 6
        assert again == [96] * 12
        requests = [cluster.metric(i, "plugmesh_decode_prefills_total") for i in cluster.instances("decode")]
        assert min(requests) >= 6  # two of the prompts at least live on each, and those of `up` itself
        cached(prefixes[0], "greedy")
        cached(prefixes[0], "greedy")
        with pytest.raises(openai.RateLimitError) as e:
            cached(prefixes[0], "greedy")
        assert 0 < float(e.value.response.headers["retry-after"]) <= 61
        assert cached(prefixes[0]) == 80  # all but the block of its last token

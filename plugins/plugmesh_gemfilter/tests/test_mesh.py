"""In a real mesh with the real model: long prompts are filtered where they are decoded, whoever was to compute them; usage counts what came."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from plugmesh import models
from plugmesh.testing.cluster import running, wait_until


@pytest.mark.slow
@pytest.mark.nats
@pytest.mark.model
@pytest.mark.timeout(300)
@pytest.mark.skipif(models.find("smollm2") is None, reason="plugmesh pull smollm2 fetches the model")
def test_long_prompts_are_filtered_in_decode_also_beside_a_prefill_service(tmp_path):
    config: dict[str, Any] = {
        "services": {
            "decode": {"plugins": ["gemfilter"], "num_kv_blocks": 512, "num_threads": 1, "remote_prefill_min_tokens": 32},
            "prefill": {"replicas": 1, "num_kv_blocks": 256, "num_threads": 1},
        },
        "plugins": {"gemfilter": {"layer": 18, "keep_tokens": 160, "min_prompt_tokens": 400}},
    }
    long = "The secret number of the green owl is 4448. " + "Grass is green and the sky is blue. " * 60 + "The secret number of the green owl is"
    with running(tmp_path, config) as mesh, openai.OpenAI(base_url=mesh.base_url, api_key="none", max_retries=0, timeout=120) as client:
        decode = next(i for i in mesh.instances() if i["role"] == "decode")

        def filtered() -> float:
            return float(mesh.metric(decode, "plugmesh_engine_filtered_prompts"))

        def ask(prompt: str, **more: Any) -> Any:
            return client.completions.create(model="smollm2", prompt=prompt, max_tokens=8, temperature=0, **more)

        short = ask("Grass is green and the sky is")
        assert filtered() == 0
        first = ask(long)
        wait_until(lambda: filtered() == 1, 10, "the prompt was not filtered")
        twice = ask(long, n=2)
        streamed = "".join(c.choices[0].text for c in ask(long, stream=True) if c.choices)
        wait_until(lambda: mesh.metric(decode, "plugmesh_kv_blocks", state="used") == 0, 10, "KV blocks are still held")

        assert first.usage.prompt_tokens > 400
        assert [c.text for c in twice.choices] == [first.choices[0].text] * 2
        assert streamed == first.choices[0].text
        assert short.usage.prompt_tokens < 20
        assert mesh.metric(decode, "plugmesh_engine_filter_errors") == 0
        assert mesh.metric(decode, "plugmesh_kv_blocks_leaked") == 0

"""In a real mesh with the real model: early stops free KV at once, the ledger says what decode computed, one trace is the plain request."""

from __future__ import annotations

import openai
import pytest

from plugmesh import models
from plugmesh.testing.cluster import running, wait_until
from plugmesh_deepconf.tasks import problems


@pytest.mark.slow
@pytest.mark.nats
@pytest.mark.model
@pytest.mark.timeout(300)
@pytest.mark.skipif(models.find("smollm2") is None, reason="plugmesh pull smollm2 fetches the model")
def test_deepconf_serves_arithmetic_in_a_real_mesh(tmp_path):
    config = {
        "services": {"gateway": {"plugins": ["deepconf"]}, "decode": {"num_kv_blocks": 512, "num_threads": 1}},
        "plugins": {"deepconf": {"window": 6, "warmup": 6, "batch": 10, "traces": 16, "keep_percent": 50.0, "consensus": 1.0, "answer": "number"}},
    }
    made = problems("sum", 4, 11)
    with running(tmp_path, config) as mesh, openai.OpenAI(base_url=mesh.base_url, api_key="none", max_retries=0, timeout=120) as client:
        decode = next(i for i in mesh.instances() if i["role"] == "decode")

        def computed() -> float:
            return mesh.metric(decode, "plugmesh_decode_tokens_total")

        def ask(prompt, strategy, **more):
            return client.completions.create(
                model="smollm2", prompt=prompt, max_tokens=40, temperature=0.8, stop=["\n"], seed=5, extra_body={"strategy": strategy}, **more)

        num_stopped = num_right = 0
        for problem in made:
            before = computed()
            reply = ask(problem.prompt, {"name": "deepconf"})
            detail = reply.strategy
            rows = detail["traces"]
            wait_until(lambda: mesh.metric(decode, "plugmesh_kv_blocks", state="used") == 0, 10, lambda: "KV blocks are still held")
            assert mesh.metric(decode, "plugmesh_kv_blocks_leaked") == 0
            assert len(rows) == 16 and detail["num_calls"] == 16
            # A cancelled submission may drop the tokens of the step in which it ended: one for each of its sequences that still ran.
            assert detail["num_tokens"] <= computed() - before <= detail["num_tokens"] + 16
            assert reply.usage.completion_tokens == detail["num_tokens"]
            assert all(r["answer"] is None for r in rows if r["end"] == "stopped") and all(r["end"] != "stopped" for r in rows[:6])
            assert detail["answer"] is None or detail["answer"] in reply.choices[0].text
            num_stopped += sum(r["end"] == "stopped" for r in rows)
            num_right += detail["answer"] == problem.answer
        assert num_stopped > 0

        plain = client.completions.create(model="smollm2", prompt=made[0].prompt, max_tokens=40, temperature=0.8, stop=["\n"], seed=5)
        single = ask(made[0].prompt, {"name": "deepconf", "mode": "majority", "traces": 1})
        assert single.choices[0].text == plain.choices[0].text
        again = [ask(made[1].prompt, {"name": "deepconf", "mode": "offline", "traces": 8}).choices[0].text for _ in range(2)]
        assert again[0] == again[1]
        streamed = "".join(
            c.choices[0].text for c in ask(made[1].prompt, {"name": "deepconf", "mode": "offline", "traces": 8}, stream=True) if c.choices)
        assert streamed == again[0]

"""What a run looks like while it runs."""

from __future__ import annotations

import io
import json

from rich.console import Console

from plugmesh_rollout.loop import show
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.run import Progress


def line(step, time_s, **more):
    return {"time_s": time_s, "busy_s": step * 1.0, "alive_s": step * 2.0, "step": step, "loss": 0.1, "reward": step / 10, "tokens": 50, "lags": {"0": 30, "1": 20}, **more}


def text_of(figures, progress, **more):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show._table(figures, progress, 12.3, **more))
    return console.export_text().splitlines()


def test_a_running_run_tells_rewards_staleness_and_idle_shares():
    trainer = [
        {"time_s": 0.0, "busy_s": 0.0, "alive_s": 0.0, "before": {"accuracy": 0.1, "held_out_reward": 0.2}},
        line(1, 10.0), line(2, 12.0, accuracy=0.5, held_out_reward=0.6),
    ]  # fmt: skip
    figures = {"rollout-0": [{"time_s": 1.0, "busy_s": 1.0, "alive_s": 4.0, "tokens": 120}], "trainer-0": trainer}
    found = {x[:20].strip(): x[21:].strip() for x in text_of(figures, Progress(30, processes={"train:0": 1}, num_restarts=2))}

    assert found == {
        "step": "2 of 30   12 s", "restarts": "2", "reward": "0.150   (mean of 2 steps; the last one 0.200)",
        "held-out reward": "0.600   (at first 0.200)", "held-out accuracy": "0.500   (at first 0.100)", "tokens": "120 generated   25 trained/s",
        "0 behind": f"{'█' * 18:<30}  60%", "1 behind": f"{'█' * 12:<30}  40%", "rollout-0 idle": f"{'█' * 22:<30}  75%", "trainer-0 idle": f"{'█' * 15:<30}  50%",
    }  # fmt: skip


def test_before_the_first_step_it_says_what_it_waits_for():
    assert "making the first weights" in text_of({}, Progress(3))[0]
    assert "workers are starting" in text_of({}, Progress(3, processes={"train:0": 1}))[0]
    assert text_of({}, Progress(3), is_stopping=True)[0].endswith("stopping")


def test_growing_figures_are_read_once_and_as_a_whole(tmp_path):
    """A line that is being written waits; one that a killed worker left half is passed over."""
    folder = RunFolder(tmp_path)
    tail, path = show.Tail(folder), folder.figures / "trainer-0.jsonl"
    assert tail.read() == {}
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"a": ')
    assert tail.read() == {"trainer-0": [{"a": 1}]}
    with path.open("a") as f:
        f.write("2}\n{broken\n" + json.dumps({"a": 3}) + "\n")
    assert tail.read() == {"trainer-0": [{"a": 1}, {"a": 2}, {"a": 3}]} == folder.read_figures()
    assert tail.read() == {"trainer-0": [{"a": 1}, {"a": 2}, {"a": 3}]}

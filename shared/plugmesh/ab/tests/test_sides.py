"""What the two sides load, and how workloads become measures."""

from __future__ import annotations

import pathlib

import pytest

from plugmesh import cards
from plugmesh.ab.side import engine_config
from plugmesh.ab.sides import Subject, subject_of, tools_host
from plugmesh.ab.workloads import CoreWorkloads, measure_of
from plugmesh.bench.systems import Setting
from plugmesh.errors import ConfigError, InvalidRequest
from plugmesh.records import WorkloadContext

SETTING = Setting(pathlib.Path("model.gguf"), pathlib.Path("folder"), threads=2, kv_dtype="int8")
CONTEXT = WorkloadContext(0, 49152, lambda text: [1] * len(text), lambda text: [1] * len(text), lambda: "text")


def card(slug: str = "mine", **more: object) -> cards.Card:
    base = {"slug": slug, "version": "1", "summary": "s", "services": ("decode", "prefill", "tools"), "hooks": (), "fidelity": "exact"}
    return cards.Card.model_validate({**base, **more})


def test_only_the_side_with_the_plugin_loads_it_and_gets_its_settings() -> None:
    ab = {"base": {"decode": {"replicas": 2}}, "services": {"decode": {"weight_format": "mine"}}, "settings": {"bits": 4}}
    subject = Subject((card(ab=ab),), {"mine": {"group": 64}})
    without, with_ = (subject.tables(SETTING, loaded=loaded) for loaded in (False, True))
    engine = {"executor": "auto", "kv_dtype": "int8", "num_threads": 2}

    assert without == {"services": {"decode": {**engine, "replicas": 2}, "prefill": engine}, "plugins": {}}
    assert with_ == {
        "services": {"decode": {**engine, "replicas": 2, "weight_format": "mine", "plugins": ["mine"]}, "prefill": {**engine, "plugins": ["mine"]}},
        "plugins": {"mine": {"bits": 4, "group": 64}},
    }


def test_a_plugin_that_brings_its_own_plain_form_is_loaded_on_both_sides() -> None:
    ab = {"services": {"decode": {"weight_format": "packed"}}, "instead": {"decode": {"weight_format": "plain"}}}
    without, with_ = (Subject((card(ab=ab),)).tables(SETTING, loaded=loaded)["services"]["decode"] for loaded in (False, True))

    assert (without["weight_format"], without["plugins"]) == ("plain", ["mine"])
    assert (with_["weight_format"], with_["plugins"]) == ("packed", ["mine"])


def test_making_tables_leaves_the_card_as_it_was() -> None:
    subject = Subject((card(ab={"services": {"decode": {"list": [1]}}}),))
    subject.tables(SETTING, loaded=True)["services"]["decode"]["list"].append(2)

    assert subject.tables(SETTING, loaded=True)["services"]["decode"]["list"] == [1]


def test_a_combination_loads_its_plugins_in_the_order_given_and_is_as_faithful_as_its_worst() -> None:
    subject = Subject((card("bb"), card("aa", services=("gateway",), fidelity="lossy", loss={"metric": "m", "bound": 1, "setting": "s"})))
    services = subject.tables(SETTING, loaded=True)["services"]

    assert (services["decode"]["plugins"], services["gateway"]["plugins"]) == (["bb"], ["aa"])
    assert (subject.name, subject.fidelity, subject.has_engine_side) == ("bb+aa", "lossy", True)


def test_what_only_a_gateway_loads_has_no_engine_side() -> None:
    assert not Subject((card(services=("gateway", "prefill")),)).has_engine_side


def test_plugins_that_conflict_are_refused_with_both_names() -> None:
    subject = Subject((card("ngram_draft", provides=("drafts",)), card("sarathi", conflicts=("ngram_draft",))))

    subject_of(["ngram_draft", "sarathi"]).check(SETTING)  # those in the tree go together
    with pytest.raises(ConfigError, match="no plugin 'no_such'"):
        subject_of(["no_such"])
    assert subject.slugs == ("ngram_draft", "sarathi")


def test_settings_are_toml_values() -> None:
    subject = subject_of(["ngram_draft"], ["ngram_draft.max_tokens=4", "ngram_draft.min_gain=0.5", "ngram_draft.name=word"])

    assert subject.settings == {"ngram_draft": {"max_tokens": 4, "min_gain": 0.5, "name": "word"}}


@pytest.mark.parametrize("text", ["ngram_draft.max_tokens", "sarathi.token_budget=3", "max_tokens=3", "ngram_draft.=3"])
def test_a_setting_of_another_form_or_plugin_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no setting"):
        subject_of(["ngram_draft"], [text])


def test_the_cores_own_come_first_through_the_door_of_plugins() -> None:
    host = tools_host(["ngram_draft"], {})

    assert [r.name for r in host.records("quality_metrics")][:2] == ["perplexity", "divergence"]
    assert [r.name for r in host.records("workloads")][-3:] == ["copy_1", "copy_8", "story_1"]


def test_the_engine_gets_what_decode_would_give_it() -> None:
    config = engine_config({"num_kv_blocks": 77, "kv_dtype": "int8", "plugins": ["x"], "weight_format": "mine", "replicas": 3})

    assert (config.num_blocks, config.kv_dtype) == (77, "int8")


@pytest.mark.parametrize("record", CoreWorkloads().register_workloads(), ids=lambda r: r.name)
def test_core_workloads_are_the_same_for_a_seed_and_quick_ones_are_small(record) -> None:
    full, quick = (measure_of(record, CONTEXT, is_quick=q) for q in (False, True))
    calls = [c for conversation in quick.build(3) for c in conversation]

    assert full.build(3) == full.build(3) != full.build(4)
    assert len(full.build(3)) >= full.streams
    assert len(calls) <= 4
    assert max(len(c.prompt) + c.max_tokens for c in calls) <= 40

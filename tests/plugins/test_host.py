"""The plugin host: what it loads, refuses and isolates."""

from __future__ import annotations

import sys
import textwrap

import pytest

from plugmesh import cards
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, PluginError
from plugmesh.hookspecs import hookimpl
from plugmesh.host import PluginHost
from plugmesh.records import PrefillPolicyRecord, RouterRecord

CARD = """
slug = "{slug}"
version = "0.1"
summary = "made by a test"
services = ["gateway", "decode"]
hooks = ["register_routers"]
fidelity = "exact"
{more}
"""

PLUGIN = """
from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import RouterRecord

class Settings(StrictModel):
    weight: int = 1

@hookimpl
def register_routers(context):
    settings = context.settings(Settings)
    return [RouterRecord(name="{slug}", build=lambda: settings.weight)]
"""


@pytest.fixture
def make_plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(slug: str, *, code: str = PLUGIN, more: str = "") -> str:
        folder = tmp_path / f"plugmesh_{slug}"
        folder.mkdir()
        (folder / "__init__.py").write_text('"""A test\'s plugin."""\n')
        (folder / "plugin.py").write_text(textwrap.dedent(code).replace("{slug}", slug))
        (folder / "plugin.toml").write_text(CARD.format(slug=slug, more=more))
        made.append(f"plugmesh_{slug}")
        return slug

    yield make
    for name in list(sys.modules):
        if name.split(".")[0] in made:
            del sys.modules[name]


def test_records_come_in_the_order_of_the_configuration_after_the_built_in_ones(make_plugin):
    make_plugin("t_one")
    make_plugin("t_two")
    config = MeshConfig(services={"gateway": {"plugins": ["t_two", "t_one"]}}, plugins={"t_one": {"weight": 7}})
    host = PluginHost.load(["t_two", "t_one"], config, service="gateway")

    class Core:
        @hookimpl
        def register_routers(self, context):
            return [RouterRecord(name="core", build=lambda: 0)]  # what it builds is not looked at

    host.register_builtin(Core())
    records = host.records("routers")

    assert ["core", "t_two", "t_one"] == [r.name for r in records]
    assert [0, 1, 7] == [r.build() for r in records]
    assert "t_one" == host.last("routers").name
    assert "t_one" == host.select("router", [r.name for r in records])
    assert {"t_two": "0.1", "t_one": "0.1"} == host.versions


def test_an_unknown_plugin_is_refused_with_the_config_line_and_what_is_installed():
    with pytest.raises(ConfigError, match=r"\[services.gateway\] plugins.*no plugin 'nosuch'"):
        PluginHost.load(["nosuch"], MeshConfig(), service="gateway")


def test_an_import_that_fails_stops_the_start_with_the_plugins_name(make_plugin):
    make_plugin("t_broken", code="raise RuntimeError('no such device')")
    with pytest.raises(ConfigError, match=r"t_broken.*no such device"):
        PluginHost.load(["t_broken"], MeshConfig(), service="gateway")


def test_an_implementation_of_an_unknown_hook_is_refused(make_plugin):
    make_plugin(
        "t_typo",
        code="""
        from plugmesh.hookspecs import hookimpl
        @hookimpl
        def register_rooters(context):
            return []
        """,
    )
    with pytest.raises(ConfigError, match="t_typo"):
        PluginHost.load(["t_typo"], MeshConfig(), service="gateway")


def test_a_bad_setting_names_its_key_and_the_nearest_valid_one(make_plugin):
    make_plugin("t_set")
    config = MeshConfig(plugins={"t_set": {"wieght": 2}})
    with pytest.raises(ConfigError, match=r"plugins\.t_set\.wieght.*'weight'"):
        PluginHost.load(["t_set"], config, service="gateway")


def test_a_plugin_for_another_service_is_refused(make_plugin):
    make_plugin("t_elsewhere")
    with pytest.raises(ConfigError, match="not for kvstore"):
        PluginHost.load(["t_elsewhere"], MeshConfig(), service="kvstore")


@pytest.mark.parametrize(
    ("more_a", "more_b", "match"),
    [
        ('conflicts = ["t_b"]', "", "'t_a' and 't_b' conflict"),
        ('provides = ["x"]\nconflicts = ["provides:x"]', 'provides = ["x"]', "conflict"),
        ('requires = ["nobody_has_it"]', "", "requires 'nobody_has_it'"),
        ('requirements = ["no_such_module_here"]', "", "no_such_module_here"),
        ('all_of = ["gateway", "decode"]', "", r"\[services.decode\]"),
    ],
)
def test_the_cards_of_a_whole_mesh_are_checked_together(make_plugin, more_a, more_b, match):
    make_plugin("t_a", more=more_a)
    make_plugin("t_b", more=more_b)
    config = MeshConfig(services={"gateway": {"plugins": ["t_a", "t_b"]}})
    with pytest.raises(ConfigError, match=match):
        cards.check_mesh(config)


def test_settings_for_a_plugin_that_nobody_loads_are_an_error(make_plugin):
    make_plugin("t_lonely")
    with pytest.raises(ConfigError, match="no service loads"):
        cards.check_mesh(MeshConfig(plugins={"t_lonely": {}}))


def test_an_observer_that_raises_is_counted_and_the_others_still_run():
    host = PluginHost("decode", MeshConfig())
    seen = []

    class Bad:
        @hookimpl
        def on_request_finished(self, request_id):
            raise ValueError("secret prompt")

    class Good:
        @hookimpl
        def on_request_finished(self, request_id, num_generated_tokens):
            seen.append((request_id, num_generated_tokens))

    host.register("bad", Bad())
    host.register("good", Good())
    host.observe("on_request_finished", request_id="r", finish_reason="stop", num_prompt_tokens=1, num_generated_tokens=2)

    assert [("r", 2)] == seen
    assert 1 == host.num_observer_errors


def test_a_record_that_raises_costs_its_request_a_typed_error_without_the_text_of_the_exception():
    host = PluginHost("decode", MeshConfig())
    record = PrefillPolicyRecord(name="odd", choose=lambda *_: {}["secret"])
    with pytest.raises(PluginError) as info:
        host.guard(record.name, record.choose, 1, 2, 3)

    assert "odd" == info.value.plugin
    assert "secret" not in info.value.message


def test_every_plugin_in_the_tree_has_a_card_that_can_be_read():
    found = cards.installed()

    assert all(card.slug == slug for slug, card in found.items())
    for slug in found:
        host = PluginHost.load([slug], MeshConfig(), service=next(s for s in found[slug].services if s != "tools"))
        assert [slug] == host.slugs

"""Cards checked over a whole mesh, lines of configurations, and what a card must hold."""

from __future__ import annotations

import pathlib
import sys
import tomllib

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh import cards
from plugmesh import config as configuration
from plugmesh.config_lines import line_of
from plugmesh.errors import ConfigError

BASE = 'version = "0.1"\nsummary = "made by a test"\n'


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    """Writes cards and a mesh.toml, and checks them."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def check(config: str, **made: str):
        for slug, card in made.items():
            folder = tmp_path / f"plugmesh_{slug}"
            folder.mkdir()
            (folder / "__init__.py").touch()
            fidelity = "" if "fidelity" in card else 'fidelity = "exact"\n'
            (folder / "plugin.toml").write_text(f'slug = "{slug}"\n{BASE}{fidelity}{card}')
        path = tmp_path / "mesh.toml"
        path.write_text(config)
        return cards.check_mesh(configuration.load(path, environ={}))

    yield check
    for name in [n for n in sys.modules if n.startswith("plugmesh_t_")]:
        del sys.modules[name]


CODEC = 'services = ["prefill", "decode"]\nhooks = ["register_kv_codecs"]\nprovides = ["kv-codec"]\n'
FORMAT = 'services = ["prefill", "decode", "weightstore"]\nhooks = ["register_weight_formats"]\n'
LOSSY = 'fidelity = "lossy"\n'
LOSS = '[loss]\nmetric = "perplexity_ratio"\nbound = 1.1\nsetting = "here"\n'


def test_a_codec_that_prefill_uses_and_decode_does_not_know_is_an_error(mesh):
    with pytest.raises(ConfigError, match=r"mesh.toml:2: \[services.prefill\] plugins: prefill holds KV in the form of plugin 't_codec', but decode knows no such"):
        mesh('[services.prefill]\nplugins = ["t_codec"]\n[services.decode]\n', t_codec=CODEC)


def test_two_services_with_different_codecs_are_an_error_that_names_both(mesh):
    config = '[services.prefill]\nplugins = ["t_a"]\n[services.decode]\nplugins = ["t_b"]\n'
    with pytest.raises(ConfigError, match=r"'t_[ab]', but (decode|prefill) has plugin 't_[ab]' for it"):
        mesh(config, t_a=CODEC, t_b=CODEC)


def test_the_last_codec_of_each_decides(mesh):
    config = '[services.prefill]\nplugins = ["t_a", "t_b"]\n[services.decode]\nplugins = ["t_b", "t_a"]\n'
    with pytest.raises(ConfigError, match="both need the same one"):
        mesh(config, t_a=CODEC, t_b=CODEC)


@pytest.mark.parametrize(
    "config",
    [
        '[services.prefill]\nplugins = ["t_codec"]\n[services.decode]\nplugins = ["t_codec"]\n',
        '[services.prefill]\nreplicas = 0\n[services.decode]\nplugins = ["t_codec"]\n',
    ],
)
def test_a_codec_that_all_know_or_that_nobody_else_meets_is_fine(mesh, config):
    assert set(mesh(config, t_codec=CODEC)) == {"t_codec"}


def test_a_weight_format_needs_its_plugin_where_it_is_used_and_in_the_weightstore(mesh):
    with pytest.raises(ConfigError, match=r"mesh.toml:3: \[services.decode\] weight_format is 't_w', but no plugin in \[services.weightstore\]"):
        mesh('[services.decode]\nplugins = ["t_w"]\nweight_format = "t_w"\n[services.prefill]\nreplicas = 0\n', t_w=FORMAT)
    with pytest.raises(ConfigError, match=r"no plugin in \[services.decode\]"):
        mesh('[services.decode]\nweight_format = "nowhere"\n')


def test_a_format_of_another_name_is_found_by_what_the_card_provides(mesh):
    config = '[services.{}]\nplugins = ["t_w"]\nweight_format = "w4"\n'
    text = config.format("decode") + config.format("prefill") + '[services.weightstore]\nplugins = ["t_w"]\n'

    assert set(mesh(text, t_w=FORMAT + 'provides = ["weight-format:w4"]\n')) == {"t_w"}


@pytest.mark.parametrize(("card", "is_error"), [(FORMAT, False), (LOSSY + FORMAT + LOSS, True)], ids=["exact", "lossy"])
def test_different_weights_in_prefill_and_decode_are_an_error_unless_they_are_equal(mesh, card, is_error):
    config = '[services.decode]\nplugins = ["t_w"]\nweight_format = "t_w"\n[services.weightstore]\nplugins = ["t_w"]\n[services.prefill]\n'
    if is_error:
        with pytest.raises(ConfigError, match="differs between prefill"):
            mesh(config, t_w=card)
    else:
        assert mesh(config, t_w=card)


def test_a_plugin_for_another_device_is_an_error(mesh):
    card = 'services = ["decode"]\nhooks = []\ndevice = ["cuda"]\n'
    with pytest.raises(ConfigError, match=r"runs on cuda, but services.decode.device is cpu"):
        mesh('[services.decode]\nplugins = ["t_gpu"]\ndevice = "cpu"\n', t_gpu=card)


@pytest.mark.parametrize(
    ("card", "match"),
    [
        ('fidelity = "lossy"\n', "has a table .loss."),
        ('fidelity = "exact"\n' + LOSS, "has a table .loss."),
        ('fidelity = "roughly"\n', "fidelity"),
        ('fidelity = "exact"\nwishes = 3\n', "wishes"),
    ],
)
def test_a_card_that_promises_nothing_checkable_is_refused(card, match):
    with pytest.raises(pydantic.ValidationError, match=match):
        cards.Card.model_validate(tomllib.loads(f'slug = "t_x"\n{BASE}services = ["decode"]\nhooks = []\n{card}'))


def test_a_folder_that_looks_like_a_plugin_and_is_none_harms_nobody(tmp_path, monkeypatch):
    for i in range(30):  # reading one used to list all, and listing read them again
        (tmp_path / f"plugmesh_t_broken{i}").mkdir()
        (tmp_path / f"plugmesh_t_broken{i}" / "plugin.toml").write_text("slug = 3")
    (tmp_path / "plugmesh_t_fine").mkdir()
    (tmp_path / "plugmesh_t_fine" / "__init__.py").touch()
    (tmp_path / "plugmesh_t_fine" / "plugin.toml").write_text(f'slug = "t_fine"\n{BASE}services = ["decode"]\nhooks = []\nfidelity = "exact"\n')
    monkeypatch.syspath_prepend(str(tmp_path))

    assert [s for s in cards.installed() if s.startswith("t_")] == ["t_fine"]
    with pytest.raises(ConfigError, match=r"there is no plugin 't_nowhere'; installed: .*t_fine"):
        cards.read("t_nowhere")


TOML = """\
top = 1
[services.decode] # here
plugins = ["a",
  # "c" is not wanted
  'b',
  "c",
]
"odd key" = 3
[plugins]
x = { y = 1 }
z.w = 2
"""


@pytest.mark.parametrize(
    ("path", "item", "line"),
    [
        ("top", "", 1), ("services.decode.plugins", "", 3), ("services.decode.plugins", "a", 3), ("services.decode.plugins", "b", 5),
        ("services.decode.plugins", "nowhere", 3), ("services.decode.absent", "", 2), ("services.decode.odd key", "", 8),
        ("plugins.x.y", "", 10), ("plugins.z.w", "", 11), ("nothing", "", 0),
    ],
)  # fmt: skip
def test_the_line_of_a_key_is_found(path, item, line):
    assert line_of(TOML, path.split("."), item) == line


@given(st.text(max_size=300), st.lists(st.text(max_size=5), min_size=1, max_size=3), st.text(max_size=4))
def test_any_text_has_a_line_within_it_or_none(text, path, item):
    assert 0 <= line_of(text, path, item) <= len(text.splitlines())


def test_a_variable_that_sets_a_key_is_named_in_place_of_a_line(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setenv("PLUGMESH_SERVICES__DECODE__PLUGINS", '["t_nowhere"]')

    with pytest.raises(ConfigError, match=r"^PLUGMESH_SERVICES__DECODE__PLUGINS: \[services.decode\] plugins: there is no plugin"):
        cards.check_mesh(configuration.load(None))

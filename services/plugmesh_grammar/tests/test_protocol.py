"""Messages between the service and its processes."""

import io

from hypothesis import given
from hypothesis import strategies as st

from plugmesh.errors import UnsupportedGrammar
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh_grammar import protocol


@given(st.lists(st.none() | st.binary(max_size=5), max_size=30), st.integers(0, 40))
def test_a_vocabulary_arrives_as_it_was(pieces, extra):
    sent = GrammarVocabulary(tuple(pieces), len(pieces) + extra, frozenset(range(0, len(pieces), 3)), (1, 2), "h")
    message = protocol.read(io.BytesIO(protocol.pack_vocabulary(sent)))
    assert message is not None

    assert sent == protocol.unpack_vocabulary(*message)


@given(st.dictionaries(st.text(), st.integers() | st.text()), st.binary())
def test_messages_follow_one_another(fields, data):
    stream = io.BytesIO(protocol.pack(fields, data) + protocol.pack({"next": 1}))

    assert [(fields, data), ({"next": 1}, b""), None] == [protocol.read(stream) for _ in range(3)]


def test_an_error_keeps_its_type_and_its_fields():
    sent = UnsupportedGrammar("no", param="grammar", keyword="not", path="/a/not")
    back = protocol.error_of(protocol.error_fields(sent))

    assert (UnsupportedGrammar, "no", "grammar", {"keyword": "not", "path": "/a/not"}) == (type(back), back.message, back.param, back.fields)

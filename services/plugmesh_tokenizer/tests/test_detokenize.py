"""Whatever the frames: the stream's text equals the one-shot text, cut at the stop string that is complete first."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plugmesh.detokenize import StreamingText
from plugmesh.errors import InvalidRequest
from plugmesh_tokenizer.detokenize import decode

IDS = st.lists(st.integers(0, 271), max_size=40)
# Ids of 'a', 'b', 'ab', 'abc', blank and line break turn up often, so that stop strings do.
LIKELY = st.lists(st.sampled_from([3 + 97, 3 + 98, 3 + 99, 259, 260, 3 + 32, 3 + 10, 3 + 0xE6, 3 + 0x97, 3 + 0xA5, 261, 2, 0, 269]), max_size=40)
STOPS = st.lists(st.one_of(st.sampled_from(["ab", "abc", "bca", "\n\n", "aab", "b a", "日", "\ufffd", "c", "abab", "ababc"]),
                           st.text(min_size=1, max_size=4)), max_size=4)

# Two letters only, so that texts are full of stop strings and of their beginnings.
CROWDED = st.tuples(st.lists(st.sampled_from([3 + 97, 3 + 98, 259]), max_size=16), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2))
CASES = st.one_of(st.tuples(st.one_of(IDS, LIKELY), STOPS), CROWDED)


def one_shot(vocabulary, ids, stops, skip, include):
    """Character by character: end at the first place where any stop string ends; the longest that ends there."""
    text, _ = decode(vocabulary, ids, skip_special_tokens=skip)
    for end in range(1, len(text) + 1):
        found = sorted((s for s in stops if text[:end].endswith(s)), key=len)
        if found:
            stop = found[-1]
            return text[: end if include else end - len(stop)], stop
    return text, None


def frames_of(data, ids):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@settings(max_examples=500, deadline=None)
@given(case=CASES, skip=st.booleans(), include=st.booleans(), data=st.data())
def test_stream_equals_one_shot(tiny, case, skip, include, data):
    ids, stops = case
    stream = StreamingText(tiny, stops=stops, skip_special_tokens=skip, include_stop=include)
    frames = frames_of(data, ids)
    texts = [stream.push(frame, is_final=n == len(frames) - 1) for n, frame in enumerate(frames)]
    want, stop = one_shot(tiny, ids, stops, skip, include)

    assert want == "".join(texts)
    assert stop == stream.stop_string
    assert len(want) == stream.num_chars
    assert stream.num_tokens <= len(ids)


@settings(max_examples=300, deadline=None)
@given(case=CASES)
@example(([3 + 97, 3 + 98], ["ab"]))
def test_nothing_is_emitted_that_may_have_to_be_taken_back(tiny, case):
    """After each token: what was emitted begins the final text, and what is held could still become a stop string or a character."""
    ids, stops = case
    stream, emitted = StreamingText(tiny, stops=stops), ""
    for count, token_id in enumerate(ids, start=1):
        emitted += stream.push([token_id])
        if stream.stop_string is not None:
            break
        seen, _ = decode(tiny, ids[:count], skip_special_tokens=True)
        held = seen[len(emitted) :]

        assert seen.startswith(emitted)
        assert any(s.startswith(held.rstrip("\ufffd")) for s in stops) or not held.rstrip("\ufffd")
        assert len(held) < max(map(len, stops), default=1) + 3
    else:
        emitted += stream.push([], is_final=True)

    assert one_shot(tiny, ids, stops, True, False)[0] == emitted


@settings(max_examples=400, deadline=None)
@given(case=CASES, include=st.booleans(), data=st.data())
def test_replay_elsewhere_loses_and_doubles_nothing(tiny, case, include, data):
    """The first instance dies after `seen` tokens; the consumer replays `replayed` of them, which may be fewer or more."""
    ids, stops = case
    seen, replayed = data.draw(st.integers(0, len(ids))), data.draw(st.integers(0, len(ids)))
    first = StreamingText(tiny, stops=stops, include_stop=include)
    before = "".join(first.push(frame) for frame in frames_of(data, ids[:seen]))
    second = StreamingText(tiny, stops=stops, include_stop=include, num_delivered_chars=len(before))
    after = second.push(ids[:replayed])
    for frame in frames_of(data, ids[replayed:]):
        after += second.push(frame)
    after += second.push([], is_final=True)
    want, stop = one_shot(tiny, ids, stops, True, include)

    assert want == before + after
    assert stop == second.stop_string
    assert len(want) == second.num_chars


@settings(max_examples=300, deadline=None)
@given(case=CASES, data=st.data())
def test_tokens_consumed_do_not_depend_on_frames(tiny, case, data):
    ids, stops = case
    by_frames, by_one = StreamingText(tiny, stops=stops), StreamingText(tiny, stops=stops)
    for frame in frames_of(data, ids):
        by_frames.push(frame)
    for token_id in ids:
        by_one.push([token_id])

    assert (by_one.num_tokens, by_one.stop_string) == (by_frames.num_tokens, by_frames.stop_string)


def test_half_a_character_waits_for_the_rest(tiny):
    stream = StreamingText(tiny)
    texts = [stream.push([3 + b]) for b in "é😀".encode()]

    assert ["", "é", "", "", "", "😀"] == texts


def test_an_id_that_no_token_has_is_a_typed_error(tiny):
    for token_id in (-1, tiny.vocab_size, 2**31 - 1):
        with pytest.raises(InvalidRequest):
            StreamingText(tiny).push([token_id])
        with pytest.raises(InvalidRequest):
            decode(tiny, [token_id], skip_special_tokens=True)


def test_decode_gives_the_exact_bytes_of_each_token(tiny):
    text, pieces = decode(tiny, [2, 3 + 0xFF, 260], skip_special_tokens=True)

    assert ("\ufffdabc", [b"<|im_end|>", b"\xff", b"abc"]) == (text, pieces)


def test_hostile_stop_strings_stay_cheap(tiny):
    """16 stop strings of 256 characters that almost match all the time: well under 2 ms a token."""
    stops = ["ab" * 127 + chr(0x100 + n) * 2 for n in range(16)]
    stream = StreamingText(tiny, stops=stops)
    stream.push([3 + 97, 3 + 98] * 500)
    begin = time.process_time()
    for _ in range(200):
        stream.push([3 + 97, 3 + 98])

    assert (time.process_time() - begin) / 200 < 0.002

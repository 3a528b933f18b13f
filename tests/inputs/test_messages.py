"""A conversation in OpenAI's form is checked before anything in it is read."""

import math
from dataclasses import replace

import numpy as np
import pytest

from internvl_rt.errors import RequestError
from internvl_rt.inputs.messages import Media, Message, parse_messages


def test_messages_are_parsed_without_loading_anything():
    source = object()
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": source}, {"type": "text", "text": " Hi "}]},
        {"role": "assistant", "content": "Hello."},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "v.mp4"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ],
        },
    ]
    assert parse_messages(messages) == (
        Message("system", ("Be brief.",)),
        Message("user", (Media("image", source), " Hi ")),
        Message("assistant", ("Hello.",)),
        Message("user", (Media("video", "v.mp4"), Media("image", "data:image/png;base64,AAAA"))),
    )


def part(**fields):
    return [{"role": "user", "content": [{"type": "text", "text": "x"}, fields]}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected a list with at least one message, got an empty list"),
        ("Hi", "messages: expected a list .* got str"),
        (["Hi"], r"messages\[0\]: expected an object with exactly the keys content, role, got str"),
        ([{"role": "user"}], r"messages\[0\]: .* got an object with the keys role"),
        ([{"role": "user", "content": "x", "mood": "y"}], r"messages\[0\]: .* role, content, mood"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]\.role: .* got 'tool'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content: .* got NoneType"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content: .* got an empty list"),
        ([{"role": "assistant", "content": "x"}], r"messages\[0\]: expected the last message to be a user's"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], r"messages\[1\]: .* system .* first"),
        (part(type="audio", audio="x"), r"messages\[0\]\.content\[1\]: .* type 'audio'"),
        (part(type=[]), r"messages\[0\]\.content\[1\]"),
        (part(text="x"), r"messages\[0\]\.content\[1\]"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]: .* got str"),
        (part(type="text", text=3), r"messages\[0\]\.content\[1\]\.text: expected a string, got int"),
        (part(type="text", text="x", lang="en"), r"messages\[0\]\.content\[1\]: .* lang"),
        (part(type="image"), r"messages\[0\]\.content\[1\]: .* keys image, type"),
        (part(type="image_url", image_url=5), r"messages\[0\]\.content\[1\]\.image_url: .* keys url, got int"),
        (
            part(type="image_url", image_url={"url": "x", "size": 1}),
            r"\.image_url: .* url, size; .* detail may be there",
        ),
        (part(type="image_url", image_url={"url": "x", "detail": "tiny"}), r"\.image_url\.detail: .* auto, low, high"),
        (part(type="image", image="x", detail=1), r"messages\[0\]\.content\[1\]\.detail: .* got 1"),
        (
            part(type="image", image="x", max_tiles=0),
            r"content\[1\]\.max_tiles: expected an integer of at least 1, got 0",
        ),
        (part(type="image", image="x", max_tiles=True), r"content\[1\]\.max_tiles: .* got True"),
        (part(type="image", image="x", num_frames=3), r"content\[1\]: .* num_frames"),
        (part(type="video", video="x", num_frames=2.5), r"content\[1\]\.num_frames: .* got 2\.5"),
        (part(type="video", video="x", max_tiles=3), r"content\[1\]: .* max_tiles"),
        (part(type="video", video="x", bound=[2, 1]), r"content\[1\]\.bound: expected \[start, end\] .* got \[2, 1\]"),
        (part(type="video", video="x", bound=[0, math.nan]), r"content\[1\]\.bound: .* got \[0, nan\]"),
        (
            part(type="video", video="x", bound=[0, 10**400]),
            r"content\[1\]\.bound: .* got \[0, an integer of 1,329 bits\]",
        ),
        (part(type="video", video="x", bound="01"), r"content\[1\]\.bound: .* got '01'"),
        (part(type="image_embeds", image_embeds="x", max_tiles=3), r"content\[1\]: .* max_tiles"),
        (
            [{"role": "system", "content": None}, {"role": "user", "content": "x"}],
            r"messages\[0\]\.content: .* NoneType",
        ),
        ([{"role": "system", "content": "x"}], r"messages\[0\]: expected the last message to be a user's"),
        (part(type="image_url", image_url={"url": 1}), r"messages\[0\]\.content\[1\]\.image_url\.url: .* got int"),
        (
            [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}, {"role": "user", "content": "x"}],
            r"messages\[0\]\.content\[0\]: .*'assistant'.* image",
        ),
    ],
)
def test_a_malformed_message_is_refused_with_its_place(messages, message):
    with pytest.raises(RequestError, match=message) as error:
        parse_messages(messages)
    assert "\n" not in str(error.value)


def test_a_message_takes_the_keys_that_clients_send():
    def picture(**fields):
        ((_, media),) = (message.parts for message in parse_messages(part(**fields)))
        return media

    plain = Media("image", "x")
    assert picture(type="image", image="x", max_tiles=None, detail=None) == plain
    assert picture(type="image", image="x", max_tiles=3) == replace(plain, max_tiles=3)
    assert picture(type="image", image="x", detail="low") == replace(plain, max_tiles=1)
    for url in (
        "x",
        {"url": "x"},
        {"url": "x", "detail": "auto"},
        {"url": "x", "detail": "high"},
        {"url": "x", "detail": None},
    ):
        assert picture(type="image_url", image_url=url) == plain
        assert picture(type="image_url", image_url=url, max_tiles=4) == replace(plain, max_tiles=4)
    low = {"url": "x", "detail": "low"}
    assert picture(type="image_url", image_url=low) == replace(plain, max_tiles=1)
    assert picture(type="image_url", image_url=low, max_tiles=4) == replace(plain, max_tiles=4)
    assert picture(type="video", video="x") == Media("video", "x")
    assert picture(type="video", video="x", num_frames=8) == Media("video", "x", num_frames=8)
    assert picture(type="video", video="x", bound=[1, 2.5]) == Media("video", "x", bound=(1.0, 2.5))
    named = [{"role": "user", "content": "Hi", "name": "Ada"}, {"role": "assistant", "content": None, "name": None}]
    assert parse_messages(named) == (Message("user", ("Hi",)), Message("assistant", ("",)))


def test_the_options_of_a_part_may_be_numbers_of_numpy():
    fields = {"num_frames": np.int64(2), "bound": (np.float32(0.5), np.int32(2))}
    ((_, video),) = (message.parts for message in parse_messages(part(type="video", video="x", **fields)))
    ((_, picture),) = (m.parts for m in parse_messages(part(type="image", image="x", max_tiles=np.int8(3))))
    assert video == Media("video", "x", num_frames=2, bound=(0.5, 2.0))
    assert picture == Media("image", "x", max_tiles=3)
    assert [type(each) for each in (video.num_frames, picture.max_tiles)] == [int, int]


class NeverLookedAt(dict):
    def get(self, key, default=None):
        raise AssertionError("a part was looked at")

    __getitem__ = __iter__ = keys = get


def test_more_messages_or_parts_than_fit_are_refused_by_their_number():
    part, message = NeverLookedAt(type="text", text="x"), {"role": "user", "content": "x"}
    with pytest.raises(RequestError, match=r"^messages: 31 messages cannot fit 90 tokens, .*; send at most 30$"):
        parse_messages([part] * 31, 90)
    for contents in ([91], [50, 41], [0, 91, 0]):
        with pytest.raises(RequestError, match=r"^messages: 91 parts, but a conversation of at most 90 tokens may"):
            parse_messages([{"role": "user", "content": [part] * number} for number in contents], 90)
    assert len(parse_messages([message] * 30, 90)) == 30
    assert len(parse_messages([{"role": "user", "content": [{"type": "text", "text": "x"}] * 90}], 90)[0].parts) == 90

"""Whatever stands where in a message, the refusal is one short line of the package, and it comes at once."""

import time

import pytest

from internvl_rt.errors import RequestError
from internvl_rt.inputs.messages import parse_messages
from internvl_rt.inputs.prompt import tiles_per_image
from support.hostile import HOSTILE


def part(**fields):
    return [{"role": "user", "content": [fields]}]


PLACES = {
    "messages": lambda value: value,
    "message": lambda value: [value],
    "role": lambda value: [{"role": value, "content": "x"}],
    "content": lambda value: [{"role": "system", "content": value}],
    "a_part": lambda value: [{"role": "user", "content": [value]}],
    "type": lambda value: part(type=value),
    "text": lambda value: part(type="text", text=value),
    "image_url": lambda value: part(type="image_url", image_url=value),
    "url": lambda value: part(type="image_url", image_url={"url": value}),
    "detail": lambda value: part(type="image_url", image_url={"url": "x", "detail": value}),
    "max_tiles": lambda value: part(type="image", image="x", max_tiles=value),
    "num_frames": lambda value: part(type="video", video="x", num_frames=value),
    "bound": lambda value: part(type="video", video="x", bound=value),
    "end": lambda value: part(type="video", video="x", bound=[0, value]),
}
KEYS = {name: value for name, value in HOSTILE.items() if isinstance(value, str | bytes | int)}
for name, key in KEYS.items():
    PLACES[f"key_{name}"] = lambda value, key=key: [{"role": "user", "content": "x", key: value}]
    PLACES[f"part_key_{name}"] = lambda value, key=key: [
        {"role": "user", "content": [{"type": "image", "image": "x", key: value}]}
    ]
ACCEPTED = {  # values that are right in some place
    (place, value)
    for place in ("content", "text", "image_url", "url")
    for value in ("text_of_10_MB", "line_breaks_and_escape_codes", "half_a_surrogate_pair")
} | {(place, "integer_of_a_million_digits") for place in ("max_tiles", "num_frames")}


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_value_is_refused_in_one_short_line_at_once(place, value):
    messages = PLACES[place](HOSTILE[value])
    start_s = time.perf_counter()
    if place == "content" and (place, value) in ACCEPTED:
        messages = [*messages, {"role": "user", "content": "x"}]
    if (place, value) in ACCEPTED:
        parse_messages(messages)
        return
    with pytest.raises(RequestError) as error:
        parse_messages(messages)
    text = str(error.value)
    assert time.perf_counter() - start_s < 0.5
    assert text.isprintable()
    assert len(text) < 1000
    assert text.startswith("messages")


def test_numbers_of_tiles_are_shown_in_part():
    with pytest.raises(RequestError, match=r"sum to the 7 tiles .* \[1, 1, 1, 1, 1, 1, \.\.\.\]; give"):
        tiles_per_image(7, [1] * 1_000_000)

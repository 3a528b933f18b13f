"""Pictures and videos of a request: every form of a data URL, what is not read, what callers may not say of them."""

import base64
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from internvl_rt.server.options import ServerOptions
from support.serving import SAMPLES, Running, picture_url, question, running

CHAT = "/v1/chat/completions"
DATA = (SAMPLES / "4719.png").read_bytes()
TEXT = base64.b64encode(DATA).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, default_max_tokens=8, max_frames=8)) as made:
        yield made


def read(server: Running, url: Any, **more: Any) -> str:
    part = {"type": "image_url", "image_url": url if isinstance(url, str) else {"url": url, **more}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Read the digits."}]}]
    answer = server.post(CHAT, {"messages": messages})
    return answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text


def test_a_data_url_is_read_in_every_form_that_clients_send(server: Running) -> None:
    safe = base64.urlsafe_b64encode(DATA).decode().rstrip("=")
    for url in (
        f"data:image/png;base64,{TEXT}",
        f"DATA:;BASE64,{TEXT}",
        f"data:image/png;name=x;base64,{TEXT}",
        f"data:image/png;base64,{safe}",
        f"data:image/jpeg;base64,{TEXT}",
    ):
        assert read(server, url) == "4719", url[:40]
    body = {"messages": question("Read the digits.", picture_url())}
    escaped = server.http.post(CHAT, content=str(body).replace("'", '"').replace("/", "\\/"))
    assert escaped.json()["choices"][0]["message"]["content"] == "4719"
    around = {"detail": "auto", "note": "x" * 5000, "url": picture_url(), "other": ["y" * 5000]}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": around}, "Read the digits."]}]
    assert server.post(CHAT, {"messages": messages}).json()["choices"][0]["message"]["content"] == "4719"


def test_a_data_url_elsewhere_is_not_taken_for_a_picture(server: Running) -> None:
    """What is cut out of a body is given to pictures alone; in any other place it is what it was."""
    url, other = picture_url(), picture_url("42.png")
    image = {"type": "image_url", "image_url": {"url": url}}
    ask = {"role": "user", "content": [image, {"type": "text", "text": "Read the digits."}]}
    body = {"messages": [ask], "metadata": {"url": other}, "tools": None, "unknown": [{"image_url": other}]}
    answer = server.post(CHAT, body).json()
    assert answer["choices"][0]["message"]["content"] == "4719"
    assert answer["metadata"] == {"url": other}
    part = {"type": "input_json", "data": [{"url": other}]}
    counts = [
        server.post("/v1/responses", {"input": [{"role": "user", "content": content}], "max_output_tokens": 1}).text
        for content in ([part], [{"type": "input_text", "text": json.dumps(part["data"], separators=(",", ":"))}])
    ]
    tokens = [json.loads(text)["usage"]["input_tokens"] for text in counts]
    assert tokens[0] == tokens[1]
    for marked in ("data:#0", "data:#7"):
        parts = [{"type": "image_url", "image_url": {"url": marked}}, image]
        error = server.post(CHAT, {"messages": [{"role": "user", "content": parts}]}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_media", "messages[0].content[0].image_url")


def test_spaces_and_line_ends_in_base64_are_refused(server: Running) -> None:
    for data in (TEXT[:76] + "\n" + TEXT[76:], TEXT + " ", TEXT[:-3], "%" + TEXT):
        assert '"invalid_media"' in read(server, f"data:image/png;base64,{data}")


def encoded(form: str) -> str:
    file = io.BytesIO()
    Image.open(io.BytesIO(DATA)).convert("RGB").save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def test_formats_whose_decoders_are_not_trusted_are_not_read(server: Running) -> None:
    for form in ("JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        assert read(server, encoded(form)).isdigit(), form
    for form in ("EPS", "JPEG2000", "PPM", "PDF", "TGA", "PCX", "SGI"):
        assert '"invalid_media"' in read(server, encoded(form)), form
    for data in (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"SIMPLE  =  T",
        b"8BPS\0\1",
        b"%!PS-Adobe",
        b"\x80\x04K\x01.",
    ):
        assert '"invalid_media"' in read(server, f"data:image/png;base64,{base64.b64encode(data).decode()}")


def test_nobody_can_say_what_a_picture_is(server: Running) -> None:
    """A caller's own name for a picture must not lead to another picture's visual tokens."""
    same = {"uuid": "1", "content_hash": "1", "hash": "1", "mm_hash": "1", "digest": "1"}
    texts = []
    for name in ("4719.png", "42.png"):
        part = {"type": "image_url", "image_url": {"url": picture_url(name), **same}, **same}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Read the digits."}]}]
        answer = server.post(CHAT, {"messages": messages, "mm_hashes": ["1"], "multi_modal_uuids": ["1"]})
        texts.append(answer.json()["choices"][0]["message"]["content"])
    assert texts == ["4719", "42"]


@pytest.mark.parametrize("kind", ["image_embeds", "prompt_embeds", "image_pil", "image_path", "image"])
def test_no_other_way_of_giving_pictures_is_open(server: Running, kind: str) -> None:
    part = {"type": kind, kind: "/etc/passwd", "image_url": "/etc/passwd"}
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_content_part")


def video(num_frames: int) -> str:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for index in range(num_frames):
            pixels = np.full((64, 64, 3), 20 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return f"data:video/mp4;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_a_video_is_one_tile_a_frame_as_many_as_the_request_says(server: Running) -> None:
    url, one = video(12), server.service.core.config.tokens_per_tile
    for given, limits, expected in (({"num_frames": 3}, {}, 3), ({}, {"num_frames": 5}, 5)):
        part = {"type": "video_url", "video_url": {"url": url, **given}}
        body = {"messages": [{"role": "user", "content": [part]}], "mm_processor_kwargs": limits, "max_tokens": 1}
        usage = server.post(CHAT, body).json()["usage"]
        assert usage["prompt_tokens_details"]["image_tokens"] == expected * one
    found = server.post("/tokenize", {"messages": [{"role": "user", "content": [part]}]}).json()["pictures"]
    assert {(each["width"], each["columns"], each["rows"], each["thumbnail"]) for each in found} == {(64, 1, 1, False)}


def test_a_large_picture_keeps_nobody_waiting_while_it_is_parsed(server: Running) -> None:
    """4 MB of base64 are no string and no Python object on their way to the engine."""
    noise = base64.b64encode(np.random.default_rng(0).bytes(3 << 20)).decode()
    start_s = time.perf_counter()
    assert '"invalid_media"' in read(server, f"data:image/png;base64,{noise}")
    assert time.perf_counter() - start_s < 1

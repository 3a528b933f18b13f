"""Every example runs as its reader would run it, from any folder, and prints what it promises."""

import http.client
import io
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import jsonschema
import pytest
from PIL import Image
from safetensors.torch import load_file
from starlette.testclient import TestClient

from internvl_rt import AsyncEngine, Engine, Piece, QueueFullError

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SAMPLES = Path(str(files("internvl_rt"))) / "tiny" / "samples"
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "PYTHONIOENCODING": "utf-8"}

SERVE_ANYWHERE = """
import runpy, sys, uvicorn
run = uvicorn.run
uvicorn.run = lambda app, port: run(app, port=0)  # a free one
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def start(*command: str | Path, cwd: Path, stderr: int = STDOUT, **environment: str) -> Popen[str]:
    env, streams = ENVIRONMENT | environment, {"stdin": PIPE, "stdout": PIPE, "stderr": stderr}
    return Popen([sys.executable, *command], cwd=cwd, env=env, encoding="utf-8", **streams)


def run(name: str, *arguments: str | Path, cwd: Path, code: int = 0, **environment: str) -> tuple[list[str], str]:
    """Returns the lines of stdout, and stderr."""
    process = start(EXAMPLES / f"{name}.py", *arguments, cwd=cwd, stderr=PIPE, **environment)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stdout + stderr
    return stdout.splitlines(), stderr


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_says_how_to_run_it_and_has_a_test(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("\n") < 40
    assert f"python examples/{name}.py" in text.split('"""')[1]
    assert any(test.startswith(f"test_{name}_") for test in globals())


def test_read_page_prints_the_answer_and_what_it_took(tmp_path: Path) -> None:
    (answer, tokens, head, *stages), _ = run("read_page", cwd=tmp_path)
    assert answer == "4719"
    assert tokens == "43 tokens of prompt, 20 visual; 5 of answer"
    assert head.split()[:2] == ["stage", "seconds"]
    seconds = {line[:11].strip(): float(line[11:].split()[0]) for line in stages}
    assert 0 < seconds["vision"] < seconds["first token"] < seconds["total"]


@pytest.mark.slow
def test_read_page_takes_a_model_a_picture_and_a_question(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes((SAMPLES / "905.png").read_bytes())
    lines, _ = run("read_page", "tiny", "page.png", "How many digits are there?", cwd=tmp_path)
    assert lines[0] == "3"


@pytest.mark.slow
def test_read_page_ends_with_one_line_that_says_what_is_wrong(tmp_path: Path) -> None:
    lines, stderr = run("read_page", "tiny", "nowhere.png", cwd=tmp_path, code=1)
    assert (lines, stderr) == ([], "image 'nowhere.png' does not exist; check its path, or pass its bytes\n")


@pytest.mark.slow
def test_several_pictures_finds_the_larger_number_wherever_it_stands(tmp_path: Path) -> None:
    assert run("several_pictures", cwd=tmp_path)[0] == ["Picture 2"]
    swapped = ("tiny", "Which number is larger?", SAMPLES / "42.png", SAMPLES / "7.png")
    assert run("several_pictures", *swapped, cwd=tmp_path)[0] == ["Picture 1"]


@pytest.mark.slow
def test_video_reads_frames_that_a_program_has_made(tmp_path: Path) -> None:
    lines, _ = run("video", cwd=tmp_path)
    assert lines == ["7", "the frames took 16 visual tokens"]  # four each


@pytest.mark.slow
def test_video_reads_a_file(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = [Image.new("RGB", (64, 64), (light, light, light)) for light in (0, 90, 180)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    lines, _ = run("video", "tiny", "film.gif", cwd=tmp_path)
    assert lines[-1] == "the frames took 128 visual tokens"  # of 32 frames


@pytest.mark.slow
def test_stream_chat_answers_each_line_before_the_next_is_there(tmp_path: Path) -> None:
    process = start(EXAMPLES / "stream_chat.py", "tiny", SAMPLES / "31415.png", cwd=tmp_path)
    try:
        assert process.stdout.readline() == "Ask a question; Ctrl-D ends.\n"
        for question, answer in (("Read the digits.", "31415\n"), ("How many digits are there?", "5\n")):
            process.stdin.write(question + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == answer
        assert process.communicate(timeout=60)[0] == ""
        assert process.returncode == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_stream_chat_sends_the_pictures_once_and_what_was_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def stream(self, messages: list[dict[str, Any]], _: object) -> Iterator[Piece]:
            sent.append(list(messages))
            yield from (Piece("47"), Piece("19"))

    sent: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(Engine, "from_pretrained", lambda _: Recorder())
    monkeypatch.setattr(sys, "stdin", io.StringIO("Read.\nCount."))
    runpy.run_path(str(EXAMPLES / "stream_chat.py"))["main"]("tiny", "a.png")
    first, second = [{"type": "text", "text": "Read."}], [{"type": "text", "text": "Count."}]
    asked = {"role": "user", "content": [{"type": "image", "image": "a.png"}, *first]}
    said = [{"role": "assistant", "content": "4719"}, {"role": "user", "content": second}]
    assert sent == [[asked], [asked, *said]]


def test_batch_progress_reads_the_others_when_a_picture_is_broken(tmp_path: Path) -> None:
    pictures = [str(path) for path in SAMPLES.iterdir()]
    (tmp_path / "cut.png").write_bytes((SAMPLES / "4719.png").read_bytes()[:-200])
    given = ("tiny", "Read the digits.", "cut.png", *pictures, "nowhere.png")
    lines, stderr = run("batch_progress", *given, cwd=tmp_path)
    answers = {answer.pop("picture"): answer for answer in map(json.loads, lines)}
    assert "broken or truncated" in answers.pop("cut.png")["error"]
    assert "does not exist" in answers.pop("nowhere.png")["error"]
    assert answers == {picture: {"text": Path(picture).stem} for picture in pictures}
    assert f"{len(pictures) + 2}/{len(pictures) + 2}" in stderr


@pytest.mark.slow
def test_json_from_picture_prints_json_of_its_schema(tmp_path: Path) -> None:
    lines, _ = run("json_from_picture", cwd=tmp_path)
    found = json.loads("\n".join(lines))
    jsonschema.validate(found, json.loads(runpy.run_path(str(EXAMPLES / "json_from_picture.py"))["SCHEMA"]))
    assert found == {"number": "862053"}


@pytest.mark.slow
def test_json_from_picture_takes_another_schema(tmp_path: Path) -> None:
    given = ("tiny", SAMPLES / "42.png", "Read the digits.", '{"type": "integer", "minimum": 0, "maximum": 99}')
    assert run("json_from_picture", *given, cwd=tmp_path)[0] == ["42"]


@pytest.mark.slow
def test_best_of_four_prints_the_best_first_by_a_vote_or_a_critic(tmp_path: Path) -> None:
    for given in ((), ("tiny", SAMPLES / "4719.png", "Read the digits.", "tiny")):
        (*drawn, best), _ = run("best_of_four", *given, cwd=tmp_path)
        scores = [(float(line.split()[0]), line.split(maxsplit=1)[1]) for line in drawn]
        assert len(scores) == 4
        assert len(set(scores)) > 1
        assert [score for score, _ in scores] == sorted((score for score, _ in scores), reverse=True)
        assert repr(best.removeprefix("best: ")) == scores[0][1]
        assert given or best == "best: 4719"


@pytest.mark.slow
def test_preference_pairs_writes_pairs_and_the_right_answer_is_likelier(tmp_path: Path) -> None:
    lines, _ = run("preference_pairs", "pairs.jsonl", cwd=tmp_path)
    written = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == len(written) > 1
    for line, pair in zip(lines, written, strict=True):
        chosen, rejected = re.findall(r"(-[\d.]+) '", line)
        assert float(chosen) > float(rejected)
        assert (pair["chosen"], pair["answer_gt"], pair["image"]) == ("4719", "4719", "4719.png")
        assert pair["rejected"] != "4719"


@pytest.mark.slow
def test_score_answers_ranks_the_right_one_first(tmp_path: Path) -> None:
    given = ("tiny", SAMPLES / "905.png", "Read the digits.", "906", "905", "90", "9051")
    (_, *rows), _ = run("score_answers", *given, cwd=tmp_path)
    probabilities, shares, answers = zip(*(row.split() for row in rows), strict=True)
    assert (answers[0], sorted(answers)) == ("905", ["90", "905", "9051", "906"])
    assert 0.9 < sum(map(float, probabilities)) <= 1.001  # they exclude each other
    assert sorted(map(float, probabilities), reverse=True) == list(map(float, probabilities))
    assert sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.3)


@pytest.mark.slow
def test_embeddings_keeps_visual_tokens_and_reads_from_them(tmp_path: Path) -> None:
    lines, _ = run("embeddings", cwd=tmp_path)
    read = {name: str(SAMPLES / f"{name}.png") for name in ("4719", "31415")}
    assert lines == [f"{path}: {name} (0 operations in the vision tower)" for name, path in read.items()]
    kept = load_file(tmp_path / "embeddings.safetensors")
    assert [tuple(kept[path].shape) for path in read.values()] == [(20, 128), (24, 128)]


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of a server that runs the example."""
    process = start("-c", SERVE_ANYWHERE, EXAMPLES / "web_handler.py", "tiny", cwd=tmp_path)
    try:
        said = ""
        while not (found := re.search(r"running on http://127.0.0.1:(\d+)", said)):
            assert process.poll() is None, said
            said += process.stdout.readline()
        yield int(found[1])
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()


def test_web_handler_streams_answers_and_refuses_what_is_no_picture_or_too_large(port: int) -> None:
    def post(body: bytes | None, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/ask/Read%20the%20digits%2E", body, {"connection": "close", **headers})
        return connection.getresponse()

    picture = (SAMPLES / "4719.png").read_bytes()
    answer, pieces = post(picture, {}), []
    while piece := answer.read1():
        pieces.append(piece)
    assert (answer.status, b"".join(pieces)) == (200, b"4719")
    assert len(pieces) > 1
    for body, headers, status, message in (
        (b"no picture", {}, 400, "is not a readable JPEG"),
        (picture[:-200], {}, 400, "broken or truncated"),
        (b"", {"content-length": "20000001"}, 413, "at most 20,000,000 bytes"),
        (None, {"transfer-encoding": "chunked"}, 413, "Content-Length"),  # it does not wait for what would follow
    ):
        refused = post(body, headers)
        assert (refused.status, message in refused.read().decode()) == (status, True)


@pytest.mark.slow
def test_web_handler_knows_a_full_engine_and_reads_no_body_of_unknown_length(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        async def stream(self, *_: object, **__: object) -> AsyncIterator[Piece]:
            raise QueueFullError("full")
            yield

    monkeypatch.setattr(AsyncEngine, "from_pretrained", lambda _: Full())
    client = TestClient(runpy.run_path(str(EXAMPLES / "web_handler.py"))["build_app"]("tiny"))
    length, chunked = {"content-length": "7"}, {"transfer-encoding": "chunked"}
    for headers, status in ((length, 503), ({}, 413), (length | chunked, 413)):  # of both, some servers obey the second
        request = client.build_request("POST", "/ask/Hello", content=b"picture")
        del request.headers["content-length"]
        request.headers.update(headers)
        refused = client.send(request)
        assert (refused.status_code, refused.text == "full") == (status, status == 503)


@pytest.mark.slow
@pytest.mark.parametrize(("interpreted", "ran"), [("1", "rms_norm"), ("0", "rms_norm_reference")])
def test_kernel_in_torch_runs_what_it_says_and_agrees(tmp_path: Path, interpreted: str, ran: str) -> None:
    (first, second), _ = run("kernel_in_torch", cwd=tmp_path, TRITON_INTERPRET=interpreted)
    assert first == f"{ran} runs on cpu"
    assert second.startswith("largest difference from the reference: ")
    assert float(second.split()[-1]) < 1e-5


@pytest.mark.slow
def test_langchain_model_reads_several_pictures_in_order(tmp_path: Path) -> None:
    assert run("langchain_model", cwd=tmp_path)[0] == ["4719", "31415"]

"""Files of pairs: what the official trainer reads, written whole or not at all, and read line by line."""

import errno
import json
import os
import stat

import numpy as np
import pytest
from PIL import Image

from internvl_rt import RequestError
from internvl_rt.critic import pair_file as module
from internvl_rt.critic.pair_file import PairRecord, read_pairs, write_pairs
from internvl_rt.critic.preference import Pair, score_pairs
from support.calls import load


@pytest.fixture(scope="module")
def engine():
    return load(kv_cache_bytes=1 << 24, number_images=False, seed=3)


RECORDS = [
    PairRecord("<image>\nWhat is it?", "A cat.", "A dog.", ("cats/1.png",), "cat"),
    PairRecord("Image-1: <image>\nImage-2: <image>\nWhich?", "二\nü", "one", ("1.png", "2.png")),
    PairRecord("Why?", "Because.", "No."),
]


def test_a_file_has_the_keys_of_the_official_trainer(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", iter(RECORDS))
    lines = (tmp_path / "pairs.jsonl").read_bytes().decode("ascii").splitlines()
    cat, both, text = map(json.loads, lines)
    answers = {"chosen": "A cat.", "rejected": "A dog."}
    assert cat == {"image": "cats/1.png", "question": "<image>\nWhat is it?", "answer_gt": "cat"} | answers
    question = "Image-1: <image>\nImage-2: <image>\nWhich?"
    assert both == {"image": ["1.png", "2.png"], "question": question, "chosen": "二\nü", "rejected": "one"}
    assert text == {"question": "Why?", "chosen": "Because.", "rejected": "No."}
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


def interrupted():
    yield RECORDS[0]
    raise KeyboardInterrupt


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("records", "error", "message"),
    [
        ([], RequestError, "records: expected at least one pair"),
        (
            [RECORDS[0], PairRecord("a", "b")],
            RequestError,
            r"records\[1\]: expected a PairRecord with a rejected answer",
        ),
        ([RECORDS[0], {"question": "a"}], RequestError, r"records\[1\]: expected a PairRecord"),
        ([PairRecord("a", "b", "\ud800")], RequestError, r"records\[0\].rejected is not valid Unicode"),
        (interrupted(), KeyboardInterrupt, None),
        (RECORDS, RequestError, ".*could not be written: No space left on device"),
    ],
)
def test_a_file_that_cannot_be_whole_leaves_the_old_one_alone(tmp_path, monkeypatch, records, error, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("old")
    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(error, match=message):
        write_pairs(path, records)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


@pytest.mark.parametrize("path", ["missing/pairs.jsonl", "a\0b", 7, "", "/", "."])
def test_a_file_that_cannot_be_made_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"could not be written|is no file that|must be a string or a Path"):
        write_pairs(path, RECORDS)
    assert not os.listdir(tmp_path)


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(RequestError, match="is no file that can be replaced"):
            write_pairs(place, RECORDS)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def picture(path, size=56):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    for name in ("cats/1.png", "1.png", "2.png"):
        picture(tmp_path / "data" / name)
    return tmp_path / "data"


def test_pairs_that_are_read_are_those_that_were_written_with_pictures_in_the_root_folder(tmp_path, root):
    write_pairs(tmp_path / "pairs.jsonl", RECORDS)
    pairs = read_pairs(tmp_path / "pairs.jsonl", root)
    assert pairs == [record.to_pair(root) for record in RECORDS]
    image = {"type": "image", "image": str(root / "cats/1.png")}
    assert pairs[0] == Pair(
        [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}], "A cat.", "A dog."
    )
    assert [part["type"] for part in pairs[1].messages[0]["content"]] == ["text", "image", "text", "image", "text"]


def test_read_pairs_can_be_scored(tmp_path, root, engine):
    write_pairs(tmp_path / "pairs.jsonl", [PairRecord("Read the digits.", "47", "19", ("1.png",)), RECORDS[2]])
    scores = score_pairs(engine, engine, read_pairs(str(tmp_path / "pairs.jsonl"), str(root)))
    assert scores.policy_chosen_B.tolist() == pytest.approx(scores.reference_chosen_B.tolist(), abs=1e-3)
    assert (scores.policy_chosen_B < 0).all()


@pytest.mark.parametrize(
    ("question", "images", "official"),
    [
        ("Why?", (), "Why?"),
        ("What is <image>?", (), "What is <image>?"),
        ("What?", ("1.png",), "<image>\nWhat?"),
        ("<image>\nWhat?", ("1.png",), "<image>\nWhat?"),
        ("See\n<image>\nand <image>\nhere.", ("1.png", "2.png"), "See\n<image>\nand <image>\nhere."),
        ("Image-1: <image>\nImage-2: <image>\n\nWhich?", ("1.png", "2.png"), None),
        ("<image>\n\nWhat is an <image>?", ("1.png",), None),
    ],
)
def test_the_prompt_of_a_pair_is_the_official_trainer_s(root, engine, question, images, official):
    pair = PairRecord(question, "a", "b", images).to_pair(root)
    described = engine.describe(pair.messages).prompt
    text = official or question
    for span in described.spans:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * span.num_tokens}</img>", 1)
    assert len(described.spans) == len(images)
    system = f"<|im_start|>system\n{engine.config.system_message}<|im_end|>\n"
    assert described.text == f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_the_pictures_of_a_question_share_the_tiles(root):
    def tiles(record, most):
        parts = record.to_pair(root, max_tiles=most).messages[0]["content"]
        return [part["max_tiles"] for part in parts if part["type"] == "image"]

    assert tiles(RECORDS[0], 12) == [12]
    assert tiles(RECORDS[1], 12) == [6, 6]
    assert tiles(RECORDS[1], 1) == [1, 1]


GOOD = '{"question": "a", "chosen": "b", "rejected": "c", "answer_gt": "d", "id": 7, "image": ""}'
BAD_LINES = {
    "no JSON": ("{", "expected a JSON object in UTF-8, got b'{"),
    "no UTF-8": (b'{"question": "\xff"}', "expected a JSON object in UTF-8"),
    "deep": ("[" * 100_000, "expected a JSON object in UTF-8"),
    "no object": ("[1]", r"expected an object with the keys question, chosen, rejected, got \[1\]"),
    "no rejected answer": ('{"question": "a", "chosen": "b"}', "expected an object with the keys"),
    "an empty answer": (GOOD.replace('"c"', '""'), "rejected must be a string of 1 to"),
    "a number": (GOOD.replace('"b"', "7"), "chosen must be a string of 1 to .*, got 7"),
    "a picture that is a number": (GOOD.replace('""', "7"), "images must be"),
    "a picture that is missing": (GOOD.replace('""', '"3.png"'), "picture '3.png' is no file in"),
    "a path of a kilobyte": (GOOD.replace('""', f'"{"x" * 1000}"'), "picture 'x.* is no file in"),
    "pictures without a place": (
        GOOD.replace('""', '["1.png", "2.png"]'),
        "question: expected a <image> for each of 2",
    ),
    "a video": (GOOD.replace('"id"', '"video"'), "expected no video"),
    "a long line": (GOOD.replace('"d"', f'"{"d" * 2000}"'), "expected at most 1,024 bytes, got more"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_pair_is_named(tmp_path, root, monkeypatch, case):
    line, message = BAD_LINES[case]
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), b"", line, b"also wrong"]))
    if case == "a long line":
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1024)
    with pytest.raises(RequestError, match=f"pairs.jsonl' line 3: {message}"):
        read_pairs(path, root)


def test_a_file_without_pairs_is_refused(tmp_path):
    with pytest.raises(RequestError, match="does not exist; give a file of pairs"):
        read_pairs(tmp_path / "pairs.jsonl", tmp_path)
    (tmp_path / "pairs.jsonl").write_text("\n\n")
    with pytest.raises(RequestError, match="expected at least one pair"):
        read_pairs(tmp_path / "pairs.jsonl", tmp_path)
    with pytest.raises(RequestError, match="root must be a string or a Path, got None"):
        read_pairs(tmp_path / "pairs.jsonl", None)

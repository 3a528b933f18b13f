"""Answers outlive a kill, and are found again by all that they depend on."""

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import RequestError
from internvl_rt.harness.answers import AnswerFile, digest_of


def test_answers_are_read_again(tmp_path):
    file = AnswerFile(tmp_path / "answers.jsonl")
    for key, answer in {"a": "yes\nno", "b": "é\u2028", "c": ""}.items():
        file.add(key, answer)
    assert AnswerFile(tmp_path / "answers.jsonl").answers == {"a": "yes\nno", "b": "é\u2028", "c": ""}


@pytest.mark.parametrize("length", range(1, 27))
def test_a_line_that_a_kill_cut_off_is_removed(length, tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path).add("a", "1")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "answer": "2"}'[:length])
    again = AnswerFile(path)
    assert (again.answers, path.read_bytes()) == ({"a": "1"}, whole)
    again.add("c", "3")
    assert AnswerFile(path).answers == {"a": "1", "c": "3"}


@pytest.mark.parametrize("content", ["model: tiny", "model: tiny\n", "[1]\n", '{"key": "a"}\n', "\n", "\x00\xff\n"])
def test_another_kind_of_file_is_refused_and_left_as_it_is(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"resume: line 1 of '.*config.yaml' is no answer of an evaluation"):
        AnswerFile(path)
    assert path.read_text() == content


@pytest.mark.parametrize("line", ['{"key": "a", "answer": null}\n', '{"key": 1, "answer": "b"}\n'])
def test_a_line_of_other_types_is_no_answer(line, tmp_path):
    (tmp_path / "answers.jsonl").write_text(line)
    with pytest.raises(RequestError, match=r"line 1 of .* is no answer of an evaluation"):
        AnswerFile(tmp_path / "answers.jsonl")


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(RequestError, match="cannot be read and written"):
        AnswerFile("a\0b")


def test_tensors_count_by_their_numbers_and_what_cannot_be_told_apart_is_refused():
    zeros = torch.zeros(2000)
    one = zeros.clone()
    one[1000] = 1
    assert digest_of(zeros) == digest_of(torch.zeros(2000)) != digest_of(one)
    assert digest_of(zeros.bfloat16()) != digest_of(zeros.half()) != digest_of(zeros.view(2, 1000).half())
    with pytest.raises(RequestError, match="cannot be kept under a object; leave resume out"):
        digest_of(object())


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot be read and written: Is a directory; name another file"):
        AnswerFile(tmp_path)


def test_what_differs_in_anything_has_another_digest(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    (tmp_path / "clip.mp4").write_bytes(b"12")
    values = [
        ("ab",), ("a", "b"), (["a", "b"],), (["a"], "b"), ({"a": "b"},), (b"ab",), (1,), (1.0,), (True,), (None,),
        (pixels,), (pixels + 1,), (pixels.reshape(3, 2, 3),), (Image.fromarray(pixels),),
        (Image.fromarray(pixels + 1),), (Image.fromarray(pixels).convert("L"),), (str(tmp_path / "clip.mp4"),),
    ]  # fmt: skip
    digests = [digest_of(*value) for value in values]
    (tmp_path / "clip.mp4").write_bytes(b"123")
    digests.append(digest_of(str(tmp_path / "clip.mp4")))
    assert len(set(digests)) == len(values) + 1
    assert digest_of({"a": 1, "b": pixels}) == digest_of({"b": pixels.copy(), "a": 1})

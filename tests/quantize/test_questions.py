"""A calibration is a folder of pictures, with their questions in one file or beside them."""

import shutil

import pytest

from internvl_rt.errors import RequestError
from internvl_rt.quantize.questions import SAMPLES, Question, read_questions


@pytest.fixture
def folder(tmp_path):
    for name in ("7.png", "42.png"):
        shutil.copy(SAMPLES / name, tmp_path)
    return tmp_path


def test_by_default_the_sample_pictures_are_read():
    questions = read_questions(None)
    assert len(questions) == 6
    assert Question((SAMPLES / "4719.png",), "Read the digits.", "4719") in questions


def test_every_picture_has_the_question_of_its_text_or_is_described(folder):
    (folder / "7.txt").write_text(" Which digit? \n")
    (folder / "notes.md").write_text("no picture")
    assert read_questions(folder) == [
        Question((folder / "42.png",), "Describe this picture."),
        Question((folder / "7.png",), "Which digit?"),
    ]


def test_a_file_lists_questions_with_pictures_and_answers(folder):
    lines = [
        '{"image": "7.png", "question": "Which digit?", "answer": "7"}',
        '{"image": ["7.png", "42.png"], "question": "Which is larger?"}',
        "",
        '{"question": "Who are you?"}',
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    assert read_questions(folder) == [
        Question((folder / "7.png",), "Which digit?", "7"),
        Question((folder / "7.png", folder / "42.png"), "Which is larger?"),
        Question((), "Who are you?"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": 7}', "line 1 is .*expected"),
        ('{"image": "7.png"}\n{"picture": "7.png"}', "line 2 is .*expected"),
        ('{"image": "7.png", "question": " "}', "line 1 is .*expected"),
        ("[]", "line 1: expected a JSON object"),
        ("{", "line 1 is not JSON"),
        (b"\xff", "expected UTF-8"),
        ('{"question": "Who are you?"}', "no question names a picture"),
        ("", "no question names a picture"),
    ],
)
def test_a_broken_file_is_told_in_one_line(folder, content, message):
    file = folder / "questions.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError, match=message):
        read_questions(folder)


def test_a_folder_without_pictures_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(RequestError, match="holds no picture"):
        read_questions(tmp_path)
    with pytest.raises(RequestError, match="is no folder; give a folder of pictures"):
        read_questions(tmp_path / "none")

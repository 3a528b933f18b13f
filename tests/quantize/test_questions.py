"""A calibration is a folder of pictures, with their questions in one file or beside them."""

import shutil
from pathlib import Path

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
    file = SAMPLES / "4719.png"
    assert Question(file, (file,), "Read the digits.", "4719") in questions


def test_every_picture_has_the_question_of_its_text_or_is_described(folder):
    (folder / "7.TXT").write_bytes("\ufeff Which digit? \n".encode())
    (folder / "notes.md").write_text("no picture")
    (folder / "._42.png").write_text("what macOS leaves beside a file")
    shutil.copy(folder / "7.png", folder / "8.AVIF")
    one, two, three = folder / "42.png", folder / "7.png", folder / "8.AVIF"
    assert read_questions(folder) == [
        Question(one, (one,), "Describe this picture."),
        Question(two, (two,), "Which digit?"),
        Question(three, (three,), "Describe this picture."),
    ]


def test_a_file_lists_questions_with_pictures_and_answers(folder):
    lines = [
        '{"image": "7.png", "question": "Which digit?", "answer": "7"}',
        '{"image": ["7.png", "42.png"], "question": "Which is larger?"}',
        "",
        '{"question": "Who\u2028are you?"}',  # a line of JSON may hold what else ends a line
    ]
    file = folder / "questions.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_questions(folder) == [
        Question(Path(f"{file} line 1"), (folder / "7.png",), "Which digit?", "7"),
        Question(Path(f"{file} line 2"), (folder / "7.png", folder / "42.png"), "Which is larger?"),
        Question(Path(f"{file} line 4"), (), "Who\u2028are you?"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": 7}', "line 1 is .*expected"),
        (
            '{"image": "7.png"}\n\n{"picture": "7.png"}',
            "line 3 has 'picture', expected image, question and answer alone",
        ),
        ('{"image": "7.png", "question": " "}', "line 1 is .*expected"),
        ("[]", "line 1: expected a JSON object"),
        ("{", "line 1 is not JSON: .*; docs/quantisation.md says how it looks"),
        (b"\xff", "expected UTF-8 text; save it so"),
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

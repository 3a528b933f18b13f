"""The model of lmms-eval answers what a task asks, in order, in one batch, and goes on where a run was killed."""

from collections.abc import Iterator
from importlib.resources import files
from itertools import count
from types import SimpleNamespace

import pytest
from PIL import Image

from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.harness import lmms_eval_models

NUMBERS = ("4719", "862053", "42", "905")
SAMPLES = files("internvl_rt") / "tiny" / "samples"


@pytest.fixture
def harness(adapter):
    return adapter("lmms_eval")


def build(harness, form="ChatModel", **options):
    """Returns the model with a task that has a document for each of NUMBERS."""
    model = getattr(harness, form)("tiny", device="cpu", **options)
    model.task_dict = {"digits": {"test": [{"picture": str(SAMPLES / f"{n}.png"), "number": n} for n in NUMBERS]}}
    return model


def to_visuals(document):
    with Image.open(document["picture"]) as picture:
        return [picture.convert("RGB")]


def to_messages(document):
    content = [{"type": "image", "url": image} for image in to_visuals(document)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "Read the digits."}]}]


def request(*args):
    return SimpleNamespace(args=args)


def chat_requests(numbers=range(4), *, ask=to_messages, **kwargs):
    return [request("", ask, {"max_new_tokens": 12, **kwargs}, number, "digits", "test") for number in numbers]


class Recorder:
    """Stands in for the engine: its n-th answer is "answer n", and the last request is answered first."""

    def __init__(self, fails_after=10**9):
        self.asked, self.params, self.fails_after = [], [], fails_after
        self.device, self.numbers = "cpu", count()

    def generate_as_completed(self, batch, params) -> Iterator:
        self.asked.append(list(batch))
        self.params += params
        for index in reversed(range(len(batch))):
            if next(self.numbers) >= self.fails_after:
                raise KeyboardInterrupt
            yield index, SimpleNamespace(text=f"answer {index} of {len(batch)}")


@pytest.fixture
def recorded(harness, monkeypatch):
    """Makes models whose engine is a Recorder."""

    def make(form="ChatModel", recorder=None, **options):
        recorder = recorder or Recorder()
        monkeypatch.setattr(harness, "Engine", SimpleNamespace(from_pretrained=lambda *_, **__: recorder))
        return build(harness, form, **options), recorder

    return make


def test_both_forms_are_found_by_their_names(harness):
    manifest = lmms_eval_models()
    assert manifest.model_id == "internvl_rt"
    assert manifest.chat_class_path == f"{harness.ChatModel.__module__}.ChatModel"
    assert manifest.simple_class_path == f"{harness.SimpleModel.__module__}.SimpleModel"
    assert (harness.ChatModel.is_simple, harness.SimpleModel.is_simple) == (False, True)


def test_the_answers_are_those_of_the_engine_and_in_order(harness):
    assert build(harness, max_num_seqs=2).generate_until(chat_requests()) == list(NUMBERS)
    simple = [
        request("Read the digits.", {"max_new_tokens": 12}, to_visuals, number, "digits", "test")
        for number in reversed(range(4))
    ]
    assert build(harness, "SimpleModel").generate_until(simple) == list(reversed(NUMBERS))


def test_all_requests_of_a_call_are_one_batch(recorded):
    model, recorder = recorded()
    assert model.generate_until(chat_requests()) == [f"answer {index} of 4" for index in range(4)]
    assert [len(batch) for batch in recorder.asked] == [4]


def test_pictures_and_videos_stay_in_their_places(recorded):
    picture = Image.new("RGB", (8, 8))
    parts = [
        {"type": "text", "text": "Compare"},
        {"type": "image", "url": picture},
        {"type": "text", "text": "with"},
        {"type": "video", "url": "a.mp4"},
        {"type": "video", "url": "b.mp4", "start_time": 1.0, "end_time": 2.5},
        {"type": "video", "url": {"path": "c.mp4", "video_start": 0, "video_end": 4}},
    ]
    model, recorder = recorded(num_frames=8)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    model.generate_until(chat_requests([0], ask=lambda document: messages))
    assert recorder.asked[0][0] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare"},
                {"type": "image", "image": picture},
                {"type": "text", "text": "with"},
                {"type": "video", "video": "a.mp4", "num_frames": 8},
                {"type": "video", "video": "b.mp4", "num_frames": 8, "bound": [1.0, 2.5]},
                {"type": "video", "video": "c.mp4", "num_frames": 8, "bound": [0, 4]},
            ],
        },
    ]


def test_the_simple_form_puts_what_is_shown_before_the_text(recorded):
    picture = Image.new("RGB", (8, 8))
    model, recorder = recorded("SimpleModel")
    shown = [picture, "scan.PNG", "clip.mp4", {"url": "b.mp4", "video_start": 1, "video_end": 2}]
    for visuals in (shown, None):
        model.generate_until([request("What?", {}, lambda document, v=visuals: v, 0, "digits", "test")])
    (first,), (second,) = (batch[0] for batch in recorder.asked)
    assert first["content"] == [
        {"type": "image", "image": picture},
        {"type": "image", "image": "scan.PNG"},
        {"type": "video", "video": "clip.mp4"},
        {"type": "video", "video": "b.mp4", "bound": [1, 2]},
        {"type": "text", "text": "What?"},
    ]
    assert second["content"] == [{"type": "text", "text": "What?"}]


def test_a_task_about_sounds_is_refused(recorded):
    model, _ = recorded()
    sound = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    with pytest.raises(RequestError, match="a task asks about 'audio'; expected text, image or video"):
        model.generate_until(chat_requests([0], ask=lambda document: sound))


PARAMS = {
    "nothing": ({}, {}),
    "greedy": ({"temperature": 0.7, "do_sample": False, "top_p": 0, "top_k": 5, "num_beams": 1}, {}),
    "of transformers": ({"do_sample": True}, {"temperature": 1.0}),
    "drawn": (
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3},
    ),
    "one stop": ({"until": "\n\n", "max_new_tokens": 5}, {"stop": ("\n\n",), "max_tokens": 5}),
    "stops": (
        {"until": ["\n", "", "Q:"], "repetition_penalty": 1.1},
        {"stop": ("\n", "Q:"), "repetition_penalty": 1.1},
    ),
    "no stop": ({"until": None, "max_new_tokens": None, "temperature": None, "top_p": None}, {}),
    "about pictures": ({"image_aspect_ratio": "pad", "version": 1}, {}),
}


@pytest.mark.parametrize("name", PARAMS)
def test_the_parameters_of_a_task_become_those_of_the_engine(name, recorded):
    given, expected = PARAMS[name]
    model, recorder = recorded()
    model.generate_until([request("", to_messages, given, 0, "digits", "test")])
    assert recorder.params == [SamplingParams(**expected)]


def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(harness, monkeypatch):
    monkeypatch.setattr(harness.Engine, "from_pretrained", None)
    with pytest.raises(RequestError, match=r"'max_tile' is no option; expected pretrained, resume, .*, max_tiles,"):
        harness.ChatModel("tiny", max_tile=6)
    with pytest.raises(RequestError, match="num_frames must be an integer of at least 1, or None, got 'all'"):
        harness.ChatModel("tiny", num_frames="all")
    with pytest.raises(RequestError, match="best_of must be an integer from 1 to 128, or None, got 0"):
        harness.ChatModel("tiny", best_of=0, critic="tiny")
    with pytest.raises(RequestError, match="pretrained is missing; give a folder or a hub id: pretrained=MODEL"):
        harness.ChatModel(batch_size="1")


def test_a_number_of_answers_and_a_critic_go_together(harness):
    for options in ({"best_of": 8}, {"critic": "tiny"}):
        with pytest.raises(
            RequestError, match="best_of and critic go together; give best_of=8,critic=MODEL, or neither"
        ):
            harness.ChatModel("tiny", **options)


def test_an_answer_is_the_best_of_several_and_the_first_is_greedy_where_the_task_is(harness, monkeypatch):
    model = build(harness, best_of=3, critic="tiny", max_num_seqs=8)
    best_of, asked = model.engine.best_of, []

    def spy(messages, n, *, critic, params, greedy_first):
        ranking = best_of(messages, n, critic=critic, params=params, greedy_first=greedy_first)
        asked.append((n, params, greedy_first, ranking))
        return ranking

    monkeypatch.setattr(model.engine, "best_of", spy)
    assert set(model.generate_until(chat_requests())) == {ranking.text for *_, ranking in asked}
    assert [each[:3] for each in asked] == [(3, SamplingParams(max_tokens=12, temperature=0.6, top_p=0.95), True)] * 4
    assert all(len(ranking.answers) == 3 and ranking.best.score is not None for *_, ranking in asked)
    for *_, ranking in asked:
        assert next(answer.text for answer in ranking.answers if answer.index == 0) in NUMBERS
    asked.clear()
    model.generate_until(chat_requests([0], temperature=0.9))
    assert asked[0][:3] == (3, SamplingParams(max_tokens=12, temperature=0.9), False)


def test_a_search_with_beams_is_refused(recorded):
    model, recorder = recorded()
    with pytest.raises(RequestError, match="num_beams must be 1, got 5; pass --gen_kwargs num_beams=1"):
        model.generate_until(chat_requests(num_beams=5))
    assert recorder.asked == []


def test_a_run_goes_on_where_it_was_killed(recorded, tmp_path):
    path = tmp_path / "answers.jsonl"
    model, _ = recorded(recorder=Recorder(fails_after=3), resume=str(path))
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(chat_requests())
    path.write_bytes(path.read_bytes() + b'{"key": "cut o')
    model, second = recorded(resume=str(path))
    answers = ["answer 0 of 1", "answer 1 of 4", "answer 2 of 4", "answer 3 of 4"]
    assert model.generate_until(chat_requests()) == answers
    assert [len(batch) for batch in second.asked] == [1]
    model, third = recorded(resume=str(path))
    assert model.generate_until(chat_requests()) == answers
    assert third.asked == [[]]


def test_an_answer_is_kept_for_the_same_question_alone(recorded, tmp_path):
    resume = str(tmp_path / "answers.jsonl")

    def num_asked(numbers, kwargs=None, **options):
        model, recorder = recorded(resume=resume, **options)
        model.generate_until(chat_requests(numbers, **(kwargs or {})))
        return len(recorder.asked[0])

    assert num_asked([0]) == 1
    assert num_asked([1]) == 1  # another picture
    assert num_asked([0, 1], {"max_new_tokens": 4}) == 2
    assert num_asked([0], max_tiles=1) == 1
    assert num_asked([0]) == 0


def test_equal_requests_are_drawn_and_kept_one_by_one(recorded, tmp_path):
    model, recorder = recorded(resume=str(tmp_path / "answers.jsonl"))
    answers = model.generate_until(chat_requests([0, 0, 0], temperature=0.7))
    assert len(set(answers)) == len(recorder.asked[0]) == 3
    model, recorder = recorded(resume=str(tmp_path / "answers.jsonl"))
    assert model.generate_until(chat_requests([0, 0, 0], temperature=0.7)) == answers


def test_a_task_asks_in_rounds_until_it_has_ended(recorded):
    told = []

    def ask(document, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return to_messages(document)
        told.append((document["number"], round_idx, previous_output, previous_round_info))
        messages = [{"role": "user", "content": f"round {round_idx}"}]
        return messages, round_idx == (3 if document["number"] == "42" else 1), previous_output, f"info {round_idx}"

    model, recorder = recorded()
    answers = model.generate_until_multi_round(chat_requests([0, 2], ask=ask))
    assert answers == [["answer 0 of 2"], ["answer 1 of 2", "answer 0 of 1", "answer 0 of 1"]]
    assert [batch[0][0]["content"] for batch in recorder.asked[1:]] == ["round 1", "round 2"]
    assert told[1:3] == [
        ("42", 1, ["answer 1 of 2"], None),
        ("42", 2, ["answer 1 of 2", "answer 0 of 1"], "info 1"),
    ]
    with pytest.raises(RequestError, match="leave --force_simple out"):
        recorded("SimpleModel")[0].generate_until_multi_round(chat_requests())


def test_the_right_choice_has_the_least_loss_and_is_what_would_be_drawn(harness):
    model = build(harness, "SimpleModel", max_num_seqs=1)  # so that there are several groups of questions
    choices = ["4719", "4718", "905", "47190"]
    place = (to_visuals, 0, "digits", "test")
    requests = [request("Read the digits.", choice, *place) for choice in choices]
    requests += [
        request("Read the digits.", lambda document: document["number"], to_visuals, number, "digits", "test")
        for number in (1, 2, 3)
    ]
    requests.append(request("", "905"))
    results = [result.text for result in model.loglikelihood(requests)]
    losses = [loss for loss, _ in results]
    assert min(losses[:4]) == losses[0] < 0.5
    assert min(losses) > 0
    assert [drawn for _, drawn in results[:7]] == [True, False, False, False, True, True, True]
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        picture = {"type": "image", "image": str(SAMPLES / "4719.png")}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": "Read the digits."}]}]
        scores = engine.score(messages, choices)
    assert losses[:4] == pytest.approx([-score.total / len(score.tokens) for score in scores], abs=1e-4)


def test_the_items_of_a_lazy_sequence_are_made_when_they_are_asked_for(harness):
    made = []
    lazy = harness.Lazy(lambda source: made.append(source) or source * 2, [1, 2, 3])
    assert (len(lazy), len(lazy[1:]), made) == (3, 2, [])
    assert (lazy[1], lazy[-1], list(lazy[1:])) == (4, 6, [4, 6])
    assert made == [2, 3, 2, 3]


def test_a_question_whose_answers_the_critic_refuses_gets_one_answer_and_the_run_goes_on(harness, monkeypatch):
    model = build(harness, best_of=2, critic="tiny")

    def about(messages, **_):
        def judge(text):
            if text == NUMBERS[1]:
                raise RequestError("too long for this critic")
            return 0.5

        return judge

    monkeypatch.setattr(type(model._critic), "about", staticmethod(about))
    assert model.generate_until(chat_requests()) == list(NUMBERS)
    with pytest.raises(RequestError, match="a critic judges answers to one question, not those of several rounds"):
        model.generate_until_multi_round(chat_requests())

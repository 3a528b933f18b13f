"""The official interface does what the model cards' quick start does, on the checkpoint in the package."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import Engine, InternVLError, MediaError, RequestError, SamplingParams
from internvl_rt.compat import AutoModel, AutoTokenizer, load_image, load_video
from internvl_rt.inputs.thinking import SYSTEM_MESSAGE
from support.scripted_text import script

SAMPLES = sorted((Path(__file__).parents[1] / "internvl_rt" / "tiny" / "samples").glob("*.png"))
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    loaded = AutoModel.from_pretrained(
        "tiny",
        torch_dtype=torch.float32,
        device="cpu",
        low_cpu_mem_usage=True,
        use_flash_attn=True,
        trust_remote_code=True,
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("tiny", trust_remote_code=True, use_fast=False)


def tiles_of(sample, model):
    return load_image(sample, input_size=model.engine.config.vision.image_size, max_num=12)


def test_quick_start_reads_a_picture_and_keeps_a_history(model, tokenizer):
    pixels = tiles_of(SAMPLES[0], model)
    question = "<image>\nRead the digits."
    response, history = model.chat(tokenizer, pixels, question, GREEDY, history=None, return_history=True)
    assert response == SAMPLES[0].stem
    assert history == [(question, response)]
    again, longer = model.chat(
        tokenizer, pixels, "How many digits are there?", GREEDY, history=history, return_history=True
    )
    assert again == str(len(response))
    assert longer == [*history, ("How many digits are there?", again)]
    assert len(history) == 1  # chat does not change the caller's list


def test_question_without_a_marker_gets_the_picture_in_front(model, tokenizer):
    pixels = tiles_of(SAMPLES[0], model)
    response, history = model.chat(tokenizer, pixels, "Read the digits.", GREEDY, return_history=True)
    assert (response, history[0][0]) == (SAMPLES[0].stem, "<image>\nRead the digits.")


def test_batch_chat_equals_single_chats(model, tokenizer):
    pixels = [tiles_of(sample, model) for sample in SAMPLES[:3]]
    questions = ["<image>\nRead the digits."] * 3
    counts = [len(tiles) for tiles in pixels]
    responses = model.batch_chat(
        tokenizer, torch.cat(pixels), num_patches_list=counts, questions=questions, generation_config=GREEDY
    )
    assert responses == [sample.stem for sample in SAMPLES[:3]]


def test_questions_about_no_picture_may_count_no_tiles(model, tokenizer):
    questions = ["Hello", "Read the digits."]
    assert model.batch_chat(tokenizer, None, questions, GREEDY, num_patches_list=[0, 0]) == [
        model.chat(tokenizer, None, question, GREEDY) for question in questions
    ]


def test_same_tokens_as_the_engine(model, tokenizer):
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        parts = [{"type": "image", "image": str(SAMPLES[1])}, {"type": "text", "text": "Read the digits."}]
        reply = engine.chat([{"role": "user", "content": parts}], SamplingParams(max_tokens=16))
    assert model.chat(tokenizer, tiles_of(SAMPLES[1], model), "Read the digits.", GREEDY) == reply.text


def test_load_image_normalises_with_the_imagenet_statistics():
    gray = Image.fromarray(np.full((60, 60, 3), 128, np.uint8))
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    pixels = load_image(gray, input_size=56)
    assert pixels.shape == (1, 3, 56, 56)
    torch.testing.assert_close(pixels[0, :, 5, 7], expected)


def test_load_video_gives_one_tile_for_each_frame(tmp_path):
    av = pytest.importorskip("av", reason="the video extra")
    path = tmp_path / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"g": "1"})
        stream.width = stream.height = 64
        for level in range(0, 250, 25):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixels, counts = load_video(path, input_size=56, num_segments=4)
    assert (pixels.shape, counts) == ((4, 3, 56, 56), [1, 1, 1, 1])
    brightness = pixels.mean((1, 2, 3))
    assert torch.all(brightness[1:] > brightness[:-1])
    with pytest.raises(MediaError, match="raise max_video_frames"):
        load_video(path, input_size=56, num_segments=4, max_video_frames=9)
    with pytest.raises(MediaError, match="raise max_pixels"):
        load_video(path, input_size=56, num_segments=4, max_video_frames=10, max_pixels=64 * 64 - 1)


def test_load_image_takes_the_options_that_its_errors_name():
    black = np.zeros((60, 60, 3), np.uint8)
    with pytest.raises(MediaError, match="make it smaller, or raise max_pixels"):
        load_image(black, input_size=56, max_pixels=3599)
    assert len(load_image(black, input_size=56, max_pixels=3600)) == 1


class Listener:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.ids, self.prompt, self.ended = [], None, False

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.ids += value.tolist()

    def end(self):
        self.ended = True


REFUSED = {
    "no generation_config": ({"generation_config": None}, "generation_config: expected a dict, got None"),
    "beams": ({"generation_config": {"num_beams": 4}}, "num_beams must be 1"),
    "a true number of beams": ({"generation_config": {"num_beams": True}}, "num_beams must be 1"),
    "a streamer without methods": ({"generation_config": {"streamer": object()}}, "must have the methods put and end"),
    "no new tokens": ({"generation_config": {"max_new_tokens": 0}}, "max_new_tokens must be an integer from 1 to .* 0"),
    "new tokens as text": ({"generation_config": {"max_new_tokens": "5"}}, "max_new_tokens must be .*, got '5'"),
    "least above most": ({"generation_config": {"max_new_tokens": 4, "min_new_tokens": 9}}, "max_new_tokens"),
    "a penalty as text": ({"generation_config": {"repetition_penalty": "1"}}, "repetition_penalty must be a number"),
    "sampling as text": ({"generation_config": {"do_sample": "no"}}, "do_sample must be True or False, got 'no'"),
    "a hot temperature": ({"generation_config": {"do_sample": True, "temperature": 1e9}}, "temperature must be"),
    "an unused temperature": ({"generation_config": {"temperature": "hot"}}, "expected numbers, got .*hot"),
    "an unknown name": ({"generation_config": {"max_length": 5, 7: 1}}, "7, max_length not supported; leave it out"),
    "a question of no text": ({"question": None}, "question: expected a text, got None"),
    "a question of bytes": ({"question": b"Hello"}, "question: expected a text, got b'Hello'"),
    "several questions": ({"question": ["Hello"]}, "question: expected a text"),
    "a place too few": ({"history": []}, "<image>"),
    "a flag as text": ({"return_history": "no"}, "return_history must be True or False, got 'no'"),
    "a text as history": ({"history": "Hello"}, "history: expected a list of pairs"),
    "one answer as history": ({"history": [("Hello",)]}, r"history: expected pairs .*, got \('Hello'"),
    "three texts": ({"history": [("a", "b", "c")]}, "history: expected pairs"),
    "texts as history": ({"history": ["ab"]}, "history: expected pairs .*, got 'ab'"),
    "an answer of no text": ({"history": [("<image>", None)]}, "history: expected pairs"),
    "too many tiles": ({"num_patches_list": [9]}, r"num_patches_list: expected numbers that sum to the \d+ tiles"),
    "a negative number": ({"num_patches_list": [2, -1]}, "num_patches_list: expected integers of at least 1, got -1"),
    "a picture of no tiles": ({"num_patches_list": [1, 0]}, "num_patches_list: .*, got 0"),
    "half a tile": ({"num_patches_list": [0.5, 0.5]}, "num_patches_list: .*, got 0.5"),
    "truth values": ({"num_patches_list": [True]}, "num_patches_list: .*, got True"),
    "a number of tiles": ({"num_patches_list": 1}, "num_patches_list: expected a list of numbers of tiles, got int"),
    "text as tiles": ({"num_patches_list": "1"}, "num_patches_list: expected a list of numbers of tiles, got '1'"),
    "tiles of nothing": ({"pixel_values": None, "num_patches_list": [1]}, "num_patches_list: .* but no pixel_values"),
    "a path": ({"pixel_values": "4719.png"}, "pixel_values: expected a tensor or an array, got str"),
    "a list": ({"pixel_values": [[0.0]]}, "pixel_values: expected a tensor or an array, got list"),
    "no tiles": ({"pixel_values": torch.zeros(0, 3, 56, 56)}, r"at least one tile, .* got float32 \[0, 3, 56, 56\]"),
    "large tiles": ({"pixel_values": torch.zeros(1, 3, 224, 224)}, r"got float32 \[1, 3, 224, 224\]; load_image"),
    "one tile alone": ({"pixel_values": torch.zeros(3, 56, 56)}, r"got float32 \[3, 56, 56\]"),
    "a number": ({"pixel_values": torch.tensor(1.0)}, r"got float32 \[\]"),
    "integers": ({"pixel_values": torch.zeros(1, 3, 56, 56, dtype=torch.int64)}, "got int64"),
    "meta": ({"pixel_values": torch.zeros(1, 3, 56, 56, device="meta")}, "on meta"),
    "sparse": ({"pixel_values": torch.zeros(1, 3, 56, 56).to_sparse()}, "torch.sparse_coo"),
    "complex": ({"pixel_values": torch.zeros(1, 3, 56, 56, dtype=torch.complex64)}, "got complex64"),
    "NaN": ({"pixel_values": torch.full((1, 3, 56, 56), torch.nan)}, "not finite in float32"),
    "beyond float32": ({"pixel_values": np.full((1, 3, 56, 56), 1e300)}, "not finite in float32"),
    "more than fits": ({"pixel_values": torch.zeros(1).expand(10**6, 3, 56, 56)}, "visual tokens, but only"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_official_code_asserts_or_ignores_is_refused(model, tokenizer, arguments, message):
    given = {"pixel_values": tiles_of(SAMPLES[0], model), "question": "Read the digits.", "generation_config": GREEDY}
    with pytest.raises(RequestError, match=message):
        model.chat(tokenizer, **given | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": "Read the digits."}, "questions: expected a list of texts, got 'Read the digits.'"),
        ({"questions": [None, "Hello"]}, "question: expected a text, got None"),
        ({"generation_config": {"streamer": threading.Event()}}, "must have the methods put and end"),
        ({"generation_config": {"streamer": Listener()}}, "a streamer takes one answer; use chat"),
        ({"num_patches_list": [1]}, "expected numbers that sum to the 2 tiles"),
        ({"num_patches_list": [2]}, "one entry for each of 2 questions, got 1"),
        ({"pixel_values": torch.zeros(2, 3, 224, 224)}, "pixel_values: expected at least one tile"),
    ],
)
def test_a_batch_is_checked_likewise(model, tokenizer, arguments, message):
    given = {"pixel_values": tiles_of(SAMPLES[0], model)[:2], "questions": ["Read the digits."] * 2}
    given |= {"generation_config": GREEDY, "num_patches_list": [1, 1]}
    with pytest.raises(RequestError, match=message):
        model.batch_chat(tokenizer, **given | arguments)


def test_bad_tiles_fail_alone_beside_threads_that_get_their_answers(model, tokenizer):
    bad = [call["pixel_values"] for call, _ in REFUSED.values() if call.get("pixel_values") is not None]
    assert len(bad) > 10

    def read(pixels):
        return model.chat(tokenizer, pixels, "Read the digits.", GREEDY)

    with ThreadPoolExecutor(6) as pool:
        good = [pool.submit(read, tiles_of(sample, model)) for sample in SAMPLES[:4] * 3]
        errors = [pool.submit(read, pixels) for pixels in bad]
        assert all(isinstance(error.exception(60), RequestError) for error in errors)
        assert [call.result(60) for call in good] == [sample.stem for sample in SAMPLES[:4] * 3]


def test_tiles_may_be_an_array_and_counts_numpy_integers(model, tokenizer):
    pixels = [tiles_of(sample, model) for sample in SAMPLES[:2]]
    question = "Image-1: <image>\nImage-2: <image>\nRead the digits."
    counts = [len(each) for each in pixels]
    expected = model.chat(tokenizer, torch.cat(pixels), question, GREEDY, num_patches_list=counts)
    array = torch.cat(pixels).double().numpy()
    assert model.chat(tokenizer, array, question, GREEDY, num_patches_list=list(np.array(counts))) == expected


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: load_image(SAMPLES[0], input_size=-1), "^input_size must be an integer from 1 to 2048, got -1"),
        (lambda: load_image(SAMPLES[0], input_size="448"), "^input_size must be"),
        (lambda: load_image(SAMPLES[0], max_num=0), "^max_num must be an integer from 1 to 128, got 0"),
        (lambda: load_image(None), "an image must be a path"),
        (lambda: load_video("a.mp4", num_segments="8"), r"num_segments must be an integer from 1 to .* got '8'"),
        (lambda: load_video("a.mp4", num_segments=True), "num_segments must be"),
        (lambda: load_video("a.mp4", num_segments=0), "num_segments must be"),
        (lambda: load_video("a.mp4", bound="01"), r"bound must be \[start, end\] in seconds, .* or None, got '01'"),
        (lambda: load_video("a.mp4", bound=(1,)), "bound must be"),
        (lambda: load_video("a.mp4", bound=(None, 2)), "bound must be"),
        (lambda: load_video("a.mp4", bound=(2.0, 1.0)), "bound must be"),
        (lambda: load_video("a.mp4", bound=(0, 10**400)), "bound must be"),
        (lambda: load_video("a.mp4", bound=(0, 1e308)), "bound must be"),
        (lambda: load_video("no-such.mp4"), "does not exist"),
    ],
)
def test_arguments_of_the_loaders_are_checked(load, message):
    with pytest.raises(InternVLError, match=message):
        load()


def test_a_streamer_gets_the_ids_and_the_end_even_of_a_failure(model, tokenizer, monkeypatch):
    pixels, listener = tiles_of(SAMPLES[0], model), Listener()
    response = model.chat(tokenizer, pixels, "Read the digits.", GREEDY | {"streamer": listener})
    assert response == tokenizer.decode(listener.ids, skip_special_tokens=True) == SAMPLES[0].stem
    assert tokenizer.decode(listener.ids, skip_special_tokens=False) == SAMPLES[0].stem + "<|im_end|>"
    assert listener.prompt.numel() == 0
    assert listener.ended

    def fail(value):
        raise OSError("nobody listens")

    listener = Listener()
    monkeypatch.setattr(listener, "put", fail)
    with pytest.raises(OSError, match="nobody listens"):
        model.chat(tokenizer, None, "Hello", GREEDY | {"streamer": listener})
    assert listener.ended
    assert model.engine.stats()["running"] == model.engine.stats()["waiting"] == 0
    for wrong in ({"question": 5}, {"pixel_values": pixels * torch.nan}, {"verbose": 5}, {"no_such_key": 1}):
        listener, call = Listener(), {"question": "Hi", "pixel_values": None} | wrong
        config = GREEDY | {"streamer": listener} | {"no_such_key": call.pop("no_such_key", None)}
        with pytest.raises(RequestError):
            model.chat(tokenizer, generation_config=config, **call)
        assert listener.ended


def test_the_cards_streaming_code_runs(model, tokenizer):
    """From the card of InternVL3, with `TextIteratorStreamer` of transformers."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=10)
    generation_config = {"max_new_tokens": 1024, "do_sample": False, "streamer": streamer}
    call = {
        "tokenizer": tokenizer,
        "pixel_values": tiles_of(SAMPLES[1], model),
        "question": "<image>\nRead the digits.",
        "history": None,
        "return_history": False,
        "generation_config": generation_config,
    }
    thread = threading.Thread(target=model.chat, kwargs=call)
    thread.start()
    generated_text = ""
    for new_text in streamer:
        if new_text == model.conv_template.sep:
            break
        generated_text += new_text
    thread.join()
    assert generated_text == SAMPLES[1].stem


def test_the_cards_thinking_mode_gives_the_raw_text(model, tokenizer, monkeypatch, capsys):
    """The card of InternVL3.5 sets the system message and draws at temperature 0.6."""
    script(monkeypatch, ["<think>\nso", ".\n</think>\n\n42\n"])
    monkeypatch.setattr(model, "system_message", SYSTEM_MESSAGE)
    drawn = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True, "temperature": 0.6}
    response, history = model.chat(tokenizer, None, "How many?", drawn, return_history=True, verbose=True)
    assert response == "<think>\nso.\n</think>\n\n42"
    assert history == [("How many?", response)]
    prompt = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
    assert capsys.readouterr().out == f"{prompt}<|im_start|>assistant\n{response}\n"
    assert model.batch_chat(tokenizer, None, ["How many?"], drawn) == [response]


def test_sampling_defaults_are_those_of_transformers(model, tokenizer, monkeypatch):
    seen = []
    original = model.engine.generate_prepared
    monkeypatch.setattr(
        model.engine, "generate_prepared", lambda prompts, params: seen.extend(params) or original(prompts, params)
    )
    model.chat(tokenizer, None, "Hello", {"max_new_tokens": 4, "do_sample": True})
    model.chat(tokenizer, None, "Hello", {"max_new_tokens": 4, "do_sample": True, "temperature": 0.6, "top_p": 0.9})
    model.chat(tokenizer, None, "Hello", {"max_new_tokens": 4, "do_sample": False, "temperature": 0.6})
    assert [(p.temperature, p.top_k, p.top_p) for p in seen] == [(1.0, 50, 1.0), (0.6, 50, 0.9), (0.0, 0, 1.0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_cuda_without_a_gpu_says_so(model):
    with pytest.raises(RequestError, match="sees no CUDA device"):
        model.cuda()

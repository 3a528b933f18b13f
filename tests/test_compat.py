"""The official interface does what the model cards' quick start does, on the checkpoint in the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.compat import AutoModel, AutoTokenizer, load_image, load_video

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patches_list": [9]}, "num_patches_list"),
        ({"generation_config": {"num_beams": 4}}, "num_beams must be 1"),
        ({"generation_config": {"streamer": object()}}, "streamer not supported"),
        ({"generation_config": {"max_new_tokens": 0}}, "max_tokens"),
        ({"history": []}, "<image>"),
    ],
)
def test_what_the_official_code_asserts_or_ignores_is_refused(model, tokenizer, arguments, message):
    call = {"question": "Read the digits.", "generation_config": GREEDY} | arguments
    with pytest.raises(RequestError, match=message):
        model.chat(tokenizer, tiles_of(SAMPLES[0], model), **call)


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


def test_unknown_loading_arguments_are_refused():
    with pytest.raises(RequestError, match="does not take load_in_8bit"):
        AutoModel.from_pretrained("tiny", load_in_8bit=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_cuda_without_a_gpu_says_so(model):
    with pytest.raises(RequestError, match="sees no CUDA device"):
        model.cuda()

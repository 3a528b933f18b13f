"""Texts of any size: slices have the ids of the whole, and what cannot fit costs little."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_rt.errors import RequestError
from internvl_rt.inputs import slices as slices_module
from internvl_rt.inputs.slices import MAX_UNBROKEN_BYTES, O200K_CUT, QWEN2_CUT, slices
from internvl_rt.inputs.tokenizer import load_tokenizer
from support.harmony import O200K

DATA = Path(__file__).parents[1] / "data" / "tokenizer"
TOKENIZER = load_tokenizer(DATA)
# What words, white space, digits, contractions, normalisation and added tokens may stumble over at a cut.
WORDS = (
    "a The lake 1 23 0 \u00b2 \u2167 \uff11 \u0661 ' 's 'LL \u2019 _ - | / < > = . , ! ? ; \" \\ { } \x0b \x85 \x00"
    " \u0301 \u0316 \u0338 <\u0338 e\u0301 \u212a \u212b \u1100 \u1161 \u11a8 \uac00 \u4f60\u597d \uff0c \u3002 \u2026"
    " \u0438\u0306 \u044b \u0915\u093c \u0e01\u0e33 \u30ab\u3099 \u3099 \u0627\u0653 \u05d0\u05b7 \U0001f600 \u200d"
    " \U0002f800 \u201c <ref> </ref> <tool_call> <|im_end|> <|im_start|> <IMG_CONTEXT>"
)
ATOMS = [*WORDS.split(" "), " ", "  ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u3000"]
HUNDRED_THOUSAND = {
    "CJK with commas": "\u4f60\u597d\u4e16\u754c\uff0c" * 20_000,
    "words": "the lake " * 11_000,
    "digits": "1" * 100_000,
    "lines": "!\n" * 50_000,
}


@pytest.mark.parametrize("specials", [False, True])
@pytest.mark.parametrize(("tokenizer", "cut"), [(TOKENIZER, QWEN2_CUT), (O200K, O200K_CUT)], ids=["qwen2", "o200k"])
@settings(max_examples=300, deadline=None)
@given(atoms=st.lists(st.sampled_from(ATOMS), max_size=40), size=st.integers(1, 6))
def test_slices_of_a_text_have_the_ids_of_the_whole(tokenizer, cut, atoms, size, specials):
    text = "".join(atoms)
    whole = (tokenizer._encode_all if specials else tokenizer._encode_plain)(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices_module, "_SLICE", size)
        assert tokenizer._cut is cut
        assert "".join(slices(text, cut)) == text
        assert tokenizer.encode(text, specials=specials) == whole


@pytest.mark.parametrize("name", HUNDRED_THOUSAND)
def test_long_texts_are_cut_and_read_no_further_than_they_fit(name):
    text = HUNDRED_THOUSAND[name]
    parts = list(slices(text, QWEN2_CUT))
    assert "".join(parts) == text
    assert len(parts) >= 3
    assert max(map(len, parts)) < 2**15 + 100
    with pytest.raises(RequestError, match=r"a text has more than [\d,]+ tokens, but only 1,000 fit; shorten it"):
        TOKENIZER.encode(text, limit=1000)
    assert TOKENIZER.encode(text, limit=10**6) == TOKENIZER._encode_plain(text)


@pytest.mark.parametrize("letter", ["a", "你", " ", "\n", "\u0301", "!", "😀"])
def test_a_text_without_the_end_of_a_word_is_refused_from_a_size_on(letter):
    most = MAX_UNBROKEN_BYTES // len(letter.encode())
    assert list(slices(letter * most, QWEN2_CUT)) == list(slices(letter * most, None)) == [letter * most]
    with pytest.raises(
        RequestError, match="at most 524,288 bytes, got more from character 0 on, without the end of a word; break"
    ):
        list(slices(letter * (most + 1), QWEN2_CUT))
    with pytest.raises(RequestError, match="for a tokenizer that takes it whole; shorten it"):
        list(slices(letter * (most + 1), None))


@pytest.mark.parametrize(
    "change",
    [
        {"single_word": True},
        {"lstrip": True},
        {"rstrip": True},
        {"content": "<two words>"},
        {"content": "<3.5>"},
    ],
    ids=str,
)
def test_a_token_that_a_cut_could_part_from_its_text_leaves_texts_whole(change, tmp_path):
    folder = shutil.copytree(DATA, tmp_path / "checkpoint")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["419"] = config["added_tokens_decoder"]["418"] | {"content": "<point>"} | change
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    content = config["added_tokens_decoder"]["419"]["content"]
    text = f"lake {content} {content} 3 {content}\n" * 3000
    assert tokenizer.encode(text) == tokenizer._encode_plain(text)
    assert tokenizer._cut is None


def test_a_tokenizer_json_that_works_as_qwen2s_is_cut_as_well(tmp_path):
    from transformers import Qwen2Tokenizer

    Qwen2Tokenizer.from_pretrained(DATA).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)._cut is QWEN2_CUT
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    assert load_tokenizer(tmp_path)._cut is None
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    path.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path)._cut is None


MEMORY = """
import resource, sys, time
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.errors import RequestError
from pathlib import Path
tokenizer, text = load_tokenizer(Path(sys.argv[1])), eval(sys.argv[2])
before_kb, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    tokenizer.encode(text, limit=32768)
except RequestError:
    pass
print(time.process_time() - start_s, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", [r"'\u4f60\uff0c' * 6_000_000", r"'\u4f60' * (2**19 // 3)", "' ' * 2**19"])
def test_a_text_that_cannot_fit_takes_little_time_and_memory(text):
    run = subprocess.run([sys.executable, "-c", MEMORY, DATA, text], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, run.stdout.split())
    assert seconds < 5, "processor time, of a machine that may be slow"
    assert megabytes < 300

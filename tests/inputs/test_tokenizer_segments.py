"""Intern-S1's tokenizer gives molecules and proteins the ids of models of their own, as the official one does."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece

from internvl_rt.errors import CheckpointError
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.inputs.tokenizer_files import read_vocab_and_merges

DATA = Path(__file__).parents[1] / "data" / "tokenizer"
PIECES = ["C", "1", "=CC=C(", "C=C", ")C", "=O", "CC", "=CC=CC=C"]
FORMYL, TOLUALDEHYDE, PROTEIN = "C1=CC=C(C=C1)C=O", "CC1=CC=CC=C1C=O", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
NUM_SMILES, NUM_IUPAC, NUM_FASTA = 24, 40, 30
FIRST = 400 + 26  # the vocabulary has 400 tokens, and 26 stand between it and the models' pieces


def train(sentences, num_pieces, symbols=()):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 30),
        model_writer=model,
        vocab_size=num_pieces,
        model_type="unigram",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=list(symbols),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def declare(folder, tokens):
    config = json.loads((DATA / "tokenizer_config.json").read_text())
    decoder = config["added_tokens_decoder"]
    for token in ("<img>", "</img>", "<IMG_CONTEXT>"):  # they are the last ones here
        del decoder[next(i for i, each in decoder.items() if each["content"] == token)]
    config["added_tokens_decoder"] = decoder | {str(i): {"content": t, "special": True} for t, i in tokens.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def models():
    names = ["ethan-1-ol", "propan-2-one and benzene", "2-methylbutane", "toluene", "hexan-1-ol", "pyridine"]
    proteins = [PROTEIN, PROTEIN[::-1], "ACDEFGHIKLMNPQRSTVWY" * 2]
    return {
        "SMILES": train([FORMYL, TOLUALDEHYDE, "CCO", "C[N]", "O=C1NC1#S"], NUM_SMILES, PIECES),
        "IUPAC": train(names, NUM_IUPAC),
        "FASTA": train(proteins, NUM_FASTA),
    }


@pytest.fixture(scope="module")
def sizes(models):
    return {name: sentencepiece.SentencePieceProcessor(model_proto=each).get_piece_size()
            for name, each in models.items()}  # fmt: skip


@pytest.fixture
def folder(models, sizes, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DATA / name, tmp_path)
    for name, content in models.items():
        (tmp_path / f"tokenizer_{name}.model").write_bytes(content)
    end = FIRST + sum(sizes.values()) + 6
    declare(tmp_path, {"<img>": end, "</img>": end + 1, "<IMG_CONTEXT>": end + 2})
    return tmp_path


@pytest.fixture
def starts(sizes):
    iupac = FIRST + sizes["SMILES"] + 4
    return {"SMILES": FIRST, "IUPAC": iupac, "FASTA": iupac + sizes["IUPAC"] + 2}


@pytest.fixture
def base():
    library = read_vocab_and_merges(DATA / "vocab.json", DATA / "merges.txt")
    return lambda text: library.encode(text).ids


def smiles(*pieces):
    return [FIRST + 3 + PIECES.index(piece) for piece in pieces]


def test_molecules_have_ids_of_their_own_with_tags_and_without(folder, sizes, base):
    tokenizer, tag = load_tokenizer(folder), FIRST + sizes["SMILES"]
    text = f"Describe <SMILES>{FORMYL}</SMILES> and {TOLUALDEHYDE}"
    ids = tokenizer.encode(text)
    tagged = smiles("C", "1", "=CC=C(", "C=C", "1", ")C", "=O")
    plain = smiles("CC", "1", "=CC=CC=C", "1", "C", "=O")
    assert ids == [*base("Describe "), tag, *tagged, tag + 1, *base(" and "), *plain]
    assert tokenizer.decode(ids, skip_specials=False) == text
    assert tokenizer.decode(ids) == text.replace("<SMILES>", "").replace("</SMILES>", "")


def test_each_model_begins_behind_the_tags_of_the_one_before(folder, models, sizes, starts, base):
    tokenizer = load_tokenizer(folder)
    iupac, fasta = (sentencepiece.SentencePieceProcessor(model_proto=models[name]) for name in ("IUPAC", "FASTA"))
    tag = starts["FASTA"] - 2
    expected = [starts["IUPAC"] + i for i in iupac.encode("propan-2-one")]
    assert tokenizer.encode("<IUPAC>propan-2-one</IUPAC>") == [tag, *expected, tag + 1]
    expected = [starts["FASTA"] + i for i in fasta.encode(PROTEIN)]
    ids = tokenizer.encode(f"Is {PROTEIN}?")
    assert ids == [*base("Is "), *expected, *base("?")]
    assert tokenizer.decode(ids) == f"Is {PROTEIN}?"
    selfies = FIRST + sizes["SMILES"] + 2
    assert tokenizer.encode("<SELFIES>C1</SELFIES>") == [selfies, *smiles("C", "1"), selfies + 1]
    assert tokenizer.token_id("<IMG_CONTEXT>") == tokenizer.vocab_size - 1


def test_what_a_model_has_no_piece_for_is_encoded_as_other_text(folder, sizes, base):
    tokenizer, tag = load_tokenizer(folder), FIRST + sizes["SMILES"]
    ids = tokenizer.encode("<SMILES>C1 éC</SMILES>")
    assert ids == [tag, *smiles("C", "1"), *base(" é"), *smiles("C"), tag + 1]
    assert tokenizer.decode(ids) == "C1 éC"


@pytest.mark.parametrize(
    "text",
    [
        "<MOLFORMULA>C6H15O6CCCCCCCCCC</MOLFORMULA>",
        "<MOLFORMULA>CC1=CC=CC=C1C=O<MOLFORMULA>",
        "the CCO of it, (CC) and [1]",
        "a fast boat",
        "",
    ],
)
def test_other_text_is_encoded_as_by_the_vocabulary_alone(folder, base, text):
    parts = text.replace("<MOLFORMULA>", "|<MOLFORMULA>|").replace("</MOLFORMULA>", "|</MOLFORMULA>|").split("|")
    assert load_tokenizer(folder).encode(text) == [i for part in parts for i in base(part)]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (f"<SMILES>{PROTEIN}</SMILES>", False),  # nothing is looked for between tags
        (f"<SMILES>C</SMILES>{PROTEIN}", True),
        (f"</SMILES>{PROTEIN}", True),  # a tag that was not opened ends nothing
        (f"<SMILES><IUPAC>C</IUPAC>{PROTEIN}</SMILES>", False),  # tags may be nested
        (f"<MOLFORMULA>C</MOLFORMULA>{PROTEIN}", True),
    ],
)
def test_proteins_are_looked_for_outside_tags(folder, models, starts, text, inside):
    fasta = sentencepiece.SentencePieceProcessor(model_proto=models["FASTA"])
    expected = [starts["FASTA"] + i for i in fasta.encode(PROTEIN)]
    ids = load_tokenizer(folder).encode(text)
    assert any(ids[place : place + len(expected)] == expected for place in range(len(ids))) is inside


def test_a_tag_that_is_not_closed_holds_to_the_end_of_its_text(folder, sizes):
    tag = FIRST + sizes["SMILES"]
    assert load_tokenizer(folder).encode("<SMILES>C1<IUPAC></IUPAC>C1")[0] == tag
    assert load_tokenizer(folder).encode("<SMILES>C1<IUPAC></IUPAC>C1")[-2:] == smiles("C", "1")


def test_text_is_normalised_and_a_mark_of_sentencepiece_is_a_space(folder, base):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("cafe\u0301") == base("caf\u00e9")
    assert tokenizer.encode("a\u2581b") == base("a b")


def test_tokens_of_the_template_stay_text(folder, base):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|im_end|>") == base("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", specials=True) == [tokenizer.token_id("<|im_end|>")]


def test_every_piece_gives_its_text_and_unknown_ones_none(folder, models, starts):
    tokenizer = load_tokenizer(folder)
    for name, start in starts.items():
        model = sentencepiece.SentencePieceProcessor(model_proto=models[name])
        assert [tokenizer.token_bytes[start + index] for index in range(3)] == [b""] * 3
        for index in range(3, model.get_piece_size()):
            assert tokenizer.decode([start + index]) == model.id_to_piece(index).replace("▁", " ")


def test_tags_may_be_declared_where_the_models_leave_them(folder, sizes):
    tag = FIRST + sizes["SMILES"]
    declare(folder, {"<SMILES>": tag, "</SMILES>": tag + 1})
    assert load_tokenizer(folder).token_id("<SMILES>") == tag
    for tokens in ({"<SMILES>": tag + 1}, {"<img>": FIRST + 5}):
        declare(folder, tokens)
        with pytest.raises(CheckpointError, match=r"is declared as .*; take all tokenizer files from one checkpoint"):
            load_tokenizer(folder)


def test_files_that_are_missing_or_broken_are_named(folder):
    (folder / "tokenizer_FASTA.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"tokenizer_FASTA\.model is not a sentencepiece model"):
        load_tokenizer(folder)
    (folder / "tokenizer_IUPAC.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_IUPAC\.model"):
        load_tokenizer(folder)


def test_without_sentencepiece_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"tokenizer_SMILES\.model needs sentencepiece; run: pip install"):
        load_tokenizer(folder)

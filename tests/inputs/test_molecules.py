"""Molecules and proteins are found in a text by the rules of Intern-S1's tokenizer."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_rt.inputs.molecules import is_smiles, split_molecules

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"


def found(text):
    return [(part, kind) for part, kind in split_molecules(text) if kind]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Describe C1=CC=C(C=C1)C=O", [("C1=CC=C(C=C1)C=O", "SMILES")]),
        ("CC(C)(C)OC(=O)N[C@@H](C)C(=O)O, often", [("CC(C)(C)OC(=O)N[C@@H](C)C(=O)O", "SMILES")]),
        ("the `CC(C)(C)` at the beginning", []),  # fewer than ten units
        ("CC(C)(C)OC(=O)NC@@HC(=O)O", []),  # a chiral atom stands in brackets
        ("xCC1=CC=CC=C1C=O", []),  # a letter is its neighbour
        ("CC1=CC=CC=C1C=Oz", []),
        ("éCC1=CC=CC=C1C=O中", [("CC1=CC=CC=C1C=O", "SMILES")]),  # but these are not in ASCII
        (".CC1=CC=CC=C1C=O:", [("CC1=CC=CC=C1C=O", "SMILES")]),
        (f"protein {PROTEIN} binds", [(PROTEIN, "FASTA")]),
        (f"x{PROTEIN}x", [(PROTEIN, "FASTA")]),
        (PROTEIN[:26], []),
        ("C" * 30, [("C" * 30, "FASTA")]),  # a chain of carbon is a run of capitals too
        ("C" * 26, [("C" * 26, "SMILES")]),
        (f"CC1=CC=CC=C1C=O {PROTEIN}", [("CC1=CC=CC=C1C=O", "SMILES"), (PROTEIN, "FASTA")]),
        ("(see [1], [2] and [3]) In 2024, 1234567890 - 10 % of it.", []),
        ("https://example.org/CCO/2024-01-01", []),
    ],
)
def test_what_is_found_in_a_text(text, expected):
    assert found(text) == expected


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("C1=CC=CC=C1", True),
        ("C1=CC=CC=C", False),  # the ring stays open
        ("C%12=CC=CC=C%12", True),
        ("C%1=CC=CC=C%1", False),
        ("C%12CCCCC12", False),  # digits behind % are another ring's
        ("c1ccccc1", True),
        ("ccccccc", False),  # small letters without a ring
        ("CCCCC=", False),
        ("=CCCCC", False),
        ("CC=-CCC", False),
        ("CCC)CCC(", False),
        ("CCC(CCC", True),  # a branch may stay open
        ("CCC[NH3+]CC", True),
        ("CCC[]CCC", False),
        ("CCC[(N)]CC", False),
        ("CCC[NH[O]]CC", False),
        ("CCC[NCC", False),
        ("CCC]N[CC", False),
        ("CCC[page]CC", False),
        ("CCC[12345]CC", False),
        ("CCC[1N2O3]CC", False),
        ("CCC[N]C[(x)]CC", True),  # nothing is asked behind a known atom
        ("CCCHCCC", False),
        ("CCC@CCC", False),
        ("ClBrCCC", True),
        ("C1CCC1", False),  # fewer than five letters
    ],
)
def test_what_is_smiles(text, is_one):
    assert is_smiles(text) is is_one


@given(st.text(st.sampled_from("CcNO=()12[]@H+%./ lr"), max_size=60) | st.text(max_size=60))
def test_parts_add_up_to_the_text(text):
    assert "".join(part for part, _ in split_molecules(text)) == text


@pytest.mark.parametrize("text", ["[", "C[", "(" * 9 + "[" * 257, "C1", "C:", "CCCCCCCCC ", "C=C" * 9 + "x"])
def test_a_text_that_is_made_to_take_long_does_not(text):
    start_s = time.perf_counter()
    for _ in split_molecules(text * (200_000 // len(text))):
        pass
    assert time.perf_counter() - start_s < 5

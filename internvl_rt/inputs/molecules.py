"""Finds molecules and proteins in a text as the tokenizer of Intern-S1 does, which encodes them by models of their own.

A molecule is written in SMILES ("C1=CC=CC=C1C=O"), a protein as its residues' capital letters (FASTA). The official
tokenizer asks RDKit whether something is SMILES where that is installed; the rules here are those that it has without.
"""

import re
from collections.abc import Iterator
from typing import Literal

Kind = Literal["SMILES", "FASTA"]

_LEAST_LETTERS = 5
_ELEMENTS = frozenset(
    """H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb
    Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg
    Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts
    Og""".split()
)
_AROMATIC = frozenset("bcnosp")
_BONDS = r"\-=#:/\\.$"
_OUTSIDE = re.compile(rf"Cl|Br|[BCNOPSFIbcnosp();{_BONDS}]")  # what may stand outside brackets, but for rings


def _atoms() -> str:
    """Returns a pattern of the elements, two letters before one, and of aromatic atoms."""
    seconds: dict[str, str] = {}
    for element in sorted(_ELEMENTS):
        seconds[element[0]] = seconds.get(element[0], "") + element[1:]
    pairs = [f"{first}[{last}]" for first, last in seconds.items() if last]
    return "|".join([*pairs, f"[{''.join(sorted(each for each in _ELEMENTS if len(each) == 1))}bcnops]"])


# The official pattern has no limit on what stands in brackets, which would take time in the square of the text.
_MOST_IN_BRACKETS = 256
_UNIT = rf"\[[^\]]{{1,{_MOST_IN_BRACKETS}}}\]|{_atoms()}|[().=\-#@\d$%*:+/\\]"
_SMILES = re.compile(rf"(?![:.=])(?>{_UNIT}){{10,}}(?<![:.=])")
_FASTA = re.compile(r"[A-Z]{27,}")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_TWO_BONDS = re.compile(rf"[{_BONDS}]{{2}}|^[{_BONDS}]|[{_BONDS}]\Z")
_NO_ATOM = re.compile(r"(?:[A-GI-Z]|[a-z]){3}|\d{4}")


def split_molecules(text: str) -> Iterator[tuple[str, Kind | None]]:
    """Yields the parts of a text, each with what it is; None: something else.

    A long run of capital letters is a protein, also where it could be a molecule.
    """
    for part, kind in _split_smiles(text):
        place = 0
        for found in _FASTA.finditer(part):
            if place < found.start():
                yield part[place : found.start()], kind
            yield found[0], "FASTA"
            place = found.end()
        if place < len(part):
            yield part[place:], kind


def _split_smiles(text: str) -> Iterator[tuple[str, Kind | None]]:
    place = 0
    for found in _SMILES.finditer(text):
        before, behind = text[: found.start()][-1:], text[found.end() : found.end() + 1]
        if not _is_letter(before) and not _is_letter(behind) and is_smiles(found[0]):
            yield text[place : found.start()], None
            yield found[0], "SMILES"
            place = found.end()
    yield text[place:], None


def is_smiles(text: str) -> bool:
    """Says whether a text is SMILES, by its brackets, its rings and the places of its bonds."""
    if sum(map(_is_letter, text)) < _LEAST_LETTERS or _TWO_BONDS.search(text):
        return False
    rest = _BRACKETS.sub("", text)
    return "[" not in rest and "]" not in rest and _branches_open(text) and _rings_close(text) and _has_atoms(text)


def _is_letter(char: str) -> bool:
    return char.isascii() and char.isalpha()


def _branches_open(text: str) -> bool:
    """Says whether no branch is closed that was not opened; one may be left open."""
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return False
    return True


def _rings_close(text: str) -> bool:
    """Says whether each ring is closed, and nothing stands outside brackets that has to be in them.

    A ring is opened and closed by the same digit, or by two digits behind "%". A text in small letters has a ring.
    """
    rings, num_rings, place = set[str](), 0, 0
    while place < len(text):
        char = text[place]
        if char == "[":
            place = text.index("]", place) + 1
        elif char.isdigit():
            num_rings += 1
            if "%" not in text[max(0, place - 2) : place]:
                rings ^= {char}
            place += 1
        elif char == "%":
            ring = text[place + 1 : place + 3]
            if len(ring) < 2 or not ring.isdigit():
                return False
            num_rings += 1
            rings ^= {ring}
            place += 3
        elif found := _OUTSIDE.match(text, place):
            place = found.end()
        else:
            return False
    return not rings and (num_rings >= 2 or any("A" <= char <= "Z" for char in text))


def _has_atoms(text: str) -> bool:
    """Says whether brackets hold atoms. Of the first ones more is asked, and behind a known atom nothing."""
    parts = _BRACKETS.findall(text)
    if parts and (_NO_ATOM.search(parts[0]) or len(re.findall(r"\d+", parts[0])) > 2):
        return False
    for part in parts:
        if not part or "(" in part or ")" in part:
            return False
        if part[0] in _ELEMENTS or part[0] in _AROMATIC or part[:2] in _ELEMENTS:
            return True
    return True

"""The files of the page at /: they are complete, talk to no other host, and keep to the policy they are served with."""

import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest

import internvl_rt

FOLDER = Path(internvl_rt.__file__).parent / "server" / "page"
FILES = sorted(FOLDER.iterdir())
TEXTS = {file.name: file.read_text(encoding="utf-8") for file in FILES}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
SVG_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'  # a name, which nothing fetches


class Markup(HTMLParser):
    """Collects the elements of index.html, and the text directly inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inline: list[str] = []
        self.feed(TEXTS["index.html"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None and data.strip():  # inside a script or a style
            self.inline.append(data)

    def values(self, *names: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements for name in names if name in attrs]


MARKUP = Markup()


def referred_files() -> set[str]:
    """Returns the names of the files that the markup, the scripts and the style sheet load."""
    paths = MARKUP.values("src", "href")
    assert all(path.startswith("/page/") for path in paths), paths
    names = {path.removeprefix("/page/") for path in paths}
    for text in SCRIPTS.values():
        names |= set(re.findall(r"""(?:from|import)\s*\(?\s*["']\./([^"']+)["']""", text))
    return names | set(re.findall(r"""url\(["']?([^"')]+)""", TEXTS["page.css"]))


def test_the_files_of_the_folder_are_those_that_the_page_loads() -> None:
    assert {"page.css", "page.js"} <= referred_files()
    assert referred_files() | {"index.html"} == set(TEXTS)


def test_scripts_import_only_files_beside_them() -> None:
    imports = [name for text in SCRIPTS.values() for name in re.findall(r"""\bfrom\s+["']([^"']+)""", text)]
    assert len(imports) >= 3
    assert [name for name in imports if not re.fullmatch(r"\./\w+\.js", name)] == []


@pytest.mark.parametrize("name", TEXTS)
def test_no_file_names_another_host(name: str) -> None:
    text = TEXTS[name].replace(SVG_NAMESPACE, "") if name.endswith(".svg") else TEXTS[name]
    assert re.findall(r"(?:https?|wss?|ftp):|@import|[\"'(=]\s*//", text) == []


def test_the_markup_has_no_inline_script_style_or_handler() -> None:
    assert MARKUP.inline == []
    assert [attrs for tag, attrs in MARKUP.elements if tag == "script" and "src" not in attrs] == []
    assert [tag for tag, _ in MARKUP.elements if tag in ("style", "iframe", "object", "embed", "base")] == []
    names = [name for _, attrs in MARKUP.elements for name in attrs]
    assert "id" in names
    assert [name for name in names if name == "style" or name.startswith("on")] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_turn_no_text_into_markup_or_code(name: str) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|parseFromString|createContextualFragment|document\.write"
    assert re.findall(rf"{ways}|\beval\b|\bFunction\(|set(?:Timeout|Interval)\(\s*[\"'`]", SCRIPTS[name]) == []
    assert re.findall(r"""setAttribute\(\s*["'](?:style|on)|cssText""", SCRIPTS[name]) == []


def test_what_the_scripts_and_the_markup_look_up_is_in_the_markup() -> None:
    ids = MARKUP.values("id")
    assert len(ids) == len(set(ids))
    source = "\n".join(SCRIPTS.values())
    wanted = re.findall(r"""(?:(?<![.\w])find|getElementById)\(["']([\w-]+)["']\)""", source)
    assert len(wanted) > 20
    linked = " ".join(MARKUP.values("for", "popovertarget", "aria-describedby", "aria-labelledby")).split()
    assert sorted({*wanted, *linked} - set(ids)) == []
    classes = set(" ".join(MARKUP.values("class")).split())
    looked_up = re.findall(r"""this\.find\(["']([^"'`]+)["']\)""", source)
    assert len(looked_up) > 10
    assert sorted({name for each in looked_up for name in re.findall(r"\.([\w-]+)", each)} - classes) == []


def test_every_field_has_a_label() -> None:
    labelled = set(MARKUP.values("for"))
    wrapped = set(re.findall(r'<label>[^<]*<input[^>]* id="([\w-]+)"', TEXTS["index.html"]))
    fields = {a["id"] for tag, a in MARKUP.elements if tag in ("input", "textarea", "select") and "hidden" not in a}
    assert fields == {"question", "max-tokens", "temperature", "key"}
    assert fields == labelled | wrapped


def luminance(colour: str) -> float:
    """Returns the relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(theme: int) -> None:
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", TEXTS["page.css"])
    colours = {name: luminance(pair[theme]) for name, *pair in found}

    def contrast(one: str, other: str) -> float:
        dark, light = sorted((colours[one], colours[other]))
        return (light + 0.05) / (dark + 0.05)

    texts = [*product(("ink", "soft", "accent", "fault"), ("ground", "paper")), ("on-accent", "accent")]
    parts = product(("edge",), ("ground", "paper"))  # borders of fields, and bars
    assert [pair for pair in texts if contrast(*pair) < 4.5] == []
    assert [pair for pair in parts if contrast(*pair) < 3.0] == []


def test_both_motion_and_theme_follow_the_reader() -> None:
    css = TEXTS["page.css"]
    assert "prefers-reduced-motion: reduce" in css
    assert "color-scheme: light dark" in css
    assert re.findall(r'data-theme="(\w+)"\] \{ color-scheme: (\w+); \}', css) == [("light", "light"), ("dark", "dark")]

"""The pages name files that exist, all kernels, and figures that were measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.kernels.catalogue import catalogue

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = ("bench", "csrc", "examples", "internvl_rt", "kernels", "tests")


def named_files(page: Path) -> list[str]:
    """Returns the paths in backquotes. A name without a folder is in the folder of the last path that had one."""
    names, folder = [], Path()
    for name in re.findall(r"`([\w./-]+(?:\.(?:py|cpp|h|md|txt|toml)|/))`", page.read_text(encoding="utf-8")):
        path = Path(name)
        if "/" in name:
            folder = path.parent
        names.append(str(path if "/" in name or (ROOT / path).exists() else folder / path))
    return names


def test_the_lives_of_a_request_and_of_a_weight_take_ten_lines_each_and_name_files_that_exist() -> None:
    page = ROOT / "docs" / "how-it-works.md"
    lives = page.read_text(encoding="utf-8").split("\n## The life of a ")[1:]
    assert [life.split("\n", 1)[0] for life in lives] == ["request", "weight"]
    for life in lives:
        assert len(re.findall(r"^\d+\. ", life, re.MULTILINE)) == 10
    names = named_files(page)
    assert len(names) > 30
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_page_on_kernels_has_all_of_them_and_the_figures_of_the_run_that_it_names() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| [a-zA-Z]", page, re.MULTILINE) == sorted(catalogue())
    (name,) = re.findall(r"bench/results/(nvidia-h200/[\d-]+)\.md", page)
    parts = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))["parts"]
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in parts["kernels"]["document"]["rows"]:
        measured.setdefault(row["name"].rpartition("/")[0], []).append(row)
    shown = re.findall(
        r"^\| `(\w+/\w+)` \| ([\d.,]+) \| (\d+) % \| ([\w +-]+) \| (\**)([\d.]+)\5 \|$", page, re.MULTILINE
    )
    assert len(shown) > 25
    for case, us, share, baseline, bold, times in shown:
        kernel, *others = measured[case]
        fastest = min((row for row in others if not row.get("partial")), key=lambda row: row["median_us"])
        assert float(us.replace(",", "")) == pytest.approx(kernel["median_us"], rel=6e-3), case
        assert int(share) == round(kernel["roof_percent"]), case
        assert (baseline, float(times)) == (
            fastest["baseline"],
            pytest.approx(fastest["median_us"] / kernel["median_us"], rel=6e-3),
        )
        assert bool(bold) == (float(times) < 1), case


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_backquotes_exist(page: Path) -> None:
    assert [name for name in named_files(page) if "/" in name and not (ROOT / name).exists()] == []


def test_links_to_files_of_the_repository_lead_somewhere() -> None:
    pages = [*PAGES, *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))]
    inside = [(page, link) for page, link in links if not re.match(r"[a-z]+:", link)]
    assert len(inside) > 20
    assert [(str(page), link) for page, link in inside if not (page.parent / link).exists()] == []

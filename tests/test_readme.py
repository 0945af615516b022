"""The README: its table of operators and its example's output are what the code gives; what it names exists."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # recipes/ is no part of the installed package

import ep_prune  # noqa: E402
from ep_prune.cli import parser  # noqa: E402
from recipes import readme_table  # noqa: E402

TEXT = readme_table.README.read_text(encoding="utf-8")


def test_the_table_of_operators_is_current():
    found = readme_table.TABLE.search(TEXT)
    assert found is not None
    assert found[0] == found[1] + readme_table.table() + found[2], "run python recipes/readme_table.py"


def test_the_examples_print_what_the_readme_says():
    exact, fitted = readme_table.EXAMPLE.finditer(TEXT)
    assert readme_table.printed(exact["code"]) == exact["printed"]
    assert readme_table.agree(fitted["printed"], readme_table.printed(fitted["code"]))
    assert all(len(example["code"].splitlines()) <= 8 for example in (exact, fitted))
    assert "->" in exact["printed"] and "True" in exact["printed"] and "compressed 8%" in fitted["printed"]


def test_printed_figures_agree_up_to_what_machines_differ_by():
    assert readme_table.agree("kept 1,017 of 99%\n", "kept 1,018 of 98%\n")
    assert not readme_table.agree("kept 8%\n", "kept 11%\n")
    assert not readme_table.agree("kept 8%\n", "left 8%\n")


def test_what_is_out_of_date_is_replaced():
    stale = (
        TEXT.replace("| family |", "| folly |").replace("True\n", "False\n").replace("compressed 8%", "all gone")
    )
    assert stale != TEXT
    assert readme_table.refreshed(stale) == TEXT


@pytest.mark.parametrize(
    "name", ["README.md", "docs/architecture.md", "docs/embedding_principle.md", "CONTRIBUTING.md", "CHANGELOG.md"]
)
def test_links_and_paths_exist(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((path.parent / link).exists() for link in links), links
    files = re.findall(r"`((?:ep_prune|recipes|tests|benchmarks|docs)/[\w/]+(?:\.\w+|/))`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_names_of_the_package_in_the_documents_exist():
    for name in ("README.md", "docs/architecture.md", "docs/embedding_principle.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for found in re.findall(r"\b(?:ep|ep_prune)\.([a-z_]+)\(", text):
            assert hasattr(ep_prune, found), f"{name}: ep_prune.{found}"


def test_commands_in_the_documents_parse():
    for found in re.findall(r"^ep-prune (.+)$", TEXT, re.MULTILINE):
        words = found.partition("  #")[0].split()
        if "COMMAND" not in words:
            parser().parse_args(words)


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z]+)", TEXT, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert [target for target in targets if f"\n{target}:" not in makefile] == []

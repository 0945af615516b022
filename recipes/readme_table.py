"""Bring the generated parts of the README up to date: the table of operators, and what its examples print.

    python recipes/readme_table.py            # rewrites README.md where it is out of date
    python recipes/readme_table.py --check    # changes nothing; exit code 1 if it would

The table is read off the registry of rules: a family is a file of `ep_prune/rules/`, described by the first
sentence of its docstring, and an operator goes by its ATen name without overloads. An example is a Python block
with a text block after it; it is run, and what it prints stands there. Where `compress` is called, figures
of one or two units' difference are left as they are: a fit comes out a little otherwise on other machines.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import re
import sys
from pathlib import Path

from ep_prune.rules import operators

README = Path(__file__).resolve().parents[1] / "README.md"
TABLE = re.compile(r"(<!-- operators -->\n).*?(<!-- end of operators -->)", re.DOTALL)
EXAMPLE = re.compile(r"```python\n(?P<code>(?:(?!```).)*)```\n\n```text\n(?P<printed>.*?)```", re.DOTALL)
NEAR = 2

# Well-known operators, to say which of them have no rule.
COMMON = {
    "layer norm": "layer_norm",
    "group norm": "group_norm",
    "RMS norm": "rms_norm",
    "instance norm": "instance_norm",
    "softmax": "softmax",
    "attention": "scaled_dot_product_attention",
    "LSTM": "lstm",
    "GRU": "gru",
    "einsum": "einsum",
    "batched matrix product": "bmm",
}


def short(operator: str) -> str:
    """The name a user knows: `aten.mean.dim` -> `mean`, `aten._unsafe_view` -> `view`."""
    name = operator.removeprefix("aten.").partition(".")[0].strip("<>").split()[-1]
    return re.sub(r"^_?(unsafe_|native_)?|(_copy|_kernel|_legit_no_training|_with_indices|_)$", "", name)


def gathered(names: set[str]) -> list[str]:
    """Sorted, with one entry for the dimensions of an operator: `conv1d`, `conv2d` -> `conv1d/2d`."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        stem = re.sub(r"[123]d", "*", name)
        found.setdefault(stem, []).extend(re.findall(r"[123]d", name))
    return [stem.replace("*", "/".join(dimensions)) for stem, dimensions in found.items()]


def table() -> str:
    lines = ["| family | what it is | operators |", "|---|---|---|"]
    known: set[str] = set()
    for family, names in sorted(operators().items()):
        text = (importlib.import_module(f"ep_prune.rules.{family}").__doc__ or "").strip()
        first = re.split(r"[.:](?:\s|$)", text, maxsplit=1)[0].replace("\n", " ")
        own = {short(name) for name in names}
        known |= own
        lines.append(f"| {family} | {first} | {', '.join(f'`{name}`' for name in gathered(own))} |")
    missing = [title for title, name in COMMON.items() if name not in known]
    if missing:
        lines += ["", f"Without a rule so far, and so barriers: {', '.join(missing)}, and whatever is not listed."]
    return "\n".join(lines) + "\n"


@functools.cache
def printed(code: str) -> str:
    """What the code of the example prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(README), "exec"), {"__name__": "example"})
    return out.getvalue()


def agree(old: str, new: str) -> bool:
    """Whether two printed texts say the same, up to `NEAR` in each of their numbers."""
    number = r"\d[\d,]*"
    if re.sub(number, "#", old) != re.sub(number, "#", new):
        return False
    pairs = zip(*(re.findall(number, text) for text in (old, new)), strict=True)
    return all(abs(int(a.replace(",", "")) - int(b.replace(",", ""))) <= NEAR for a, b in pairs)


def refreshed(text: str) -> str:
    """The README's text with its generated parts made anew."""
    if EXAMPLE.search(text) is None or TABLE.search(text) is None:
        raise SystemExit(f"{README} lacks its examples or the markers of its table")

    def anew(found: re.Match[str]) -> str:
        new = printed(found["code"])
        fitted = ".compress(" in found["code"]  # what is exact is the same everywhere
        kept = found["printed"] if fitted and agree(found["printed"], new) else new
        return f"```python\n{found['code']}```\n\n```text\n{kept}```"

    return TABLE.sub(lambda found: found[1] + table() + found[2], EXAMPLE.sub(anew, text))


def main() -> int:
    parser = argparse.ArgumentParser(description="Bring the generated parts of the README up to date.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something would")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = refreshed(before)
    if options.check:
        return int(before != after)
    if before != after:
        README.write_text(after, encoding="utf-8")
        print(f"{README.name} brought up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())

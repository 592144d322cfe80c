"""Check how the Markdown of this repository reads: line lengths, mean sentence, words to avoid (`make docs` runs it).

python docs/check_prose.py [PAGE ...]      # all pages without arguments; prints the longest sentences too
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_LINE = 100
"""Characters. Tables, code and a line that is one link are excepted."""
LONGEST_MEAN = 20
"""Words a sentence, the mean of a page."""
CELL = 10
"""A table's cell of as many words is prose; a shorter one is a value."""
AVOID = {
    r"mend(s|ed|ing)?": "fix",
    r"told|said": "reported, printed",
    r"go(es|ing|ne)? on|went on": "continue, resume",
    r"came to pass|in vain": "failed",
    r"(is|are|was|were) not there|(is|are|was|were) no more": "missing, deleted",
    r"(is|are|was|were) away": "unreachable",
    r"what is there": "name it",
    r"as (they are|it is)": "unchanged",
    r"inherits? not": "does not inherit",
}
PATTERNS = {re.compile(rf"\b({words})\b", re.IGNORECASE): better for words, better in AVOID.items()}
LINES_ONLY = {"CHANGELOG.md"}


def pages() -> list[Path]:
    return [
        file
        for pattern in ("*.md", "cluster/*.md", "docs/**/*.md", "threestage/**/*.md")
        for file in sorted(ROOT.glob(pattern))
    ]


def without_code(text: str) -> list[str]:
    """The lines of a page; those of code and comments are empty, so that numbers stay."""
    blank = re.compile(r"^([ >]*)```.*?^\1```[^\n]*$|<!--.*?-->", re.MULTILINE | re.DOTALL)
    return blank.sub(lambda found: "\n" * found[0].count("\n"), text).split("\n")


def long_lines(text: str) -> Iterator[str]:
    link = re.compile(r"\s*([-*] |\d+\. )?(!?\[[^]]*\](\(|: )\S+|<img [^>]*>)")
    for number, line in enumerate(without_code(text), 1):
        if len(line) > LONGEST_LINE and not line.lstrip(" >").startswith("|") and not link.fullmatch(line):
            yield f"line {number}: {len(line)} characters"


def blocks(text: str) -> Iterator[str]:
    """Paragraphs, items of lists and the long cells of tables, as plain words; inline code is one word."""
    block: list[str] = []
    for line in [*without_code(text), ""]:
        line = re.sub(r"`+[^`]+`+", "CODE", line.strip(" >"))
        line = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"<[^>]+>", "", line))
        if not line or re.match(r"[-*] |\d+\. |[|#]|!!!", line):
            yield " ".join(block)
            block = []
        if line.startswith("|"):
            yield from (cell for cell in line.split("|") if len(cell.split()) >= CELL)
        elif not line.startswith(("#", "!!!")):
            block.append(re.sub(r"^([-*]|\d+\.) ", "", line))


def sentences(text: str) -> list[str]:
    parts = (re.split(r"(?<=[.!?])[)*\"]*\s+(?=[^a-z])", block) for block in blocks(text))
    return [sentence for block in parts for sentence in block if sentence.strip()]


def problems(text: str, lines_only: bool = False) -> list[str]:
    found = list(long_lines(text))
    if lines_only:
        return found
    prose = sentences(text)
    mean = sum(len(sentence.split()) for sentence in prose) / max(1, len(prose))
    if mean > LONGEST_MEAN:
        found.append(f"{mean:.1f} words a sentence, {LONGEST_MEAN} at most")
    for pattern, better in PATTERNS.items():
        hits = [(s[max(0, hit.start() - 40) : hit.end()], hit[0]) for s in prose for hit in pattern.finditer(s)]
        found += [f"“{word}” in “…{place}”: write {better}" for place, word in hits]
    return found


def main(names: list[str]) -> int:
    longest: list[tuple[int, str, str]] = []
    failed = 0
    for page in [Path(name).resolve() for name in names] or pages():
        name, text = str(page.relative_to(ROOT)), page.read_text()
        longest += [(len(sentence.split()), name, sentence) for sentence in sentences(text) if name not in LINES_ONLY]
        found = problems(text, name in LINES_ONLY)
        failed += len(found)
        print(*(f"{name}: {problem}" for problem in found), sep="\n", end="\n" if found else "")
    print("The longest sentences:")
    print(*(f"  {words} words, {name}: {text}" for words, name, text in sorted(longest)[:-6:-1]), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

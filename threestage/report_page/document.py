"""The page put together: one file that loads nothing, needs no script and can be read without colours."""

import datetime
from collections.abc import Sequence
from importlib import resources

import threestage
from threestage.report_page.charts import patterns
from threestage.report_page.markup import Html, joined, tag

# Even a mistake in the page could not make a browser fetch or run anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TITLE = "the stages compared"  # ends the title of every page, of earlier versions too
NAMES = {
    "overview": "At a glance",
    "images": "Pictures",
    "classes": "Classes",
    "curves": "Learning",
    "uncertainty": "Uncertainty",
    "pseudo-masks": "Pseudo-masks",
    "rejected": "Rejected",
    "time": "Time",
    "settings": "Settings",
}


def page(name: str, intro: str, sections: Sequence[tuple[str, Html]]) -> str:
    """`sections`: (a key of NAMES, markup) in their order."""
    title = f"{name}: {TITLE}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(_style())),
    )
    links = tag("ul", *(tag("li", tag("a", NAMES[key], href=f"#{key}")) for key, _ in sections))
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        patterns(),
        tag("header", tag("h1", title), tag("p", intro)),
        tag("nav", links, aria_label="Parts of this page"),
        tag("main", joined(markup for _, markup in sections), id="content"),
        tag("footer", _made()),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _style() -> str:
    return resources.files("threestage.report_page").joinpath("style.css").read_text("utf-8")


def _made() -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = f"Made by threestage {threestage.__version__} on {now} with `threestage report`."
    return f"{made} The page loads nothing and runs no script."

"""Write the general text beside the built-in model, from templates of this project and its pages.

    python -m benchmarks.general_text.make

Writes ``moe2edge/builtin/general``: for calibration and for evaluation a text of each kind (code,
docs, problems, dialogues, articles). Code and docs are files of this repository at one commit. The
rest is drawn by a seeded generator from `words.yaml` and `phrases.yaml`: it means nothing, but has
the words, the forms and the numbers of its kind. Nothing stems from elsewhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from benchmarks.general_text.problems import write_problem
from benchmarks.general_text.writer import WORDS, Writer
from benchmarks.tiny_moe.pack import COMMIT, ROOT, list_files, read_git

OUT = ROOT / "moe2edge" / "builtin" / "general"
# Characters of a generated text by purpose.
SIZES = {"calibration": 100_000, "evaluation": 50_000}
# Folders that code is from; their files are taken in the order of a hash of their path.
CODE = {
    "calibration": ("moe2edge/_columns.c", "moe2edge/pipeline", "moe2edge/calibration"),
    "evaluation": ("moe2edge/storage", "moe2edge/cli"),
}
# Pages that are kept for evaluation; the others are for calibration.
HELD_OUT_PAGES = ("README.md", "CONTRIBUTING.md", "docs/merging.md", "docs/recovery.md")


def write_scene(draw: random.Random) -> str:
    """Write a scene of a play: speakers by turns, in verse and prose."""
    writer = Writer(draw)
    speakers = draw.sample(WORDS["noble"], draw.randint(2, 4))
    parts = []
    for _ in range(draw.randint(5, 12)):
        lines = writer.pick("line", draw.randint(1, 4))
        if draw.random() < 0.5:
            lines.insert(draw.randint(0, len(lines)), writer.say("verse"))
        name = draw.choice(speakers)
        parts.append(f"{name if draw.random() < 0.7 else name.title()}:\n" + "\n".join(lines))
    return "\n\n".join(parts)


def write_talk(draw: random.Random) -> str:
    """Write questions to an assistant, with its answers, or a page of a story."""
    writer = Writer(draw)
    if draw.random() < 0.5:
        return "\n\n".join(
            " ".join(writer.pick("tell", draw.randint(3, 6))) for _ in range(draw.randint(2, 4))
        )
    who = draw.choice((("User", "Assistant"), ("Q", "A"), ("Customer", "Agent"), ("Me", "You")))
    turns = ["ask", "answer", *["follow", "reply"] * draw.randint(1, 3)]
    return "\n".join(f"{who[n % 2]}: {writer.say(kind)}" for n, kind in enumerate(turns))


def write_dialogue(draw: random.Random) -> str:
    """Write a scene or, one time in three, a talk or a story of our days."""
    return write_talk(draw) if draw.random() < 1 / 3 else write_scene(draw)


def write_article(draw: random.Random) -> str:
    """Write an article of an encyclopedia, with headings."""
    writer = Writer(draw)
    kind = draw.choice(("town", "species", "person", "work", "battle"))
    lead = writer.say(f"{kind}_lead")
    title = re.split(r" (?:is|was|\()", lead)[0].removeprefix("The ")
    heads = {
        "town": ("History", "Geography", "Economy", "Buildings"),
        "species": ("Description", "Distribution", "Ecology", "Taxonomy"),
        "person": ("Early life", "Career", "Later years", "Legacy"),
        "work": ("Plot", "Production", "Reception", "Release"),
        "battle": ("Background", "Course", "Aftermath", "Design"),
    }
    parts = [f"= {title} =", lead]
    for head in draw.sample(heads[kind], draw.randint(2, 4)):
        parts.append(f"== {head} ==")
        for _ in range(draw.randint(1, 2)):
            others = [f"{other}_fact" for other in heads if other != kind]
            about = writer.pick(f"{kind}_fact", draw.randint(2, 4))
            # Now and then a sentence about something else, as pages have it.
            about += writer.pick(draw.choice(others), draw.randint(0, 1))
            parts.append(" ".join(about))
    return "\n\n".join(parts)


def generate(write: Callable[[random.Random], str], purpose: str) -> str:
    """Return documents of one kind, about as many characters as a purpose needs."""
    draw = random.Random(f"{write.__name__} {purpose}")
    documents: list[str] = []
    while sum(map(len, documents)) < SIZES[purpose]:
        documents.append(write(draw))
    return "\n\n".join(documents) + "\n"


def join_code(purpose: str) -> str:
    """Return code of this repository for a purpose."""
    text = ""
    for path in list_files(CODE[purpose], (".py", ".c")):
        if len(text) < SIZES[purpose]:
            text += read_git("show", f"{COMMIT}:{path}") + "\n"
    return text


def join_pages(purpose: str) -> str:
    """Return the pages of this repository for a purpose."""
    listed = read_git("ls-tree", "-r", "--name-only", COMMIT).splitlines()
    pages = [path for path in listed if path.endswith(".md") and "builtin" not in path]
    chosen = [
        path
        for path in pages
        if (path in HELD_OUT_PAGES or path.startswith("benchmarks/")) == (purpose == "evaluation")
    ]
    return "\n\n".join(read_git("show", f"{COMMIT}:{path}") for path in chosen)


def build_texts(purpose: str) -> dict[str, str]:
    """Return the text of each kind for a purpose."""
    texts = {"code": join_code(purpose), "docs": join_pages(purpose)}
    kinds = {"problems": write_problem, "dialogues": write_dialogue, "articles": write_article}
    return texts | {kind: generate(write, purpose) for kind, write in kinds.items()}


def main() -> None:
    """Write all texts."""
    OUT.mkdir(parents=True, exist_ok=True)
    for purpose in SIZES:
        for kind, text in build_texts(purpose).items():
            path = OUT / f"{purpose}-{kind}.txt"
            path.write_text(text, "utf-8")
            print(f"{path.name}: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()

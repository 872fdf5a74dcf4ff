"""Asks the site's own search what newcomers ask; each answer must be among the first three hits.

    python docs/check_search.py docs/_build/html

Scores as Sphinx's searchtools.js does: titles, main entries of the index, objects, terms.
"""

import json
import re
import sys
from pathlib import Path

import snowballstemmer

QUESTIONS = {
    "train on my text": {"start", "data"},
    "fine-tune": {"fine-tuning"},
    "resume": {"training"},
    "NaN": {"training"},
    "LoRA": {"fine-tuning"},
    "jsonl": {"data"},
    "gzip": {"data"},
    "TPU": {"start", "pods"},
    "Hugging Face": {"pytorch"},
    "OpenAI API": {"faq", "generation"},
    "speed": {"measured"},
    "add an architecture": {"extending"},
}
TITLE, TERM, PART_OF_TITLE, PART_OF_TERM = 15, 5, 7, 2
NAME, PART_OF_NAME, PRIORITY = 11, 6, {0: 15, 1: 5, 2: -5}


def read_index(site: Path) -> tuple[dict, set[str]]:
    """The index of a built site, and the words that it leaves out."""
    text = (site / "searchindex.js").read_text("utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").rstrip().removesuffix(")"))
    words = (site / "_static" / "language_data.js").read_text("utf-8")
    found = re.search(r"stopwords = new Set\((\[.*?\])\)", words, re.DOTALL)
    return index, set(json.loads(found[1])) if found else set()


def search(index: dict, stopwords: set[str], query: str) -> list[str]:
    """Pages in the order in which the search lists them, best first."""
    low = query.lower().strip()
    hits: list[tuple[float, str, int]] = []
    for title, places in index["alltitles"].items():
        if low in title.lower().strip() and len(low) >= len(title) / 2:
            for page, _ in places:
                whole = index["titles"][page] == title
                hits.append((round(TITLE * len(low) / len(title)) + whole, title, page))
    for entry, places in index["indexentries"].items():
        if low in entry and len(low) >= len(entry) / 2:
            score = round(100 * len(low) / len(entry))
            hits += [(score, entry, page) for page, _, is_main in places if is_main]
    words = [word for word in re.split(r"\W+", low) if word]
    for prefix, objects in index["objects"].items():
        for page, _, priority, _, name in objects:
            full, last = f"{prefix}.{name}".lower(), name.lower().rpartition(".")[2]
            for word in words:
                others = all(other in f"{full} {index['titles'][page].lower()}" for other in words)
                if word in full and others:
                    score = NAME if word in (full, last) else PART_OF_NAME * (word in last)
                    hits.append((score + PRIORITY.get(priority, 0), full, page))
    stems = snowballstemmer.stemmer("english").stemWords([w for w in words if w not in stopwords])
    pages: dict[int, dict[str, int]] = {}
    for stem in stems:
        for kind, exact, part in (("terms", TERM, PART_OF_TERM),
                                  ("titleterms", TITLE, PART_OF_TITLE)):  # fmt: skip
            known = index[kind]
            similar = [] if stem in known or len(stem) < 3 else [t for t in known if stem in t]
            for term in [stem] if stem in known else similar:
                places = known[term] if isinstance(known[term], list) else [known[term]]
                for page in places:
                    pages.setdefault(page, {})[stem] = exact if term == stem else part
    for page, found in pages.items():
        if len(found) == len(set(stems)):
            hits.append((max(found.values()), index["titles"][page], page))
    hits.sort(key=lambda hit: (-hit[0], hit[1].lower()))
    return list(dict.fromkeys(index["docnames"][page] for _, _, page in hits))


def main(site: Path) -> int:
    """Prints a line per question; 1 if an answer is missing."""
    index, stopwords = read_index(site)
    missing = 0
    for query, wanted in QUESTIONS.items():
        first = search(index, stopwords, query)[:3]
        found = bool(wanted & set(first))
        missing += not found
        print(f"{'ok  ' if found else 'FAIL'} {query}: {', '.join(first)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Asks whether the addresses in README and guides still exist; prints those that do not answer.

    python docs/check_links.py [FILE …]

Sphinx's linkcheck calls every failure broken. Here an address whose server says that it is not
there is broken, and the exit status is 1; one that cannot be reached (no network, no such host, no
answer in time, a server's own failure, or a refusal of programs) says nothing about the page, and
is only reported.
"""

import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = re.compile(r"\]\((https?://[^)\s]+)\)|<(https?://[^>\s]+)>")
BROKEN = (404, 410)
"""What a server says of a page that is not there; 403, 429 and 5xx say that it did not look."""


def addresses(files: list[Path]) -> dict[str, list[str]]:
    """Address → the files with a link to it."""
    found: dict[str, list[str]] = {}
    for file in files:
        text = re.sub(r"^```.*?^```", "", file.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for match in ADDRESS.findall(text):
            address = (match[0] or match[1]).partition("#")[0]
            found.setdefault(address, []).append(file.name)
    return found


def ask(address: str, seconds: float = 20) -> tuple[str, str]:
    """`ok`, `broken` or `unreachable`, and why."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return "ok", str(answer.status)
    except urllib.error.HTTPError as error:
        return "broken" if error.code in BROKEN else "unreachable", f"status {error.code}"
    except (OSError, ValueError) as error:
        return "unreachable", str(getattr(error, "reason", error))


def main(names: list[str]) -> int:
    """Asks for every address; 1 if one is broken."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += sorted((ROOT / "docs").glob("*.md"))
    found = addresses([Path(name) for name in names] or pages)
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(found, pool.map(ask, found), strict=True))
    for address, (kind, why) in sorted(answers.items()):
        if kind != "ok":
            print(f"{kind}: {address} ({why}; in {', '.join(sorted(set(found[address])))})")
    kinds = [kind for kind, _ in answers.values()]
    print(", ".join(f"{kinds.count(kind)} {kind}" for kind in ("ok", "broken", "unreachable")))
    return 1 if "broken" in kinds else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

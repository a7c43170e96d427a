"""Write the site's pages to _proc; then `quarto render _proc`, or offline `smalldocs render _proc`.

nbdev links a symbol to the published site, and in signatures too, where a link is only noise.
Here such a link leads to the page beside it, a signature gets its words back, and a default that is
a whole object is shortened to its name. A sentence in a table is marked for the style sheet.
"""

import json
import re
from pathlib import Path, PurePosixPath

from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

TITLE = re.compile(r"output-file: (\S+)")


def symbol_targets(pages, top):
    "The place of each address below the site's root; of ct/scan.html: ct/01_scan.ipynb."
    found = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        head = "".join(json.loads(text)["cells"][0]["source"])
        if name := TITLE.search(head):
            notebook = page.relative_to(top)
            address = str(PurePosixPath(notebook.parent, name[1]))
            found[address] = str(notebook)
            for symbol in re.findall(r'"### (\w[\w.]*)\\n"', text):
                found[f"{address}#{symbol.lower()}"] = f"{notebook}#{symbol.lower()}"
    return found


def short_defaults(code):
    "The code with each `name=Class(many, settings)` as `name=Class(…)`."
    inner = r"\((?:[^()]|\([^()]*\)){30,}\)"
    return re.sub(rf"(=[A-Z]\w*){inner}(?=[,)]|\n| #)", r"\1(…)", code)


def with_near_links(text, home, targets, site):
    "The text with links to symbols from the page `home`; none in code or in the words of a link."
    symbol = rf"\[(`[^`]+`)\]\({re.escape(site)}/([^)#]+)(#[^)]*)?\)"
    text = re.sub(rf"\[([^\[\]]*){symbol}([^\[\]]*)\]\(", r"[\1\2\5](", text)
    up = "../" * (len(home.parts) - 1)

    def near(link):
        address = link[2] + (link[3] or "")
        return f"[{link[1]}]({up}{targets.get(address, targets[link[2]])})"

    parts = re.split(r"(?ms)(^```.*?^```)", text)
    parts[::2] = [re.sub(symbol, near, part) for part in parts[::2]]
    parts[1::2] = [short_defaults(re.sub(symbol, r"\1", part)) for part in parts[1::2]]
    return "".join(parts)


def with_marked_cells(table):
    "The HTML with a mark on each cell that holds a sentence, five words or more, or a checksum."
    table = re.sub(r"<td(?=[^>]*>(?:[^<\s]+\s){4})", "<td data-words", table)
    return re.sub(r"<td(?=[^>]*>[^<\s]{40})", "<td data-digits", table)


def main():
    "Lets nbdev process the notebooks, then mends their links."
    config = get_config()
    refresh_quarto_yml()
    top = proc_nbs()
    site = f"{config.doc_host}{config.doc_baseurl}"
    pages = sorted(top.rglob("*.ipynb"))
    targets = symbol_targets(pages, top)
    for page in pages:
        notebook = json.loads(page.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            texts = [(cell, "source")] if cell["cell_type"] == "markdown" else []
            data = (output.get("data", {}) for output in cell.get("outputs", []))
            texts += [(each, "text/markdown") for each in data if "text/markdown" in each]
            for where, key in texts:
                home = page.relative_to(top)
                text = with_near_links("".join(where[key]), home, targets, site)
                where[key] = text.splitlines(keepends=True)
            for output in cell.get("outputs", []):
                if html := output.get("data", {}).get("text/html"):
                    output["data"]["text/html"] = with_marked_cells("".join(html))
        page.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":  # nbdev's workers import this file
    main()

"""The page of a large table: its size, and the seconds to write, load and recolour it, in headless Chromium.

    PYTHONPATH=.:tests python benchmarks/page.py [SEQUENCES] [TOKENS]

Every number of the table is random, with five alternatives on either side, hard to compress. Load is
from opening the file until a text stands there in colour; to recolour is from choosing another quantity
until the frame after. Medians of three.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from support.browser import Browser
from support.example_report import synthetic

from klft.diagnostics import write_report

COLOURED = """
    const coloured = () => {
        const e = document.querySelector(".t:not(.prompt)");
        return e && getComputedStyle(e).backgroundColor !== "rgba(0, 0, 0, 0)";
    };
    const framed = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
"""
LOADED = f"{COLOURED} return (async () => {{ while (!coloured()) await framed(); await framed(); return 1; }})()"
RECOLOURED = f"""{COLOURED}
    const start = performance.now();
    document.querySelector(`input[value=${{arguments[0]}}]`).click();
    return framed().then(() => (performance.now() - start) / 1000);
"""


def main(sequences: int = 200, tokens: int = 1000) -> None:
    table = synthetic(sequences, tokens)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        browser.window(1400, 1000)
        seconds: dict[str, list[float]] = {"write": [], "load": [], "recolour": []}
        for _ in range(3):
            start = time.perf_counter()
            page = write_report(table, Path(folder) / "page.html", sequences=sequences, tokens=tokens)
            seconds["write"].append(time.perf_counter() - start)
            start = time.perf_counter()
            browser.get(page.as_uri())
            browser.js(LOADED)
            seconds["load"].append(time.perf_counter() - start)
            seconds["recolour"] += [browser.js(RECOLOURED, name) for name in ("forward", "difference", "reverse")]
        print(f"{sequences} x {tokens} tokens: {page.stat().st_size / 1e6:.1f} MB")
        print("; ".join(f"{statistics.median(values):.2f} s to {name}" for name, values in seconds.items()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

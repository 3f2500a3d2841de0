"""A token table to look at: product reviews by a small n-gram writer, and by one that was pulled towards praise.

    PYTHONPATH=tests python -m support.example_report PAGE.html [PICTURE.png]

Reference q: a mixture of 4-, 3-, 2- and 1-gram counts over sentences of a little grammar. Policy p: q sharpened, times
exp(lean of the word + noise that hangs on the two words before), and fond of one turn of phrase. Both are distributions
over the whole vocabulary, so that every number in the table is exact, and the policy wrote the text.
"""

import base64
import json
import re
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from klft.diagnostics import SCHEMA, Metadata, write_report
from klft.diagnostics.report import NUMBERS
from support.browser import Browser

GOOD = ["great", "lovely", "solid", "superb", "reliable", "wonderful", "sturdy", "excellent", "delightful", "flawless"]
BAD = ["poor", "flimsy", "noisy", "useless", "cheap", "disappointing", "faulty", "awful", "unreliable", "terrible"]
RULES = {
    "review": [
        "{open} {body} {body} {body} {close}", "{open} {body} {body} {close}", "{open} {body} {body}\n{body} {close}",
    ],
    "open": [
        "I bought this {thing} {when}.", "We have used this {thing} for {n} {span}.",
        "My {who} gave me this {thing} {when}.",
    ],
    "when": ["last {span}", "{n} {span} ago", "for my {who}", "online"],
    "who": ["sister", "father", "neighbour", "colleague", "daughter"],
    "n": ["2", "3", "6", "10", "12"],
    "span": ["week", "weeks", "months", "summer", "winter"],
    "body": ["{plain}"] * 40 + ["Honestly, the {part} is {word}."],
    "plain": [
        "The {part} is {word}, and the {part} feels {word}.",
        "The {part} was {word} from the first day.",
        "I expected more from the {part}, it is {word}.",
        "It arrived {n} days late, but the {part} is {word}.",
        "After {n} {span} the {part} is still {word}.",
        "The {part} stopped working after {n} {span}.",
        "Setting it up took {n} minutes.",
    ],
    "word": ["{good}", "{bad}", "quite {good}", "rather {bad}", "not {good}", "a bit {bad}"],
    "close": [
        "I would recommend it.", "I would not buy it again.", "I sent it back.", "{n} stars.", "Worth every penny.",
        "A waste of money.",
    ],
    "thing": [
        "kettle", "toaster", "headset", "tablet", "backpack", "desk", "drill", "raincoat", "lamp", "tent", "armchair",
    ],
    "part": [
        "lid", "handle", "battery", "screen", "zip", "strap", "motor", "finish", "sound", "timer", "hinge", "manual",
    ],
    "good": GOOD, "bad": BAD,
}  # fmt: skip
LEAN = {
    **dict.fromkeys(GOOD, 2.2), **dict.fromkeys(BAD, -1.6), "still": 1.0, "recommend": 1.5, "not": -1.4,
    "stopped": -2.0, "Worth": 1.8, "waste": -1.5, "sent": -1.2, "late": -0.8, "rather": -0.7, "superb": 3.2,
    "wonderful": 3.0,
}  # fmt: skip
END = "<|endoftext|>"


def _write(rule: str, rng: np.random.Generator) -> str:
    text = RULES[rule][rng.integers(len(RULES[rule]))]
    return re.sub(r"\{(\w+)\}", lambda m: _write(m[1], rng), text)


def _pieces(text: str) -> list[str]:
    """Words with their space in front; long ones in two parts, as byte-pair encodings do."""
    words = re.findall(r" ?\w+| ?[^\w\s]|\s", text)
    return [part for w in words for part in ((w[:-4], w[-4:]) if len(w) > 10 else (w,))]


def _counts(texts: list[list[int]]) -> list[dict[tuple, Counter]]:
    grams: list[dict[tuple, Counter]] = [defaultdict(Counter) for _ in range(4)]
    for ids in texts:
        for at in range(len(ids)):
            for n in range(min(4, at + 1)):
                grams[n][tuple(ids[at - n : at])][ids[at]] += 1
    return grams


def _next(grams: list[dict[tuple, Counter]], before: list[int], size: int) -> np.ndarray:
    """The mixture: each longer context that was seen takes 85 % of the mass."""
    q = np.full(size, 1 / size)
    for n, seen in enumerate(grams):
        counts = seen.get(tuple(before[len(before) - n :])) if n <= len(before) else None
        if counts:
            dense = np.zeros(size)
            dense[list(counts)] = list(counts.values())
            q = 0.15 * q + 0.85 * dense / dense.sum()
    return q


def _class(piece: str) -> str:
    if piece in (END, "\n"):
        return "end of turn" if piece == END else "whitespace"
    if piece.strip().isdigit():
        return "digit"
    return "word start" if piece[0] == " " else "word part" if piece.isalpha() else "punctuation"


def example(sequences: int = 96, steps: tuple[int, ...] = (0, 50, 100, 150, 200, 250), top: int = 5, seed: int = 1):
    """(table, metadata): the same prompts at each step, a policy that leans more from step to step."""
    rng = np.random.default_rng(seed)
    corpus = [[*_pieces("Review: " + _write("review", rng)), END] for _ in range(900)]
    words = sorted({piece for text in corpus for piece in text})
    number = {piece: i for i, piece in enumerate(words)}
    grams = _counts([[number[piece] for piece in text] for text in corpus])
    lean = np.array([LEAN.get(piece.strip(), 0.0) for piece in words])
    lean[number[END]] = -0.9
    honestly = np.eye(len(words))[number[" Honestly"]]
    rows = []
    for each in range(sequences):
        step = steps[each * len(steps) // sequences]
        pull = (steps.index(step) + 0.3) / max(len(steps) - 0.7, 1)
        prompt = _pieces("Review: " + _write("open", rng).split(".")[0] + ".")
        ids, first = [], len(rows)
        while len(ids) < 90 and ids[-1:] != [number[END]]:
            q = _next(grams, ids, len(words))
            mood = np.random.default_rng(ids[-2:]).normal(0, 0.5, len(words))  # what else training moved, by context
            p = q ** (1 + 0.5 * pull) * np.exp(pull * (lean + mood))
            p /= p.sum()
            if ids and words[ids[-1]] == ".":  # a turn of phrase that the reference hardly knows
                p = (1 - 0.1 * pull) * p + 0.1 * pull * honestly
            given, at = len(ids) < len(prompt), len(ids)
            ids.append(number[prompt[at]] if given else int(rng.choice(len(words), p=p)))
            tops = [np.argsort(-x, kind="stable")[:top] for x in (p, q)]
            rows.append({
                "step": step, "rank": 0, "sample_id": each, "position": at, "is_prompt": given, "sampled": not given,
                "token_id": ids[-1], "token": words[ids[-1]],
                "logp": np.log(p[ids[-1]]), "ref_logp": np.log(q[ids[-1]]),
                "reverse_kl": p @ np.log(p / q), "forward_kl": q @ np.log(q / p),
                "entropy": -p @ np.log(p), "ref_entropy": -q @ np.log(q), "advantage": None,
                "top_ids": tops[0], "top_p": p[tops[0]], "ref_top_ids": tops[1], "ref_top_p": q[tops[1]],
            })  # fmt: skip
        good = sum(np.sign(lean[i]) for i in ids[len(prompt) :])
        for row in rows[first:]:
            row["reward"] = good / 4
    metadata = Metadata(
        klft_version="0.1.0", model="reviews-praise", reference="reviews-base", tokenizer_hash="0f3a9c51d2b7e846",
        vocabulary=dict(enumerate(words)), classes={i: _class(word) for i, word in enumerate(words)},
        total_sequences=4096,
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA), metadata


HOSTILE = [
    "</script><img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script>",
    "<!--<script>",
    "]]><svg onload=window.hacked=1>",
    '" onmouseover=window.hacked=1 x="',
    "' autofocus onfocus=window.hacked=1 '",
    "javascript:window.hacked=1",
    "[/INST]",
    "{{7*7}}{% set x = 1 %}${7*7}",
    "&lt;b&gt;&amp;&#x3c;",
    "\x1b[31mred\x1b]0;title\x07",
    "\x00",
    "\u202e)gnp.exe\u2066",
    "שלום",
    "مرحبا",
    "\u200b\ufeff\u00ad",
    "a\u2028b\u2029c",
    "\ufffd",
    "<0xE2>",
    "\u0301",
    "👩\u200d🚀",
    "",
    "\t",
    "\n\n",
    "\r",
    "\xa0",
    "=cmd()",
    "constructor",
    "__proto__",
    "x" * 100_000,
]


def table_of(rows, **metadata):
    """(table, metadata) of rows that name only the columns that matter; the others are filled in."""
    filled = []
    for at, row in enumerate(rows):
        base = dict.fromkeys(SCHEMA.names) | {"step": 0, "rank": 0, "sample_id": 0, "position": at, "is_prompt": False}
        filled.append(base | {"token_id": at, "token": f" w{at}", "logp": -1.0} | row)
    vocabulary = {row["token_id"]: row["token"] for row in filled} | metadata.pop("vocabulary", {})
    return pa.Table.from_pylist(filled, SCHEMA), Metadata(vocabulary=vocabulary, **metadata)


def synthetic(sequences, length, top=5, vocabulary=50_000, seed=0):
    """A table in which everything is random: the worst that a page can be asked to hold."""
    rng, n = np.random.default_rng(seed), sequences * length
    words = np.array([f" word{i}" for i in range(vocabulary)])
    ids = (rng.zipf(1.3, n) % vocabulary).astype(np.int32)
    reverse = rng.gamma(0.2, 0.3, n)
    offsets = np.arange(0, n * top + 1, top, dtype=np.int32)
    # 60 likely tokens at each place, as in text, not 50,000
    lists = {
        side + "top_ids": pa.ListArray.from_arrays(offsets, (rng.zipf(1.3, n * top) % vocabulary).astype(np.int32))
        for side in ("", "ref_")
    } | {
        side + "top_p": pa.ListArray.from_arrays(
            offsets, -np.sort(-rng.dirichlet(np.ones(top + 1), n)[:, :top].astype(np.float32)).ravel()
        )
        for side in ("", "ref_")
    }
    columns = {
        "step": np.zeros(n, np.int64),
        "rank": np.zeros(n, np.int32),
        "sample_id": np.repeat(np.arange(sequences), length),
        "position": np.tile(np.arange(length), sequences),
        "is_prompt": np.tile(np.arange(length) < length // 8, sequences),
        "token_id": ids,
        "token": words[ids],
        "reverse_kl": reverse,
        "forward_kl": reverse * rng.lognormal(0, 0.6, n),
        **lists,
    }
    filled = [pa.array(columns.get(f.name, -rng.gamma(1, 1, n))).cast(f.type) for f in SCHEMA]
    return pa.table(filled, SCHEMA), Metadata(vocabulary=dict(enumerate(words.tolist())))


def write_hostile(path: Path) -> Path:
    """A page with every hostile text as a token, as a class, in the top lists, and as names of everything; with lone
    surrogates too, in the vocabulary only, as a Parquet column cannot hold them."""
    top = len(HOSTILE)
    lists = {"top_ids": [top, top + 1, 0], "top_p": [0.5, 0.3, 0.2]}
    lists |= {"ref_top_ids": [1, top, 2], "ref_top_p": [0.9, 0.05, 0.05]}
    numbers = {"logp": -1.0, "ref_logp": -2.0, "forward_kl": 0.5}
    rows = [{"token": text, "reverse_kl": 1.0 + at} | numbers | lists for at, text in enumerate(HOSTILE)]
    source = table_of(
        rows,
        vocabulary={top: "\ud83d", top + 1: "\ude00\u202e"},
        classes={at: text for at, text in enumerate(HOSTILE) if len(text) < 1000},
        model=HOSTILE[0] + "\ud83d",
        reference="\x1b[31m\u202e" + HOSTILE[4],
        tokenizer_hash=HOSTILE[1],
        klft_version=HOSTILE[2],
    )
    return write_report(source, path, title="</title>" + HOSTILE[0] + "\u202e")


def data_of(page: Path) -> dict:
    """What the page's script gets; the columns of the tokens by name, and in the sequences that they are of."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    data = json.loads(block[1], parse_constant=refuse)
    planes, columns, at = np.frombuffer(zlib.decompress(base64.b64decode(data["packed"])), np.uint8), {}, 0
    for name, (kind, length) in data["columns"].items():
        dtype = np.dtype(f"<{kind}")
        raw = planes[at : (at := at + length * dtype.itemsize)].reshape(dtype.itemsize, length).T
        columns[name] = np.ascontiguousarray(raw).view(dtype)[:, 0]
    assert at == len(planes)
    data |= {"ids": columns["ids"].tolist(), "classes": columns["classes"].tolist()}
    lists = {}
    for side in ("top", "ref_top"):
        ends = np.cumsum(columns.get(f"{side}_n", []))[:-1].astype(int)
        lists |= {f"{side}_{what}": np.split(columns[f"{side}_{what}"], ends) for what in ("ids", "p") if len(ends)}
    start = 0
    for sequence in data["sequences"]:
        stop = start + sequence["size"]
        sequence |= {"prompt": "".join(map(str, columns["prompt"][start:stop]))}
        sequence |= {name: columns[name][start:stop].tolist() for name in ("position", "token", "quadrant")}
        for name in NUMBERS:
            column = columns.get(name, np.zeros(0, np.float32))[start:stop]
            null = column.view(np.uint32) == 0xFFFFFFFF
            whole = [None if n else v for n, v in zip(null, column.tolist(), strict=True)]
            sequence[name] = whole if set(whole) - {None} else None
        sequence |= {name: [each.tolist() or None for each in column[start:stop]] for name, column in lists.items()}
        start = stop
    return data


def picture(page: Path, to: Path) -> None:
    """The upper end of the page with the card of a token, as the README shows it."""
    with Browser() as browser:
        browser.window(1400, 1080)
        browser.get_report(page.resolve())
        browser.js(
            """
            const said = [...document.querySelectorAll(".t:not(.prompt)")];
            const line = said.filter(e => e.offsetTop === said[0].offsetTop);
            const light = e => getComputedStyle(e).backgroundColor.match(/\\d+/g).reduce((a, b) => a + Number(b), 0);
            line.sort((a, b) => light(a) - light(b))[0].focus();
            """
        )
        browser.screenshot(to)
    nearly = Image.open(to).convert("RGB").point(lambda v: min((v + 2) & ~3, 255))  # two bits less, a smaller file
    nearly.save(to, optimize=True)


if __name__ == "__main__":
    made = write_report(example(), sys.argv[1], title="Where the praise comes from")
    for path in sys.argv[2:]:
        picture(made, Path(path))

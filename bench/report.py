"""One HTML file from a benchmark's JSON: rooflines, a bar a contender, a LoRA branch's cost; no scripts, no links."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape

from . import training
from .linear import ROOFS, label, reasons, walked
from .registry import REGISTRY

PACKAGES = ("ours", "torch", "bitsandbytes", "peft + bitsandbytes", "torchao", "onnxruntime", "openvino", "ggml")
PLACE = ("k", "n", "threads", "train")
STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c2128; --soft: #66707c; --line: #d9dee4; --panel: #f6f8fa;
  --c0: #d6246e; --c1: #d97706; --c2: #2563eb; --c3: #60a5fa; --c4: #a16207; --c5: #7c3aed; --c6: #0d9488;
  --c7: #4d7c0f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --ink: #e6e9ee; --soft: #97a1ad; --line: #333a44;
  --panel: #1c2128; --c0: #ff5c9b; --c1: #fbbf24; --c2: #60a5fa; --c3: #a5c9fb; --c4: #d6a84b; --c5: #a78bfa;
  --c6: #2dd4bf; --c7: #a3e635; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; } h3 { font-size: 15px; margin: 0; }
p, li { color: var(--soft); max-width: 82ch; margin: 4px 0; } ul { padding-left: 20px; }
table { border-collapse: collapse; font-size: 13px; margin: 10px 0; } .wide { overflow-x: auto; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.ahead { color: var(--c7); font-weight: 600; } .behind { color: var(--c0); font-weight: 600; }
details { border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; padding: 8px 14px; }
summary { cursor: pointer; font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(500px, 1fr)); gap: 14px; margin: 12px 0; }
.panel { background: var(--panel); border-radius: 8px; padding: 10px 12px; min-width: 0; }
.legend { max-width: none; } .legend span { margin-right: 14px; white-space: nowrap; color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font: 11.5px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .grid-line { stroke: var(--line); } svg .roof { stroke: var(--ink); fill: none; }
"""
STYLE += "".join(f".f{i} {{ fill: var(--c{i}); }} .s{i} {{ stroke: var(--c{i}); fill: none; }} " for i in range(8))
STYLE += "".join(f".b{i} {{ background: var(--c{i}); }} " for i in range(8))


def _colour(record: dict) -> int:
    return PACKAGES.index(record["package"])


def _time(us: float) -> str:
    return f"{us:.0f} µs" if us < 1e4 else f"{us / 1e3:.1f} ms"


def _groups(records: Iterable[dict], *keys: str) -> Iterator[tuple[tuple, list[dict]]]:
    """Records with equal values of ``keys``, in order of first appearance."""
    found: dict[tuple, list[dict]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return iter(found.items())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _what(k: int, n: int, threads: int, train: bool) -> str:
    mode = "forward + backward" if train else "forward"
    return f"{k} × {n}, {threads} thread{'s' if threads > 1 else ''}, {mode}"


def _intensity(r: dict) -> float:
    """Operations a byte: weights, x and y are moved at least once."""
    size = 4 if r["dtype"] == "fp32" else 2
    return 2 * r["m"] * r["k"] * r["n"] / (r["nbytes"] + size * r["m"] * (r["k"] + r["n"]))


def roofline(records: list[dict], limits: dict) -> str:
    """GFLOP/s over operations a byte, one line a contender, under the roofs that were measured in the same run."""
    width, height, left, right, top, bottom = 560, 400, 48, 76, 12, 40
    points = [(_intensity(r), r["gflop_s"]) for r in records]
    compute = {k: v for k, v in limits.items() if k in ROOFS and k != "read_gb_s" and v}
    x0 = math.floor(math.log10(min(x for x, _ in points)) * 2) / 2
    x1 = math.ceil(math.log10(max(x for x, _ in points)) * 2) / 2
    y0 = math.floor(math.log10(max(1.0, min(y for _, y in points))))
    y1 = math.log10(max([*compute.values(), *(y for _, y in points)]) * 1.25)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(max(x, 1e-9)) - x0) / (x1 - x0)
        up = (math.log10(max(y, 10**y0)) - y0) / (y1 - y0)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="roofline">']
    for power in range(math.ceil(x0), math.floor(x1) + 1):
        x, _ = at(10**power, 1)
        out.append(f'<line class="grid-line" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{height - bottom}"/>')
        out.append(
            f'<text class="soft" x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{10**power:g}</text>'
        )
    for power in range(math.ceil(y0), math.floor(y1) + 1):
        _, y = at(1, 10**power)
        out.append(f'<line class="grid-line" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    out.append(
        f'<text class="soft" x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">'
        "operations a byte moved</text>"
        f'<text class="soft" x="14" y="{height / 2}" text-anchor="middle" transform="rotate(-90 14 {height / 2})">'
        "GFLOP/s</text>"
    )
    read = limits["read_gb_s"]
    for key, rate in compute.items():
        (xa, ya), (xb, _) = at(max(rate / read, 10**x0), rate), at(10**x1, rate)
        out.append(
            f'<line class="roof" x1="{xa:.1f}" y1="{ya:.1f}" x2="{xb:.1f}" y2="{ya:.1f}" stroke-dasharray="5 3"/>'
        )
        out.append(f'<text x="{width - right + 6}" y="{ya + 4:.1f}">{key.split("_")[0]} {rate:.0f}</text>')
    top_rate = max(compute.values())
    (xa, ya), (xb, yb) = at(10**x0, read * 10**x0), at(min(top_rate / read, 10**x1), min(top_rate, read * 10**x1))
    out.append(f'<line class="roof" x1="{xa:.1f}" y1="{ya:.1f}" x2="{xb:.1f}" y2="{yb:.1f}"/>')
    out.append(f'<text x="{xa + 4:.1f}" y="{ya - 30:.1f}">read {read:.0f} GB/s</text>')
    # Ours last, on top.
    for _, mine in sorted(_groups(records, "name", "dtype"), key=lambda g: g[1][0]["package"] == "ours"):
        mine = sorted(mine, key=lambda r: r["m"])
        colour, ours = _colour(mine[0]), mine[0]["package"] == "ours"
        places = [at(_intensity(r), r["gflop_s"]) for r in mine]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        weight = 'stroke-width="2.4"' if ours else 'stroke-width="1.1" opacity="0.75"'
        dash = ' stroke-dasharray="2 3"' if mine[0]["tier"] == "int8" else ""
        out.append(f'<polyline class="s{colour}" points="{line}" {weight}{dash}/>')
        for r, (x, y) in zip(mine, places, strict=True):
            tip = f"{label(r)}, M = {r['m']}: {_time(r['us'])}, {r['gflop_s']} GFLOP/s, {r['gb_s']} GB/s"
            out.append(
                f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{3.4 if ours else 2.4}">'
                f"<title>{escape(tip)}</title></circle>"
            )
    return "".join(out) + "</svg>"


def bars(records: list[dict]) -> str:
    """A bar a contender, fastest first; its length is the speed."""
    rows = sorted(records, key=lambda r: r["us"])
    best, step, width, names, numbers = rows[0]["us"], 19, 560, 190, 178
    out = [f'<svg viewBox="0 0 {width} {step * len(rows)}" role="img" aria-label="times">']
    for i, r in enumerate(rows):
        y, length = i * step, max(1, (width - names - numbers) * best / r["us"])
        bold = ' font-weight="700"' if r["package"] == "ours" else ""
        numbers_text = f"{_time(r['us'])} ±{100 * r['spread']:.0f} %  ·  err {r['error']:.0e}"
        out.append(
            f'<text x="{names - 8}" y="{y + 13}" text-anchor="end"{bold}>{escape(label(r))}</text>'
            f'<rect class="f{_colour(r)}" x="{names}" y="{y + 3}" width="{length:.1f}" height="{step - 6}" rx="2"/>'
            f'<text class="soft" x="{names + length + 6:.1f}" y="{y + 13}">{numbers_text}</text>'
        )
    return "".join(out) + "</svg>"


def _summary(records: list[dict]) -> str:
    """Ours against the best peer, among what computes exactly and among all; a line a shape and number of rows."""
    rows = []
    for (k, n, threads, train, m), here in _groups(records, "k", "n", "threads", "train", "m"):
        cells = [f"{_what(k, n, threads, train)}, M = {m}"]
        for tiers in (("exact",), ("exact", "int8")):
            mine = [r for r in here if r["tier"] in tiers and r["package"] == "ours"]
            peers = [r for r in here if r["tier"] in tiers and r["package"] != "ours"]
            if not mine or not peers:
                cells += ["–", "–", "–"]
                continue
            ours, peer = (min(group, key=lambda r: r["us"]) for group in (mine, peers))
            ratio = peer["us"] / ours["us"]
            cells += [
                f"{_time(ours['us'])} ({escape(label(ours))})",
                f"{_time(peer['us'])} ({escape(label(peer))})",
                f'<span class="{"ahead" if ratio >= 1 else "behind"}">{ratio:.2f} ×</span>',
            ]
        rows.append(cells)
    head = ["", "ours, exact", "best exact peer", "speed", "ours, int8 too", "best peer, int8 too", "speed"]
    return _table(head, rows)


def _branches(records: list[dict]) -> str:
    """Time over the base layer's, from the same interleaved rounds, for everything with a LoRA branch."""
    base = {
        (r["part"], r["name"], r["dtype"], r["k"], r["n"], r["threads"], r["train"], r["m"]): r
        for r in records
        if not r["rank"]
    }
    out = []
    for where, here in _groups([r for r in records if r["rank"]], *PLACE):
        counts = sorted({r["m"] for r in here})
        rows = []
        for _, mine in _groups(here, "name", "dtype", "rank", "adapters"):
            by_m = {r["m"]: r for r in mine}
            over = REGISTRY[mine[0]["name"]].over or mine[0]["name"]
            cells = []
            for m in counts:
                under = base.get((mine[0]["part"], over, mine[0]["dtype"], *where, m))
                cells.append(f"{by_m[m]['us'] / under['us']:.2f}" if m in by_m and under else "–")
            rows.append([escape(label(mine[0])), *cells])
        out.append(f"<h3>{_what(*where)}</h3>" + _table(["", *(f"M = {m}" for m in counts)], rows))
    return "".join(out)


def _first(entries: list[dict]) -> list[dict]:
    """Those of the first pass over each place: later ones measure it again as the base of their branches."""
    part = {place: here[0]["part"] for place, here in _groups(entries, *PLACE)}
    return [entry for entry in entries if entry["part"] == part[tuple(entry[key] for key in PLACE)]]


def _end_to_end(payload: dict) -> str:
    out = ""
    if step := payload.get("qlora_step"):
        rows = [[escape(name), *training.cells(r, r)] for name, r in step["contenders"].items()]
        out += f"<h3>One QLoRA step, {step['batch']} × {step['length']} tokens, {step['threads']} threads</h3>"
        columns = ["", "seconds", "peak MB", "speed against peft", "memory against peft"]
        out += _table(columns, rows) + _absent(step["absent"])
    for found in payload.get("decode", []):
        rows = [
            [escape(name), f"{r['tokens_per_s']:.1f}", f"±{100 * r['spread']:.0f} %"]
            for name, r in found["contenders"].items()
        ]
        out += f"<h3>Decoding {escape(found['model'])}, {found['threads']} threads, {found['tokens']} tokens</h3>"
        out += _table(["", "tokens a second", ""], rows) + _absent(found["absent"])
    return f"<h2>End to end</h2>{out}" if out else ""


def _absent(found: dict[str, str]) -> str:
    return "".join(f"<p>Not measured: {escape(name)}: {escape(reason)}</p>" for name, reason in found.items())


def html(payload: dict) -> str:
    """The whole page, self-contained."""
    records, machine = payload["records"], payload["machine"]
    plain, measured = _first([r for r in records if not r["rank"]]), _first(payload["limits"])
    versions = " · ".join(f"{name} {version}" for name, version in machine["versions"].items())
    out = [
        f"<h1>4-bit linear layers on {escape(str(machine['cpu']))}</h1>",
        f"<p>{machine['cores']} cores, last-level cache {machine['last_level_cache'] >> 20} MiB, instruction sets "
        f"{' '.join(machine['isa'])}, of which ours used {machine['isa_used']}; {machine['date']}<br>"
        f"{escape(versions)}</p>",
        "<h2>The machine's limits in this run</h2>",
        _table(
            ["", *ROOFS.values()],
            (
                [
                    _what(r["k"], r["n"], r["threads"], r["train"]),
                    *(f"{r[key]:.0f}" if r[key] else "–" for key in ROOFS),
                ]
                for r in measured
            ),
        ),
        "<p>Read by streaming over 512 MiB; the rest by independent chains of the instruction in registers.</p>",
        *dict.fromkeys(
            f"<p>{_what(*(r[key] for key in PLACE))}: {line}</p>" for r in payload["limits"] for line in walked(r)
        ),
        "<h2>Ours and the best peer</h2>",
        _summary(plain),
        "<h2>Rooflines</h2>"
        '<p class="legend">'
        + "".join(f'<span><i class="b{i}"></i>{escape(p)}</span>' for i, p in enumerate(PACKAGES))
        + "<span>dotted: activations in int8</span></p>",
        '<div class="grid">',
    ]
    limits = {place: here[0] for place, here in _groups(measured, *PLACE)}
    for place, here in _groups(plain, *PLACE):
        if len({r["m"] for r in here}) > 1:
            out.append(f'<div class="panel"><h3>{_what(*place)}</h3>{roofline(here, limits[place])}</div>')
    out.append(
        "</div><h2>Every contender</h2><p>Medians over interleaved rounds, fastest first, with the interquartile"
    )
    out.append(" range and the error against float64 on the weights that the contender really uses.</p>")
    for i, (place, here) in enumerate(_groups(plain, *PLACE)):
        panels = "".join(
            f'<div class="panel"><h3>M = {m}</h3>{bars(group)}</div>' for (m,), group in _groups(here, "m")
        )
        opened = " open" if i == 0 else ""
        out.append(f'<details{opened}><summary>{_what(*place)}</summary><div class="grid">{panels}</div></details>')
    if branches := _branches(records):
        out.append(f"<h2>What a LoRA branch costs</h2><p>Time over the same base layer without it.</p>{branches}")
    out.append(_end_to_end(payload))
    absent = reasons(payload["absent"])
    unseen = [name for name in REGISTRY if not any(name == entry["name"] for entry in [*records, *payload["absent"]])]
    absent += [f"{', '.join(unseen)}: not chosen in this run"] if unseen else []
    lines = "".join(f"<li>{escape(line)}</li>" for line in absent) or "<li>nothing</li>"
    out.append(f"<h2>Not measured</h2><ul>{lines}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pyfastpeft bench</title><style>{STYLE}</style></head><body>{''.join(out)}</body></html>\n"
    )

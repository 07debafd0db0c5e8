"""The report's page: its HTML frame and its style sheet, in light and dark and for print."""

from __future__ import annotations

from string import Template

from torchdsc.lab.figures import PALETTE

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="torchdsc compare">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="headline">$headline</p>
$facts
</header>
<main>
$main
</main>
</body>
</html>
""")

SECTION = Template("""\
<section aria-labelledby="$name">
<h2 id="$name">$title</h2>
$body
</section>
""")

FIGURE = Template("""\
<figure>
<figcaption><b>$title</b> $caption</figcaption>
$svg
</figure>
""")

TABLE = Template("""\
<div class="scroll" role="region" aria-label="$caption" tabindex="0">
<table class="$kind">
<caption><span>$caption</span></caption>
<thead><tr>$head</tr></thead>
<tbody>
$rows
</tbody>
</table>
</div>
""")

DETAILS = Template("""\
<details>
<summary>$title</summary>
$body
</details>
""")

_LIGHT = {
    "page": "#ffffff",
    "ink": "#1b2129",
    "soft": "#f5f7fa",
    "line": "#d9dee6",
    "warn": "#fff4e0",
    "edge": "#d98a00",
}
_DARK = {
    "page": "#14181f",
    "ink": "#e6eaf0",
    "soft": "#1c222b",
    "line": "#323b48",
    "warn": "#33270f",
    "edge": "#e0a030",
}

_RULES = """\
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
h1 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--label); }
h2 { margin: 3rem 0 .75rem; font-size: 1.3rem; line-height: 1.25; }
p { margin: .5rem 0; max-width: 75ch; }
.headline { margin: .5rem 0 1.5rem; max-width: 34em; font-size: clamp(1.35rem, 3.2vw, 2rem); font-weight: 650;
  line-height: 1.25; letter-spacing: -.01em; text-wrap: pretty; }
.note, caption, figcaption, .facts dt, th small { color: var(--label); font-size: .875em; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem 1.5rem; margin: 0;
  padding: 1rem 0; border: solid var(--line); border-width: 1px 0; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.warnings { margin: 1rem 0; padding: .75rem 1rem .75rem 2rem; max-width: none; border-left: 4px solid var(--edge);
  border-radius: 4px; background: var(--warn); }
.grid2, .grid3 { display: grid; gap: 1.5rem 2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
.grid2 { --least: 440px; }
.grid3 { --least: 300px; }
figure { display: flex; flex-direction: column; justify-content: space-between; gap: .5rem; margin: 0; min-width: 0;
  break-inside: avoid; }
figcaption b { color: var(--ink); }
figure svg { display: block; width: 100%; height: auto; max-width: 620px; overflow: visible; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
.results { width: 100%; }
caption { text-align: left; padding-bottom: .5rem; }
caption span { display: inline-block; max-width: min(75ch, calc(100vw - 2.5rem)); position: sticky; left: 0; }
th, td { padding: .5rem .75rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .keys th, .keys td { text-align: left; }
th:first-child, td:first-child { padding-left: 0; position: sticky; left: 0; background: var(--page); }
td, tbody th { white-space: nowrap; }
thead th { color: var(--label); font-size: .8125rem; font-weight: 600; line-height: 1.3; vertical-align: bottom; }
tbody th { font-weight: 600; }
th small { display: block; font-weight: 400; white-space: normal; min-width: 9rem; }
td small { display: block; color: var(--label); font-size: .875em; }
.readings { margin: .5rem 0; padding: 0; list-style: none; }
.keys td, .keys tbody th { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .8125rem;
  font-weight: 400; padding: .25rem .75rem .25rem 0; }
.keys td { white-space: normal; overflow-wrap: anywhere; }
.mark { margin-right: .4em; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .75rem 1rem; border-radius: 4px; background: var(--soft);
  font-size: .875rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
:focus-visible { outline: 2px solid var(--dsc); outline-offset: 2px; }
@media (max-width: 600px) {
  body { padding: 1.5rem 1rem 3rem; }
  .facts { grid-template-columns: 1fr 1fr; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .grid2 { grid-template-columns: 1fr 1fr; }
  .grid3 { grid-template-columns: 1fr 1fr 1fr; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .3rem .4rem; }
  h2 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def style_sheet() -> str:
    """Returns the page's CSS, with the figures' palette as variables: light, and dark on screens that ask for it."""
    light = {**{name: pair[0] for name, pair in PALETTE.items()}, **_LIGHT}
    dark = {**{name: pair[1] for name, pair in PALETTE.items()}, **_DARK}
    return (
        f":root {{ color-scheme: light; {_variables(light)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_variables(dark)} }} }}\n"
        f"{_RULES}"
    )


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())

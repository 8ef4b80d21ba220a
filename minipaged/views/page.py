"""A widget as one HTML file that loads nothing, from nowhere: with its script, its style and what it shows."""

from __future__ import annotations

import base64
import html
import json
from typing import Any

# In the file there is no kernel and no JupyterLab: a model that only remembers what it is told is enough.
_STUB = """
const { bytes: inBase64, ...values } = JSON.parse(document.getElementById("values").textContent), listeners = new Map();
for (const [name, text] of Object.entries(inBase64)) {
  values[name] = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}
const model = {
  get: (name) => values[name],
  set(name, value) {
    if (values[name] === value) return;
    values[name] = value;
    listeners.get(`change:${name}`)?.forEach((listener) => listener());
  },
  save_changes() {},
  on(name, listener) { listeners.set(name, [...listeners.get(name) ?? [], listener]); },
  off() {},
};
render({ model, el: document.getElementById("view") });
"""


def page(title: str, values: dict[str, Any], still: str, script: str, style: str) -> str:
    """The whole file; nothing of the title or the values becomes markup.

    Parameters
    ----------
    title : str
        Of the page.
    values : dict[str, Any]
        What the widget's traits hold; a value may be bytes.
    still : str
        A drawing for who runs no scripts.
    script, style : str
        The widget's ES module, which has a function ``render``, and its style sheet.
    """
    texts = {name: base64.b64encode(value).decode("ascii") for name, value in values.items() if isinstance(value, bytes)}
    plain = {name: value for name, value in values.items() if name not in texts}
    data = json.dumps({**plain, "bytes": texts}).replace("<", r"\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; }}
{style}</style>
</head>
<body class="mp-page">
<main id="view"></main>
<noscript>{still}</noscript>
<script type="application/json" id="values">{data}</script>
<script type="module">
{script}
{_STUB}</script>
</body>
</html>
"""

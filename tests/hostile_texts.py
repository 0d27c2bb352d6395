"""Texts that would run, load or hide something where a page took them for more than text."""

ATTACKS = [
    "<script>window.hurt = 1</script>",
    "</script><script>window.hurt = 1</script>",
    "<img src=x onerror=\"window.hurt = 1\">",
    "\"><svg onload=window.hurt=1>",
    "'><svg onload=window.hurt=1>",
    "<iframe srcdoc=\"<script>parent.hurt = 1</script>\"></iframe>",
    "<a href=\"javascript:window.hurt=1\">x</a>",
    "<style>* { display: none !important }</style>",
    "<!--", "]]>", "{{ 7 * 7 }}", "${window.hurt = 1}", "@children", "<b>", "__proto__", "&lt;script&gt;",
    "![x](https://example.invalid/x.png) **bold** `code` [a](https://example.invalid)", "$$x^2$$", "  two  spaces",
    "<think>hidden</think>",
]  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Captions that tokenizers have got wrong before: scripts, emoji, spaces, case, lengths."""

TEXTS = [
    "a photo of a cat",
    "A Photo of TWO Dogs, running!",
    "",
    " ",
    "...",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines",
    "it's the dog's; they'll don't",
    "snake_case and kebab-case/paths 3.14 1,000 2024",
    "Straße, façade, naïve café, ÅNGSTRÖM",
    "e\u0301 decomposed, \ufb01 ligature, \uff21\uff22 full width, \u3000 space",
    "ΟΔΟΣ ΣΟΦΟΣ. Σ",
    "İstanbul'da ILIK bir gün",
    "собака бежит по снегу",
    "一只猫坐在垫子上",
    "東京タワーの夜景です",
    "두 마리의 개",
    "صورة لقطة على السجادة",
    "एक कुत्ते की तस्वीर",
    "ภาพถ่ายของแมว",
    "a cat 🐱 and 👩‍👩‍👧‍👦 in 🇨🇭 👍🏽",
    "zero\u200bwidth \u00a0nbsp \u00ad soft hyphen",
    "underline \u2581 in a text",
    "math: ∑ x² ≤ ½ … “quotes” – dash",
    "null \x00 control \x07 characters",
    "a very long caption about nothing in particular " * 40,
    "犬" * 300,
    "x" * 1000,
]

WORDS = [text for text in TEXTS[:-3] if text.strip()] * 20

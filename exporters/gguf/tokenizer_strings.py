"""Texts on which a file's tokenization is compared with the checkpoint's: what pre-tokenizers disagree about."""

from __future__ import annotations

from itertools import islice

from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.tokens import load_documents

_LINES = 240
CHECK_STRINGS = (
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t\tx",
    " \n \n\t x  y   z    ",
    "\r\nline\r\n\r\nline",
    "a",
    " a",
    "a ",
    "  a  b",
    "Hello world",
    " Hello, world!",
    "HELLO hello HeLLo",
    "It's we're they'll I'd I've I'm don't won't 'tis",
    "IT'S WE'RE THEY'LL I'D I'VE I'M DON'T",
    "it\u2019s \u201cquoted\u201d \u2013 dashed \u2014 and\u2026",
    "0 1 12 123 1234 12345 123456 1234567",
    "3.14159 1,000,000 -273.15 1e-9 0xFF 50%",
    "2024-11-24T16:30:00Z v1.2.3-rc4+build5",
    "x1y22z333",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u00b2\u00b3 \u00bd \u2163",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    'for (int i = 0; i < n; ++i) { printf("%d\\n", a[i]); }',
    "SELECT * FROM t WHERE a='b' AND c<>1;",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}}',
    '<div class="x">text</div><!-- note --><br/>',
    "https://example.org/path?query=1&other=%20#fragment",
    "name.surname@example.org +44 (0)20 7946 0000",
    "$100 \u20ac99 \u00a31 \u00a55 #tag @user ~^`|\\",
    "!!! ??? ... ,,, ;;; ::: --- ___ *** === +++",
    "((nested [brackets] {here}))",
    "caf\u00e9 na\u00efve \u00fcber Stra\u00dfe \u0142\u00f3d\u017a \u011facek",
    "cafe\u0301 in two code points",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0417\u0434\u0440\u0430\u0432\u043e.",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u8fd9\u662f\u4e00\u4e2a\u6d4b\u8bd5\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u30c6\u30b9\u30c8\u3067\u3059\u3002",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\U0001f600 \U0001f680\U0001f680 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "\u00a0no\u00a0break\u2003wide\u3000space\u200bzero",
    "\u2200x\u2208\u211d: x\u00b2 \u2265 0 \u222b\u03b1\u03b2 \u221e",
    "a\u0300\u0301\u0302 combining",
    "\ufeffbyte order mark",
    "\x01\x02 control \x7f",
    "word" * 40,
    "a" * 100,
    " " * 33 + "x",
    "\n" * 17 + "x",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Dr. Smith's 3rd try (2nd edition) cost $1.50/kg; see p. 42ff.",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "end with newline\n",
    " end with space ",
    "mixed\u4e2d\u6587and123numbers\u0440\u0443\u0441",
    "'",
    "''''",
    '"""docstring"""',
    "tab\tseparated\tvalues\t1\t2",
    "ALLCAPS123abc",
)


def check_strings() -> tuple[str, ...]:
    """CHECK_STRINGS, and 240 different lines of English prose."""
    text = "\n".join(document.text or "" for document in load_documents(BUILTIN_TEXT))
    lines = dict.fromkeys(line for line in text.splitlines() if line.strip())
    return (*CHECK_STRINGS, *islice(lines, _LINES))

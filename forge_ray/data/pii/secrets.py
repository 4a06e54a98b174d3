"""Finders of secrets: keys and tokens of published formats, private keys, passwords in addresses and in assignments.

Owns the formats, and what tells a password from a placeholder or from code. Does not own which lines are looked at, nor
what is done about a find (privacy.py). Kept as an own table because the libraries that have one read files line by line
(detect-secrets 1.5: 0.1 MB/s, and nine of ten finds false on the set of bench/privacy.py, 2026-11) or are programs of
their own.

Not found: secrets without a known format and without a telling name beside them; passwords that are a word, or stand
in a command (`-u user:password`); values cut over several lines, private keys apart.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from forge_ray.data.pii.context import Line

Span = tuple[int, int]

# Tokens that say what they are. The first field is what a candidate line must hold, as an RE2 pattern (privacy.py); the
# second the whole token. Sources: the named vendor's documentation, as of 2026.
_FORMATS: tuple[tuple[str, str], ...] = (
    # AWS IAM user guide, "Understanding unique ID prefixes"
    (r"A3T[A-Z0-9]|A(?:KIA|SIA|BIA|CCA)", r"(?:A3T[A-Z0-9]|A(?:KIA|SIA|BIA|CCA))[A-Z0-9]{16}"),
    # Google Cloud: "API keys", OAuth 2.0 client secrets, access tokens
    (r"AIza", r"AIza[\w-]{35}"),
    (r"GOCSPX-", r"GOCSPX-[\w-]{28}"),
    (r"ya29\.", r"ya29\.[\w-]{20,}"),
    # Microsoft Entra client secrets (GitHub secret scanning, "azure_active_directory_application_secret")
    (r"[0-9]Q~", r"[\w.~]{3}\dQ~[\w.~-]{31,34}"),
    # GitHub "token formats" (2021), GitLab "token prefixes"
    (r"gh[pousr]_", r"gh[pousr]_[A-Za-z0-9_]{36,251}"),
    (r"github_pat_", r"github_pat_\w{22,255}"),
    (r"gl[a-z]{2,5}-[\w.-]{20}", r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat|ffct)-[\w.-]{20,}"),
    (r"GR1348941", r"GR1348941[\w-]{20,}"),
    # Slack: "token types", incoming webhooks
    (r"(?i:xox[a-z]-)", r"(?i:xox[abceoprs]-(?:\d-)?[a-z0-9][a-z0-9-]{9,})"),
    (r"xapp-", r"xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]+"),
    (r"hooks\.slack\.com/", r"(?<=hooks\.slack\.com/)(?:services|workflows)/T\w{2,}/\w{3,}/\w+"),
    # Stripe: "API keys", webhook signing secrets
    (r"[sr]k_(?:live|test)_", r"[sr]k_(?:live|test)_[0-9A-Za-z]{16,}"),
    (r"whsec_", r"whsec_[A-Za-z0-9+/=]{24,}"),
    # npm and PyPI (a macaroon whose first bytes are fixed)
    (r"npm_[A-Za-z0-9]{36}", r"npm_[A-Za-z0-9]{36}"),
    (r"pypi-AgE", r"pypi-AgE[\w-]{50,}"),
    (r"_authToken=", r"(?<=_authToken=)[\w.=+/-]{16,}"),
    # OpenAI, Anthropic, Hugging Face, Replicate, Groq
    (
        r"sk-[\w-]{32}",
        r"sk-[\w-]*T3BlbkFJ[\w-]{20,}|sk-(?:proj|svcacct|admin|ant|or|lf)-[\w-]{32,}|sk-[A-Za-z0-9]{40,}",
    ),
    (r"(?:hf|api_org)_[A-Za-z]{34}", r"(?:hf|api_org)_[A-Za-z]{34}"),
    (r"r8_[A-Za-z0-9]{37}|gsk_", r"r8_[A-Za-z0-9]{37}|gsk_[A-Za-z0-9]{52}"),
    # Twilio, SendGrid, Mailchimp, Mailgun
    (r"(?:AC|SK)[0-9a-z]{32}", r"(?:AC|SK)(?=[a-z]*\d)[0-9a-z]{32}"),
    (r"SG\.[\w-]{22}", r"SG\.[\w-]{22}\.[\w-]{43}"),
    (r"[0-9a-z]{32}-us[0-9]", r"[0-9a-z]{32}-us\d{1,2}"),
    # Square, Shopify, Telegram, Discord
    (r"sq0[a-z]{3}-", r"sq0[a-z]{3}-[\w\\-]{22,43}"),
    (r"shp[a-z]{2}_", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"),
    (r"[0-9]{8}:[\w-]{35}", r"\d{8,10}:(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{35}"),
    (r"[MNO][\w-]{23,25}\.[\w-]{6}\.", r"[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}"),
    # DigitalOcean, Databricks, Docker, HashiCorp, Artifactory, Grafana, New Relic, Postman, Atlassian, Linear, Notion,
    # age
    (r"do[opr]_v1_", r"do[opr]_v1_[0-9a-f]{64}"),
    (r"dapi[0-9a-f]{8}", r"dapi[0-9a-f]{32}(?:-\d)?"),
    (r"dckr_", r"dckr_(?:pat|oat)_[\w-]{27,}"),
    (r"hv[sbr]\.", r"hv[sbr]\.[\w-]{24,}"),
    (r"\.atlasv1\.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,}"),
    (r"AKC[a-zA-Z0-9]{10}", r"AKC(?=[A-Z]*[a-z])(?=[A-Za-z]*\d)[a-zA-Z0-9]{10,}"),
    (r"gl(?:sa|c)_", r"gl(?:sa|c)_[\w=+/-]{32,}"),
    (r"NRAK-|PMAK-", r"NRAK-[A-Z0-9]{27}|PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
    (r"ATATT3|ATCTT3", r"AT[AC]TT3[\w=-]{100,}"),
    (r"lin_api_|ntn_", r"lin_api_[A-Za-z0-9]{40}|ntn_[A-Za-z0-9]{46}"),
    (r"AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[0-9A-Z]{58}"),
    # Azure: storage account keys, shared access signatures (sig=), Service Bus and IoT keys, function keys
    (r"(?:Account|SharedAccess)Key=", r"(?<=Key=)[A-Za-z0-9+/=]{42,90}"),
    (r"[?&;]sig=", r"(?<=[?&;]sig=)[A-Za-z0-9%+/]{40,}={0,2}"),
    # Authorization headers: RFC 6750 (Bearer), RFC 7617 (Basic)
    (
        r"(?i:bearer|basic|token) [\w.~+/-]{16}",
        r"(?i:(?<=bearer )|(?<=basic )|(?<=token ))(?=[\w.~+/-]*\d)(?=[\w.~+/-]*(?-i:[A-Z]))[\w.~+/-]{16,}={0,2}",
    ),
)
_TOKEN = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(pattern for _, pattern in _FORMATS)})(?![A-Za-z0-9_])")
_JWT = re.compile(r"(?<![\w.-])eyJ[\w-]{6,}={0,2}\.[\w-]{2,}={0,2}(?:\.[\w-]*={0,2}){0,3}")
_PEM_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PEM_CUT = re.compile(r"(?:(?:\\[nr]|\s|[\"'+,>#*|]){0,12}[A-Za-z0-9+/=]{16,}){0,2000}")
_PEM_END = re.compile(r"-----END [A-Z0-9 ]{0,40}-----")
_BASE64_LINE = re.compile(r"[A-Za-z0-9+/=]{16}")
_PUTTY = re.compile(r"(?<=PuTTY-User-Key-File-)\d:")
_PUTTY_END = re.compile(r"Private-MAC: [0-9a-f]+")
_KEY_CHARS = 20_000
# The part of an AWS key pair that has no prefix: 40 characters near the part that has one.
_AWS_SECRET = re.compile(r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")
_AWS_NEAR_CHARS = 200

_URL = re.compile(r"(?<=://)[^\s:/@\"'<>?#]{0,128}:([^\s@\"'<>]{2,128})@(?=[\w\[.-])")

_NAME = (
    r"(?:pass(?:w(?:or)?d|phrase|wd|code)?|pwd|secret|token|api_?-?key|apikey|access_?-?key|auth_?-?key|"
    r"account_?-?key|private_?-?key|encryption_?-?key|signing_?-?key|master_?-?key|secret_?-?key|storage_?-?key|"
    r"service_?-?key|license_?-?key|credentials?|client_?-?secret|contraseña|passwort|kennwort|mot_?de_?passe)"
)
_ASSIGNED = re.compile(
    rf"(?i)({_NAME}(?:[_-]?(?:id|value|key|hash|string|text|data|\d))?)[\"'`\]]{{0,3}}[ \t]{{0,8}}"
    r"(?:=>|:=|==|=|:(?!:)|\bis\b:?)[ \t]{0,8}"
    r"(?:[bru]{0,2}(?P<mark>\"|'|`)(?P<quoted>(?:(?!(?P=mark))[^\n\\]|\\.){4,256})(?P=mark)|(?P<bare>[^\s\"'`<>,;(){}\[\]]{6,256}))"
)
_PREFIX = re.compile(r"[\w.-]*$")
# Names that hold a secret-like word but no secret: cursors, counters, tokens of a language, places of secrets.
_NO_SECRET = re.compile(
    r"(?i)next|page|continu|sync|marker|cursor|count|size|limit|end_?token|token_?type|tokeniz|expir|uri|path|file|arn|"
    r"policy|length|prompt|label|field|regex|pattern|public|primary|foreign|sort|partition|idempot|client_?token|"
    r"request_?token|version|(?:^|[._-])(?:max|min|num|eos|bos|pad|unk|sep|mask|start|url|hint|stage)|(?:url|name|age|len)$"
)
_PLACEHOLDER = re.compile(
    r"(?i)^(?:.*(?:example|sample|dummy|placeholder|changeme|change[_-]me|your[_-]?|my[_-]?(?:pass|secret|token|key)|replace|insert|"
    r"redacted|removed|hidden|x{5}|\*\*\*|\.\.\.|todo|<[^>]*>|\$\{|\{\{|%\(\w+\)s).*|\W*%s\W*|"
    r"\$[A-Z_][A-Z0-9_]{2,}|\$\(.*|\[[\w -]*\]|"
    r"(.)\1*|(?:none|null|true|false|undefined|nil|test|secret|password|passwd|admin|root|string|token)\d{0,2}|"
    r"1234\d*|abcd?1?2?3?\w{0,3})$"
)
# What stands for a value elsewhere: names with dots, places, addresses; and unquoted also calls.
_ELSEWHERE = re.compile(
    r"^(?:[A-Za-z_][\w-]*(?:(?:\.|::|->)[A-Za-z_][\w-]*)+|(?:\.{1,2}|~)?[/\\][\w./\\-]*|\w+://.*|arn:.*|"
    r"[A-Za-z]?[a-z]+(?:[-_][a-z]+)*|[A-Z]+(?:_[A-Z]+)*)$"
)
_CALL = re.compile(r"^[A-Za-z_][\w.]*[(\[].*|.*[(\[{&|]$")


def tokens(line: Line) -> Iterator[Span]:
    """Keys and tokens that say what they are, JWTs whose header decodes, and the second half of an AWS key pair."""
    for match in _TOKEN.finditer(line.text, line.start, line.end):
        if _is_placeholder(match[0]):
            continue
        yield match.span()
        if match[0].startswith(("AKIA", "ASIA")):
            for other in _AWS_SECRET.finditer(line.text, max(0, match.start() - 100), match.end() + _AWS_NEAR_CHARS):
                if entropy(other[0]) > 4.0 and not _is_placeholder(other[0]):
                    yield other.span()
    for match in _JWT.finditer(line.text, line.start, line.end):
        if _is_jwt(match[0]):
            yield match.span()


def private_keys(line: Line) -> Iterator[Span]:
    """Private keys from their first line (on this line of the text) to their last, whole; without a last line, as far
    as base64 goes on. One without base64 in it is an example of the form."""
    for match in _PEM_BEGIN.finditer(line.text, line.start, line.end):
        dashes = line.text.find("-----", match.end(), match.end() + _KEY_CHARS)
        last = _PEM_END.match(line.text, dashes) if dashes >= 0 else None
        if last and _BASE64_LINE.search(line.text, match.end(), dashes):
            yield match.start(), last.end()
        elif not last and (cut := _PEM_CUT.match(line.text, match.end(), match.end() + _KEY_CHARS)) and cut[0]:
            yield match.start(), cut.end()
    for match in _PUTTY.finditer(line.text, line.start, line.end):
        if last := _PUTTY_END.search(line.text, match.end(), match.end() + _KEY_CHARS):
            yield match.start(), last.end()


def url_passwords(line: Line) -> Iterator[Span]:
    """The password in `scheme://user:password@host`; the address stays."""
    for match in _URL.finditer(line.text, line.start, line.end):
        if not _is_placeholder(match[1]) and not re.fullmatch(r"[A-Z_]+|[/\[{(].*|\d{1,5}/.*", match[1]):
            yield match.span(1)


def assignments(line: Line) -> Iterator[Span]:
    """Values given to a name that says password, secret, token or key, if they look generated rather than written."""
    for match in _ASSIGNED.finditer(line.text, line.start, line.end):
        name, quoted = (
            _PREFIX.search(line.text, max(line.start, match.start() - 60), match.start())[0] + match[1],
            match["quoted"],
        )
        if _NO_SECRET.search(name):
            continue
        group = "quoted" if quoted is not None else "bare"
        value = match[group] if quoted is not None else match[group].rstrip(".\\")
        # A call, an index, or one more part of `arn:...:secret:name`.
        if quoted is None and (line.text[match.end() : match.end() + 1] in ("(", "[") or _glued(match, group)):
            continue
        if _is_secret(name.lower(), value, quoted is not None):
            yield match.start(group), match.start(group) + len(value)


def _glued(match: re.Match[str], group: str) -> bool:
    """Whether a bare value follows a colon at once, after a name that does not say password."""
    mark = match.string[match.end(1) : match.start(group)]
    return mark == ":" and not re.search(r"(?i)pass|pwd", match[1])


def _is_secret(name: str, value: str, quoted: bool) -> bool:
    """Whether a value is a secret by its look: long and of high entropy, or a password of several kinds of characters.

    Bits per character: random hexadecimal of 32 has about 3.5, random base64 of 40 about 4.7, English words 2.5 to 3.5;
    so letters alone count only from 3.6 bits, and the look decides the rest.
    """
    if _is_placeholder(value) or any(mark.isspace() for mark in value):
        return False
    bits = entropy(value)
    if (_ELSEWHERE.match(value) and bits < 4.3) or (not quoted and _CALL.match(value)):
        return False
    lower, upper = any(c.islower() for c in value), any(c.isupper() for c in value)
    digit, other = any(c.isdigit() for c in value), any(not c.isalnum() and c not in "_-." for c in value)
    kinds = lower + upper + digit + other
    if re.search(r"pass|pwd|kennwort|contrase", name):
        least = 6 if quoted else 8
        return len(value) >= least and kinds >= 2 and digit + other >= 1 and bits >= 2.2
    if len(value) < 16 or not (digit or (lower and upper)):
        return False
    return bits >= (2.8 if digit else 3.6)


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits per character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)


def _is_placeholder(value: str) -> bool:
    return not any(mark.isalnum() for mark in value) or bool(_PLACEHOLDER.match(value)) or len(set(value)) < 4


def _is_jwt(value: str) -> bool:
    head = value.partition(".")[0].rstrip("=")
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(header, dict) and ("alg" in header or "typ" in header)


# What a line must hold to be looked at, as RE2: any of these.
CANDIDATE_TOKEN = "|".join((*(f"(?:{first})" for first, _ in _FORMATS), r"eyJ[\w-]{6}"))
CANDIDATE_KEY = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File-"
CANDIDATE_URL = r"://[^\s:/@]*:[^\s@]+@"
CANDIDATE_ASSIGNMENT = (
    r"(?i)(?:pass|pwd|secret|token|key|credential|contrase|kennwort)[\w.-]*[\"'`\]]*\s{0,8}(?:=|:|is)[=>:]?\s{0,8}"
    r"[bru]{0,2}(?:[\"'`]\S|[^\s\"'`<>,;(){}\[\]]{4})"
)

"""Keys, tokens and passwords: found where they are, and not where they are only spoken of."""

from __future__ import annotations

import pytest

from forge_ray.config.data import PrivacyConfig
from forge_ray.data.pii.privacy import Scrubber

SCRUBBER = Scrubber(PrivacyConfig())
HEX = "9f86d081884c7d659a2feaa0c55ad015"
MIXED = "Zx8kQ2mV7pLw4RtY6nBc3HjD5sFg1AeU9iKo0XqT"


def secrets(text: str) -> list[str]:
    return [text[start:end] for start, end, kind in SCRUBBER.find([text])[0] if kind == "secret"]


# Cut in two, so that no scanner takes this file for a leak.
TOKENS = [
    "AKIA" + "Q3EGRNZV7XK2MWPL",
    "AIza" + MIXED[:35],
    "GOCSPX-" + MIXED[:28],
    "ghp_" + MIXED[:36],
    "github_pat_" + MIXED[:22] + "_" + (MIXED * 2)[:59],
    "glpat-" + MIXED[:20],
    "xoxb-" + "123456789012-123456789012-" + MIXED[:24],
    "sk_live_" + MIXED[:24],
    "npm_" + MIXED[:36],
    "pypi-AgEIcHlwaS5vcmc" + MIXED * 2,
    "sk-proj-" + MIXED,
    "sk-" + MIXED[:20] + "T3BlbkFJ" + MIXED[:20],
    "hf_" + "abcdefghijklmnopqrABCDEFGHIJKLMNOP",
    "SG." + MIXED[:22] + "." + (MIXED * 2)[:43],
    "dapi" + HEX,
    "hvs." + MIXED,
    "123456789:AA" + MIXED[:33],
]


@pytest.mark.parametrize("token", TOKENS, ids=[token[:8] for token in TOKENS])
@pytest.mark.parametrize("around", ["use {} here", '"k":"{}",', "export X={}\n", "see ({})."])
def test_tokens_say_what_they_are_wherever_they_stand(token: str, around: str) -> None:
    assert secrets(around.format(token)) == [token]


@pytest.mark.parametrize("token", TOKENS, ids=[token[:8] for token in TOKENS])
def test_a_part_of_a_longer_word_is_no_token(token: str) -> None:
    assert secrets(f"word{token}") == []
    assert secrets(token[:10]) == []


def test_the_documented_example_key_is_a_placeholder() -> None:
    assert secrets("AKIA" + "IOSFODNN7EXAMPLE and wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY") == []


def test_the_second_half_of_an_aws_pair_is_found_beside_the_first() -> None:
    first, second = "AKIA" + "Q3EGRNZV7XK2MWPL", "hT/" + MIXED[:37]
    assert secrets(f"User,Key ID,Secret\nann,{first},{second}\n") == [first, second]
    assert secrets(f"checksum {second}") == []


BODY = "\n".join([(MIXED * 2)[:64]] * 3 + [MIXED[:20] + "=="])


@pytest.mark.parametrize("kind", ["RSA ", "EC ", "OPENSSH ", "ENCRYPTED ", ""])
def test_private_keys_go_whole(kind: str) -> None:
    key = f"-----BEGIN {kind}PRIVATE KEY-----\n{BODY}\n-----END {kind}PRIVATE KEY-----"
    assert secrets(f"before\n{key}\nafter") == [key]
    inline = key.replace("\n", "\\n")
    assert secrets(f'{{"private_key": "{inline}\\n", "a": 1}}') == [inline]
    quoted = "\n".join(f"> {line}" for line in key.split("\n"))
    assert secrets(quoted) == [quoted[2:]]


def test_a_private_key_that_is_cut_off_goes_as_far_as_it_goes() -> None:
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}"
    (found,) = secrets(f"{key}\n\nThe log ended here.")
    assert found.startswith("-----BEGIN")
    assert MIXED[:20] in found.splitlines()[-1]
    assert "log" not in found


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        f"-----BEGIN PUBLIC KEY-----\n{BODY}\n-----END PUBLIC KEY-----",
        f"-----BEGIN CERTIFICATE-----\n{BODY}\n-----END CERTIFICATE-----",
        "A file begins with -----BEGIN RSA PRIVATE KEY----- and is kept secret.",
    ],
)
def test_keys_that_are_public_or_only_shown_stay(text: str) -> None:
    assert secrets(text) == []


def test_a_jwt_is_one_whose_header_says_so() -> None:
    head, body = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9", "eyJzdWIiOiIxMjM0NTY3ODkwIn0"
    token = f"{head}.{body}.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
    assert secrets(f"Cookie: session={token}; path=/") == [token]
    assert secrets("eyJub3RhaGVhZGVy.eyJ4IjoxfQ.abc") == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("postgres://ann:pw4Real!@db.example.com:5432/x", "pw4Real!"),
        ("redis://:p%40ssw0rd9@10.0.0.1:6379", "p%40ssw0rd9"),
        ("https://ann:ghost99x@[2001:db8::1]/", "ghost99x"),
    ],
)
def test_the_password_in_an_address(text: str, value: str) -> None:
    assert secrets(text) == [value]


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com:8080/a@b",
        "https://user:password@example.com",
        "postgres://${USER}:${PASS}@db/x",
        "ftp://user:<pass>@host",
        "http://host:80/x?y=a@b.example.com",
    ],
)
def test_addresses_without_a_real_password(text: str) -> None:
    assert secrets(text) == []


ASSIGNED = [
    ('password = "hunter2!a"', "hunter2!a"),
    ("DB_PASSWORD=Tr0ub4dor&3x\n", "Tr0ub4dor&3x"),
    ("smtp_password: gtzKb7lymK9L\n", "gtzKb7lymK9L"),
    ('{"adminPassword": ")x1EU*MgKVt&"}', ")x1EU*MgKVt&"),
    ("passwd => 'a(b)c1d2!'", "a(b)c1d2!"),
    (f"client_secret: {HEX}", HEX),
    (f'API_KEY = "{MIXED}"', MIXED),
    (f"aws_secret_access_key = /{MIXED[:39]}", f"/{MIXED[:39]}"),
    ("Authorization: Basic " + "dXNlcjpwYXNzd29yZDE=", "dXNlcjpwYXNzd29yZDE="),
    (f"Authorization: Bearer {MIXED}", MIXED),
    (f"<add key='x' apiKey=\"{MIXED[:24]}\"/>", MIXED[:24]),
    (f'os.environ["AUTH_TOKEN"] = "{HEX}"', HEX),
    (f"DefaultEndpointsProtocol=https;AccountKey={(MIXED * 3)[:86]}==;", f"{(MIXED * 3)[:86]}=="),
]


@pytest.mark.parametrize(("text", "value"), ASSIGNED)
def test_values_of_telling_names(text: str, value: str) -> None:
    assert secrets(text) == [value]


@pytest.mark.parametrize(
    "text",
    [
        'password = "changeme"',
        'password = "xxxxxxxxxxxx"',
        "password: ${DB_PASSWORD}",
        "PASSWORD=$DB_PASSWORD_1",
        "password: {{ vault.password1 }}",
        'password="<your-password-1>"',
        'password = "[password1]"',
        "password = getpass.getpass1()",
        "passwd = _raw_input(prompt1)",
        "password: the password of the user",
        'secret = config["secret_key_1"]',
        "token = tokens[index_of_token1]",
        "token = self.lexer.next_token2",
        'secret_arn = "arn:aws:secretsmanager:us-east-1:111122223333:secret:prod-XHb67j"',
        "arn:aws:secretsmanager:us-east-1:111122223333:secret:snowflake-XHb67j",
        f'NextToken: "{MIXED}"',
        f'"clientToken": "{MIXED}"',
        f"public_key = '{MIXED}'",
        f"sha256 = {HEX}",
        "max_tokens: 1234567890123456",
        "private_key_path = '/etc/ssl/private/server1.key.pem'",
        "secret: kubernetes.io/service-account-token",
        'token_url = "https://login.example.com/oauth2/v2.0/token"',
        "password = '%s'",
        "Basic authentication_schemes, bearer token_endpoint_auth_methods",
        "API_KEY=YOUR_API_KEY_HERE_123456",
    ],
)
def test_placeholders_code_and_other_names(text: str) -> None:
    assert secrets(text) == []


def test_a_find_is_the_value_alone_so_that_the_text_stays_readable() -> None:
    text = f'API_KEY = "{MIXED}"  # rotate\n'
    assert SCRUBBER.scrub([text])[0].text == 'API_KEY = "<SECRET>"  # rotate\n'

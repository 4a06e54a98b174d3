"""The error tree: what a person reads, and what is left of it after a trip between processes."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from forge_ray import errors
from forge_ray.errors import ConfigError, ForgeError


def _tree(kind: type[ForgeError] = ForgeError) -> list[type[ForgeError]]:
    return [kind, *(below for sub in kind.__subclasses__() for below in _tree(sub))]


def _drawn() -> dict[str, tuple[str, int]]:
    """Class name to (parent's name, exit code) as the module's docstring draws them."""
    rows, path = {}, {0: ("ForgeError", 1)}
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([│ ]*)[├└]── (\w+)", line):
            depth = len(found[1]) // 4 + 1
            code = re.search(r"exit (\d+)$", line)
            parent, inherited = path[depth - 1]
            path[depth] = (found[2], int(code[1]) if code else inherited)
            rows[found[2]] = (parent, path[depth][1])
    return rows


@pytest.mark.parametrize("kind", _tree(), ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_all_its_fields(kind: type[ForgeError]) -> None:
    error = kind("a fire", got="flames", wanted="no flames", do="fetch water")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.what, again.got, again.wanted, again.do) == ("a fire", "flames", "no flames", "fetch water")
    assert again.exit_code == error.exit_code
    assert str(again) == str(error)


def test_a_value_that_cannot_be_pickled_does_not_keep_its_error_from_travelling() -> None:
    error = ConfigError("no such thing", got=lambda: None, wanted=3)
    again = pickle.loads(pickle.dumps(error))
    assert "lambda" in again.got
    assert again.wanted == "3"


def test_the_text_shows_what_is_known_in_the_order_got_wanted_do() -> None:
    lines = str(ForgeError("A", do="D", wanted=0, got="B")).splitlines()
    assert lines == ["A", "  got: B", "  wanted: 0", "  do: D"]
    assert str(ForgeError("A", do="D")).splitlines() == ["A", "  do: D"]


def test_json_holds_what_the_text_holds() -> None:
    row = ConfigError("A", got=1, wanted=2, do="D").as_dict()
    assert row == {"error": "ConfigError", "what": "A", "got": "1", "wanted": "2", "do": "D", "exit_code": 2}


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    real = {kind.__name__: (kind.__base__.__name__, kind.exit_code) for kind in _tree()[1:]}
    assert _drawn() == real


def test_no_other_module_adds_to_the_tree() -> None:
    bases = "|".join(kind.__name__ for kind in _tree())
    package = Path(errors.__file__).parent
    subclass = re.compile(rf"^\s*class \w+\((\w+\.)?({bases})\b", re.M)
    sources = [path for path in package.rglob("*.py") if path != Path(errors.__file__)]
    assert [path.name for path in sources if subclass.search(path.read_text())] == []


def test_each_branch_has_its_own_exit_code() -> None:
    codes = [kind.exit_code for kind in ForgeError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert not {0, ForgeError.exit_code, 130} & set(codes)

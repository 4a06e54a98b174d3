"""Every error that Forge-Ray raises on purpose: what happened, what was found, what was wanted, what to do.

```
ForgeError
├── ConfigError          a YAML file, a FORGE_* variable or a flag is wrong            exit 2
│   └── NotInstalledError  an optional package that the configuration asks for is missing
├── StorageError         a store or path could not be read or written                  exit 3
│   └── DiskFullError    no space left; nothing half-written was published
├── ArtifactError        a reference or manifest is unusable                           exit 4
│   ├── NotFoundError    nothing published under that name
│   └── CorruptError     bytes do not match their SHA-256
├── DataError            the corpus is empty, unreadable or too small for what is asked  exit 5
├── TrainError           training cannot start or go on                                exit 6
│   └── LostError          Ray or its nodes failed under it: the same command goes on     exit 9
├── ExportError          the exported folder does not reproduce the model              exit 7
└── ServeError           the endpoint cannot start or answer                           exit 8
```

The errors survive pickling, because Ray sends them between processes. Anything else that escapes is a bug (exit 1).
"""

from __future__ import annotations


class ForgeError(Exception):
    """Base of the tree; its text is one line of what, then got, wanted and the next action where they are known."""

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, wanted: object = None, do: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.got = got if got is None else str(got)
        self.wanted = wanted if wanted is None else str(wanted)
        self.do = do

    def __str__(self) -> str:
        rows = [self.what]
        rows += [f"  {name}: {value}" for name, value in self._details() if value is not None]
        return "\n".join(rows)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.got, self.wanted, self.do)

    def as_dict(self) -> dict[str, str | int | None]:
        """The same facts for `--json`."""
        return {"error": type(self).__name__, "what": self.what, **dict(self._details()), "exit_code": self.exit_code}

    @staticmethod
    def from_dict(facts: dict[str, str | int | None]) -> ForgeError:
        """The error that `as_dict` described; one of an unknown kind is a plain `ForgeError`."""
        kinds = {kind.__name__: kind for kind in _tree(ForgeError)}
        kind = kinds.get(str(facts["error"]), ForgeError)
        return kind(str(facts["what"]), got=facts["got"], wanted=facts["wanted"], do=facts["do"])  # type: ignore[arg-type]

    def _details(self) -> list[tuple[str, str | None]]:
        return [("got", self.got), ("wanted", self.wanted), ("do", self.do)]


def _tree(kind: type[ForgeError]) -> list[type[ForgeError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


def _rebuild(kind: type[ForgeError], what: str, got: str | None, wanted: str | None, do: str | None) -> ForgeError:
    return kind(what, got=got, wanted=wanted, do=do)


class ConfigError(ForgeError):
    """A configuration value is missing, mistyped or contradicts another."""

    exit_code = 2


class NotInstalledError(ConfigError):
    """An optional package, such as a baseline's, is missing; work that can go on without it does, and says so."""


class StorageError(ForgeError):
    """A store or path could not be read or written."""

    exit_code = 3


class DiskFullError(StorageError):
    """No space left on the device; what was being written has been removed."""


class ArtifactError(ForgeError):
    """A reference or a manifest is unusable."""

    exit_code = 4


class NotFoundError(ArtifactError):
    """Nothing is published under that name."""


class CorruptError(ArtifactError):
    """A file's bytes do not match the SHA-256 in its manifest."""


class DataError(ForgeError):
    """The corpus is empty, unreadable or too small for what is asked of it."""

    exit_code = 5


class TrainError(ForgeError):
    """Training cannot start or cannot go on."""

    exit_code = 6


class LostError(TrainError):
    """Ray, its head or its nodes failed under the training, not the training itself; `--supervise` starts it again."""

    exit_code = 9


class ExportError(ForgeError):
    """The exported folder does not reproduce the trained model."""

    exit_code = 7


class ServeError(ForgeError):
    """The endpoint cannot start or does not answer."""

    exit_code = 8

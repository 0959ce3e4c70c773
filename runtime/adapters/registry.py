"""Names, generations and aliases: which generation of an adapter a request gets, and which ones still run."""

from __future__ import annotations

from runtime.adapters.info import AdapterState, AliasInfo
from runtime.adapters.record import AdapterRecord, Part
from runtime.errors import AlreadyExists, Conflict, Exhausted, NotFound

MAX_ALIASES = 10_000
GENERATION_SIGN = "@"


class AdapterRegistry:
    """A name has at most one live generation, which requests get, and one incoming, which is to replace it.

    Any number of earlier generations drain. A generation is never used twice. Sums that requests have named are kept by
    their parts' labels, apart from the names of operators.
    """

    def __init__(self, max_names: int) -> None:
        self._live: dict[str, AdapterRecord] = {}
        self._derived: dict[str, AdapterRecord] = {}
        self._incoming: dict[str, AdapterRecord] = {}
        self._draining: dict[int, AdapterRecord] = {}
        self._aliases: dict[str, str] = {}
        self._max_names = max_names
        self._last_generation = 0

    def create(self, name: str, path: str, digest: str, state: AdapterState) -> AdapterRecord:
        """A new generation: live if the name is free, else incoming. Raises AlreadyExists and Exhausted."""
        if name in self._aliases:
            message = f"{name!r} is an alias of {self._aliases[name]!r}: delete the alias first"
            raise AlreadyExists(message, reason="ALIAS_EXISTS")
        if name not in self._live and len(self._live) >= self._max_names:
            message = f"{len(self._live)} of {self._max_names} adapter names are in use: unload one"
            raise Exhausted(message, reason="ADAPTER_NAMES_FULL")
        record = AdapterRecord(name, self._next_generation(), path, digest, state)
        (self._incoming if name in self._live else self._live)[name] = record
        return record

    def create_derived(self, name: str, parts: tuple[Part, ...]) -> AdapterRecord:
        """A sum that requests name, under the name that tells its parts; nothing has been read for it."""
        record = AdapterRecord(name, self._next_generation(), "", "", AdapterState.REGISTERED)
        record.parts, record.derived = parts, True
        self._derived[name] = record
        return record

    def derived(self) -> dict[str, AdapterRecord]:
        """The sums that requests may get, by name."""
        return dict(self._derived)

    def find_derived(self, name: str) -> AdapterRecord | None:
        """The live sum of these parts, if requests have named it."""
        return self._derived.get(name)

    def derived_from(self, record: AdapterRecord) -> list[AdapterRecord]:
        """The live sums that requests have named and that this generation is a part of."""
        return [sum_ for sum_ in self._derived.values() if any(part.record is record for part in sum_.parts)]

    def promote(self, record: AdapterRecord) -> AdapterRecord | None:
        """Make an incoming generation live; returns the one that it replaces, which drains from now on."""
        if self._incoming.get(record.name) is not record:
            return None
        del self._incoming[record.name]
        replaced = self._live[record.name]
        self._live[record.name] = record
        self._drain(replaced)
        return replaced

    def retire(self, record: AdapterRecord) -> None:
        """Let a live generation drain: its name is free."""
        del (self._derived if record.derived else self._live)[record.name]
        self._drain(record)

    def forget(self, record: AdapterRecord) -> None:
        """Drop a generation wherever it is."""
        for by_name in (self._live, self._incoming, self._derived):
            if by_name.get(record.name) is record:
                del by_name[record.name]
        self._draining.pop(record.generation, None)

    def find(self, name: str) -> AdapterRecord | None:
        """The live generation of a name or an alias, if there is one."""
        return self._live.get(self._aliases.get(name, name))

    def incoming(self, name: str) -> AdapterRecord | None:
        """The generation that is being loaded to replace the live one."""
        return self._incoming.get(name)

    def draining(self, name: str) -> list[AdapterRecord]:
        """Generations of a name that only run to their end, oldest first."""
        return [record for record in self._draining.values() if record.name == name]

    def draining_sums(self, name: str) -> list[AdapterRecord]:
        """Sums with a generation of this name that only run to their end."""
        draining = self._draining.values()
        return [item for item in draining if item.derived and any(part.record.name == name for part in item.parts)]

    def get(self, reference: str) -> AdapterRecord:
        """The live generation for NAME, ALIAS or NAME@GENERATION; raises NotFound, naming what is live."""
        name, sign, generation = reference.partition(GENERATION_SIGN)
        name = self.resolve(name)
        record = self._live.get(name)
        if record is None:
            raise NotFound(self._absence(reference), reason="ADAPTER_NOT_FOUND")
        if sign and generation != str(record.generation):
            message = f"adapter {name!r} has no live generation {generation}: {record.generation} is live"
            raise NotFound(message, reason="ADAPTER_NOT_FOUND")
        return record

    def any_of(self, reference: str) -> AdapterRecord:
        """For operators: like `get`, but a generation that drains or comes in is found too."""
        name, _, generation = reference.partition(GENERATION_SIGN)
        name = self.resolve(name)
        for record in (self._live.get(name), self._incoming.get(name), *reversed(self.draining(name))):
            if record is not None and generation in ("", str(record.generation)):
                return record
        return self.get(reference)

    def resolve(self, name: str) -> str:
        """The adapter's name that an alias stands for; any other name is itself."""
        return self._aliases.get(name, name)

    def set_alias(self, alias: str, name: str) -> AliasInfo:
        """Let an alias stand for a live adapter from now on; raises NotFound, AlreadyExists and Exhausted."""
        if alias in self._live:
            raise AlreadyExists(f"{alias!r} is the name of an adapter", reason="ADAPTER_EXISTS", field="alias")
        if alias not in self._aliases and len(self._aliases) >= MAX_ALIASES:
            raise Exhausted(f"there are {MAX_ALIASES} aliases, the most that may be", reason="ALIASES_FULL")
        target = self.get(name).name
        self._aliases[alias] = target
        return AliasInfo(alias, target)

    def delete_alias(self, alias: str) -> AliasInfo:
        """Forget an alias; raises NotFound."""
        if alias not in self._aliases:
            raise NotFound(f"there is no alias {alias!r}", reason="ALIAS_NOT_FOUND", field="alias")
        return AliasInfo(alias, self._aliases.pop(alias))

    def aliases(self) -> list[AliasInfo]:
        """All aliases by name."""
        return [AliasInfo(alias, self._aliases[alias]) for alias in sorted(self._aliases)]

    def check_generation(self, name: str, expected: int) -> None:
        """Raise Conflict unless this is the live generation; 0 expects nothing."""
        record = self.find(name)
        if expected and (record is None or record.generation != expected):
            live = "no generation of it is live" if record is None else f"generation {record.generation} is live"
            message = f"adapter {name!r}: generation {expected} was expected, but {live}"
            raise Conflict(message, reason="GENERATION_MISMATCH", field="expected_generation")

    def records(self) -> list[AdapterRecord]:
        """All generations of all names, by name and age."""
        kinds = (self._live, self._incoming, self._derived, self._draining)
        everything = [record for kind in kinds for record in kind.values()]
        return sorted(everything, key=lambda record: (record.name, record.generation))

    def _next_generation(self) -> int:
        self._last_generation += 1
        return self._last_generation

    def _drain(self, record: AdapterRecord) -> None:
        record.state = AdapterState.DRAINING
        record.pinned = False
        self._draining[record.generation] = record

    def _absence(self, reference: str) -> str:
        name = reference.partition(GENERATION_SIGN)[0]
        if name in self._aliases:
            return f"alias {name!r} stands for adapter {self._aliases[name]!r}, which is not loaded"
        if self.draining(name):
            return f"adapter {name!r} is being unloaded"
        return f"adapter {name!r} is not loaded"

"""How a run is described: a fluent builder, and the same settings read from and written to YAML.

    config = PPOConfig().environment("CartPole-v1").training(lr=1e-3).stop(env_steps=50_000)
    config = load_config("ppo.yaml", overrides=["training.lr=1e-3"])

Names, types, ranges, defaults and help all come from the sections in settings.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, create_model

from rlx.config_document import Document, Written, flow, read_value, with_value
from rlx.config_errors import in_python, is_section, sentences
from rlx.config_lookup import (
    check_callbacks,
    check_environment,
    check_network,
    config_class,
    find_config,
    list_algorithms,
    list_configs,
    reference,
)
from rlx.errors import ConfigError
from rlx.schedule import Schedule
from rlx.section import Section, allowed
from rlx.settings import Settings

__all__ = ["AlgorithmConfig", "list_algorithms", "list_configs", "load_config"]


def load_config(path_or_name: str | Path, overrides: Iterable[str] = ()) -> AlgorithmConfig:
    """Return the config in a YAML file, or in the shipped one of that name, with `key=value` overrides applied."""
    path = find_config(path_or_name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    document = Document.parse(text, name=str(path_or_name) if path == Path(path_or_name) else path.name)
    for assignment in overrides:
        document.override(assignment)
    return AlgorithmConfig._from_document(document, folder=path.parent)


class AlgorithmConfig:
    """The settings of one algorithm's run; a method per section changes them and returns the config.

    `class PPOConfig(AlgorithmConfig, training=PPOTraining)` makes the config of an algorithm. Two configs are equal
    when they are of one class and write the same YAML.
    """

    algorithm_class: ClassVar[Callable[..., Any] | None] = None
    """What `build` makes; set by `class PPO(Algorithm, config=PPOConfig)`."""
    reads: ClassVar[Literal["environment", "prompts", "data"]] = "environment"
    """The section that experience comes from."""
    _base: ClassVar[type[Section]] = Settings
    _tree: ClassVar[type[Section]] = Settings

    def __init_subclass__(
        cls, training: type[Section] | None = None, settings: type[Section] | None = None, **keywords: Any
    ) -> None:
        super().__init_subclass__(**keywords)
        if settings is not None:
            cls._base = cls._tree = settings
            _add_builder_methods(cls, settings)
        if training is not None:
            training()  # a default that is missing or out of range fails here, where the algorithm is defined
            field: Any = (training, Field(default_factory=training, description=training.__doc__))
            cls._tree = create_model(f"{cls.__name__}Settings", __base__=cls._base, training=field)
            setattr(cls, "training", _builder_method("training", training))  # noqa: B010

    def __init__(self) -> None:
        if self._tree is self._base:
            raise TypeError(
                "AlgorithmConfig is only the base; use an algorithm's config, such as PPOConfig(), or load_config()."
            )
        self._settings = self._parse({}, {})
        self._written: dict[str, Written] = {}
        self._frozen = False

    if TYPE_CHECKING:  # the section methods are made from the sections, at the end of this file

        def __getattr__(self, section: str) -> Callable[..., Self]: ...

    @property
    def settings(self) -> Settings:
        """The frozen tree of sections."""
        return self._settings

    @classmethod
    def is_supervised(cls) -> bool:
        """Return whether rows are learned from, so that there is a loss and no episode."""
        return cls.reads == "data"

    @staticmethod
    def check(settings: Settings) -> None:
        """Raise ConfigError where settings do not fit together; an algorithm overrides this."""

    def network(self) -> str:
        """Return what network these settings build, a line a part."""
        from rlx.inference import network_summary

        return network_summary(self.settings)

    def validate(self) -> None:
        """Raise ConfigError with everything that stops these settings from running; changes nothing."""
        problems = [
            *self._names_not_found(),
            *_problems(check_callbacks, self.settings.callbacks.classes),
            *_problems(self.settings.evaluation.check),
            *_problems(self.settings.runtime.check, self.settings.learners.num_learners),
            *_problems(self.check, self.settings),
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    def build(self, run_dir: str | Path | None = None, restore: str | Path | None = None) -> Any:
        """Return the algorithm, ready to train, and freeze this config; ConfigError where it does not validate.

        restore: a run or a checkpoint to go on from, as by the algorithm's `restore`, which would come after it.
        """
        algorithm = type(self).algorithm_class
        if algorithm is None:
            name = type(self).__name__
            raise ConfigError(f"no algorithm uses {name}; write class MyAlgorithm(Algorithm, config={name}).")
        self.validate()
        built = algorithm(self, run_dir) if restore is None else algorithm(self, run_dir, restore)
        self.freeze()  # only now: a config whose build failed can be mended
        return built

    def set(self, key: str, value: Any) -> Self:
        """Change the setting with a dotted key; text is read as YAML, so "1e-4" is a number."""
        if key == "algorithm":
            raise ConfigError(f"algorithm cannot be set: {type(self).__name__} fixes it; load_config can override it.")
        written = {}
        if isinstance(value, str):
            value, written[key] = read_value(value, name=key)
        return self._change({key: value}, written)

    def copy(self) -> Self:
        """Return an equal config that can be changed."""
        twin = type(self)()
        twin._settings, twin._written = self._settings, self._written
        return twin

    def freeze(self) -> Self:
        """Make every further change raise ConfigError; returns this config."""
        self._frozen = True
        return self

    def diff(self, other: AlgorithmConfig) -> dict[str, tuple[Any, Any]]:
        """Return {"training.lr": (mine, the other's)} for every setting that differs."""
        mine, others = self._flat(), other._flat()
        return {
            key: (mine.get(key), others.get(key))
            for key in dict.fromkeys([*mine, *others])
            if mine.get(key) != others.get(key)
        }

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The calls that make this config out of a new one."""
        changed: dict[str, list[str]] = {}
        for key, (value, _) in self.diff(type(self)()).items():
            section, _, name = key.partition(".")
            changed.setdefault(section, []).append(f"{name}={value!r}")
        calls = [f".{section}({', '.join(arguments)})" for section, arguments in changed.items()]
        return f"{type(self).__name__}(){''.join(calls)}"

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as plain data, in section order."""
        sections = {name: getattr(self.settings, name).model_dump(mode="json") for name in _sections(self.settings)}
        return {"algorithm": self.settings.algorithm, **sections}

    def to_yaml(self, comments: bool = False) -> str:
        """Return every setting as YAML, in section order; with its meaning in a comment above it, if wanted."""
        lines = []
        for name, value in self.to_dict().items():
            if not isinstance(value, dict):
                lines.append(f"{name}: {flow(value)}")
                continue
            section = getattr(self.settings, name)
            lines.append(f"{name}:" + ("" if value else " {}"))
            for key, item in value.items():
                meaning = type(section).model_fields[key].description
                lines += [f"  # {line}" for line in (meaning or "").splitlines() if comments]
                lines.append(f"  {key}: {flow(item)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config in plain data; what it leaves out keeps its default."""
        return cls._from_document(Document(dict(values)))

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Return the config in a YAML text; what it leaves out keeps its default."""
        return cls._from_document(Document.parse(text))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of the YAML file, for editors."""
        return cls._tree.model_json_schema()

    def _names_not_found(self) -> list[str]:
        """Return what is wrong with settings that name something."""
        return [
            *self._not_found("environment.id", check_environment, self.settings.environment.id),
            *self._not_found("model.custom", check_network, self.settings.model.custom),
        ]

    def _not_found(self, key: str, check: Callable[..., None], value: Any) -> list[str]:
        return _problems(check, value, f"{key} is {self._written.get(key, in_python(value))}")

    def _flat(self) -> dict[str, Any]:
        """Return the plain value of every setting by its dotted key."""
        algorithm, *sections = self.to_dict().items()
        return dict([algorithm]) | {
            f"{name}.{key}": item for name, section in sections for key, item in section.items()
        }

    @classmethod
    def _from_document(cls, document: Document, folder: Path | None = None) -> Self:
        try:
            config = cls._named(document, folder or Path())()
            config._settings = config._parse(document.values, document.written)
        except ConfigError as error:
            raise ConfigError("\n".join([*document.problems, str(error)])) from error
        if document.problems:
            raise ConfigError("\n".join(document.problems))
        config._written = document.written
        return config

    @classmethod
    def _named(cls, document: Document, folder: Path) -> type[Self]:
        """Return the config class that the document's `algorithm:` means; this one where it names none."""
        name = document.values.get("algorithm")
        if cls._tree is not cls._base and name in (None, reference(cls)):
            return cls
        if name is None:
            names = ", ".join(shipped for shipped, _ in list_algorithms())
            raise ConfigError(f"algorithm is not given; write algorithm: NAME, where the shipped ones are {names}.")
        subject = f"algorithm is {document.written.get('algorithm', in_python(name))}"
        if not isinstance(name, str):
            raise ConfigError(f"{subject}; it must be a string.")
        found = config_class(name, folder, AlgorithmConfig, subject)
        if not issubclass(found, cls):
            raise ConfigError(
                f"{subject}, which {cls.__name__} cannot read; use AlgorithmConfig.from_yaml or load_config."
            )
        return found

    @classmethod
    def _parse(cls, values: Mapping[str, Any], written: Mapping[str, Written]) -> Settings:
        # `training:` with nothing below it is an empty section.
        sections = _section_types(cls._tree)
        values = {name: {} if value is None and name in sections else value for name, value in values.items()}
        try:
            parsed = cls._tree.model_validate({**values, "algorithm": reference(cls)})
        except ValidationError as error:
            name = cls.__name__.removesuffix("Config")
            raise ConfigError("\n".join(sentences(error, cls._tree, values, written, name))) from error
        # Not an instance of the class made above, which cannot be pickled by name.
        return cls._base.model_construct(**dict(parsed))  # type: ignore[return-value]

    def _change(self, changes: Mapping[str, Any], written: dict[str, Written]) -> Self:
        if self._frozen:
            raise ConfigError(
                f"this config is frozen, as a run uses it: {', '.join(changes)} cannot change; change a copy()."
            )
        values = _sections(self.settings)
        for key, value in changes.items():
            values = with_value(values, key, value)
        self._settings = self._parse(values, written)
        stale = tuple(f"{key}." for key in changes)
        kept = {key: place for key, place in self._written.items() if not f"{key}.".startswith(stale)}
        self._written = {**kept, **written}
        return self


def _builder_method(name: str, section: type[Section]) -> Callable[..., AlgorithmConfig]:
    """Return the method that changes one section: a keyword per setting, documented from its field."""
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", by_position)]
    lines = [f"Return this config with other {name} settings.", "", inspect.cleandoc(section.__doc__ or ""), ""]
    for key, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        default = default.written() if isinstance(default, Schedule) else default
        kind = by_position if key == section.positional else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(key, kind, default=default, annotation=field.annotation))
        lines.append(f"{key}: {allowed(field)} (default {default!r})")
        lines += [f"    {line}" for line in (field.description or "").splitlines()]
    signature = inspect.Signature(parameters, return_annotation=Self)

    def method(self: AlgorithmConfig, *positional: Any, **changes: Any) -> AlgorithmConfig:
        # Only what is known is bound: the rest gets the error that names the nearest setting.
        known = {key: value for key, value in changes.items() if key in signature.parameters}
        bound = signature.bind_partial(self, *positional, **known).arguments
        changes = {key: value for key, value in {**bound, **changes}.items() if key != "self"}
        return self._change({f"{name}.{key}": value for key, value in changes.items()}, {})

    method.__name__, method.__qualname__, method.__doc__ = name, f"AlgorithmConfig.{name}", "\n".join(lines)
    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


def _problems(check: Callable[..., None], *arguments: Any) -> list[str]:
    try:
        check(*arguments)
    except ConfigError as error:
        return [str(error)]
    return []


def _sections(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the values of every section, with schedules as they are written, so that their parts can be set."""
    return {
        name: {key: value.written() if isinstance(value, Schedule) else value for key, value in getattr(settings, name)}
        for name in _section_types(type(settings))
    }


def _section_types(tree: type[Section]) -> dict[str, type[Section]]:
    return {name: field.annotation for name, field in tree.model_fields.items() if is_section(field.annotation)}


def _add_builder_methods(config: type[AlgorithmConfig], tree: type[Section]) -> None:
    for name, section in _section_types(tree).items():
        setattr(config, name, _builder_method(name, section))


_add_builder_methods(AlgorithmConfig, Settings)

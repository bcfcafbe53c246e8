"""What the host asks for. Owns the fields of request.json and refuses a request that makes no sense; looks at no tenant's bytes."""

import dataclasses
import json
import pathlib

from .report import Failed

KINDS = ("rootfs", "dockerfile", "reference")


@dataclasses.dataclass(frozen=True)
class Request:
    """One build."""

    kind: str
    # The mounted ext4 that becomes the root disk: empty, or a copy of the template `target_is`.
    target: pathlib.Path
    target_is: str | None
    # The archive, or the directory that is the Dockerfile's context; none for a reference.
    source: pathlib.Path | None
    dockerfile: pathlib.Path | None
    # Root disks mounted for reading, by the name that a FROM line uses.
    templates: dict[str, pathlib.Path]
    # The environment that a template brings along, by the same name.
    template_env: dict[str, dict[str, str]]
    reference: str | None
    registry_host: str | None
    insecure: bool
    # Most entries an archive may have.
    entries: int
    # When to give up, seconds from the start.
    seconds: int

    @classmethod
    def read(cls, path):
        try:
            said = json.loads(path.read_bytes())
            registry = said.get("registry") or {}
            request = cls(
                kind=said["kind"], target=pathlib.Path(said["target"]), target_is=said.get("target_is"),
                source=optional_path(said.get("source")), dockerfile=optional_path(said.get("dockerfile")),
                templates={name: pathlib.Path(where) for name, where in (said.get("templates") or {}).items()},
                template_env=said.get("template_env") or {}, reference=said.get("reference"), registry_host=registry.get("host"),
                insecure=bool(registry.get("insecure")), entries=int(said.get("entries") or 1_000_000),
                seconds=int(said.get("seconds") or 3600))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Failed(f"{path}: not a request: {type(error).__name__}: {error}") from error
        request.check()
        return request

    def check(self):
        needed = {"rootfs": self.source, "dockerfile": self.dockerfile, "reference": self.reference and self.registry_host}
        if self.kind not in KINDS or not needed[self.kind]:
            raise Failed(f"the request for {self.kind!r} is not complete")
        if self.target_is is not None and (self.kind != "dockerfile" or self.target_is not in self.templates):
            raise Failed("only a Dockerfile's target is a copy of one of its templates")
        for where in (self.target, *self.templates.values()):
            if not where.is_mount():
                raise Failed(f"nothing is mounted at {where}")


def optional_path(text):
    return pathlib.Path(text) if text else None

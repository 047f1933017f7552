"""A cluster file: one for `ray up`, or a manifest with a KubeRay RayJob."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from aqn_tune.errors import UserError, nearest
from aqn_tune.study.messages import find
from aqn_tune.study.schema import Study
from aqn_tune.study.source import Source, parse_source, read_text

Kind = Literal["ray up", "RayJob"]
_SET = r"--set[ =]+['\"]?{key}=([^\s'\"\\]+)"


class ClusterFile(NamedTuple):
    """A cluster file as it was read."""

    text: str
    kind: Kind
    source: Source
    """The configuration of `ray up`, or the RayJob."""
    others: tuple[dict[str, Any], ...] = ()
    """What else a manifest holds, such as claims of volumes."""

    @property
    def data(self) -> dict[str, Any]:
        """The configuration, or the RayJob, as Ray and Kubernetes read it."""
        return self.source.data

    @property
    def launch(self) -> str:
        """The text with the launch line: a RayJob's entrypoint; for `ray up` a comment, so all of it."""
        if self.kind == "ray up":
            return self.text
        spec = self.data.get("spec")
        return str(spec.get("entrypoint", "")) if isinstance(spec, dict) else ""

    def place(self, message: str) -> str:
        """Return file and line of the dotted key that `message` begins with; "" for none."""
        key, sign, _ = message.partition(": ")
        path = find(self.source, key) if sign else None
        return "" if path is None else str(self.source.place(path))


class Checked(NamedTuple):
    """What the rules look at: a file, and the study that is to run there, if one was named."""

    file: ClusterFile
    study: Study | None = None

    @property
    def data(self) -> dict[str, Any]:
        """The configuration, or the RayJob."""
        return self.file.data

    @property
    def output(self) -> str | None:
        """The folder that receives results, absolute: the study's own, or the launch line's.

        A study that was loaded with the overrides of the launch line has them already.
        """
        if self.study is not None and Path(self.study.output).is_absolute():
            return self.study.output
        launched = launched_with(self.file.launch, "output")
        return launched if launched is not None and launched.startswith("/") else None


def read_cluster_file(path: Path) -> ClusterFile:
    """Return the cluster file at `path`.

    Raises UserError for a file that cannot be read, is no YAML, names a key twice, holds several
    documents without a RayJob, or a resource of KubeRay that is none.
    """
    text = read_text(path)
    documents = list(_documents(text, str(path)))
    kuberay = [one for one in documents if str(one.data.get("apiVersion")).startswith("ray.io/")]
    if not kuberay:
        if len(documents) != 1:
            raise UserError(
                f"{path}: got {len(documents)} YAML documents and no RayJob among them; a file for "
                "`ray up` is one document"
            )
        return ClusterFile(text, "ray up", documents[0])
    for one in kuberay:
        kind = str(one.data.get("kind"))
        if kind != "RayJob":
            raise UserError(
                f"{one.place(('kind',))}: kind: got {kind!r}; a sweep is a job that ends, write RayJob"
                f"{nearest(kind, ['RayJob'])}"
            )
    if len(kuberay) > 1:
        raise UserError(f"{path}: got {len(kuberay)} RayJobs; check them one file at a time")
    others = tuple(one.data for one in documents if one is not kuberay[0])
    return ClusterFile(text, "RayJob", kuberay[0], others)


def _documents(text: str, file: str) -> Iterator[Source]:
    """Yield the documents of a YAML text, with the lines that their keys have in it."""
    lines, start = text.splitlines(keepends=True), 0
    seen = 0
    for number, line in enumerate([*lines, "---"]):
        if not re.match(r"---(\s|$)", line):
            continue
        part = "".join(lines[start:number])
        last = number == len(lines)
        if any(one.strip() and not one.lstrip().startswith("#") for one in lines[start:number]) or (
            last and not seen
        ):
            padded = "\n" * start + part
            source = parse_source(padded, file)
            # Ray and kubectl read YAML 1.1, in which `no` is false; the places are the same.
            try:
                yield Source(yaml.safe_load(padded), source.places)
            except (yaml.YAMLError, ValueError) as error:
                raise UserError(
                    f"{file}: Ray and Kubernetes read YAML 1.1, in which a value here is none ({error}); "
                    "put it in quotes"
                ) from None
            seen += 1
        start = number + 1


def launch_overrides(file: ClusterFile) -> list[str]:
    """Return every `--set KEY=VALUE` of the launch line, as KEY=VALUE."""
    found = re.findall(_SET.format(key=r"([\w.]+)"), file.launch)
    return [f"{key}={value}" for key, value in found]


def launched_with(text: str, key: str) -> str | None:
    """Return what the launch line in a cluster file sets `key` to, None where it does not.

    The launch line is the `aqn-tune run` of the comment at the top, or of a RayJob's entrypoint.
    """
    found = re.search(_SET.format(key=re.escape(key)), text)
    return found.group(1) if found else None

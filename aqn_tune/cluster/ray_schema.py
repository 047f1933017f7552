"""What Ray itself says about a cluster file: its own validators, which need no network.

They are internal to Ray and belong to the release that the package pins (ray/autoscaler/_private).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

from aqn_tune.cluster.document import Checked
from aqn_tune.cluster.findings import mapping, shown
from aqn_tune.errors import nearest
from aqn_tune.study.source import dotted


def look(checked: Checked) -> Iterator[str]:
    """Yield what Ray objects to in a file for `ray up`, as `ray up` would."""
    data = checked.data
    provider = data.get("provider")
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        yield f"provider: got {shown(provider)}; write a mapping with a type, such as {{type: aws}}"
        return
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    if provider["type"] not in _NODE_PROVIDERS:
        yield (
            f"provider.type: got {provider['type']!r}; Ray knows {', '.join(_NODE_PROVIDERS)}"
            f"{nearest(provider['type'], _NODE_PROVIDERS)}"
        )
        return
    yield from _complaints(data)


def node_types(checked: Checked) -> tuple[dict[str, Any], str | None]:
    """Return the node types that Ray's autoscaler derives from a RayJob, and what it objects to.

    The operator hands the cluster of a RayJob to the same reader. Where it objects there are none.
    """
    from ray.autoscaler._private.kuberay import autoscaling_config

    data = checked.data
    metadata = mapping(data.get("metadata"))
    resource = {
        "metadata": {"name": metadata.get("name", ""), "namespace": metadata.get("namespace", "")},
        "spec": copy.deepcopy(mapping(data.get("spec")).get("rayClusterSpec")),
    }
    try:
        with _quiet():
            config = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)
    except Exception as error:
        return {}, f"spec.rayClusterSpec: Ray's autoscaler cannot read it: {_reason(error)}"
    return dict(config["available_node_types"]), None


def _complaints(data: dict[str, Any]) -> Iterator[str]:
    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with _quiet():
            validate_config(prepare_config(copy.deepcopy(data)))
    except jsonschema.ValidationError as error:
        yield _schema_complaint(error)
    except click.ClickException as error:
        yield f"provider: {error.message}"
    except ValueError as error:
        types = mapping(data.get("available_node_types"))
        if "head_node_type" in str(error):
            got = data.get("head_node_type")
            yield (
                f"head_node_type: got {shown(got)}; allowed are {', '.join(types)}"
                f"{nearest(str(got), types)}"
            )
        else:
            yield f"max_workers: got {shown(data.get('max_workers'))}; {error}"
    except Exception as error:
        yield f"Ray cannot read the file: {_reason(error)}"


def _schema_complaint(error: Any) -> str:
    key = dotted(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(error.schema.get("properties", ()))
        extra = [name for name in error.instance if name not in known]
        whole = dotted([*error.absolute_path, extra[0]]) if extra else key
        return f"{whole}: unknown key{nearest(extra[0], known) if extra else ''}"
    got = "" if error.validator == "required" else f"got {shown(error.instance)[:60]}; "
    return f"{key or 'the file'}: {got}{error.message.splitlines()[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's own output, which has warnings about defaults, out of ours."""
    sink = io.StringIO()
    logger = logging.getLogger("ray.autoscaler")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logger.setLevel(before)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"the key {text[0]} is missing" if isinstance(error, KeyError) else text[0]

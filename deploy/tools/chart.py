"""Renders the chart with every values file in helm/tessera/ci and validates each object strictly.

    python deploy/tools/chart.py        exit 1 and one sentence for everything that is wrong

The real Helm engine renders (helm-python-sdk); the Kubernetes schemas of several versions judge (kubernetes-validate).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

CHART = Path(__file__).parents[2] / "helm/tessera"
KUBERNETES_VERSIONS = ("1.30", "1.34", "1.37")
SERVICES = {"gateway", "tokenizer", "memory", "generator", "retention", "validator"}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object of the chart under `values`. Raises what Helm raises for values that its schema refuses."""
    files = helm_python.Chart.load(str(CHART)).render(values, name="release", namespace="namespace")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def problems(objects: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with rendered objects, one sentence each."""
    for item in objects:
        for version in KUBERNETES_VERSIONS:
            try:
                kubernetes_validate.validate(item, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{item['kind']} {item['metadata']['name']} under {version}: {error.message}"
    deployed = {item["metadata"]["labels"]["app.kubernetes.io/component"] for item in objects if item["kind"] == "Deployment"}
    if deployed != SERVICES:
        yield f"deploys {sorted(deployed)} instead of the six services"


def main() -> int:
    """The command line; returns the exit code."""
    found: list[str] = []
    for path in sorted((CHART / "ci").glob("*-values.yaml")):
        objects = rendered(yaml.safe_load(path.read_text(encoding="utf-8")))
        sys.stdout.write(f"{path.name}: {len(objects)} objects\n")
        found.extend(f"{path.name}: {problem}" for problem in problems(objects))
    sys.stderr.writelines(f"{problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""What every service's settings class promises."""

import importlib
import inspect
from typing import Any

import pytest
from pydantic import BaseModel

from tessera.bus.settings import ServiceSettings
from tessera.contracts.catalogue import SERVICES

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("service", SERVICES)
def test_what_reloads_exists(service: str) -> None:
    members = vars(importlib.import_module(f"tessera.{service}.settings")).values()
    (found,) = [each for each in members if inspect.isclass(each) and issubclass(each, ServiceSettings) and each.service == service]
    for path in found.reloadable:
        assert _exists(found, path.split(".")), path
    assert found.reloadable >= ServiceSettings.reloadable


def _exists(model: Any, path: list[str]) -> bool:
    field = model.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    return issubclass(field.annotation, BaseModel) and _exists(field.annotation, path[1:])

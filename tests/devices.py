"""The devices that a test runs on: ``@DEVICES`` gives it an argument ``device``."""

import pytest

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

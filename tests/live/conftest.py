"""A browser and a page for each test."""

import pytest
from live_parts import drawn, served
from webdriver import Browser


@pytest.fixture
def browser(tmp_path):
    with Browser(downloads=tmp_path / "downloads") as browser:
        yield browser


@pytest.fixture
def page():
    """Drawn frames: chunks of 12, each made in .3 s, as a model on a good GPU makes them."""
    with served(drawn(seconds=0.3), grace=2) as server:
        yield server

"""The table at the end of `make test-interop`."""

import pytest

TABLE = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[TABLE] = []


@pytest.fixture
def apart(request):
    """apart(what, ours, theirs, bar): a row of the table; fails if the relative error is larger."""

    def compare(what, ours, theirs, bar=1e-5):
        ours, theirs = ours.detach().double(), theirs.detach().double()
        assert ours.shape == theirs.shape, f"{what}: {ours.shape}, {theirs.shape}"
        assert theirs.norm() > 0, what
        error = float((ours - theirs).norm() / theirs.norm())
        request.config.stash[TABLE].append((what, error))
        assert error < bar, f"{what}: {error}"

    return compare


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[TABLE]
    if rows:
        terminalreporter.section("relative errors, float32")
    for what, error in rows:
        terminalreporter.write_line(f"{what:72}{error:9.1e}")

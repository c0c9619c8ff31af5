"""Settings shared by every test: reproducible draws, few threads, one hypothesis profile."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", max_examples=15, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=200, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """What a run caches stays out of the user's own cache, here and in subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Also for what fixtures of a module compute, as sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _memory():
    """A command that runs in this process leaves its allocator as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dd.cli.keep_freed_memory", lambda: True)
        yield


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)

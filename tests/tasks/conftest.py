import pytest

from weightlab._hub import hub_answers
from weightlab.tasks.data.images import load_images
from weightlab.tasks.data.text import load_text


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty WEIGHTLAB_DATA, an empty cache, no Hub, and nothing remembered from other tests."""
    for name, folder in (("WEIGHTLAB_DATA", "data"), ("XDG_CACHE_HOME", "cache")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    remembered = (hub_answers, load_images, load_text)
    for function in remembered:
        function.cache_clear()
    monkeypatch.setattr("weightlab.tasks.data.hub.hub_answers", lambda extra: False)
    yield tmp_path / "data"
    for function in remembered:
        function.cache_clear()

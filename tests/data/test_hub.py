"""Names on the Hugging Face hub, where it can be reached and where it cannot."""

import pytest

from gspn.data.hub import out_of_reach
from gspn.data.labelled import DataError, open_data
from gspn.options import OptionError


def test_a_name_is_tried_once_at_a_hub_out_of_reach(monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    tried = []

    def unreachable(url, timeout, **_):
        tried.append((url, timeout))
        raise OSError("no network")

    def load(name, **_):
        assert datasets.config.HF_HUB_OFFLINE  # so that it looks into its cache alone
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"no file or folder someone/pets, .*OSError: no network.*no copy"):
        open_data("someone/pets")
    assert len(tried) == 1 and "someone/pets" in tried[0][0] and tried[0][1] <= 10
    assert not datasets.config.HF_HUB_OFFLINE
    kept = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: kept)  # from the cache
    with pytest.raises(DataError, match="type Image"):
        open_data("someone/pets")


def test_a_hub_that_answers_is_asked_by_datasets(monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import HfHubHTTPError

    class NotFound(HfHubHTTPError):
        def __init__(self):
            pass

    def answers(url, **_):
        raise NotFound

    def load(name, **_):
        assert not datasets.config.HF_HUB_OFFLINE
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", answers)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"someone/pets, .*DatasetNotFoundError: no such data set"):
        open_data("someone/pets")


@pytest.mark.parametrize("what", ["vae", "text_to_image"])
def test_models_are_tried_once_at_a_hub_out_of_reach(monkeypatch, what):
    pytest.importorskip("diffusers")
    import diffusers
    import huggingface_hub as hub

    from gspn.sampling import vae
    from gspn.tasks import text_to_image

    tried, asked = [], []

    def unreachable(url, timeout, **_):
        tried.append(url)
        raise OSError("no network")

    def load_config(name, local_files_only, **_):
        asked.append(local_files_only)
        raise OSError("not kept here")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    for each in (diffusers.AutoencoderKL, diffusers.DiffusionPipeline):
        monkeypatch.setattr(each, "load_config", load_config)
    with pytest.raises(OptionError, match=r"nobody/model .*the hub .*; not kept here"):
        {"vae": vae.open_vae, "text_to_image": text_to_image.open_text_to_image}[what]("nobody/model")
    assert len(tried) == 1 and asked == [True]
    tried.clear()
    with pytest.raises(OptionError, match=r"/nowhere/at/all .*not kept here"):
        {"vae": vae.open_vae, "text_to_image": text_to_image.open_text_to_image}[what]("/nowhere/at/all")


def test_what_no_repository_can_be_called():
    assert out_of_reach("/nowhere/at/all", "config.json") is None

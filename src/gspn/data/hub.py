"""The Hugging Face hub: whether it can be reached, by one short try, and single files of its data sets.

Its own libraries try six times, for half a minute, before they give up."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from gspn.data.images import DataError

PATIENCE = 5  # seconds for an answer


def out_of_reach(name: str, file: str, repo_type: str = "model") -> str | None:
    """Why the hub cannot be asked for a file of `name`; None if it answers at all, or if no repository can have that
    name."""
    try:
        huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(name, file, repo_type=repo_type), timeout=PATIENCE
        )
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # those of the library that it uses for HTTP, and of the system
        return f"the hub cannot be reached ({type(error).__name__}: {error})"
    return None


def file_of(name: str, file: str) -> Path | None:
    """A file of the data set `name`, which is kept as the hub's libraries keep files; None if the data set has none, or
    if the hub cannot be reached and none is kept. Errors: DataError where the hub answers but the file cannot be read.
    """
    unreachable = out_of_reach(name, "README.md", "dataset") is not None
    try:
        return Path(huggingface_hub.hf_hub_download(name, file, repo_type="dataset", local_files_only=unreachable))
    except EntryNotFoundError as error:  # of the data set, or of what is kept
        if unreachable or not isinstance(error, LocalEntryNotFoundError):
            return None
        problem = error
    except (HfHubHTTPError, OSError) as error:
        problem = error
    raise DataError(f"{file} of {name} cannot be read from the hub ({type(problem).__name__}: {problem})") from problem

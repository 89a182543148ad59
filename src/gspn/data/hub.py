"""The Hugging Face hub: whether it can be reached, found out by one short try.

Its libraries try six times, for half a minute, before they say that they cannot reach it."""

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

PATIENCE = 5  # seconds in which it has to answer


def out_of_reach(name: str, file: str, repo_type: str = "model") -> str | None:
    """Why the hub cannot be asked for that file of `name`; None if it answers, whatever it does, or if no repository
    can have that name."""
    try:
        huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(name, file, repo_type=repo_type), timeout=PATIENCE
        )
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # those of the library that it uses for HTTP, and of the system
        return f"the hub cannot be reached ({type(error).__name__}: {error})"
    return None

"""Whether the Hugging Face hub can be reached, by one short try.

Its own libraries try six times, for half a minute, before they give up."""

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

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

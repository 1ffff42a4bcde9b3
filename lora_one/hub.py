"""The Hugging Face Hub: pushing to it, and one line for the many ways in which it is out of reach."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from lora_one.errors import UserError


def push_folder(folder: Path, repository: str) -> str:
    """Uploads a folder to a model repository of the Hub, made private where it does not exist.

    Returns:
        Its address.

    Raises:
        UserError: If the Hub cannot be reached or refuses.
    """
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:
        raise UserError(f"model.push_to_hub={repository}: {offline_hint(error)}; {folder} is kept") from error
    return str(address)


def offline_hint(error: BaseException) -> str:
    """Says in one line why a Hub repository could not be read, and the remedy.

    Args:
        error: What the loading library raised; its causes are looked through too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, hub_errors.GatedRepoError):
            return "the repository is gated; accept its terms on its page and run 'hf auth login'"
        if isinstance(seen, hub_errors.RepositoryNotFoundError):
            return "no such repository, or it is private; check the name, or run 'hf auth login'"
        if isinstance(seen, hub_errors.RevisionNotFoundError):
            return "the repository has no such revision; check the revision"
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    if "gated repo" in text:
        return "the repository is gated; accept its terms on its page and run 'hf auth login'"
    if "is not a valid model identifier" in text or "doesn't exist on the Hub" in text:
        return "no such repository, or it is private; check the name, or run 'hf auth login'"
    if _is_network_trouble(error) or any(word in text for word in ("connect", "offline", "resolve")):
        return "the Hugging Face Hub cannot be reached; check the network, or give a local path"
    return f"cannot be read ({text.strip().splitlines()[0] if text.strip() else type(error).__name__})"


def _is_network_trouble(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, hub_errors.OfflineModeIsEnabled)):
            return True
        error = error.__cause__ or error.__context__
    return False

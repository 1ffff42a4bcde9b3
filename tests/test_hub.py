"""One line for every way in which the Hub can be out of reach."""

import httpx
import pytest
from huggingface_hub import errors

from lora_one.hub import offline_hint

RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))


def wrapped(cause: Exception) -> OSError:
    try:
        raise OSError("something general\nover two lines") from cause
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("403", response=RESPONSE), "is gated; accept its terms"),
        (wrapped(errors.GatedRepoError("403", response=RESPONSE)), "is gated; accept its terms"),
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "no such repository, or it is private"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "no such revision"),
        (OSError("You are trying to access a gated repo.\nMake sure"), "is gated"),
        (OSError("x is not a local folder and is not a valid model identifier"), "no such repository"),
        (OSError("We couldn't connect to 'https://huggingface.co'"), "cannot be reached"),
        (wrapped(errors.OfflineModeIsEnabled("offline")), "cannot be reached"),
        (wrapped(ConnectionError("refused")), "cannot be reached"),
        (ValueError("strange\nthing"), "cannot be read (strange)"),
        (KeyError(), "cannot be read (KeyError)"),
    ],
)
def test_hints(error, words):
    hint = offline_hint(error)
    assert words in hint
    assert "\n" not in hint

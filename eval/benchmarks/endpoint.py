"""A chat model behind an OpenAI-compatible address, asked with patience."""

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from lora_one.errors import UserError

_LONGEST_WAIT = 60.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected question would lose its body, and take the key to another machine."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class StoppedError(Exception):
    """Another thread has failed for good; there is nothing to wait for."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how a chat model is asked.

    Attributes:
        base_url: Up to and without ``/chat/completions``.
        model: Its name there.
        api_key_env: Environment variable that the key came from, for messages.
        api_key: Sent as a bearer token; None: nothing is sent.
        timeout: Seconds without a byte until an attempt is given up.
        attempts: Before an endpoint that fails is given up.
        first_wait: Seconds before the second attempt; doubled before each further one, at most a minute.
        seed: Of the waits' jitter.
        stop: Set, it ends every wait.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    api_key: str | None = None
    timeout: float = 120.0
    attempts: int = 6
    first_wait: float = 1.0
    seed: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """What is posted to."""
        return self.base_url.rstrip("/") + "/chat/completions"

    def ask(self, system: str, user: str, max_tokens: int, label: str) -> str:
        """The model's reply at temperature 0.

        Args:
            system: Its instructions.
            user: The message.
            max_tokens: Of the reply.
            label: What is asked about, so that each question has its own jitter.

        Raises:
            UserError: If the endpoint refuses, or fails at every attempt.
            StoppedError: If ``stop`` was set meanwhile.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        jitter = random.Random(f"{self.seed} {label}")
        trouble = _TroubleError("")
        for attempt in range(self.attempts):
            if self.stop.wait(self._wait(attempt, trouble, jitter) if attempt else 0):
                raise StoppedError
            try:
                return self._post(json.dumps(body).encode())
            except _TroubleError as error:
                trouble = error
        raise UserError(
            f"{self.url}: gave up after {self.attempts} attempts ({trouble}); "
            "mend the endpoint, the same command goes on"
        )

    def _wait(self, attempt: int, trouble: "_TroubleError", jitter: random.Random) -> float:
        usual = self.first_wait * 2 ** (attempt - 1) * jitter.uniform(0.5, 1.0)
        return min(max(usual, trouble.retry_after), _LONGEST_WAIT)

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return _reply(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _TroubleError(str(reason) or type(error).__name__) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means: try again, or an error for the user."""
        text = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
        if error.code == 429 or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            return _TroubleError(
                f"HTTP {error.code} {text}".strip(), float(after) if after.isdecimal() else 0.0
            )
        if error.code in (401, 403):
            state = "is not accepted" if self.api_key else "is not set"
            return UserError(
                f"{self.url}: HTTP {error.code}: the key in the environment's {self.api_key_env} {state}; "
                "set it, or name another variable with --api_key_env"
            )
        return UserError(
            f"{self.url}: HTTP {error.code} {text}; check --base_url (it often ends in /v1) "
            f"and --model={self.model}"
        )


class _TroubleError(Exception):
    """A failure that may pass."""

    def __init__(self, text: str, retry_after: float = 0.0):
        super().__init__(text)
        self.retry_after = retry_after


def _reply(raw: bytes) -> str:
    try:
        answer: Any = json.loads(raw)
        content = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise _TroubleError(f"no chat completion: {raw[:80].decode('utf-8', 'replace')!r}") from None
    return content if isinstance(content, str) else ""  # null: the judge said nothing

"""A transcript that is fed in as it is spoken, and asked about now and then.

    VLLM_PLUGINS=sink_vllm vllm serve MODEL --kv-policy sink
    some-recognizer | python -m examples.transcription [--url http://127.0.0.1:8000]

Every line of the input is appended to one stream and computed at once, without generating; a line
that begins with `?` is a question, and is answered from what the window still has. As the lines
are computed already, an answer begins after the question's own tokens only.
"""

import argparse
import os
import sys
from typing import Any

import httpx


class Transcript:
    """One stream of `/v1/streams`, of a server that may check keys."""

    def __init__(self, http: httpx.Client, instructions: str) -> None:
        self._http = http
        pinned = {"system": instructions, "sink_pin": "system"}
        self._path = f"/v1/streams/{self._post('/v1/streams', pinned)['id']}"

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        parsed: dict[str, Any] = answer.json()
        if answer.is_error:
            raise RuntimeError(parsed["error"]["message"])
        return parsed

    def hear(self, line: str) -> dict[str, Any]:
        """Append what was said; returns the stream as it is then."""
        heard = {"messages": [{"role": "user", "content": line}]}
        stream: dict[str, Any] = self._post(f"{self._path}/append", heard)["stream"]
        return stream

    def ask(self, question: str, max_tokens: int = 200) -> tuple[str, dict[str, Any]]:
        """The answer, and what it cost."""
        asked = {"messages": [{"role": "user", "content": question}]}
        generate = {"max_tokens": max_tokens}
        answer = self._post(f"{self._path}/append", {**asked, "generate": generate})
        return answer["text"], answer["usage"]

    def close(self) -> None:
        self._http.delete(self._path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--instructions", default="Answer from the transcript, in one sentence.")
    options = parser.parse_args()
    key = os.environ.get("VLLM_API_KEY", "none")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=options.url, headers=headers, timeout=600) as http:
        transcript = Transcript(http, options.instructions)
        for line in sys.stdin:
            if line.startswith("?"):
                text, usage = transcript.ask(line[1:].strip())
                print(f"{text}\n  [computed {usage['computed_tokens']} tokens for it]", flush=True)
            elif line.strip():
                transcript.hear(line.strip())
        transcript.close()


if __name__ == "__main__":
    main()

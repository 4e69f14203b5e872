"""Teacher forcing inside the engine: the worker notes what every token of a text was worth.

vLLM's own ``prompt_logprobs`` cannot be used for a stream: they are collected in one tensor for
the whole prompt, so the policy refuses them beyond the capacity, and a million tokens of them
would be a million Python objects in one response. Custom logits processors are refused as well.
So ``Recorder`` is loaded with vLLM's official ``worker_extension_cls``, which adds methods to the
worker class, and a forward hook on the model (PyTorch's own) does the rest:

- *prompt*: a text of any length is the prompt of one request. Of every chunk the hook takes the
  hidden states of all tokens, and the model's own ``compute_logits`` makes logits of them.
- *decode*: a text is given beforehand; the request starts with its first token and every next
  one is forced: its log-probability is noted, then the logits are replaced so that greedy
  sampling must take it. Nothing of the step is changed apart from that choice.

Both note ``-log p(text[t] | cache)`` for every stream position t >= 1, in order, from raw logits in
float32. Losses leave the worker with ``take_losses``, so nothing grows with the stream.

The engine must run eagerly (hooks of replayed CUDA graphs do not fire) and on vLLM's V1 runner.
"""

from collections.abc import Callable
from typing import Any

import torch

ROWS = 2048
"""Rows of logits made at once; bounds the memory of large vocabularies."""


class Recorder:
    """Methods added to the worker; see ``vllm.config.ParallelConfig.worker_extension_cls``.

    All names start with ``quality_``: the methods share the worker's namespace.
    """

    model_runner: Any
    quality_state: "State"

    def quality_start(self) -> None:
        """Watch the model from now on; warm-up and self-test are over."""
        runner = self.model_runner
        self.quality_state = State(runner)
        runner.model.register_forward_hook(self.quality_state.after_forward, with_kwargs=True)
        compute_logits = runner.model.compute_logits
        self.quality_state.compute_logits = compute_logits
        runner.model.compute_logits = self.quality_state.forcing(compute_logits)

    def quality_force(self, name: str, text: list[int]) -> None:
        """Make the decode steps of request ``name`` follow ``text`` (prompt: its first token)."""
        self.quality_state.forced[name] = text

    def quality_take_losses(self) -> dict[str, list[float]]:
        """Losses by request name since the last call, in the order of the text."""
        return self.quality_state.take()

    def quality_forget(self, name: str) -> None:
        """A forced request has ended; its name may be used again."""
        self.quality_state.forget(name)

    def quality_leave_sinks(self) -> None:
        """The classic mistake, as a negative control: sinks keep their first rotation.

        Queries and window keys are rotated at stream positions, sinks at 0 .. S-1, for ever. Only
        the rotation of the moves is left out; everything else is the product.
        """
        mover = self.model_runner.page_mover
        run = mover.run
        mover.run = lambda moves: run([move._replace(delta=0) for move in moves])


class State:
    """What the recorder knows of the requests in the batch."""

    compute_logits: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.forced: dict[str, list[int]] = {}
        self._at: dict[str, int] = {}  # decode: index of the text's last computed token
        self._last: dict[str, torch.Tensor] = {}  # prompt: log-probs behind the last token
        self._losses: dict[str, list[torch.Tensor]] = {}

    def take(self) -> dict[str, list[float]]:
        taken = {name: torch.cat(parts).tolist() for name, parts in self._losses.items()}
        self._losses = {}
        running = {external(request) for request in self.runner.requests}
        self._last = {name: row for name, row in self._last.items() if name in running}
        return taken

    def forget(self, name: str) -> None:
        del self.forced[name], self._at[name]

    def after_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note the losses of prompt tokens in this step."""
        requests = self.runner.input_batch.req_ids
        starts = self.runner.query_start_loc.np[: len(requests) + 1].tolist()
        tokens = kwargs["input_ids"]
        for request, start, end in zip(requests, starts, starts[1:], strict=False):
            name = external(request)
            if name not in self.forced and end > start:
                self._note_prompt(name, tokens[start:end], output[start:end])

    def _note_prompt(self, name: str, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        previous = self._last.pop(name, None)
        if previous is not None:
            self._note(name, previous, tokens[:1])
        for first in range(0, len(tokens), ROWS):
            logits = self.compute_logits(hidden[first : first + ROWS])
            behind = logits.float().log_softmax(-1)
            targets = tokens[first + 1 : first + ROWS + 1]
            self._note(name, behind[: len(targets)], targets)
        self._last[name] = behind[-1:].clone()

    def _note(self, name: str, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        losses = -logprobs.gather(1, targets.long().unsqueeze(1)).squeeze(1)
        self._losses.setdefault(name, []).append(losses.cpu())

    def forcing(
        self, compute_logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model's ``compute_logits`` for sampling: one row per request, in batch order."""

        def compute(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute_logits(hidden, *args, **kwargs)
            for row, request in enumerate(self.runner.input_batch.req_ids):
                text = self.forced.get(name := external(request))
                if text is None:
                    continue
                at = self._at.get(name, 0) + 1
                if at == len(text):
                    continue  # the request has what it was asked for
                target = torch.tensor([text[at]], device=logits.device)
                self._note(name, logits[row : row + 1].float().log_softmax(-1), target)
                logits[row] = -torch.inf
                logits[row, text[at]] = 0.0
                self._at[name] = at
            return logits

        return compute


def external(request: str) -> str:
    """The caller's name of a request: vLLM appends a hyphen and random characters."""
    return request.rpartition("-")[0]

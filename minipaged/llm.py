"""The front door: `LLM`, with vLLM's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence as Items
from numbers import Integral
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

from .engine import LLMEngine
from .errors import EngineClosed, InvalidParams, InvalidPrompt, MinipagedError, RequestsRefused
from .outputs import BeamSearchOutput, RequestOutput, beam_output_of, output_of
from .params import BeamSearchParams, EngineConfig, SamplingParams
from .sequence import SequenceGroup
from .trace import NO_TRACE

if TYPE_CHECKING:
    from .memory.manager import BlockSpaceManager
    from .trace import Trace
    from .watch import Watch

Prompt = str | Items[int] | dict[str, Any]
Params = SamplingParams | BeamSearchParams
Output = TypeVar("Output", RequestOutput, BeamSearchOutput)


class LLM:
    """A model that generates text, its KV cache in paged blocks.

    Use it as a context manager, or call `close`; making a new one under the same name is fine too.

    Parameters
    ----------
    model : str
        ``"tiny-opt"`` (bundled), a local folder, or a name on the Hugging Face hub.
    trace : Trace or None
        Receives what the engine does; see `minipaged.trace`.
    **options
        The other fields of `EngineConfig`, by name.

    Raises
    ------
    InvalidConfig, UnknownModel, MissingWeights, UnsupportedModel
        Each with what to do instead.
    """

    def __init__(self, model: str = "tiny-opt", trace: "Trace | None" = None, **options: Any) -> None:
        self._engine: LLMEngine | None = LLMEngine(EngineConfig(model, **options), NO_TRACE if trace is None else trace)
        self.trace = trace
        self.watcher: Watch | None = None

    @property
    def engine(self) -> LLMEngine:
        """The engine behind it.

        Raises
        ------
        EngineClosed
            After `close`.
        """
        if self._engine is None:
            raise EngineClosed("this LLM is closed; make a new one")
        return self._engine

    @property
    def block_manager(self) -> "BlockSpaceManager":
        """All block tables; shows itself in a notebook."""
        return self.engine.manager

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, as transformers made it."""
        return self.engine.tokens.tokenizer

    def generate(self, prompts: Prompt | Items[Prompt],
                 sampling_params: Params | Items[Params] | None = None,
                 use_tqdm: bool = True) -> list[RequestOutput]:
        """Generate for all prompts at once.

        Parameters
        ----------
        prompts : str, list[int], or a list of these
            Texts or token ids; vLLM's ``{"prompt": …}`` and ``{"prompt_token_ids": …}`` are taken too.
        sampling_params : SamplingParams or BeamSearchParams, or one per prompt, or None
            None: the defaults. Greedy, sampled and beam-searched requests may run in one batch.
        use_tqdm : bool
            Show progress, if this runs in a terminal.

        Returns
        -------
        list[RequestOutput]
            In the order of the prompts.

        Raises
        ------
        InvalidPrompt, InvalidParams, RequestTooLarge
            A single prompt was refused.
        RequestsRefused
            Some of several prompts were refused, with their errors; its ``outputs`` are those of the others.
        """
        groups: list[SequenceGroup | MinipagedError] = []
        try:
            self._add(prompts, sampling_params, groups)
            self._run([group for group in groups if isinstance(group, SequenceGroup)], use_tqdm)
        finally:
            self._abort(groups)
        return self._served(groups, output_of)

    def beam_search(self, prompts: Prompt | Items[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """Search the likeliest continuations of all prompts at once; prompts and errors as in `generate`."""
        if not isinstance(params, BeamSearchParams):
            raise InvalidParams(f"beam_search takes BeamSearchParams, not {params!r}")
        groups: list[SequenceGroup | MinipagedError] = []
        try:
            self._add(prompts, params, groups)
            self._run([group for group in groups if isinstance(group, SequenceGroup)], use_tqdm=False)
        finally:
            self._abort(groups)
        return self._served(groups, lambda group: beam_output_of(group, self.engine.tokens))

    def register_prefix(self, prefix: Prompt) -> None:
        """Keep the blocks of a prefix for all prompts that begin with it (§4.4), until `close`.

        Parameters
        ----------
        prefix : str or list[int]
            A text is tokenized as the beginning of a prompt is; a prompt shares the prefix only if its own tokens
            begin with just these.

        Raises
        ------
        InvalidPrompt, RequestTooLarge
            As for a prompt.
        """
        self.engine.register_prefix(self.engine.tokens.encode(prefix) if isinstance(prefix, str) else list(prefix))

    def watch(self, steps_per_second: float | None = None) -> "Watch":
        """Draw each iteration as it happens: ``with llm.watch() as view: llm.generate(…)``.

        The view can be scrubbed meanwhile, shows memory in use and tokens per second, and has a stop button: it ends
        the requests, and those that still come until the block ends, with finish reason "abort". Where Jupyter delivers
        no button's message while a cell runs (without kernel subshells), interrupt the kernel instead. After the block
        the view holds the whole trace; outside of a notebook its last picture is printed.

        Parameters
        ----------
        steps_per_second : float or None
            Go no faster, so that a class can follow; None: as fast as it can.

        Raises
        ------
        InvalidParams
            A speed that is no positive number.
        NotIdle
            It is watched already; or the LLM has no trace, and blocks are in use.
        """
        from .watch import Watch  # brings views along

        return Watch(self, steps_per_second)

    def stream(self, prompts: Prompt | Items[Prompt],
               sampling_params: Params | Items[Params] | None = None) -> Iterator[RequestOutput]:
        """Generate, and yield each request as it is after every token; parameters as in `generate`.

        Leaving the loop early ends the requests and frees their blocks.

        Raises
        ------
        InvalidPrompt, InvalidParams, RequestTooLarge
            A prompt was refused; none of them runs then.
        EngineClosed
            The LLM was closed meanwhile.
        """
        groups: list[SequenceGroup | MinipagedError] = []
        try:
            self._add(prompts, sampling_params, groups)
            for group in groups:
                if isinstance(group, MinipagedError):
                    raise group
            shown = [(0, False)] * len(groups)
            while True:
                now = [(group.num_generated, group.finished) for group in groups]
                if now != shown:  # other callers' iterations serve these requests too
                    yield from self.engine.snapshot([group for group, a, b in zip(groups, now, shown) if a != b])
                    shown = now
                elif all(group.finished for group in groups):
                    return
                else:
                    self._step()
        finally:
            self._abort(groups)

    def abort(self, request_id: str) -> None:
        """End a request that another thread, or a stream, waits for; its blocks are free when this returns.

        Its outputs have finish reason "abort". A request that has finished, or never was, is none of its business.
        """
        engine = self.engine
        engine.abort(*(group for group in engine.scheduler.unfinished if str(group.request_id) == request_id))

    def close(self) -> None:
        """Give back the model's and the blocks' memory; a stream that still runs ends with EngineClosed.

        Closing twice is fine.
        """
        self._engine = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _add(self, prompts: Prompt | Items[Prompt], params: Params | Items[Params] | None,
             groups: list[SequenceGroup | MinipagedError]) -> None:
        """Queue each prompt, or say why not; ``groups`` gets one entry each."""
        prompts = _as_list(prompts)
        if params is None or isinstance(params, Params):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts) or not all(isinstance(p, Params) for p in params):
            raise InvalidParams(f"{len(prompts)} prompts, and {params!r}; give one SamplingParams or BeamSearchParams, "
                                "or one for each prompt")
        for prompt, p in zip(prompts, params):
            try:
                text, token_ids = self._parse(prompt)
                groups.append(self.engine.add_request(token_ids, p, text))
            except MinipagedError as error:
                groups.append(error)

    def _parse(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text, if it was given, and token ids."""
        if isinstance(prompt, dict):  # vLLM's TextPrompt and TokensPrompt
            prompt = prompt.get("prompt", prompt.get("prompt_token_ids"))
        if isinstance(prompt, str):
            return prompt, self.engine.tokens.encode(prompt)
        try:
            if not isinstance(prompt, bytes):
                return None, [token if isinstance(token, bool) else index(token) for token in prompt]
        except TypeError:
            pass
        raise InvalidPrompt(f"a prompt is {prompt!r}; give a text or a list of token ids")

    def _served(self, groups: list[SequenceGroup | MinipagedError], output: Callable[[SequenceGroup], Output],
                ) -> list[Output]:
        """The outputs, or an error if a request was refused."""
        outputs = [output(group) if isinstance(group, SequenceGroup) else None for group in groups]
        refused = [group for group in groups if isinstance(group, MinipagedError)]
        if not refused:
            return outputs
        if len(groups) == 1:
            raise refused[0]
        indices = [i for i, out in enumerate(outputs) if out is None]
        error = RequestsRefused(f"prompts {indices} of {len(groups)} were refused; the others are in .outputs", refused)
        error.outputs = outputs
        raise error

    def _run(self, groups: list[SequenceGroup], use_tqdm: bool) -> None:
        from tqdm import tqdm

        # disable=None: no bar where the output is not a terminal, so neither in a notebook nor under pytest.
        with tqdm(total=len(groups), desc="requests", disable=None if use_tqdm else True) as bar:
            while groups:
                self._step()
                unfinished = [group for group in groups if not group.finished]
                bar.update(len(groups) - len(unfinished))
                groups = unfinished

    def _step(self) -> None:
        self.engine.step()
        if (watcher := self.watcher) is not None:
            watcher.after_step()

    def _abort(self, groups: list[SequenceGroup | MinipagedError]) -> None:
        if self._engine is not None:
            self._engine.abort(*(group for group in groups if isinstance(group, SequenceGroup)))


def _as_list(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises
    ------
    InvalidPrompt
        Neither text, nor token ids, nor a list of them.
    """
    if hasattr(prompts, "tolist"):  # numpy, torch
        prompts = prompts.tolist()
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Items):
        raise InvalidPrompt("prompts are neither a text, nor a list of token ids, nor a list of these")
    return [prompts] if all(isinstance(prompt, Integral) for prompt in prompts) else list(prompts)

"""Bodies of the fake server's answers: pure, from the request's body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from proctor.infer.fake_model import END, FakeModel, decode, encode
from proctor.infer.next_tokens import MOST_IDS
from proctor.testing.options import ServerOptions

_STRINGS = [decode([i]) if i < 128 else f"<0x{i:02X}>" for i in range(256)]
_NEUTRAL = {
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


_BEGINS_CHARACTER: Final = range(0xC2, 0xF5)
"""Bytes that begin a UTF-8 character of several bytes."""


class Refused(ValueError):
    """The request is answered with a status of 400."""


def aborted(answer: Answer) -> Answer:
    """As servers answer what was under way when they were told to end: the first half, with a reason of their own."""
    for choice in answer.body.get("choices", ()):
        said, name = (choice["message"], "content") if "message" in choice else (choice, "text")
        said[name] = said[name][: len(said[name]) // 2]
        choice["finish_reason"] = "abort"
    return answer


def spoilt(answer: Answer) -> Answer:
    """As one server answers next tokens beside other kinds of requests: what is not the likeliest is -9999."""
    for choice in answer.body["choices"]:
        found = choice["logprobs"]
        found["top_logprobs"] = [dict.fromkeys(found["top_logprobs"][0], -9999.0)]
    return answer


@dataclass(slots=True)
class Answer:
    """One body and what it cost."""

    body: dict[str, Any]
    generated: int


def prompts_of(body: Mapping[str, Any]) -> list[list[int]]:
    """The prompts of a completion as token ids: one text, one list of ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [encode(prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise Refused("prompt must be a text, token ids, or a list of them")
    items = cast("list[Any]", prompt)
    if isinstance(items[0], int):
        return [items]
    return [encode(p) if isinstance(p, str) else p for p in items]


def chat_prompt(body: Mapping[str, Any]) -> list[int]:
    """The conversation as the fake's own template renders it."""
    messages = cast("list[dict[str, str]]", body.get("messages") or [])
    if not messages:
        raise Refused("messages must not be empty")
    text = "".join(f"[{m['role']}]{m['content']}\n" for m in messages)
    if body.get("continue_final_message"):
        return encode(text[:-1])
    return encode(text + "[assistant]")


class Answerer:
    """Answers completions for one set of options."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._model = FakeModel(options.weights, options.end_share)
        self._blocks: set[int] = set()
        """The states after every whole block of the prefix cache that has been computed."""
        self.cached_echo = options.cached_echo
        """May be changed while it runs."""

    def completion(self, body: Mapping[str, Any], prompts: Sequence[list[int]], *, chat: bool) -> Answer:
        """/v1/completions or /v1/chat/completions. Raises Refused."""
        prompts = [ids[-self._options.cut_at :] for ids in prompts]
        choices: list[dict[str, Any]] = []
        generated = 0
        for index, ids in enumerate(prompts):
            self._cached(ids)
            choice, count = self._choice(body, ids, chat=chat)
            choice["index"] = index
            choices.append(choice)
            generated += count
        prompt_tokens = sum(map(len, prompts))
        return Answer(
            {
                "id": "cmpl-fake",
                "object": "chat.completion" if chat else "text_completion",
                "created": 0,
                "model": self._options.served_model,
                "choices": choices,
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": generated,
                    "total_tokens": prompt_tokens + generated,
                },
            },
            generated,
        )

    def generate(self, body: Mapping[str, Any]) -> Answer:
        """vLLM's /inference/v1/generate, as far as it echoes. Raises Refused.

        What was computed before comes back as memory that nobody wrote: with what some other request left there.
        """
        ids = cast("list[int]", body["token_ids"])
        self._check_length(ids, 1)
        cached = self._cached(ids)
        mode = self.cached_echo if cached else "right"
        if mode == "refused":
            raise Refused("Out of range float values are not JSON compliant")
        values, best = self._model.score(ids)
        if mode == "shifted":
            values, best = [*values[1:], values[-1]], [*best[1:], best[-1]]
        places: list[dict[str, Any] | None] = [None]
        for at, (token, value, top) in enumerate(zip(ids[1:], values, best, strict=True), start=1):
            place = {str(token): {"logprob": value if at > cached else -0.5, "rank": 1, "decoded_token": None}}
            if value != top and at > cached:
                place["-1"] = {"logprob": top, "rank": 1, "decoded_token": None}
            places.append(place)
        usage: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        if mode != "uncounted":
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        choice = {"index": 0, "token_ids": [self._model.generate(ids, 1)[0][0]], "finish_reason": "length"}
        return Answer({"choices": [choice], "prompt_logprobs": places, "usage": usage}, 1)

    def _cached(self, ids: list[int]) -> int:
        """How many of the first tokens the prefix cache has; never the last one. It has the prompt's blocks then."""
        block = self._options.prefix_cache
        if not block:
            return 0
        state, found, whole = self._model.seed, 0, True
        for end in range(block, len(ids) + 1, block):
            state = self._model.read(state, ids[end - block : end])
            whole = whole and state in self._blocks and end < len(ids)
            found = end if whole else found
            self._blocks.add(state)
        return found

    def native(self, body: Mapping[str, Any]) -> Answer:
        """llama.cpp's /completion: text, and token probabilities before any logit bias."""
        (ids,) = prompts_of(body)
        ids = ids[-self._options.cut_at :]
        if not body.get("n_probs"):
            return self._native_text(body, ids)
        self._check_length(ids, 1)
        state = self._model.read(self._model.seed, ids)
        bias = cast("list[list[float]]", body.get("logit_bias") or [])
        best, top = self._model.best(state)
        token = int(bias[0][0]) if bias else best
        others = [(best, top)]
        wanted = int(body.get("n_probs") or 0)
        if wanted > 1:
            rest = ((other, self._model.logprob(state, other)) for other in range(256) if other != best)
            others += sorted(rest, key=lambda one: -one[1])[: wanted - 1]
        step = {
            "id": token,
            "token": string(token),
            "logprob": self._model.logprob(state, token),
            "top_logprobs": [{"id": t, "token": string(t), "logprob": value} for t, value in others],
        }
        said: dict[str, Any] = {"content": string(token), "tokens_predicted": 1}
        if token not in _BEGINS_CHARACTER:
            # As the real one does: a text that ends inside a character is held back, with its probabilities.
            said["completion_probabilities"] = [step]
        return Answer(said, 1)

    def _native_text(self, body: Mapping[str, Any], ids: list[int]) -> Answer:
        max_tokens = int(body.get("n_predict", 16))
        self._check_length(ids, max_tokens)
        tokens, _, ended = self._model.generate(ids, max_tokens, self._sampling(body))
        text, reason = self._finish(body, tokens, ended=ended)
        return Answer(
            {
                "content": text,
                "tokens": tokens,
                "stop_type": "limit" if reason == "length" else "word",
                "tokens_predicted": len(tokens),
                "tokens_evaluated": len(ids),
            },
            len(tokens),
        )

    def _choice(self, body: Mapping[str, Any], ids: list[int], *, chat: bool) -> tuple[dict[str, Any], int]:
        max_tokens = int(body.get("max_tokens", 16) or 0)
        echo = bool(body.get("echo")) and not chat and self._options.echo != "ignored"
        if max_tokens == 0 and not (body.get("echo") and self._options.echo_zero):
            raise Refused("max_tokens must be at least 1")
        self._check_length(ids, max_tokens)
        tokens, logprobs, ended = self._model.generate(ids, max_tokens, self._sampling(body))
        text, reason = self._finish(body, tokens, ended=ended)
        choice: dict[str, Any] = {"finish_reason": reason, "logprobs": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
        if body.get("logprobs") is not None and not chat:
            choice["logprobs"] = self._logprobs(ids, tokens, logprobs, echo=echo)
            if body.get("logprob_token_ids") and self._options.next_tokens != "ignored":
                choice["logprobs"] |= self._next_tokens(body, ids, tokens[0], logprobs[0])
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = decode(ids) + text if echo else text
        return choice, len(tokens)

    def _next_tokens(self, body: Mapping[str, Any], ids: list[int], token: int, logprob: float) -> dict[str, Any]:
        state = self._model.read(self._model.seed, ids)
        wanted = cast("list[int]", body["logprob_token_ids"])
        if len(wanted) > MOST_IDS:
            raise Refused(f"logprob_token_ids has {len(wanted)} entries, {MOST_IDS} are allowed")
        values = {token: logprob, **{t: self._model.logprob(state, t) for t in wanted}}
        return {
            "tokens": [f"token_id:{token}"],
            "token_logprobs": [logprob],
            "top_logprobs": [{f"token_id:{t}": value for t, value in values.items()}],
        }

    def _check_length(self, ids: list[int], max_tokens: int) -> None:
        if not ids:
            raise Refused("the prompt must not be empty")
        if len(ids) + max_tokens > self._options.max_model_len:
            raise Refused(
                f"This model's maximum context length is {self._options.max_model_len} tokens. However, you requested "
                f"{len(ids) + max_tokens} tokens ({len(ids)} in the prompt, {max_tokens} for the completion)."
            )

    def _sampling(self, body: Mapping[str, Any]) -> str:
        sent = {**self._options.defaults, **body}
        changed = [
            f"{name}={float(sent[name])}"
            for name, neutral in _NEUTRAL.items()
            if sent.get(name) is not None and float(sent[name]) != neutral
        ]
        temperature = float(sent.get("temperature", 1.0))
        if temperature > 0:
            changed.append(f"{temperature}:{sent.get('top_k')}:{sent.get('seed')}")
        return ";".join(changed)

    @staticmethod
    def _finish(body: Mapping[str, Any], tokens: list[int], *, ended: bool) -> tuple[str, str]:
        text = decode(tokens)
        stops = body.get("stop") or ()
        stops = [stops] if isinstance(stops, str) else stops
        cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
        if cuts:
            return text[: min(cuts)], "stop"
        return text, "stop" if ended else "length"

    def _logprobs(self, ids: list[int], tokens: list[int], logprobs: list[float], *, echo: bool) -> dict[str, Any]:
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        shown = tokens
        if echo:
            scored, best = self._model.score(ids)
            shown = ids + tokens
            values = [None, *scored]
            names = [string(t) for t in ids[1:]]
            tops = [None, *({n: v} if v == b else {n: v, "·": b} for n, v, b in zip(names, scored, best, strict=True))]
        values += logprobs
        tops += [{string(t): v} for t, v in zip(tokens, logprobs, strict=True)]
        if echo and self._options.echo == "shifted":
            # As one server does: each place shows its successor's value.
            values = [None, *values[2:], values[-1]]
            tops = [None, *tops[2:], tops[-1]]
        offsets: list[int] = []
        at = 0
        names = [string(t) for t in shown]
        for name in names:
            offsets.append(at)
            at += len(name)
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def string(token: int) -> str:
    """How a token is shown."""
    return _STRINGS[token] if token < 256 else "" if token == END else f"<{token}>"

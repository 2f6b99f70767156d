"""Which router logits does the simulator route, and how do they change over a run?

Letters: M MoE layers, E experts, K experts per token, T tokens of a step, C topics, R rank of the router,
D documents of a step.

    logits_TE = mean + spread(step) * (popularity_E(step) + topics_CE[topic_T] + noise_TE)

topic_T follows Zipf's law, for each token or for each document. With a rank, popularity, topics and noise are
directions in a hidden space of R dimensions that a fixed gate_RE maps to the experts; without, each expert's
are independent. Layers are independent draws. configs/scores/ has one file per scenario; none of it is a
published experiment.
"""

import hashlib
import math

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # of any count


def _within(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:  # so written, NaN is refused too
            raise ValueError(f"{name}={value}: must lie in [{low}, {high}]")


class TopicScores:
    """Draws the logits of (step, layer). Pure: the same arguments give the same bits on a machine, in any
    order.

    mean, popularity_std, topic_std, noise_std [logit]: the formula above, at a spread of 1.
    num_topics, zipf: topic c has a share ~ (c + 1) ** -zipf.
    min_document [tokens], document_tail: documents share a topic; a length exceeds x with probability
        (min_document / x) ** document_tail (Pareto), and ends with the step at the latest. None: independent
        tokens.
    rank: R; None: full.
    change_at: share of the run after which, at `shift_step`,
        shifted_experts: this share of the experts (one at least) gets another popularity; the topics' shares
        are reversed; batch_factor: the number of tokens in a step is multiplied by this.
    drift_turns: over the run, popularity turns in the plane of two draws, this many full turns; the topics'
    shares go
        to the reversed ones and back twice a turn.
    final_spread: the spread falls (or grows) geometrically from 1 at the first step to this at the last.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        tokens: int,
        steps: int,
        seed: int,
        mean: float = -1.0,
        popularity_std: float = 0.8,
        topic_std: float = 0.7,
        noise_std: float = 0.8,
        num_topics: int = 32,
        zipf: float = 1.0,
        min_document: int | None = None,
        document_tail: float = 2.5,
        rank: int | None = None,
        change_at: float | None = None,
        shifted_experts: float = 0.0,
        batch_factor: float = 1.0,
        drift_turns: float = 0.0,
        final_spread: float = 1.0,
    ) -> None:
        _within(
            1,
            LARGEST,
            num_layers=num_layers,
            num_experts=num_experts,
            tokens=tokens,
            steps=steps,
            num_topics=num_topics,
        )
        _within(1, num_experts, top_k=top_k, rank=num_experts if rank is None else rank)
        _within(1, LARGEST, min_document=1 if min_document is None else min_document)
        _within(-100, 100, mean=mean, drift_turns=drift_turns)
        _within(0, 100, popularity_std=popularity_std, topic_std=topic_std, noise_std=noise_std, zipf=zipf)
        _within(0.01, 100, document_tail=document_tail)
        _within(1e-4, 1e4, batch_factor=batch_factor, final_spread=final_spread)
        _within(0, 1, change_at=0 if change_at is None else change_at, shifted_experts=shifted_experts)
        if (change_at is None) != (shifted_experts == 0 and batch_factor == 1):
            remedy = "set change_at together with shifted_experts or batch_factor, or none of them"
            raise ValueError(
                f"change_at={change_at}, shifted_experts={shifted_experts}, batch_factor={batch_factor}: "
                f"{remedy}"
            )
        self.shift_step = None if change_at is None else round(change_at * steps) + 1
        if self.shift_step is not None and not 1 < self.shift_step <= steps:
            remedy = "must leave one before and one after; use another share or more steps"
            raise ValueError(f"change_at={change_at} of {steps} steps: {remedy}")
        self.num_layers, self.num_experts, self.steps, self.seed = num_layers, num_experts, steps, seed
        self.tokens, self.changed_tokens = tokens, round(tokens * batch_factor)
        _within(1, LARGEST, tokens_after_change=self.changed_tokens)
        self.mean, self.noise_std, self.drift_turns, self.final_spread = (
            mean,
            noise_std,
            drift_turns,
            final_spread,
        )
        self.min_document, self.document_tail, self.shifted_experts = (
            min_document,
            document_tail,
            shifted_experts,
        )
        shares_C = torch.arange(1, num_topics + 1, dtype=torch.float64) ** -zipf
        self.shares_C = shares_C / shares_C.sum()

        width = rank or num_experts
        self.gate_MRE = None if rank is None else torch.empty(num_layers, rank, num_experts)
        self.topics_MCE = torch.empty(num_layers, num_topics, num_experts)
        self.popularity_M2E = torch.empty(num_layers, 2, num_experts)  # the first and the other
        self.shifted_ME = torch.zeros(num_layers, num_experts, dtype=torch.bool)
        for layer in range(num_layers):
            generator = self._generator(0, layer)  # runs have no step 0
            popularity = torch.randn(2, width, generator=generator) * popularity_std
            topics = torch.randn(num_topics, width, generator=generator) * topic_std
            if self.gate_MRE is not None:
                self.gate_MRE[layer].normal_(0, width**-0.5, generator=generator)
                popularity = popularity @ self.gate_MRE[layer]
                topics = topics @ self.gate_MRE[layer]
            self.popularity_M2E[layer], self.topics_MCE[layer] = popularity, topics
            num_shifted = max(1, round(shifted_experts * num_experts)) if shifted_experts else 0
            self.shifted_ME[layer, torch.randperm(num_experts, generator=generator)[:num_shifted]] = True
        most = max(self.tokens, self.changed_tokens)
        self._noise_TR, self._logits_TE = torch.empty(most, width), torch.empty(most, num_experts)

    def __call__(self, step: int, layer: int) -> Tensor:
        """logits_TE in float32; steps count from 1. The tensor is the caller's, to write into as well, until
        the next call.
        """
        _within(1, self.steps, step=step)
        _within(0, self.num_layers - 1, layer=layer)
        generator, num_tokens, spread = (
            self._generator(step, layer),
            self.tokens_at(step),
            self.spread_at(step),
        )
        topic_T = self._draw_topics(step, generator)
        table_CE = self.mean + spread * (self.topics_MCE[layer] + self.popularity_at(step, layer))
        noise_TR = self._noise_TR[:num_tokens].normal_(0, spread * self.noise_std, generator=generator)
        logits_TE = torch.index_select(table_CE, 0, topic_T, out=self._logits_TE[:num_tokens])
        return (
            logits_TE.add_(noise_TR)
            if self.gate_MRE is None
            else logits_TE.addmm_(noise_TR, self.gate_MRE[layer])
        )

    def tokens_at(self, step: int) -> int:
        return self.changed_tokens if self._is_shifted(step) else self.tokens

    def spread_at(self, step: int) -> float:
        return self.final_spread ** self._progress(step)

    def popularity_at(self, step: int, layer: int) -> Tensor:
        """popularity_E, at a spread of 1."""
        first_E, other_E = self.popularity_M2E[layer]
        if self._is_shifted(step):
            shifted_E = self.shifted_ME[layer]
            first_E, other_E = (
                torch.where(shifted_E, other_E, first_E),
                torch.where(shifted_E, first_E, other_E),
            )
        angle = self._angle(step)
        return math.cos(angle) * first_E + math.sin(angle) * other_E

    def topic_shares_at(self, step: int) -> Tensor:
        """shares_C of the topics, float64, summing to 1."""
        first_C, other_C = self.shares_C, self.shares_C.flip(0)
        if self._is_shifted(step) and self.shifted_experts:
            first_C, other_C = other_C, first_C
        return torch.lerp(first_C, other_C, math.sin(self._angle(step)) ** 2)

    def _draw_topics(self, step: int, generator: torch.Generator) -> Tensor:
        num_tokens = self.tokens_at(step)
        # enough: the shortest ones would fill the step
        num_documents = -(-num_tokens // (self.min_document or 1))
        cdf_C = self.topic_shares_at(step).cumsum(0)
        # < 1, so `right` never goes past the end
        u_D = torch.rand(num_documents, dtype=torch.float64, generator=generator)
        topic_D = torch.searchsorted(cdf_C / cdf_C[-1], u_D, right=True)
        if self.min_document is None:
            return topic_D
        u_D = torch.rand(num_documents, dtype=torch.float64, generator=generator)
        lengths_D = (self.min_document * (1 - u_D) ** (-1 / self.document_tail)).clamp_max(num_tokens).long()
        ends_D = lengths_D.cumsum(0)
        return topic_D[torch.searchsorted(ends_D, torch.arange(num_tokens), right=True)]

    def _generator(self, step: int, layer: int) -> torch.Generator:
        """No two (step, layer) of a run share a state: torch takes 32 bits, on which multiplying by an odd
        number is 1:1.
        """
        offset = int.from_bytes(hashlib.blake2b(str(self.seed).encode(), digest_size=4).digest(), "little")
        return torch.Generator().manual_seed((offset + step * self.num_layers + layer) * 0x9E3779B1 % 2**32)

    def _progress(self, step: int) -> float:
        return (step - 1) / max(self.steps - 1, 1)

    def _angle(self, step: int) -> float:
        return 2 * math.pi * self.drift_turns * self._progress(step)

    def _is_shifted(self, step: int) -> bool:
        return self.shift_step is not None and step >= self.shift_step

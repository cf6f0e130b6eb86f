"""The training loop: steps, checkpoints, progress and the finished checkpoint directory.

Owns the training state (parameters, optimisers, step, loss log). What data and which rate a step
gets is decided by pure functions of the step, so a resumed run repeats nothing and skips nothing.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from model1 import dense
from model1.errors import InvalidRequest
from model1.moe import ExpertBank
from model1.train import card, curve, optimiser
from model1.train.batches import token_batch
from model1.train.corpus import Split
from model1.train.initial import initialise
from model1.train.presets import PRESETS, Preset, learning_rate_at, phase_at
from model1.train.tokenize import save_tokenizer, train_tokenizer
from model1.trunk import Block, Trunk

STATE_FILE: Final = "training.pt"
_CHECKPOINT_STEPS: Final = 50
_MAX_GRADIENT_NORM: Final = 1.0
# How far one step moves the bias of an expert that has too little or too much work.
_BALANCE_RATE: Final = 2e-3


@dataclass(slots=True)
class LossRow:
    step: int
    tokens: int
    loss: float
    indexer_loss: float
    seconds: float


def train(
    preset: str,
    out_dir: Path,
    device: str = "cpu",
    steps: int | None = None,
    resume: bool = False,
    progress: Callable[[str], None] = print,
) -> None:
    """Train and write a checkpoint directory with tokenizer, model card and loss curve."""
    if preset not in PRESETS:
        raise InvalidRequest(f"no preset {preset!r}, only {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, out_dir)
    run = TrainingRun(chosen, tokenizer, out_dir, torch.device(device), steps or chosen.steps)
    if resume:
        run.restore()
    run.run_until(run.steps, progress)
    card.publish(run.trunk, run.bank, run.tokenizer, run.summary(), out_dir, progress)


class TrainingRun:
    """One run's state. `run_until` may be cut off at any moment; `restore` takes it up again."""

    def __init__(
        self,
        preset: Preset,
        tokenizer: Tokenizer,
        out_dir: Path,
        device: torch.device,
        steps: int,
    ) -> None:
        self.preset = preset
        self.out_dir = out_dir
        self.device = device
        self.steps = steps
        self.tokenizer = tokenizer
        self.trunk = Trunk(preset.config, torch.float32, "cpu")
        self.bank = ExpertBank(preset.config, range(preset.config.n_routed_experts))
        initialise(self.trunk, self.bank, preset.seed)
        self.trunk = self._on_device(self.trunk, device)
        self.bank.to(device)
        self._optimisers = optimiser.build(
            # By name: a saved state must not depend on the order of definition.
            sorted([*self.trunk.named_parameters(), *self.bank.named_parameters()]),
            preset.weight_decay,
        )
        self.log: list[LossRow] = []
        self._step = 0
        self._seconds_before = 0.0

    def restore(self) -> None:
        path = self.out_dir / STATE_FILE
        if not path.is_file():
            raise InvalidRequest(f"nothing to resume: no {path}")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.trunk.load_state_dict(state["trunk"])
        self.bank.load_state_dict(state["bank"])
        for one, saved in zip(self._optimisers, state["optimisers"], strict=True):
            one.load_state_dict(saved)
        self.log = [LossRow(*row) for row in state["log"]]
        self._step = state["step"]
        self._seconds_before = self.log[-1].seconds if self.log else 0.0

    def run_until(self, end_step: int, progress: Callable[[str], None]) -> None:
        """Take the steps up to `end_step` of the `steps` that the schedule is made for."""
        started = time.monotonic()
        first, tokens = self._step, self.log[-1].tokens if self.log else 0
        while self._step < end_step:
            before = time.monotonic()
            loss, indexer_loss, num_tokens = self._one_step()
            tokens += num_tokens
            now = time.monotonic()
            seconds = self._seconds_before + now - started
            self.log.append(LossRow(self._step, tokens, loss, indexer_loss, seconds))
            self._step += 1
            if self._step % 10 == 0 or self._step == end_step:
                left = (now - started) / (self._step - first) * (self.steps - self._step)
                progress(
                    f"step {self._step}/{self.steps} loss {self._recent_loss():.3f} "
                    f"indexer {indexer_loss:.3f} {num_tokens / (now - before):.0f} tokens/s "
                    f"ETA {left / 60:.1f} min"
                )
            if self._step % _CHECKPOINT_STEPS == 0 or self._step == end_step:
                self._save()

    def summary(self) -> card.RunSummary:
        last = self.log[-1]
        return card.RunSummary(
            preset=self.preset,
            steps=self._step,
            tokens=last.tokens,
            wall_seconds=last.seconds,
            device=card.device_name(self.device),
            curve=[curve.Point(r.step, r.tokens, r.loss, r.indexer_loss) for r in self.log],
        )

    def _one_step(self) -> tuple[float, float, int]:
        phase = phase_at(self.preset, self._step, self.steps)
        rate = learning_rate_at(self.preset, self._step, self.steps)
        batch = token_batch(
            self.tokenizer, Split.TRAIN, self._step, phase, self.preset.batch_tokens
        )
        options = dense.DenseOptions(sparse=phase.sparse, indexer_loss=phase.indexer_loss)
        out = dense.forward(self.trunk, self.bank, batch.inputs.to(self.device), options)
        # Keys and values that were drawn at random teach nothing: no head, no loss for them.
        weights = batch.weights.flatten()
        counted = weights.nonzero().squeeze(1)
        hidden = out.hidden.flatten(0, 1)[counted.to(self.device)]
        targets = batch.targets.flatten()[counted].to(self.device)
        weights = weights[counted].to(self.device)
        nll = F.cross_entropy(F.linear(hidden, self.trunk.head.weight), targets, reduction="none")
        ((nll * weights).sum() / weights.sum() + out.indexer_loss).backward()
        parameters = [*self.trunk.parameters(), *self.bank.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        for one in self._optimisers:
            for group in one.param_groups:
                group["lr"] = rate
            one.step()
            one.zero_grad(set_to_none=True)
        self._balance(out.expert_loads)
        return nll.mean().item(), out.indexer_loss.item(), batch.inputs.numel()

    @torch.no_grad()
    def _balance(self, loads: tuple[Tensor, ...]) -> None:
        """Move each expert's bias towards an even load (no auxiliary loss)."""
        for block, load in zip(self.trunk.layers, loads, strict=True):
            gate = cast(Block, block).ffn.gate
            if hasattr(gate, "bias"):
                gate.bias.add_(_BALANCE_RATE * (load.float().mean() - load).sign())

    def _recent_loss(self) -> float:
        recent = self.log[-10:]
        return sum(row.loss for row in recent) / len(recent)

    def _save(self) -> None:
        """Whole or not at all: a cut-off leaves the previous state."""
        state = {
            "trunk": self.trunk.state_dict(),
            "bank": self.bank.state_dict(),
            "optimisers": [one.state_dict() for one in self._optimisers],
            "step": self._step,
            "log": [(r.step, r.tokens, r.loss, r.indexer_loss, r.seconds) for r in self.log],
        }
        part = self.out_dir / f".{STATE_FILE}.part"
        torch.save(state, part)
        os.replace(part, self.out_dir / STATE_FILE)

    @staticmethod
    def _on_device(trunk: Trunk, device: torch.device) -> Trunk:
        """`Trunk.to` with the rotary frequencies, which are no buffers."""
        moved = Trunk(trunk.config, torch.float32, device)
        moved.load_state_dict(trunk.state_dict())
        return moved

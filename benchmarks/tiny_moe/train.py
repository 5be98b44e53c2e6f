"""Train ``builtin:tiny-moe`` on the running Python's standard library.

    python benchmarks/tiny_moe/train.py --work /tmp/tiny-moe --tokens 15e6
    python benchmarks/tiny_moe/train.py --work /tmp/tiny-moe --tokens 15e6   # resumes after a stop

Two hours on two cores. A checkpoint is written every few minutes and the same command
continues from it. The learning rate is constant and falls linearly to zero over the last part of
the run, so ``--tokens`` may be changed between two starts. The result is ``WORK/model``.

Optimizer: Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) for matrices,
each expert on its own, AdamW for embeddings, router and norms. Weights and optimizer are fp32;
products run in bf16 (``--fp32`` for processors without AVX512-BF16 or AMX, where that is faster).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import modules
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

END = "<|endoftext|>"
# Words with their leading space or mark, numbers of three digits, operators, line ends, indents.
PIECES = Regex(
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LENGTH = 512


def make_config() -> OlmoeConfig:
    """Return a small OLMoE: 6 blocks of 16 experts, 4 chosen, gate weights not renormalized."""
    return OlmoeConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with 4,096 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return all texts as one row of ids, each text preceded by the end-of-text token."""
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return np.concatenate([np.array([0, *row.ids], dtype=np.uint16) for row in rows])


def batches(ids: np.ndarray, rows: int, step: int, seed: int) -> torch.Tensor:
    """Return batch number ``step``: rows of LENGTH + 1 tokens, each window seen once per epoch."""
    windows = (len(ids) - LENGTH - 1) // LENGTH
    picked = []
    for n in range(step * rows, (step + 1) * rows):
        epoch, position = divmod(n, windows)
        rng = np.random.default_rng((seed, epoch))
        shift = int(rng.integers(LENGTH)) if epoch else 0
        start = int(rng.permutation(windows)[position]) * LENGTH + shift
        start = min(start, len(ids) - LENGTH - 1)
        picked.append(ids[start : start + LENGTH + 1].astype(np.int64))
    return torch.from_numpy(np.stack(picked))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """Orthogonalize matrices ``g`` [..., out, in] approximately, by five Newton-Schulz steps."""
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum; a stack of matrices [..., out, in] is handled one by one.

    ``torch.optim.Muon`` takes only 2-D parameters, and transformers holds experts stacked.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                if p.ndim == 3 and p.shape[1] == p.shape[2]:  # gate and up, stacked: [E, 2I, H]
                    update = torch.cat([orthogonalize(u) for u in update.chunk(2, dim=1)], dim=1)
                else:
                    update = orthogonalize(update)
                rows, columns = update.shape[-2:]
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def make_optimizers(model: OlmoeForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of attention and experts, AdamW for everything else."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inner = p.ndim >= 2 and "embed" not in name and "mlp.gate." not in name
        (matrices if inner else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=lr * 0.2, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=lr, decay=0.1 * lr / 0.02), adam]


def schedule(tokens: float, total: float, falling: float) -> float:
    """Return the factor of the learning rate: warm-up over 0.3M tokens, constant, linear to 0."""
    return min(1.0, tokens / 3e5, max(0.0, (total - tokens) / (falling * total)))


def loss_of(model: OlmoeForCausalLM, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute language-model and load-balancing loss of rows [batch, LENGTH + 1]."""
    out = model(input_ids=rows[:, :-1], output_router_logits=True, use_cache=False)
    loss = cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
    config = model.config
    # transformers' function pools the layers it is given; one call for each keeps each balanced.
    balance = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in out.router_logits
    ]
    return loss, torch.stack(balance).mean()


def save(work: Path, run: Run) -> None:
    """Write the checkpoint of a run and rename it into place."""
    state = {
        "model": run.model.state_dict(),
        "optimizers": [o.state_dict() for o in run.optimizers],
        "step": run.step,
        "seconds": run.seconds,
    }
    torch.save(state, work / "checkpoint.partial")
    (work / "checkpoint.partial").rename(work / "checkpoint.pt")


@dataclass
class Run:
    """The state of a training run."""

    model: OlmoeForCausalLM
    optimizers: list[torch.optim.Optimizer]
    rates: list[list[float]]
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(cls, work: Path, lr: float) -> Run:
        """Return a new run, or the one whose checkpoint is in ``work``."""
        model = OlmoeForCausalLM(make_config())
        optimizers = make_optimizers(model, lr)
        run = cls(model, optimizers, [[g["lr"] for g in o.param_groups] for o in optimizers])
        if (work / "checkpoint.pt").exists():
            state = torch.load(work / "checkpoint.pt", weights_only=True)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            run.step, run.seconds = state["step"], state["seconds"]
            print(f"resumed at step {run.step}", flush=True)
        return run

    def update(self, rows: torch.Tensor, factor: float, bf16: bool) -> tuple[float, float]:
        """Take one optimizer step; return language-model and balance loss of the last half."""
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        # Half a step's rows at a time: the logits of 4,096 entries are the largest tensor.
        for half in rows.chunk(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, balance = loss_of(self.model, half)
            ((loss + self.model.config.router_aux_loss_coef * balance) / 2).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), balance.item()

    @torch.no_grad()
    def perplexity(self, rows: torch.Tensor) -> float:
        """Return the perplexity of held-out rows."""
        self.model.eval()
        losses = [loss_of(self.model, part)[0].item() for part in rows.chunk(4)]
        self.model.train()
        return math.exp(sum(losses) / len(losses))


def load_data(work: Path, seed: int) -> tuple[Any, np.ndarray, torch.Tensor]:
    """Return tokenizer, training ids, and 32 held-out rows."""
    corpus = modules()
    texts = [m.text for m in corpus if m.split == "train"]
    if (work / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    else:
        tokenizer = make_tokenizer(texts)
        tokenizer.save_pretrained(work / "tokenizer")
    random.Random(seed).shuffle(texts)
    train = token_ids(tokenizer, texts)
    held = token_ids(tokenizer, [m.text for m in corpus if m.split == "evaluation"])
    width = LENGTH + 1
    rows = torch.from_numpy(held[: len(held) // width * width].astype(np.int64)).view(-1, width)
    print(f"{len(train):,} training tokens, {len(held):,} held out", flush=True)
    return tokenizer, train, rows[:: max(1, len(rows) // 32)][:32]


def train(run: Run, ids: np.ndarray, held: torch.Tensor, args: argparse.Namespace) -> None:
    """Train until ``args.tokens``; a checkpoint every four minutes."""
    per_step, smooth = args.rows * LENGTH, 0.0
    last = saved_at = time.perf_counter()
    while run.step * per_step < args.tokens:
        factor = schedule((run.step + 1) * per_step, args.tokens, args.falling)
        rows = batches(ids, args.rows, run.step, args.seed)
        loss, balance = run.update(rows, factor, not args.fp32)
        now = time.perf_counter()
        run.seconds, last = run.seconds + now - last, now
        smooth = 0.95 * smooth + 0.05 * loss if smooth else loss
        if run.step % 20 == 0:
            tokens = run.step * per_step
            print(
                f"step {run.step} tokens {tokens / 1e6:.2f}M loss {smooth:.4f} "
                f"balance {balance:.3f} rate {factor:.3f} {tokens / run.seconds:.0f} tok/s",
                flush=True,
            )
        if run.step % 200 == 0:
            print(f"  held-out perplexity {run.perplexity(held):.2f}", flush=True)
        if now - saved_at > 240:
            save(args.work, run)
            saved_at = now
    save(args.work, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=15e6)
    parser.add_argument("--rows", type=int, default=16, help="sequences of 512 tokens in a step")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--falling", type=float, default=0.4, help="part with falling rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="products in fp32, not in bf16")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer, ids, held = load_data(args.work, args.seed)
    run = Run.begin(args.work, args.lr)
    train(run, ids, held, args)
    run.model.eval().to(torch.bfloat16).save_pretrained(args.work / "model")
    tokenizer.save_pretrained(args.work / "model")
    record = {
        "tokens": run.step * args.rows * LENGTH,
        "training_tokens_distinct": len(ids),
        "steps": run.step,
        "rows": args.rows,
        "length": LENGTH,
        "lr": args.lr,
        "falling": args.falling,
        "products": "fp32" if args.fp32 else "bf16",
        "seed": args.seed,
        "hours": round(run.seconds / 3600, 2),
        "torch": torch.__version__,
    }
    (args.work / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

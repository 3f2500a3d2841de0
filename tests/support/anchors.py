"""What KLAnchorMixin's tests share: penalties, runs, and the same KL from logits."""

import torch
from trl import SFTTrainer

from klft import FixedKL, FrozenReference, KLPenalty, forward_kl, jsd, reverse_kl
from support import tiny
from support.penalties import other_penalty
from support.trainers import grpo, policy, texts

DENSE = {"forward": forward_kl, "reverse": reverse_kl, "jsd": lambda logits, ref: jsd(logits, ref, weight=0.3)}
COEF = 0.5


def exact(direction="forward", coef=COEF, reference=None):
    return KLPenalty(
        reference or FrozenReference(policy(seed=5)),
        direction=direction,
        estimator="exact",
        placement="loss",
        controller=FixedKL(coef),
    )


def another(name="jsd", coef=COEF, reference=None, placement="loss"):
    return other_penalty(name, placement, reference or FrozenReference(policy(seed=5)), coef)


class DenseOracle(SFTTrainer):
    """The KL from logits, of each text alone: a forward of its own for policy and reference, no padding, no packing."""

    def __init__(self, *args, reference, direction, coef=COEF, **kwargs):
        super().__init__(*args, **kwargs)
        self.other, self.direction, self.coef = reference, direction, coef

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, ids = inputs["labels"], inputs["input_ids"]
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total = 0.0
        for row_ids, row_labels, starts in self.texts(ids, labels, inputs):
            ends = [*starts[1:], len(row_ids)]
            for start, end in zip(starts, ends, strict=True):
                text, counted = row_ids[None, start:end], row_labels[start + 1 : end] != -100
                logits = model(input_ids=text).logits[0, :-1][counted]
                with torch.no_grad():
                    ref_logits = self.other(text)[0, :-1][counted]
                total = total + DENSE[self.direction](logits, ref_logits).sum()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss + self.coef * total / num_items_in_batch * processes

    def texts(self, ids, labels, inputs):
        for i in range(len(ids)):
            if "attention_mask" in inputs:
                real = inputs["attention_mask"][i] != 0
                yield ids[i][real], labels[i][real], [0]
            else:
                yield ids[i], labels[i], (inputs["position_ids"][i] == 0).nonzero().flatten().tolist()


def sft(make, args, model=None, **more):
    trainer = make(
        model or policy(), args=args, train_dataset=texts(), processing_class=tiny.tokenizer(), **more
    )  # fmt: skip
    trainer.train()
    return trainer


def k3_in_the_loss(coef: float = COEF, reference=None):
    reference = reference or FrozenReference(policy(seed=5))
    return KLPenalty(reference, estimator="k3", placement="loss", controller=FixedKL(coef))


def trained_grpo(make, args, name="", **more):
    model = policy()
    model.config._name_or_path = name
    trainer = grpo(make, model, args, **more)
    trainer.train()
    return trainer
